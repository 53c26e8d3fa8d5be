"""Which Messages API the harness talks to: pure, decided from our own settings and `ANTHROPIC_API_KEY`
alone.

`ANTHROPIC_BASE_URL`, `ANTHROPIC_AUTH_TOKEN` and profiles are ignored on purpose: a user whose shell points
at this very server would make it call itself.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx2
from anthropic.lib.credentials._constants import DEFAULT_BASE_URL
from pydantic import SecretStr

from managed_agents.core.settings import Settings

PLACEHOLDER_KEY = "no-key"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where model requests go and with which key."""

    base_url: str
    api_key: SecretStr
    is_real_api: bool
    is_loopback: bool


def resolve_endpoint(settings: Settings, environ: Mapping[str, str]) -> Endpoint | None:
    """Return the effective endpoint, or None when neither MODEL_BASE_URL nor ANTHROPIC_API_KEY is set.

    Raises: ValueError when MODEL_BASE_URL is not an http(s) URL that a request can go to, or the key is none that it can carry.
    """
    key = environ.get("ANTHROPIC_API_KEY", "").strip()
    if settings.model_base_url:
        base_url = settings.model_base_url.strip().rstrip("/")
        parts = _split(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("MODEL_BASE_URL is not an http or https URL")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("MODEL_BASE_URL carries a user, a query or a fragment; give the key as MODEL_API_KEY")
        own = settings.model_api_key.get_secret_value().strip() if settings.model_api_key is not None else ""
        return Endpoint(
            base_url=base_url,
            api_key=_key(own or key or PLACEHOLDER_KEY),
            is_real_api=parts.hostname == urlsplit(DEFAULT_BASE_URL).hostname,
            is_loopback=is_loopback_host(parts.hostname),
        )
    if key:
        return Endpoint(base_url=DEFAULT_BASE_URL, api_key=_key(key), is_real_api=True, is_loopback=False)
    return None


def _split(base_url: str) -> SplitResult:
    """The URL's parts. Raises: ValueError when no request can go there, which would cost every one of them its retries."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:  # a port beyond 65535 or of no digits, a broken IPv6 address
        raise ValueError("MODEL_BASE_URL has an impossible port or address") from None
    if port == 0:
        raise ValueError("MODEL_BASE_URL has port 0, to which nothing can connect")
    try:
        httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"MODEL_BASE_URL is not a URL: {error}") from None
    return parts


def _key(key: str) -> SecretStr:
    """Raises: ValueError when it has what no header can carry, or nobody sees. The text does not show it."""
    if not key.isprintable():  # also false for what is not UTF-8, and for what has no width
        raise ValueError(
            "MODEL_API_KEY or ANTHROPIC_API_KEY has a line break, control or invisible character inside: paste the key again"
        )
    return SecretStr(key)


def is_loopback_host(host: str) -> bool:
    """Say whether `host` is this machine by its very name; nothing is resolved."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
