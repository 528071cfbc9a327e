"""The language-model product: data, tokenizer, model, loss and trainer, on top of the exact step."""
