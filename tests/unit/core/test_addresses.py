"""Which addresses may be reached on somebody else's behalf."""

import pytest

from managed_agents.core import addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.0.1", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "192.88.99.1", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:1",
        "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001::1", "2001:db8::1", "2002:7f00:1::",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "", "nonsense", "1.2.3", "0x7f000001",
    ],
)  # fmt: skip
def test_what_is_not_public_is_refused(address: str) -> None:
    assert not addresses.allowed(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert addresses.allowed(address)


def test_an_operator_may_allow_networks() -> None:
    exceptions = addresses.networks("10.1.0.0/16, fd00::/8 ,")
    assert addresses.allowed("10.1.2.3", exceptions)
    assert addresses.allowed("::ffff:10.1.2.3", exceptions)
    assert addresses.allowed("fd00::5", exceptions)
    assert not addresses.allowed("10.2.0.1", exceptions)
    assert addresses.networks("") == ()
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
        addresses.networks("10.0.0.1/8")
