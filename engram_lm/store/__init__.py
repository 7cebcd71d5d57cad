"""Rows that are not parameters: where they live, and the files they come from."""
