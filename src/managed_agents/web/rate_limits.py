"""Which requests are counted. Pure; a test walks all routes, so a new one has to be sorted in.

spec: create endpoints 300 a minute, read endpoints (retrieve, list, opening a stream) 1,200 a minute, per organisation. Updates,
archives, deletions and sent events are not counted.
"""

from managed_agents.web.actor import RateKind

# Last parts of paths on which POST makes a new object.
COLLECTIONS = frozenset(
    {
        "agents",
        "api_keys",
        "certificates",
        "credentials",
        "deployments",
        "dreams",
        "environments",
        "files",
        "keys",
        "memories",
        "memory_stores",
        "resources",
        "sessions",
        "skills",
        "tunnels",
        "user_profiles",
        "vaults",
        "versions",
        "webhooks",
        "workspaces",
    }
)


def kind_of(method: str, route_path: str) -> RateKind | None:
    """Return what a request counts as, None when it does not count."""
    if method in ("GET", "HEAD"):
        return RateKind.READ
    if method == "POST" and route_path.rpartition("/")[2] in COLLECTIONS:
        return RateKind.CREATE
    return None
