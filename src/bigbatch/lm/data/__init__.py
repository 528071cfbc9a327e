"""Data pipeline: read documents, tokenize them, split off validation data and order the samples."""
