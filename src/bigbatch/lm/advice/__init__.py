"""Whether the global batch of a run is the right one."""
