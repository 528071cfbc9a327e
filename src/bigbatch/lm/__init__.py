"""Language-model trainer: data, tokenizer, model, loss and training loop on top of exact gradient accumulation."""
