"""Plan which samples run together, and split a batch into micro-batches."""
