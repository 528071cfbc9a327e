"""Several ranks: real gloo processes, in float64, beside one process with the whole batch."""
