"""Memory limits, memory usage and allocation tracking. Re-exports nothing: import the modules."""
