"""Gradient sums and the only divisor."""
