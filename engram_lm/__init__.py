"""Conditional memory for language models: define, train, study, store and serve Engram tables."""
