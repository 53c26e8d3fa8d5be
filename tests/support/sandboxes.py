"""Sandboxes of tests."""

from managed_agents.sandbox.backend import SandboxKey


async def nothing_known() -> set[SandboxKey]:
    """For `collect_orphans` at the end of a test: everything goes."""
    return set()
