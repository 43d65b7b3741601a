"""The HTTP side: routes, wire formats, limits."""
