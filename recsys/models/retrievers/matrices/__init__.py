"""By factors or weights fitted to the matrix of interactions."""
