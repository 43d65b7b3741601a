"""Training: the loop, losses, negative sampling, checkpoints, and the runtime that places them."""
