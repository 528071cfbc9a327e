"""Load a causal language model and configure its attention, loss, layout and compilation."""
