"""Secrets as they lie in the database: sealed with AES-256-GCM under a data key of their own, which the key provider's key wraps.

Each sealed secret is bound to the row and field it belongs to: what was moved to another row does not open there. Sealing the
same secret twice gives different bytes.
"""

import hmac
import os
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from managed_agents.encryption.keyring import KEY_BYTES, KeyProvider

NONCE_BYTES = 12
TAG_BYTES = 16
VERSION = b"\x01"
_WRAPPED_BYTES = KEY_BYTES + TAG_BYTES


class SealBroken(Exception):
    """What is stored does not open: another master key, another row, or damage. The message holds no secret."""


class Sealing(Protocol):
    """Seals and opens; here with a local key, elsewhere a key service may wrap the data keys."""

    def seal(self, secret: SecretStr, identity: str) -> bytes:
        """Return what may be stored in the row and field that `identity` names."""
        ...

    def open(self, sealed: bytes, identity: str) -> SecretStr:
        """Raises: SealBroken."""
        ...

    def fingerprint(self, secret: SecretStr, scope: str) -> str:
        """Return what is the same for the same secret in the same scope, and tells nothing else of it."""
        ...


class Sealer:
    """`Sealing` under a key that is derived for a purpose."""

    def __init__(self, keys: KeyProvider, purpose: str) -> None:
        self._wrapping = AESGCM(keys.derive(purpose))
        self._comparing = keys.derive(f"{purpose}/fingerprints")

    def seal(self, secret: SecretStr, identity: str) -> bytes:
        """As `Sealing.seal`."""
        bound = identity.encode()
        data_key = os.urandom(KEY_BYTES)
        outer, inner = os.urandom(NONCE_BYTES), os.urandom(NONCE_BYTES)
        wrapped = self._wrapping.encrypt(outer, data_key, VERSION + bound)
        return VERSION + outer + wrapped + inner + AESGCM(data_key).encrypt(inner, secret.get_secret_value().encode(), bound)

    def open(self, sealed: bytes, identity: str) -> SecretStr:
        """As `Sealing.open`."""
        bound = identity.encode()
        outer_end = len(VERSION) + NONCE_BYTES
        wrapped_end = outer_end + _WRAPPED_BYTES
        inner_end = wrapped_end + NONCE_BYTES
        if sealed[: len(VERSION)] != VERSION or len(sealed) < inner_end + TAG_BYTES:
            raise SealBroken(f"{identity}: not sealed by this release")
        try:
            data_key = self._wrapping.decrypt(sealed[len(VERSION) : outer_end], sealed[outer_end:wrapped_end], VERSION + bound)
            secret = AESGCM(data_key).decrypt(sealed[wrapped_end:inner_end], sealed[inner_end:], bound)
            return SecretStr(secret.decode())
        except (InvalidTag, ValueError) as error:
            raise SealBroken(f"{identity}: does not open with this master key") from error

    def fingerprint(self, secret: SecretStr, scope: str) -> str:
        """As `Sealing.fingerprint`: an HMAC, so that nobody without the master key can try guesses."""
        message = len(scope.encode()).to_bytes(4, "big") + scope.encode() + secret.get_secret_value().encode()
        return hmac.digest(self._comparing, message, "sha256").hex()

    def __repr__(self) -> str:
        return "Sealer(…)"
