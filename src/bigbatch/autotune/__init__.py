"""Choose the fastest micro-batch size that fits in memory: predict, probe, time, search."""
