"""Plan which samples run together, split a batch into micro-batches, and prefetch them."""
