"""Verify on a user's model, loss and batch that micro-batches yield the full-batch gradient."""
