"""Memory, micro-batches and time of a run before it starts."""
