"""Retrievers: who find candidates among all items, by family."""
