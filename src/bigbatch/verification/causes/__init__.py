"""Hypotheses on why a cut does not yield the full-batch gradient, each tested on the user's model, loss and batch."""
