"""Objectives that compare sequences: preferences of answers, scores, and embeddings."""
