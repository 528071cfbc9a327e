"""Choose the micro-batch that is fastest in the memory available: predict, probe, time, search."""
