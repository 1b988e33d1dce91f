import base64
import dataclasses
import socket
import ssl

import pytest

from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
from tests.common.hostile_server import (
    CERTIFICATE,
    OK,
    Answer,
    answer_names,
    encoded,
    endless,
    redirect,
    reply,
    serving,
)

PNG = encoded()
PUBLIC = "93.184.215.14"


# The address connected to is the address checked


def test_dns_rebinding_connects_to_the_checked_address_only(monkeypatch, server):
    asked = answer_names(monkeypatch, [PUBLIC], ["127.0.0.1"])
    connected, connect = [], socket.socket.connect

    def connect_to_the_test_server(self, address):
        connected.append(address)
        connect(self, ("127.0.0.1", server.port))

    monkeypatch.setattr(socket.socket, "connect", connect_to_the_test_server)
    monkeypatch.setattr(socket.socket, "getpeername", lambda self: connected[-1])
    server.url("/a.png", reply(PNG))
    assert ImageFetcher().fetch("http://rebinding.test/a.png").size == (6, 4)
    assert (asked, connected) == (["rebinding.test"], [(PUBLIC, 80)])
    assert server.headers["Host"] == "rebinding.test"
    with pytest.raises(ImageFetchError, match=r"rebinding\.test \(127\.0\.0\.1\) is loopback"):
        ImageFetcher().fetch("http://rebinding.test/a.png")
    assert len(connected) == 1


def test_the_connected_socket_is_checked_too(monkeypatch, server):
    answer_names(monkeypatch, [PUBLIC])
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connect(self, ("127.0.0.1", server.port)))
    server.url("/a.png", reply(PNG))
    with pytest.raises(ImageFetchError, match=r"diverted\.test \(127\.0\.0\.1\) is loopback"):
        ImageFetcher().fetch("http://diverted.test/a.png")
    assert server.seen == []


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://10.0.0.1/a.png", "10.0.0.1 is private"),
        ("//[::1]/a.png", "::1 is loopback"),
        ("http://localhost/a.png", "localhost .* is loopback"),
        ("http://127.0.0.1/a.png", "127.0.0.1 is loopback"),
        ("http://127.0.0.1:{other}/secret", "port [0-9]+ is not in allow_ports"),
        ("https://169.254.169.254/a.png", "cloud metadata"),
        ("file:///etc/passwd", "not 'file'"),
        ("http://user@example.org/", "user name or password"),
        ("http://[/", "Invalid IPv6 URL"),
    ],
)
def test_a_redirect_is_checked_like_a_first_url(server, fetcher, location, message):
    with serving() as other:
        other.url("/secret", reply(PNG))
        url = server.url("/redirect", redirect(location.format(other=other.port)))
        with pytest.raises(ImageFetchError, match=rf"cannot fetch '{url}'.*{message}"):
            fetcher.fetch(url)
        assert other.seen == []


def test_redirect_loop_ends(server, fetcher):
    url = server.url("/loop", redirect("/loop"))
    with pytest.raises(ImageFetchError, match="more than max_redirects=3 redirects"):
        dataclasses.replace(fetcher, max_redirects=3).fetch(url)
    assert len(server.seen) == 4
    with pytest.raises(ImageFetchError, match="302 without a Location"):
        fetcher.fetch(server.url("/nowhere", reply(status="302 Found")))


def test_allow_hosts_means_that_host_and_port_only(server):
    url = server.url("/a.png", reply(PNG))
    for entry in (f"127.0.0.1:{server.port + 1}", "localhost", f"localhost:{server.port}", "0.0.0.1"):
        with pytest.raises(ImageFetchError, match=r"not in allow_ports|is loopback"):
            ImageFetcher(allow_hosts=[entry]).fetch(url)
    with pytest.raises(ImageFetchError, match=f"port {server.port} is not in allow_ports"):
        ImageFetcher(allow_hosts=["127.0.0.1"]).fetch(url)
    with pytest.raises(ImageFetchError, match="is loopback"):
        ImageFetcher(allow_hosts=["localhost"], allow_ports=[server.port]).fetch(url)
    assert server.seen == []
    assert ImageFetcher(allow_hosts=["127.0.0.1"], allow_ports=[server.port]).fetch(url).size == (6, 4)
    local = url.replace("127.0.0.1", "LOCALHOST.")
    assert ImageFetcher(allow_hosts=[f"localhost:{server.port}"]).fetch(local).size == (6, 4)


def test_tls_verifies_the_name_in_the_url(monkeypatch):
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(CERTIFICATE)
    asked_for = []
    server_side.sni_callback = lambda sock, name, context: asked_for.append(name)
    with serving(server_side) as server:
        answer_names(monkeypatch, ["127.0.0.1"])
        server.url("/a.png", reply(PNG))
        hosts = [f"{name}:{server.port}" for name in ("photos.test", "other.test")]
        trusting = ImageFetcher(allow_hosts=hosts, tls_context=ssl.create_default_context(cafile=CERTIFICATE))
        assert trusting.fetch(f"https://photos.test:{server.port}/a.png").size == (6, 4)
        assert asked_for == ["photos.test"]
        with pytest.raises(ImageFetchError, match=r"certificate verify failed.*not valid for 'other.test'"):
            trusting.fetch(f"https://other.test:{server.port}/a.png")
        with pytest.raises(ImageFetchError, match="certificate verify failed"):
            ImageFetcher(allow_hosts=hosts).fetch(f"https://photos.test:{server.port}/a.png")
        assert len(server.seen) == 1


# Time


@pytest.fixture
def almost_late_once_connected(monkeypatch, clock):
    """When a connection stands, 0.4 s are left of 60."""
    connect = socket.socket.connect

    def connect_and_jump(self, address):
        connect(self, address)
        clock.jump(59.6)

    monkeypatch.setattr(socket.socket, "connect", connect_and_jump)


def drip(start: bytes) -> Answer:
    return endless(start, b"x", pause_s=0.1)


@pytest.mark.parametrize(
    "answer",
    [
        lambda connection: connection.wait(),
        drip(b""),
        drip(OK + b"X-Long: "),
        drip(OK + b"\r\n"),
        drip(OK + b"Content-Length: 1000\r\n\r\n"),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1),
        endless(OK + b"\r\n", b"x", 1.0),
    ],
    ids=["hang", "drip-status", "drip-header", "drip-body", "drip-length", "drip-continue", "drip-1s"],
)
def test_time_is_limited_however_the_server_spends_it(almost_late_once_connected, server, fetcher, answer):
    with pytest.raises(ImageFetchError, match="not done within 60 s in all"):
        fetcher.fetch(server.url("/slow", answer))


def test_a_first_byte_is_waited_for_less_long(server, fetcher):
    url = server.url("/slow", lambda connection: connection.wait())
    with pytest.raises(ImageFetchError, match=r"no byte of an answer within 0\.1 s"):
        dataclasses.replace(fetcher, first_byte_timeout_s=0.1).fetch(url)


def test_redirects_share_one_time_limit(clock, server, fetcher):
    def slow_redirect(connection):
        clock.jump(25)
        redirect("/slow")(connection)

    with pytest.raises(ImageFetchError, match="not done within 60 s in all"):
        dataclasses.replace(fetcher, max_redirects=100).fetch(server.url("/slow", slow_redirect))
    assert len(server.seen) == 3


def test_a_tls_handshake_that_hangs_ends(almost_late_once_connected, server, fetcher):
    url = server.url("/a.png").replace("http:", "https:")
    with pytest.raises(ImageFetchError, match=r"timed out|not done within 60 s in all"):
        fetcher.fetch(url)
    assert server.seen == []


# Proxies


def test_behind_a_proxy_it_refuses_unless_told(monkeypatch, server, fetcher):
    url = server.url("/a.png", reply(PNG))
    for variable in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "http://user:p%40ss@127.0.0.1:9")
            with pytest.raises(ImageFetchError, match=r"a proxy is set for http URLs.*allow_proxy=True"):
                fetcher.fetch(url)
            patch.setenv("no_proxy", "127.0.0.1")
            assert fetcher.fetch(url).size == (6, 4)


def test_through_a_proxy_when_told(monkeypatch, fetcher):
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@{proxy.host}")
        monkeypatch.setenv("https_proxy", proxy.host)
        proxy.answers["http://photos.test/a.png?x=1"] = reply(PNG)
        proxy.answers["photos.test:443"] = reply(status="403 Forbidden")
        told = dataclasses.replace(fetcher, allow_proxy=True)
        assert told.fetch("http://photos.test/a.png?x=1").size == (6, 4)
        assert proxy.headers["Host"] == "photos.test"
        assert proxy.headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
        with pytest.raises(ImageFetchError, match="Tunnel connection failed: 403"):
            told.fetch("https://photos.test/a.png")
        assert proxy.seen[-1].startswith("CONNECT photos.test:443 ")
        for url in ("http://127.0.0.1/", "http://0x7f.1/", "https://[::1]/"):
            with pytest.raises(ImageFetchError, match="is loopback"):
                told.fetch(url)
        assert len(proxy.seen) == 2
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
        with pytest.raises(ImageFetchError, match="only http:// proxies are supported, not socks5:"):
            told.fetch("http://photos.test/a.png")


def test_tls_through_a_proxy_is_verified_with_the_server(monkeypatch):
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(CERTIFICATE)

    received = []

    def tunnel(connection):
        connection.send(OK + b"\r\n")
        with server_side.wrap_socket(connection.request, server_side=True) as inner:
            received.append(inner.recv(2**16))
            inner.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG)

    with serving() as proxy:
        monkeypatch.setenv("https_proxy", proxy.host)
        proxy.answers |= {"photos.test:443": tunnel, "other.test:443": tunnel}
        told = ImageFetcher(allow_proxy=True, tls_context=ssl.create_default_context(cafile=CERTIFICATE))
        assert told.fetch("https://photos.test/a.png").size == (6, 4)
        assert received[0].startswith(b"GET /a.png HTTP/1.1\r\n")
        assert b"\r\nHost: photos.test\r\n" in received[0]
        with pytest.raises(ImageFetchError, match=r"not valid for 'other.test'"):
            told.fetch("https://other.test/a.png")
