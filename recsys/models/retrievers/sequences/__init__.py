"""By networks that read a history in order."""
