"""Who may come in: API keys and rates."""
