"""The steps from interactions to a published Bundle."""
