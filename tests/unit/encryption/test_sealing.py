"""Sealed secrets open with the same key, in the same place, unchanged; and nowhere else."""

import hashlib

import pytest
from pydantic import SecretStr

from managed_agents.encryption.sealing import SealBroken, Sealer


class Keys:
    def __init__(self, name: str) -> None:
        self._name = name

    def derive(self, purpose: str) -> bytes:
        return hashlib.sha256(f"{self._name}/{purpose}".encode()).digest()


SEALER = Sealer(Keys("ours"), "tests")
SECRET = SecretStr("geheim ✓")


def test_a_sealed_secret_opens_where_it_belongs() -> None:
    sealed = SEALER.seal(SECRET, "rows/1/token")
    assert SEALER.open(sealed, "rows/1/token") == SECRET
    assert Sealer(Keys("ours"), "tests").open(sealed, "rows/1/token") == SECRET
    assert b"geheim" not in sealed
    assert SEALER.seal(SECRET, "rows/1/token") != sealed
    assert "geheim" not in f"{SEALER!r} {SECRET!r}"


@pytest.mark.parametrize("sealer", [Sealer(Keys("theirs"), "tests"), Sealer(Keys("ours"), "other")])
def test_it_opens_with_no_other_key(sealer: Sealer) -> None:
    with pytest.raises(SealBroken):
        sealer.open(SEALER.seal(SECRET, "rows/1/token"), "rows/1/token")


def test_it_opens_nowhere_else_and_not_when_changed() -> None:
    sealed = SEALER.seal(SECRET, "rows/1/token")
    with pytest.raises(SealBroken):
        SEALER.open(sealed, "rows/2/token")
    for index in range(len(sealed)):
        with pytest.raises(SealBroken):
            SEALER.open(sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :], "rows/1/token")
        with pytest.raises(SealBroken):
            SEALER.open(sealed[:index], "rows/1/token")


def test_a_fingerprint_tells_secrets_apart_and_nothing_else() -> None:
    mark = SEALER.fingerprint(SECRET, "workspace/url")
    assert Sealer(Keys("ours"), "tests").fingerprint(SECRET, "workspace/url") == mark
    others = [
        SEALER.fingerprint(SecretStr("geheim"), "workspace/url"),
        SEALER.fingerprint(SECRET, "workspace/other"),
        SEALER.fingerprint(SecretStr("lgeheim ✓"), "workspace/ur"),
        Sealer(Keys("theirs"), "tests").fingerprint(SECRET, "workspace/url"),
        Sealer(Keys("ours"), "other").fingerprint(SECRET, "workspace/url"),
        hashlib.sha256(SECRET.get_secret_value().encode()).hexdigest(),
    ]
    assert len({mark, *others}) == 1 + len(others)
