"""Rankers: who score the candidates of one user."""
