"""Connections of the fetcher: to a checked address, under a deadline, with a cap on what is received.

`http.client` parses HTTP, but its timeouts are per `recv` (a server that drips a byte a second is never late) and it
reads whatever length a server claims. It therefore reads from a `BoundedSocket`, which counts time and bytes of every
read, so that no reply, however malformed, takes longer or grows larger.
"""

import base64
import contextlib
import http.client
import io
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

from idefics_common.fetching.address_policy import literal_address, refuse_forbidden, resolve


class Target(NamedTuple):
    """A checked URL, in parts. `host` is lower-case ASCII, without the brackets of an IPv6 address."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """`host` or `host:port` as the Host header has it: without the scheme's own port."""
        bracketed = f"[{self.host}]" if ":" in self.host else self.host
        return bracketed if self.port == {"http": 80, "https": 443}[self.scheme] else f"{bracketed}:{self.port}"


class Deadline:
    """The end of the time for one fetch, or for all fetches of a call.

    Args:
        total_s: seconds from now.
        scope: what the time is for, in errors.
        within: another deadline that also holds.
    """

    def __init__(self, total_s: float, scope: str = "in all (total_timeout_s)", within: "Deadline | None" = None):
        self.total_s = total_s
        self._scope = scope
        self._within = within
        self._end = time.monotonic() + total_s

    def remaining(self) -> float:
        """Seconds left. Raises TimeoutError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"not done within {self.total_s:g} s {self._scope}")
        return left if self._within is None else min(left, self._within.remaining())


class BoundedSocket(io.RawIOBase):
    """A socket for `http.client` that reads under a deadline, and at most `max_received` bytes.

    Bytes are counted as received: status line, headers and chunk sizes as well as the body.
    """

    def __init__(self, raw: socket.socket, deadline: Deadline, first_byte_timeout_s: float, max_received: int):
        self._raw = raw
        self._deadline = deadline
        self._first_byte_timeout_s = first_byte_timeout_s
        self._max_received = max_received
        self._received = 0

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(self._deadline.remaining())
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._deadline.remaining()
        waiting_for_first = self._received == 0 and self._first_byte_timeout_s < left
        self._raw.settimeout(self._first_byte_timeout_s if waiting_for_first else left)
        try:
            count = self._raw.recv_into(buffer)
        except TimeoutError:
            self._deadline.remaining()
            raise TimeoutError(
                f"no byte of an answer within {self._first_byte_timeout_s:g} s (first_byte_timeout_s)"
            ) from None
        self._received += count
        if self._received > self._max_received:
            raise OverflowError(f"the server sent more than {self._max_received} bytes, protocol included")
        return count

    def close(self) -> None:
        """Nothing: http.client closes its socket before the response is read. Whoever opened `raw` closes it."""


class Transport(NamedTuple):
    """How to reach servers: limits in seconds and bytes, and the TLS settings."""

    connect_timeout_s: float
    first_byte_timeout_s: float
    max_received: int
    tls_context: ssl.SSLContext

    @contextlib.contextmanager
    def get(
        self, target: Target, headers: dict[str, str], deadline: Deadline, *, any_address: bool, proxy: str | None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send GET and yield the response, its body unread.

        Args:
            any_address: connect to whatever address the host has, private ones included.
            proxy: address of an HTTP proxy that connects for us, or None to connect ourselves.

        Raises:
            PermissionError: an address of the host, or the one connected to, is not allowed.
            OSError, http.client.HTTPException, OverflowError: no valid answer within the limits.
        """
        headers = {"Host": target.authority, **headers}
        path = target.path
        with contextlib.ExitStack() as opened:
            if proxy is None:
                sock = opened.enter_context(self._connect(target, deadline, any_address))
            else:
                if not any_address and (literal := literal_address(target.host)):
                    refuse_forbidden(target.host, [literal])
                sock, proxy_headers = self._connect_to_proxy(target, proxy, deadline)
                opened.enter_context(sock)
                if target.scheme == "http":
                    path = f"http://{target.authority}{path}"
                    headers |= proxy_headers
            if target.scheme == "https":
                sock.settimeout(deadline.remaining())
                sock = opened.enter_context(self.tls_context.wrap_socket(sock, server_hostname=target.host))
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = BoundedSocket(sock, deadline, self.first_byte_timeout_s, self.max_received)
            connection.request("GET", path, headers=headers)
            yield opened.enter_context(connection.getresponse())

    def _connect(self, target: Target, deadline: Deadline, any_address: bool) -> socket.socket:
        """Resolve once, check every answer, connect to one of exactly those addresses."""
        found = resolve(target.host, target.port, min(self.connect_timeout_s, deadline.remaining()))
        if not any_address:
            refuse_forbidden(target.host, [address[0] for _, address in found])
        failures = []
        for family, address in found:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(min(self.connect_timeout_s, deadline.remaining()))
                sock.connect(address)
                if not any_address:
                    # Packet filters can send a connection elsewhere than was asked.
                    refuse_forbidden(target.host, [sock.getpeername()[0]])
                return sock
            except PermissionError:
                sock.close()
                raise
            except OSError as error:
                sock.close()
                failures.append(f"{address[0]}: {error}")
        raise ConnectionError(f"no connection to {target.host} port {target.port} ({'; '.join(failures)})")

    def _connect_to_proxy(self, target: Target, proxy: str, deadline: Deadline) -> tuple[socket.socket, dict[str, str]]:
        """A socket to the proxy (for https, one tunnelled through it), and the headers that it wants."""
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.scheme != "http" or not parts.hostname:
            raise ConnectionError(f"only http:// proxies are supported, not {parts.scheme}://{parts.hostname}")
        headers = {}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        connection = http.client.HTTPConnection(
            parts.hostname, parts.port or 80, timeout=min(self.connect_timeout_s, deadline.remaining())
        )
        if target.scheme == "https":
            bracketed = f"[{target.host}]" if ":" in target.host else target.host
            connection.set_tunnel(bracketed, target.port, headers)
        connection.connect()
        return connection.sock, headers
