"""Key providers and what is derived from the master key."""
