"""A server on the loopback interface that answers each path with exactly the bytes, and the pace, it is told.

Answers are functions of the connection's socket, so that a test can send what no HTTP library would. A server whose
client should have gone away, and has not after a long time, says so when its test ends: no test measures time.
"""

import contextlib
import io
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

Answer = Callable[["Connection"], None]

OK = b"HTTP/1.1 200 OK\r\n"

# A certificate for photos.test, signed by its own key, until 2126. Made by:
#   openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=photos.test
#     -addext subjectAltName=DNS:photos.test
CERTIFICATE = Path(__file__).parents[1] / "fixtures" / "tls" / "photos.test.pem"

PATIENCE_S = 60
"""How long a server waits for a client that should go away; no client is that slow, on however busy a machine."""


class Connection(socketserver.BaseRequestHandler):
    """One connection. `server.seen` gets the first line of each request, `server.headers` the rest of the last."""

    def handle(self):
        self.end = time.monotonic() + PATIENCE_S
        self.request.settimeout(PATIENCE_S)
        try:
            if self.server.tls:
                self.request = self.server.tls.wrap_socket(self.request, server_side=True)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                byte = self.request.recv(1)
                if not byte:
                    return
                head += byte
            first, _, rest = head.decode("ascii").partition("\r\n")
            self.server.seen.append(first)
            self.server.headers = dict(line.split(": ", 1) for line in rest.splitlines() if line)
            self.server.answers[first.split()[1]](self)
            if self.server.tls:
                self.request.unwrap()
        except TimeoutError:
            self.server.lost_patience = True
        except OSError:  # the client hung up, which is what most of these tests want of it
            return
        finally:
            self.request.close()

    def send(self, data: bytes) -> None:
        self.request.sendall(data)

    def wait(self, seconds: float = PATIENCE_S + 1) -> bool:
        """Whether to go on after a pause: False once the test is over. By default the client should not await its end.

        Raises:
            TimeoutError: if the client has been waiting for too long.
        """
        is_over = self.server.over.wait(seconds)
        if not is_over and time.monotonic() > self.end:
            raise TimeoutError
        return not is_over


class HostileServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, tls: ssl.SSLContext | None):
        super().__init__(("127.0.0.1", 0), Connection)
        self.tls = tls
        self.answers: dict[str, Answer] = {}
        self.seen: list[str] = []
        self.headers: dict[str, str] = {}
        self.over = threading.Event()
        self.lost_patience = False
        self.port = self.server_address[1]
        self.host = f"127.0.0.1:{self.port}"

    def url(self, path: str, answer: Answer | None = None) -> str:
        if answer is not None:
            self.answers[path] = answer
        return f"http://{self.host}{path}"


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[HostileServer]:
    with HostileServer(tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
        assert not server.lost_patience, f"a client was still there after {PATIENCE_S} s"


def reply(body: bytes = b"", status: str = "200 OK", length: int | None = None, **headers: str) -> Answer:
    """An answer with these headers (`Content_Type` for Content-Type) and a Content-Length, true or not."""
    headers.setdefault("Content_Length", str(len(body) if length is None else length))
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(data: bytes) -> Answer:
    return lambda connection: connection.send(data)


def redirect(location: str, status: str = "302 Found") -> Answer:
    return reply(status=status, Location=location)


def endless(start: bytes, chunk: bytes, pause_s: float = 0.0) -> Answer:
    def answer(connection: Connection) -> None:
        connection.send(start)
        while connection.wait(pause_s):
            connection.send(chunk)

    return answer


def encoded(size: tuple[int, int] = (6, 4), format: str = "PNG", mode: str = "RGB") -> bytes:
    """An image file with different pixels everywhere."""
    channels = len(mode)
    values = np.arange(size[0] * size[1] * channels, dtype=np.uint32).astype(np.uint8)
    pixels = values.reshape((size[1], size[0], channels)[: 2 + (channels > 1)])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def answer_names(monkeypatch, *answers: list[str]) -> list[str]:
    """The name server gives these addresses, one list per question, the last for ever; returns the questions."""
    asked = []

    def getaddrinfo(host, port, **options):
        asked.append(host)
        families = {4: socket.AF_INET, 6: socket.AF_INET6}
        return [
            (families[6 if ":" in ip else 4], socket.SOCK_STREAM, 6, "", (ip, port, 0, 0) if ":" in ip else (ip, port))
            for ip in answers[min(len(asked), len(answers)) - 1]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked
