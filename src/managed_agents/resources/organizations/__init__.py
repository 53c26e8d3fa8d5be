"""Organisations and their workspaces."""
