"""Which addresses may be reached on somebody else's behalf."""

from ipaddress import ip_network

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


@pytest.mark.requirement("WEB-104")
@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254", "fe80::a9fe:a9fe",
        "::ffff:168.63.129.16", "::ffff:192.0.0.192", "64:ff9b::a83f:8110", "64:ff9b::c000:c0",
    ],
)  # fmt: skip
def test_metadata_of_clouds_is_refused(address: str) -> None:
    assert not addresses.allowed(address)


# Whole registries: interpreters differ in what they call global.
@pytest.mark.parametrize(
    "network",
    [
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32", "192.0.0.170/32", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24",
        "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "240.0.0.0/4", "255.255.255.255/32", "::1/128", "::/128", "::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64",
        "2001::/23", "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48", "2001:3::/32",
        "2001:4:112::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48",
        "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "ff00::/8", "4000::/3", "::ffff:0:0:0/96",
    ],
)  # fmt: skip
def test_special_purpose_networks_are_refused_from_end_to_end(network: str) -> None:
    found = ip_network(network)
    assert not addresses.allowed(str(found[0]))
    assert not addresses.allowed(str(found[-1]))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "9.255.255.255", "192.0.1.1", "168.63.129.17", "223.255.255.254", "2606:4700:4700::1111",
     "2001:200::1", "2001:4860:4860::8888", "3ffe:ffff::1", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)  # fmt: skip
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
