"""Which network addresses an image may be fetched from: the public unicast internet and nothing else.

A prompt is written by someone who may not be trusted, and the machine that fetches stands inside a network.
The blocks that must not be reached are listed here, because `ipaddress.is_global` differs between Python
releases, calls multicast and site-local addresses global, and cannot look inside the IPv6 forms that carry an
IPv4 address. Of IPv6 only 2000::/3, which is all of today's global unicast space, is open at all.
"""

import ipaddress
import socket
import threading
from collections.abc import Iterable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# IANA's special-purpose address registries (RFC 6890 and its updates), and the clouds' own addresses.
# The first that fits names the reason, so that narrow blocks stand before the wide ones around them.
_FORBIDDEN_BLOCKS = [
    (ipaddress.ip_network(block), what)
    for what, blocks in [
        ("unspecified or 'this network'", "0.0.0.0/8"),
        ("unspecified", "::/128"),
        ("loopback", "127.0.0.0/8 ::1/128"),
        ("private", "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"),
        ("private NAT64", "64:ff9b:1::/48"),
        ("carrier-grade NAT or cloud metadata", "100.64.0.0/10"),
        ("cloud metadata", "168.63.129.16/32"),
        ("link-local or cloud metadata", "169.254.0.0/16"),
        ("link-local", "fe80::/10"),
        ("site-local", "fec0::/10"),
        ("multicast", "224.0.0.0/4 ff00::/8"),
        ("broadcast", "255.255.255.255/32"),
        ("6to4 tunnel", "2002::/16"),
        ("Teredo tunnel", "2001::/32"),
        ("reserved for protocols", "2001::/23"),
        ("reserved for protocols or cloud metadata", "192.0.0.0/24"),
        ("reserved for documentation", "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20"),
        ("reserved for AS112", "192.31.196.0/24 192.175.48.0/24"),
        ("reserved for AMT", "192.52.193.0/24"),
        ("reserved for 6to4 relays", "192.88.99.0/24"),
        ("reserved for benchmarking", "198.18.0.0/15"),
        ("IPv4-compatible, reserved", "::/96"),
        ("reserved", "240.0.0.0/4"),
    ]
    for block in blocks.split()
]
_MAPPED = ipaddress.ip_network("::ffff:0:0/96")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def forbidden_reason(address: str | IPAddress) -> str | None:
    """Why an address must not be connected to, as a few words for an error, or None if it may be.

    IPv4-mapped and NAT64 addresses are judged by the IPv4 address inside, since that is where the packets
    go; the other forms that carry one (IPv4-compatible, 6to4, Teredo) are obsolete and always refused.

    Raises:
        ValueError: `address` is not an IP address.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        for prefix, name in ((_MAPPED, "IPv4-mapped"), (_NAT64, "NAT64")):
            if ip in prefix:
                inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
                reason = forbidden_reason(inner)
                return reason and f"{name} address of {inner}, {reason}"
    for block, what in _FORBIDDEN_BLOCKS:
        if ip in block:
            return what
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return "reserved"
    return None


def literal_address(host: str) -> IPAddress | None:
    """The address that a host in a URL spells out, or None for a name. Understands what `connect` does:
    `127.1`, `0x7f000001` and `2130706433` are all 127.0.0.1."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None


def resolve(host: str, port: int, timeout_s: float) -> list[tuple[socket.AddressFamily, tuple]]:
    """Look a host up once: its (family, socket address) pairs in the order to try them.

    `getaddrinfo` takes no timeout and can block for half a minute on a slow name server that belongs to
    whoever wrote the URL, so it runs in a daemon thread that is left to end by itself.

    Raises:
        OSError: no such name, no address, or no answer within `timeout_s` seconds.
    """
    answers: list[tuple] = []
    failures: list[OSError | UnicodeError] = []

    def ask() -> None:
        try:
            answers.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="image-host-lookup")
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError(f"host {host!r} was not resolved within {timeout_s:.3g} s")
    if failures or not answers:
        raise OSError(f"host {host!r} has no address: {failures[0] if failures else 'empty answer'}")
    return [(family, address) for family, _, _, _, address in answers]


def refuse_forbidden(host: str, addresses: Iterable[str | IPAddress]) -> None:
    """Refuse a host if any of its addresses is forbidden: a name that answers with a public and a private
    address is either misconfigured or an attack, and which one is tried first must not decide.

    Raises:
        PermissionError: names the host, the address and its class.
    """
    for address in addresses:
        if reason := forbidden_reason(address):
            shown = host if str(address) == host else f"{host} ({address})"
            raise PermissionError(f"address not allowed: {shown} is {reason}")
