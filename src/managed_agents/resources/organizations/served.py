"""What of a workspace is not served, and refused by name."""

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.organizations.schemas import CreateWorkspace, UpdateWorkspace

# spec: DataResidency. A server of one's own keeps its data where it runs: there is nothing to choose.
DATA_RESIDENCY = {"allowed_inference_geos": "unrestricted", "default_inference_geo": "global", "workspace_geo": "us"}


def check(command: CreateWorkspace | UpdateWorkspace) -> None:
    """Refuse what would have no effect. Raises `InvalidRequest`."""
    for name, value in (command.data_residency or {}).items():
        if name not in DATA_RESIDENCY:
            raise InvalidRequest(f"data_residency.{name[:100]}: Extra inputs are not permitted")
        if value not in (None, DATA_RESIDENCY[name]):
            raise InvalidRequest(f"data_residency.{name}: only {DATA_RESIDENCY[name]!r} is served by this server")
    for name in ("external_key_id", "user_profile_id"):
        if getattr(command, name) is not None:
            raise InvalidRequest(f"{name}: is not served by this server")
