"""Gradient accumulation that gives exactly the full-batch update."""

__version__ = "0.1.0"
