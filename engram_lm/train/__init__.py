"""Training on a laptop: the corpus that ships with the package, and what learns from it."""
