"""Where the web tools may go: a domain rule covers a host and its subdomains, and below a path prefix where it has one. Beside
the agent's rules there may be `allowed_hosts` of a limited environment, which are read as the gateway reads them. Pure.
"""

from collections.abc import Sequence
from typing import Any

import httpx

from managed_agents.egress.policy import matches


def hostname(url: str) -> str | None:
    """The host of `url` as rules are compared with it: lower case, ASCII, without a final dot. None when it has none.

    Read by the library that makes the request: two readers of one URL could be told two hosts.
    """
    try:
        return httpx.URL(url).raw_host.decode("ascii").lower().rstrip(".") or None
    except (httpx.InvalidURL, UnicodeError):
        return None


def _covers(rule: str, host: str, path: str) -> bool:
    name, _, prefix = rule.lower().removesuffix("/").partition("/")
    if host != name and not host.endswith("." + name):
        return False
    below = "/" + prefix
    return not prefix or path.lower() == below or path.lower().startswith(below + "/")


def permitted(url: str, config: dict[str, Any]) -> bool:
    """Whether the lists of a web tool's configuration, and the hosts of its session's environment, let `url` through."""
    host = hostname(url)
    if host is None:
        return False
    hosts: Sequence[str] | None = config.get("allowed_hosts")
    if hosts is not None and not any(matches(pattern, host) for pattern in hosts):
        return False
    path = httpx.URL(url).path
    rules: Sequence[str] | None = config.get("allowed_domains")
    if rules is not None and not any(_covers(rule, host, path) for rule in rules):
        return False
    return not any(_covers(rule, host, path) for rule in config.get("blocked_domains") or ())
