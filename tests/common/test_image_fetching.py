import dataclasses
import io
import pickle
import socket
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError, is_url
from tests.common.hostile_server import OK, answer_names, encoded, endless, raw, redirect, reply, serving
from tests.common.test_image_decoding import png_header

PNG = encoded()
PUBLIC = "93.184.215.14"


def forbid_connections(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


# What is fetched


@pytest.mark.parametrize(
    "answer",
    [
        reply(PNG, Content_Type="image/png"),
        reply(PNG),
        raw(OK + b"\r\n" + PNG),
        raw(
            OK
            + b"Transfer-Encoding: chunked\r\n\r\n9\r\n"
            + PNG[:9]
            + b"\r\n%x\r\n" % (len(PNG) - 9)
            + PNG[9:]
            + b"\r\n0\r\n\r\n"
        ),
        raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + PNG),
    ],
    ids=["typed", "untyped", "until-close", "chunked", "continue"],
)
def test_fetches_an_image(server, fetcher, answer):
    image = fetcher.fetch(server.url("/a.png", answer))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(PNG))))
    assert server.seen == ["GET /a.png HTTP/1.1"]
    assert server.headers["Host"] == server.host
    assert server.headers["Accept-Encoding"] == "identity"


def test_follows_redirects_and_encodes_what_needs_it(server, fetcher):
    server.answers["/caf%C3%A9%20a.png?x=1&y=%20"] = reply(PNG)
    server.url("/second", raw("HTTP/1.1 301 Moved\r\nLocation: café a.png?x=1&y=%20#top\r\n\r\n".encode()))
    assert fetcher.fetch(server.url("/first", redirect("/second"))).size == (6, 4)
    assert [line.split()[1] for line in server.seen] == ["/first", "/second", "/caf%C3%A9%20a.png?x=1&y=%20"]
    assert fetcher.fetch(server.url("/café") + " a.png?x=1&y=%20".replace(" a", "%20a")).size == (6, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://example.org/a.png", True),
        ("https://example.org", True),
        ("HTTP://EXAMPLE.ORG/a.png", True),
        ("ftp://example.org/a.png", True),
        ("file:///etc/passwd", True),
        ("data:image/png;base64,AAAA", True),
        ("http://", True),
        ("See http://example.org/a.png", False),
        ("http://example.org/a.png shows", False),
        ("http://example.org/a.png\nDescribe it.", False),
        ("example.org/a.png", False),
        ("User:", False),
        ("what?", False),
        ("data: the image", False),
        ("1://x", False),
        ("", False),
    ],
)
def test_is_url(text, expected):
    assert is_url(text) is expected


# What is refused before any connection


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.org/a.png", "only http and https URLs are fetched, not 'ftp'"),
        ("file:///etc/passwd", "only http and https URLs are fetched, not 'file'"),
        ("data:image/png;base64,AAAA", "only http and https URLs are fetched, not 'data'"),
        ("gopher://127.0.0.1:6379/_SET", "only http and https"),
        ("http://user:secret@example.org/a.png", "user name or password"),
        ("http://example.org@127.0.0.1/a.png", "user name or password"),
        ("http:///a.png", "no host"),
        ("http://exa mple.org/", "white space"),
        ("http://example.org/\r\nX-Injected: 1", "white space or a control character"),
        ("http://example.org\\@127.0.0.1/", "user name or password"),
        ("http://exam%70le.org/", "is not a host name"),
        ("http://[fe80::1%25lo]/a.png", "is not a host name"),
        ("http://[::1/", "Invalid IPv6 URL"),
        ("http://example.org:22/", r"port 22 is not in allow_ports=\(80, 443\)"),
        ("http://example.org:0/", "port 0 is not in allow_ports"),
        ("http://example.org:99999/", "[Pp]ort"),
        ("http://127.0.0.1/", "address not allowed: 127.0.0.1 is loopback"),
        ("http://127.1/", r"address not allowed: 127.1 \(127.0.0.1\) is loopback"),
        ("http://2130706433/", "127.0.0.1.* is loopback"),
        ("http://0x7f.0.0.1/", "127.0.0.1.* is loopback"),
        ("http://\uff11\uff12\uff17.0.0.1/", "127.0.0.1 is loopback"),
        ("http://0/", "unspecified"),
        ("http://[::1]/", "::1 is loopback"),
        ("http://[::ffff:10.1.2.3]/", "IPv4-mapped address of 10.1.2.3, private"),
        ("http://[64:ff9b::a9fe:a9fe]/", "NAT64 address of 169.254.169.254, link-local or cloud metadata"),
        ("http://[2002:7f00:1::]/", "6to4"),
        ("http://169.254.169.254/latest/meta-data/", "cloud metadata"),
        ("https://192.168.0.1/", "192.168.0.1 is private"),
    ],
)
def test_refused_without_a_connection(monkeypatch, url, message):
    forbid_connections(monkeypatch)
    with pytest.raises(ImageFetchError, match=message) as caught:
        ImageFetcher().fetch(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("answer", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], [PUBLIC, "fd00::1"], ["::ffff:127.0.0.1"]])
def test_a_name_with_a_private_address_is_refused(monkeypatch, answer):
    forbid_connections(monkeypatch)
    asked = answer_names(monkeypatch, answer)
    with pytest.raises(ImageFetchError, match=r"address not allowed: innocent\.test \(.*\) is .*(private|loopback)"):
        ImageFetcher().fetch("http://innocent.test/a.png")
    assert asked == ["innocent.test"]


@pytest.mark.parametrize("setting", ["0", "false", "No", "off", "flase", ""])
def test_the_environment_turns_fetching_off(monkeypatch, server, fetcher, setting):
    url = server.url("/a.png", reply(PNG))
    monkeypatch.setenv("IDEFICS_ALLOW_FETCH", setting)
    with pytest.raises(ImageFetchError, match=r"fetching is off \(IDEFICS_ALLOW_FETCH="):
        fetcher.fetch(url)
    assert server.seen == []
    monkeypatch.setenv("IDEFICS_ALLOW_FETCH", "1")
    assert fetcher.fetch(url).size == (6, 4)
    with pytest.raises(ImageFetchError, match=r"fetching is off \(allow_fetch=False\)"):
        dataclasses.replace(fetcher, allow_fetch=False).fetch(url)


# What the server sends


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(b"<html></html>", Content_Type="text/html; charset=utf-8"), "got Content-Type 'text/html"),
        (reply(b"<html></html>", Content_Type="image/png"), "the answer: not an image"),
        (reply(zlib.compress(PNG), Content_Encoding="gzip"), "expected no Content-Encoding.*'gzip'"),
        (reply(PNG, Content_Encoding="identity, br"), "expected no Content-Encoding"),
        (reply(PNG, length=len(PNG) + 9), rf"{len(PNG) + 9} bytes declared and only {len(PNG)} sent"),
        (reply(PNG, length=48), "the image is truncated or corrupt"),
        (reply(PNG[:48]), "the image is truncated or corrupt"),
        (reply(b""), "not an image"),
        (reply(encoded(format="TIFF")), "not an image in one of the formats PNG, JPEG, WEBP, GIF, BMP"),
        (
            reply(b"", length=10**10),
            r"10000000000 bytes declared, more than max_bytes=1048576; .*ImageFetcher\(max_bytes=",
        ),
        (reply(b"nope", status="404 Not Found"), "expected HTTP status 200 and got 404 Not Found"),
        (reply(PNG, status="206 Partial Content"), "got 206 Partial Content"),
        (reply(png_header(1001, 1000)), "1001 x 1000 pixels, more than max_pixels=1000000"),
        (reply(png_header(60_000, 60_000)), "too many pixels"),
        (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(PNG) + PNG[:20]), "IncompleteRead"),
        (raw(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + PNG), "IncompleteRead"),
        (raw(b"\x1b[2Jhello\r\n"), r"not a valid HTTP answer, BadStatusLine: '\\x1b\[2Jhello"),
        (raw(b"x" * 10_000 + b"\r\n"), "BadStatusLine: 'x{80}'$"),
        (raw(b""), "closed connection without response"),
        (endless(OK + b"\r\n", bytes(2**16)), "more than max_bytes=1048576 sent"),
        (
            endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + bytes(2**15) + b"\r\n"),
            "more than max_bytes",
        ),
        (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n0\r\n" * 9999), "more than 1572864 bytes"),
        (endless(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", bytes(2**16)), "more than 1572864 bytes"),
        (endless(OK, b"X-Header: " + b"x" * 60_000 + b"\r\n"), "more than 1572864 bytes"),
        (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 9999), "more than 1572864 bytes"),
    ],
)
def test_what_is_not_a_whole_image_of_bounded_size_is_refused(server, fetcher, answer, message):
    url = server.url("/x", answer)
    with pytest.raises(ImageFetchError, match=rf"^cannot fetch '{url}': .*{message}"):
        fetcher.fetch(url)


MEASURE = """
import re, sys
from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
def peak():  # ru_maxrss would start at the size of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
host, path, max_pixels, warm_up = sys.argv[1:]
fetcher = ImageFetcher(allow_hosts=[host], max_bytes=4 * 2**20, max_pixels=int(max_pixels), connect_timeout_s=60)
fetcher.fetch(f"http://{host}{warm_up}")
before = peak()
try:
    fetcher.fetch(f"http://{host}{path}")
    print("fetched", end=" ")
except ImageFetchError as error:
    print("refused", end=" ")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_p10_prompt_urls_reach_nothing_private_and_cost_bounded_time_and_memory(server, fetcher):
    for path in ("/redir", "/hang", "/bomb"):
        with pytest.raises(ImageFetchError, match="is loopback"):
            ImageFetcher(allow_ports=[server.port]).fetch(server.url(path))
    assert server.seen == []

    with serving() as inner:
        inner.url("/secret", reply(PNG))
        with pytest.raises(ImageFetchError, match=r"redirected to .*/secret.*not in allow_ports"):
            fetcher.fetch(server.url("/redir", redirect(inner.url("/secret"))))
        assert inner.seen == []

    with pytest.raises(ImageFetchError, match=r"no byte of an answer within 0\.2 s"):
        dataclasses.replace(fetcher, first_byte_timeout_s=0.2).fetch(
            server.url("/hang", lambda connection: connection.wait())
        )

    bomb = io.BytesIO()
    Image.new("L", (8000, 8000)).save(bomb, "PNG", compress_level=9)
    assert len(bomb.getvalue()) < 100_000
    server.url("/warm-up", reply(PNG))
    server.url("/bomb", reply(bomb.getvalue()))
    server.url("/10GB", endless(OK + b"\r\n", bytes(2**16)))
    server.url("/chunk", endless(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", bytes(2**16)))

    def fetch_in_new_process(path: str, max_pixels: int) -> tuple[str, float]:
        """Whether it was fetched, and by how many MiB the peak memory of the process grew."""
        command = [sys.executable, "-c", MEASURE, server.host, path, str(max_pixels), "/warm-up"]
        outcome, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return outcome, float(grown)

    default = ImageFetcher().max_pixels
    for path in ("/bomb", "/10GB", "/chunk"):
        outcome, grown = fetch_in_new_process(path, default)
        assert outcome == "refused"
        assert grown < 25, path
    outcome, grown = fetch_in_new_process("/bomb", 10**8)  # the measure sees a bomb when one goes off
    assert outcome == "fetched"
    assert grown > 55


# The fetcher as a value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be positive, not 0"),
        ({"total_timeout_s": float("nan")}, "total_timeout_s must be positive, not nan"),
        ({"max_redirects": -1}, "max_redirects must not be negative"),
        ({"allow_hosts": "localhost"}, "allow_hosts must be a sequence of strings"),
        ({"allow_hosts": ["http://localhost"]}, "expected 'host' or 'host:port', not 'http://localhost'"),
        ({"allow_hosts": ["a:b"]}, "expected 'host' or 'host:port', not 'a:b'"),
        ({"allow_hosts": ["*.example.org"]}, "expected 'host' or 'host:port'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageFetcher(**settings)


def test_travels_to_worker_processes():
    fetcher = ImageFetcher(allow_hosts=("localhost:8080",), max_bytes=1000)
    assert pickle.loads(pickle.dumps(fetcher)) == fetcher
