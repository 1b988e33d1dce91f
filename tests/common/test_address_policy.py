import socket
import threading

import pytest

from idefics_common.fetching import address_policy
from idefics_common.fetching.address_policy import forbidden_reason, literal_address, resolve

FORBIDDEN = {
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1"],
    "private": [
        "10.0.0.0",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "fc00::1",
        "fd00:ec2::254",  # the metadata service of EC2
        "::ffff:192.168.1.1",
        "64:ff9b:1::7f00:1",
    ],
    "link-local": ["169.254.169.254", "fe80::1", "fe80::1%lo", "febf::1", "::ffff:169.254.169.254"],
    "site-local": ["fec0::1"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255", "100.100.100.200", "::ffff:100.64.0.1"],
    "cloud metadata": ["169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "broadcast": ["255.255.255.255"],
    "reserved": ["240.0.0.1", "198.18.0.1", "100::1", "4000::1", "::127.0.0.1", "64:ff9b:2::1"],
    "reserved for documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.9", "2001:db8::1", "3fff:fff::1"],
    "reserved for AS112": ["192.31.196.1", "192.175.48.1"],
    "reserved for AMT": ["192.52.193.1"],
    "reserved for 6to4 relays": ["192.88.99.1"],
    "reserved for protocols": ["192.0.0.8", "2001:2::1", "2001:1ff:ffff::1"],
    "IPv4-compatible": ["::127.0.0.1", "::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:c0a8:101::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:80ff:fffe"],
    "NAT64 address of 10.0.0.1": ["64:ff9b::10.0.0.1"],
    "IPv4-mapped address of 127.0.0.1": ["::ffff:127.0.0.1"],
}


@pytest.mark.parametrize(("reason", "address"), [(why, ip) for why, ips in FORBIDDEN.items() for ip in ips])
def test_forbidden_addresses_are_refused_with_their_class(reason, address):
    assert reason in forbidden_reason(address)


@pytest.mark.parametrize(
    "address",
    # Both neighbours of the blocks whose size is easy to get wrong, and the carriers of a public IPv4 address.
    [
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "169.253.255.255",
        "169.255.0.0",
        "192.167.255.255",
        "192.169.0.0",
        "223.255.255.255",
        "198.20.0.0",
        "2606:4700::1111",
        "2a00:1450:4001::200e",
        "2001:4860::8888",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public_addresses_are_open(address):
    assert forbidden_reason(address) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1"])
def test_every_spelling_of_an_address_is_the_address(host):
    assert str(literal_address(host)) == "127.0.0.1"
    assert {address[0] for _, address in resolve(host, 80, timeout_s=60)} == {"127.0.0.1"}


@pytest.mark.parametrize("host", ["example.org", "cafe", "localhost"])
def test_a_name_is_not_a_literal_address(host):
    assert literal_address(host) is None


def test_a_slow_name_server_is_not_waited_for(monkeypatch):
    over, waited = threading.Event(), []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: waited.append(over.wait(60)) or [])
    with pytest.raises(TimeoutError, match=r"'slow\.test' was not resolved within 0\.1 s"):
        resolve("slow.test", 80, timeout_s=0.1)
    assert waited == []
    over.set()


def test_an_unknown_name_is_an_error_that_names_it(monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(address_policy.socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match=r"'nowhere\.test' has no address: .*not known"):
        resolve("nowhere.test", 80, timeout_s=60)
