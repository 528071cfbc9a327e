"""How one micro-batch is run: directly, retried after out-of-memory, or replayed as a CUDA graph."""
