"""Training state that lives in host memory between updates."""
