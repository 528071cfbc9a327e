"""Load a causal language model and set up how it runs."""
