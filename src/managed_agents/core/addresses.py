"""Which network addresses a request on somebody else's behalf may reach. Pure.

Public unicast addresses only, looked at when the connection is made, so that a name which resolves to something else a moment
later gains nothing. IPv6 forms that carry an IPv4 address are judged by what they carry. An operator may allow networks.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
# Tunnels to wherever the address says; nobody needs them to read a page. `is_global` calls some of them public.
_REFUSED = tuple(
    ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relay anycast
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site local
        "::/96",  # IPv4-compatible
        "64:ff9b:1::/48",  # NAT64 of a local network
    )
)


def networks(text: str) -> tuple[Network, ...]:
    """Read a comma-separated list of networks. Raises ValueError naming what is none."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def allowed(address: str, exceptions: Iterable[Network] = ()) -> bool:
    """Whether a connection to `address` may be made. What is no address is not allowed."""
    try:
        found: Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    carried = _carried(found)
    if any(one in network for network in exceptions for one in (found, carried) if one.version == network.version):
        return True
    return _public(found) if carried is found else _public(carried)


def _carried(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, where it is what packets go to; else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _public(address: Address) -> bool:
    if any(address in network for network in _REFUSED if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_unspecified and not address.is_reserved
