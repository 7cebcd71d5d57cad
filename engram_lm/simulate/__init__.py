"""Serving with tables in tiers, step by step, on machines that need not be there."""
