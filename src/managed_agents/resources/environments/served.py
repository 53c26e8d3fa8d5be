"""What of an environment this server does not serve yet; the only place for such refusals."""

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.environments.schemas import Config, Limited, SelfHostedConfig


def refuse_unserved(config: Config | None) -> None:
    """Raise `InvalidRequest` for the first thing that is not served."""
    if config is None:
        return
    if isinstance(config, SelfHostedConfig):
        raise InvalidRequest('config.type: "self_hosted" is not served yet by this server')
    if isinstance(config.networking, Limited):
        # Without exceptions it is what every sandbox has: no network at all (adr/0006).
        for exception in ("allow_mcp_servers", "allow_package_managers", "allowed_hosts"):
            if getattr(config.networking, exception):
                raise InvalidRequest(f"config.networking.{exception}: exceptions are not served yet by this server")
