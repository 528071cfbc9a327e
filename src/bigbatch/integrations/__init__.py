"""Exact gradient accumulation inside other trainers: one package or module for each framework."""
