"""Memory: parse a limit, measure usage, track allocations. Imports nothing: use its modules."""
