"""What of an environment this server does not serve yet; the only place for such refusals."""

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.environments.schemas import Config, SelfHostedConfig


def refuse_unserved(config: Config | None) -> None:
    """Raise `InvalidRequest` for the first thing that is not served."""
    if config is None:
        return
    if isinstance(config, SelfHostedConfig):
        raise InvalidRequest('config.type: "self_hosted" is not served yet by this server')
