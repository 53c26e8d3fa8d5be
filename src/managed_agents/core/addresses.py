"""Which network addresses a request on somebody else's behalf may reach. Pure.

Public unicast addresses only, looked at when the connection is made, so that a name which resolves to something else a moment
later gains nothing. IPv6 forms that carry an IPv4 address are judged by what they carry. An operator may allow networks.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# Written out, and not asked of the interpreter: what its `is_global` knows depends on its version. IANA's registries of special
# purpose addresses as of October 2025, also the entries that are called global there: those are services of the nearest
# network (relays, sinks of reverse lookups), which nobody needs to read a page.
_REFUSED = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT, and the metadata of some clouds
        "127.0.0.0/8",
        "168.63.129.16/32",  # in no registry: what Azure tells its machines, metadata and keys among it
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; Oracle's cloud has metadata there
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # 6to4 relay anycast
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID and others
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
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
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    if any(address in network for network in _REFUSED if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
