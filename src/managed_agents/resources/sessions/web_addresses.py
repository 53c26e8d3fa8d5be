"""Which texts are addresses of images and documents on the web. Pure.

Whoever serves the model fetches them; what it cannot read, it refuses, and with it every later request of the session. A name and
password in an address would be shown to everybody who reads the session.
"""

import re
from ipaddress import IPv6Address
from urllib.parse import urlsplit

SCHEMES = ("https://", "http://")
_NAME_CHARS_MAX = 253
# Letters of any script: names are in the client's spelling here, not in that of DNS.
_LABEL = re.compile(r"[\w-]{1,63}")
_AFTER_BRACKETS = re.compile(r"(:[0-9]*)?")


def wrong_with(address: str) -> str | None:
    """Return what is wrong with an address, none if it can be one."""
    if not address.startswith(SCHEMES):
        return "Input should be an http or https URL"
    if not address.isprintable() or " " in address:
        return "Input should be a URL without spaces and control characters"
    try:
        parts = urlsplit(address)
        if "@" in parts.netloc:
            return "Input should be a URL without a user name and password"
        if parts.port != 0 and _is_host(parts.hostname or "", parts.netloc):
            return None
    except ValueError:
        pass  # of a port or brackets, told below
    return "Input should be a URL with a valid host and port"


def _is_host(host: str, netloc: str) -> bool:
    if netloc.startswith("["):
        return bool(IPv6Address(host)) and _AFTER_BRACKETS.fullmatch(netloc.partition("]")[2]) is not None
    labels = host.removesuffix(".").split(".")
    return len(host) <= _NAME_CHARS_MAX and all(_LABEL.fullmatch(label) is not None for label in labels)
