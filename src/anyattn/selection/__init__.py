"""Which backend a call gets: preferences, the registry, and the choice."""
