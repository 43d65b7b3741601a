"""Learning from what happened since a Bundle was published."""
