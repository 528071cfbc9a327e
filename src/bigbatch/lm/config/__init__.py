"""Configuration of a training run: fields, types, validation and defaults."""
