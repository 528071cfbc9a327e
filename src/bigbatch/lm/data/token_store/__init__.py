"""Tokens on disk: written once by all cores, then memory-mapped by every start, resume and rank."""
