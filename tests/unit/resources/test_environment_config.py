"""How configurations of environments merge, also the parts that no sandbox enforces yet and the API refuses."""

from typing import Any

import pytest

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.environments.config import DEFAULT, LIMITED, EnvironmentConfig, merge
from managed_agents.resources.environments.schemas import CloudConfig


def merged(given: dict[str, Any], stored: EnvironmentConfig = DEFAULT) -> EnvironmentConfig:
    return merge(stored, CloudConfig.model_validate({"type": "cloud", **given}))


@pytest.mark.requirement("ENV-039")
def test_networks() -> None:
    limited = merged({"networking": {"type": "limited", "allowed_hosts": ["example.com"], "allow_mcp_servers": True}})
    assert limited["networking"] == {**LIMITED, "allowed_hosts": ["example.com"], "allow_mcp_servers": True}
    # Left out and null keep, an empty list clears.
    opened = merged({"networking": {"type": "limited", "allow_package_managers": True, "allowed_hosts": None}}, limited)
    assert opened["networking"] == {**limited["networking"], "allow_package_managers": True}
    assert merged({"networking": {"type": "limited", "allowed_hosts": []}}, limited)["networking"]["allowed_hosts"] == []
    assert merged({}, limited) == merged({"networking": None}, limited) == limited
    # Another kind replaces the whole, and nothing of it comes back.
    free = merged({"networking": {"type": "unrestricted"}}, limited)
    assert free["networking"] == {"type": "unrestricted"}
    assert merged({"networking": {"type": "limited"}}, free)["networking"] == LIMITED


@pytest.mark.requirement("ENV-040")
@pytest.mark.parametrize("host", ["example.com", "*.example.com", "a", "A-1.b", "xn--bcher-kva.example", "1.2.3.4"])
def test_hosts(host: str) -> None:
    networking = merged({"networking": {"type": "limited", "allowed_hosts": [host]}})["networking"]
    assert networking.get("allowed_hosts") == [host]


@pytest.mark.requirement("ENV-040")
@pytest.mark.parametrize(
    "host",
    ["", "*", "*.", ".example.com", "https://example.com", "example.com:443", "example.com/x", "a.*.b", "a b", "-a.b", "a.b-",
     "a..b", "x" * 64, ".".join(["x" * 63] * 5), "b\u00fccher.example", "[::1]", "user@example.com", "example.com\n"],
)  # fmt: skip
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^config\.networking\.allowed_hosts\.1: "):
        merged({"networking": {"type": "limited", "allowed_hosts": ["good.example", host]}})


@pytest.mark.requirement("ENV-041")
def test_packages_come_through_the_package_managers() -> None:
    packages = {"packages": {"pip": ["pandas==2.2.0"]}}
    free = merged(packages)
    assert free["packages"]["pip"] == ["pandas==2.2.0"]
    listed = {"networking": {"type": "limited", "allowed_hosts": ["packages.example"]}}
    open_ = {"networking": {"type": "limited", "allow_package_managers": True}}
    for given, stored in (({**packages, **listed}, DEFAULT), (listed, free), (packages, merged(listed))):
        with pytest.raises(InvalidRequest, match=r"^config\.packages: "):
            merged(given, stored)
    assert merged({**packages, **open_})["packages"]["pip"] == ["pandas==2.2.0"]
    # No packages, no rule.
    assert merged({"packages": {"pip": []}, **listed}, free)["packages"]["pip"] == []


def test_packages_are_kept_per_manager() -> None:
    stored = merged({"packages": {"pip": ["a"], "npm": ["b"]}})
    assert merged({"packages": {"npm": [], "apt": ["c"], "pip": None}}, stored)["packages"] == {
        **DEFAULT["packages"], "pip": ["a"], "apt": ["c"],
    }  # fmt: skip
    assert merged({"packages": None}, stored) == stored


@pytest.mark.requirement("ENV-059")
@pytest.mark.parametrize("name", ["", " ", "--index-url=x", "-r", "a\nb", "a\0", "x" * 513])
def test_a_package_is_not_an_option(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^config\.packages\.pip\.1: "):
        merged({"packages": {"pip": ["fine>=1, <2", name]}})
