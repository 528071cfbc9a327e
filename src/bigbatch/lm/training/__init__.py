"""The trainer: setup, schedule, callbacks, checkpoints, resume."""
