"""The way out of sandboxes: one gateway a host, a socket for each sandbox, and what it lets through."""
