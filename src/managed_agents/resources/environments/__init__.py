"""Environments: the configuration sandboxes are made from."""
