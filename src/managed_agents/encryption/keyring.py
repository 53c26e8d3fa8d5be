"""The local key provider: one master key in a file, purpose-bound keys derived from it.

Losing the file makes every stored API key useless (their HMACs cannot be computed again), so it is created
once, never overwritten, and belongs in the backup. Race: two processes starting on an empty data directory;
`os.link` lets exactly one file win and both read that one.
"""

import os
import secrets
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


class MasterKeyUnreadable(Exception):
    """The master key file exists but is not one of ours, or may not be read."""


class KeyProvider(Protocol):
    """Where keys come from: a local file here, a key service elsewhere."""

    def derive(self, purpose: str) -> bytes:
        """Return the 32-byte key for `purpose`, the same one for as long as the installation lives."""
        ...


class LocalKeyProvider:
    """Keys derived by HKDF-SHA256 from the 32 random bytes in a file of mode 0600."""

    def __init__(self, path: Path) -> None:
        self._master = _read_or_create(path)

    def derive(self, purpose: str) -> bytes:
        hkdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=f"managed-agents/{purpose}".encode())
        return hkdf.derive(self._master)

    def __repr__(self) -> str:
        return "LocalKeyProvider(…)"


def _read_or_create(path: Path) -> bytes:
    if not path.exists():
        _create(path)
    try:
        master = bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError) as error:
        raise MasterKeyUnreadable(f"{path}: cannot read the master key") from error
    if len(master) != KEY_BYTES:
        raise MasterKeyUnreadable(f"{path}: expected {KEY_BYTES} bytes in hexadecimal")
    return master


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_bytes(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return  # another process was first; its key is the one
    finally:
        draft.unlink()
