"""Domains of an agent's web tools against the environment of its session. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from managed_agents.core.errors import InvalidRequest
from managed_agents.egress.policy import matches


def check(tools: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> None:
    """Refuse what `allowed_hosts` of a limited environment would keep from ever being reached.

    A domain stands for its subdomains too, so one that contains an allowed host is of use.

    Raises InvalidRequest naming the entry.
    """
    networking: Mapping[str, Any] = environment["networking"]
    if networking["type"] != "limited":
        return
    hosts: Sequence[str] = networking.get("allowed_hosts", ())
    for place, tool in enumerate(tools):
        for index, config in enumerate(tool.get("configs", ())):
            for number, domain in enumerate(config.get("allowed_domains") or ()):
                name = domain.lower().partition("/")[0]
                if not any(matches(host, name) or _is_below(host, name) for host in hosts):
                    raise InvalidRequest(
                        f"agent.tools.{place}.configs.{index}.allowed_domains.{number}: {domain} is outside allowed_hosts of the "
                        "session's environment"
                    )


def _is_below(host: str, domain: str) -> bool:
    """Whether an entry of `allowed_hosts` names something that `domain` covers."""
    name = host.lower().removeprefix("*.")
    return name == domain or name.endswith("." + domain)
