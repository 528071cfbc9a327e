"""Exact accumulation inside other training frameworks; each module imports its framework."""
