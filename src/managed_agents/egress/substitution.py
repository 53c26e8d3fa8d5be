"""Credentials written into requests on their way out, so that sandboxes never hold them.

How to register one: implement `Source` (what is bound in a session, and the secret of one binding) and give it a name in
`processes/egress.py` (`sources`). For every host that a binding of the session covers, the gateway then ends TLS itself and
asks the source once a request:

- `bindings(session_id)` is asked with the policy and kept up to five seconds: hosts and paths, no secrets.
- `substitution(session_id, binding)` is asked for each covered request and forgotten with it, so a rotated secret counts at
  once. It answers with headers to set (`set_headers`, which replace what the client sent: git tokens), a placeholder to
  replace by its value in header values, in the body or in both, or None when there is no secret any more: then the request
  goes on as it came. A failing source is a 503 for the request, never a request without its secret.

A binding lends its secret to HTTPS requests only, on its one port, to hosts that its own list and the environment's networking
both allow. `opens` is for what networking does not bound (repositories): the host can then be reached, with TLS and on the
binding's paths only. Placeholders elsewhere travel as they are.

Invariants: secrets are never logged, never in an error message, never in an answer of ours (what the server answers is its
own); a path that two parsers could read in two ways is covered by no binding that names paths.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from pydantic import SecretStr

from managed_agents.egress.policy import Binding, PolicyUnknown

SOURCE_SECONDS_MAX = 5.0
_BASIC = re.compile(rb"basic ", re.IGNORECASE)
_NO_VALUE = re.compile(r"[^\x20-\x7e\t]")


class SecretUnknown(Exception):
    """The secret cannot be read now, or cannot be part of a request. The message is for the sandbox and holds no secret."""


@dataclass(frozen=True, slots=True)
class Substitution:
    """What one request gets."""

    set_headers: Mapping[str, SecretStr] = field(default_factory=dict[str, SecretStr])
    """Headers by lower-case name; what the client sent under the name is dropped."""
    placeholder: str = ""
    """Replaced by `value` wherever it stands. Empty: nothing is."""
    value: SecretStr | None = None
    in_headers: bool = True
    in_body: bool = False


class Source(Protocol):
    """Where bindings and their secrets come from."""

    async def bindings(self, session_id: str) -> Sequence[Binding]:
        """Everything that is bound in a session. `Binding.source` is the name the source is registered under.

        Raises: PolicyUnknown.
        """
        ...

    async def substitution(self, session_id: str, binding: Binding) -> Substitution | None:
        """The secret of a binding, read now. None: there is none any more.

        Raises: SecretUnknown.
        """
        ...


class Sources:
    """Sources by their names."""

    def __init__(self, named: Mapping[str, Source]) -> None:
        self._named = named

    async def bindings(self, session_id: str) -> tuple[Binding, ...]:
        """What all sources bind in a session. Raises: PolicyUnknown."""
        found: list[Binding] = []
        try:
            with anyio.fail_after(SOURCE_SECONDS_MAX):
                for source in self._named.values():
                    found += await source.bindings(session_id)
        except TimeoutError as error:
            raise PolicyUnknown("bindings took too long") from error
        return tuple(found)

    async def substitutions(self, session_id: str, bindings: Iterable[Binding]) -> list[Substitution]:
        """Read the secrets for one request. Raises: SecretUnknown."""
        found: list[Substitution] = []
        try:
            with anyio.fail_after(SOURCE_SECONDS_MAX):
                for binding in bindings:
                    substitution = await self._named[binding.source].substitution(session_id, binding)
                    if substitution is not None:
                        found.append(substitution)
        except TimeoutError as error:
            raise SecretUnknown("The credential for this host cannot be read. Please retry.") from error
        return found


def written(substitutions: Iterable[Substitution], headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers with secrets in them. Of two that set one header, the later one counts.

    Raises: SecretUnknown.
    """
    result = list(headers)
    for one in substitutions:
        set_here = {name.lower().encode(): _header_value(secret) for name, secret in one.set_headers.items()}
        result = [(name, value) for name, value in result if name not in set_here] + list(set_here.items())
        if one.placeholder and one.value is not None and one.in_headers:
            old = one.placeholder.encode()
            result = [(name, _replaced(value, old, one.value)) for name, value in result]
    return result


def in_body(substitutions: Iterable[Substitution]) -> dict[bytes, bytes]:
    """What is to be replaced in the body."""
    return {
        one.placeholder.encode(): one.value.get_secret_value().encode()
        for one in substitutions
        if one.placeholder and one.value is not None and one.in_body
    }


def _header_value(secret: SecretStr) -> bytes:
    value = secret.get_secret_value().strip()
    if _NO_VALUE.search(value):
        # A line end would begin another header.
        raise SecretUnknown("The credential for this host has characters that a header cannot hold.")
    return value.encode()


def _replaced(value: bytes, old: bytes, secret: SecretStr) -> bytes:
    if old in value:
        return value.replace(old, _header_value(secret)).strip()
    basic = _BASIC.match(value)
    if basic is None:
        return value
    # Clients that are given user and password encode them; the placeholder is inside.
    try:
        inner = base64.b64decode(value[basic.end() :].strip(), validate=True)
    except binascii.Error:
        return value
    if old not in inner:
        return value
    return value[: basic.end()] + base64.b64encode(inner.replace(old, secret.get_secret_value().encode()))


class Replacing:
    """Replaces texts in a stream, holding back no more than the beginning of one."""

    def __init__(self, values: Mapping[bytes, bytes]) -> None:
        self._values = dict(values)
        longest_first = sorted(self._values, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(re.escape(old) for old in longest_first))
        self._longest = len(longest_first[0])
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return what is certain."""
        text = self._held + data
        result: list[bytes] = []
        at = 0
        for found in self._pattern.finditer(text):
            result += (text[at : found.start()], self._values[found[0]])
            at = found.end()
        rest = text[at:]
        held = next((size for size in range(min(len(rest), self._longest - 1), 0, -1) if self._begins(rest[-size:])), 0)
        self._held = rest[len(rest) - held :]
        return b"".join([*result, rest[: len(rest) - held]])

    def end(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, b""
        return held

    def _begins(self, tail: bytes) -> bool:
        return any(old.startswith(tail) for old in self._values)
