"""Builders that several test packages share: models, data, checkpoints, run directories and ranks."""
