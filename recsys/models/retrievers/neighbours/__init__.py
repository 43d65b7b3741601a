"""By likeness of items, of users or of words."""
