"""By networks that make user vectors and item vectors for each other."""
