"""Batch norm over the whole batch: the micro-batches of a window meet at each norm and exchange their statistics."""
