"""The `managed-agents` command."""
