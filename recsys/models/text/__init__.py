"""Text encoders: how they are trained, fast forms of them, and what is saved."""
