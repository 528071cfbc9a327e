"""Trials: runs of the model that leave no trace."""
