"""Ranks of a training run."""
