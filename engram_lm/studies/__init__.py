"""One file for each published result: what is compared, on what budget, with which seeds."""
