"""The engine: a whole batch in, one update out."""
