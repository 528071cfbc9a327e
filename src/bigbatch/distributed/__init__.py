"""Gradient synchronization over ranks, and the collectives that it needs."""
