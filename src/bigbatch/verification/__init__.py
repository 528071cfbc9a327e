"""Verify on a user's model that micro-batches give the full-batch gradient."""
