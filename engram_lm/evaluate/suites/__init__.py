"""Tests that a small model can take in seconds: a generator, a scorer, and what they can show."""
