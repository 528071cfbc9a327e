"""Several ranks as real gloo processes in float64, compared with one process and the whole batch."""
