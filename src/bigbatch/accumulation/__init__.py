"""The accumulation window: sums and counts of micro-batches, and the one update that they become."""
