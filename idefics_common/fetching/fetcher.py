"""Fetching the images that prompts name by URL, without becoming a tool of whoever wrote the prompt.

Prompt segments that are URLs are fetched, as IDEFICS documents it. Whoever writes a prompt can therefore make this
machine send requests, so all of it is limited: http and https to public addresses only (checked after name resolution,
on the connected socket, and anew at each redirect); time, bytes and pixels of each image, and of all images of a call.
Which addresses: `address_policy`; connections: `transport`; limits of a call: `budget`; decoding: `images.decoding`.

Off altogether with `ImageFetcher(allow_fetch=False)` or the environment variable `IDEFICS_ALLOW_FETCH=0`.
"""

import dataclasses
import functools
import http.client
import os
import re
import ssl
import urllib.parse
import urllib.request

from PIL import Image

from idefics_common.fetching.budget import FetchBudget
from idefics_common.fetching.transport import Deadline, Target, Transport
from idefics_common.images.decoding import DEFAULT_MAX_PIXELS, WEB_FORMATS, more, open_image

ALLOW_FETCH_VARIABLE = "IDEFICS_ALLOW_FETCH"

_REDIRECTS = (301, 302, 303, 307, 308)
# http.client itself asks for "Accept-Encoding: identity".
_HEADERS = {"User-Agent": "idefics-image-fetcher", "Accept": "image/*", "Connection": "close"}
_READ_SIZE = 64 * 1024
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S*|file:/\S*|data:image/(?:\S*|[^\s,]*;base64,[a-z0-9+/=\s]*)", re.IGNORECASE)
_default_tls_context = functools.cache(ssl.create_default_context)
_URL_CHARACTERS = "/%:=&?~+!$,;'@()*[]"  # left as they are; anything else outside letters and digits is %-encoded


class ImageFetchError(ValueError):
    """An image URL was refused, or what it led to could not be used. The message names the URL and why."""


def is_url(text: str) -> bool:
    """Whether a prompt segment names an image by URL and is not text.

    True for any `scheme://...`, `file:/...` or `data:image/...` without whitespace (but for line breaks in base64), so
    strip the segment first. More than http and https on purpose: `ftp://x/y.png` or `file:///etc/passwd` as text would
    leave a model guessing at an image it never saw; `ImageFetcher.fetch` refuses them with an error instead.
    """
    return _URL.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFetcher:
    """Fetches images by URL within limits. Immutable, and safe to share between threads.

    Args:
        allow_fetch: False refuses every URL. The environment variable `IDEFICS_ALLOW_FETCH` does the same when
            it is set to anything but 1, true, yes or on; it is read at each fetch.
        allow_hosts: hosts, as `"host"` or `"host:port"` (`"[::1]:8080"`), that may have addresses which are
            otherwise forbidden, for tests and intranets. The name in the URL must be the same; neither other
            names of that address nor subdomains are meant. A port given here need not be in `allow_ports`.
        allow_ports: TCP ports that URLs may name.
        allow_proxy: use the proxy that the environment (`http_proxy`, `https_proxy`, `all_proxy`; except for
            `no_proxy`) names. Off, a URL for which there is a proxy is refused: the proxy resolves names and
            connects, so that only addresses spelt out in URLs can be checked here. The proxy must do the rest.
        connect_timeout_s: seconds for name resolution, and for each connection attempt.
        first_byte_timeout_s: seconds from the request to the first byte of the answer.
        total_timeout_s: seconds for one fetch in all, redirects included, until the last byte.
        max_bytes: the longest body accepted, in bytes.
        max_pixels: the largest image decoded, width x height.
        max_images_per_call: how many different URLs one call of a processor may name.
        max_pixels_per_call: pixels of all images that a call reads from URLs and data URIs, together. Some 40
            photographs of 12 megapixels by default; how many are decoded at a time is not up to this.
        call_timeout_s: seconds that a call may spend on all of its URLs; a batch fetches several at a time.
        max_redirects: how many redirects are followed.
        formats: the Pillow formats accepted. The default leaves out those whose decoders allocate more than
            the image's dimensions say.
        tls_context: for certificate authorities of one's own; the default trusts the system's. The certificate
            must match the host in the URL in either case, unless this context says otherwise.

    Raises:
        ValueError: a limit that is not positive, or an entry of `allow_hosts` that is not a host.
    """

    allow_fetch: bool = True
    allow_hosts: tuple[str, ...] = ()
    allow_ports: tuple[int, ...] = (80, 443)
    allow_proxy: bool = False
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 10.0
    total_timeout_s: float = 30.0
    max_bytes: int = 20 * 2**20
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_images_per_call: int = 128
    max_pixels_per_call: int = 10 * DEFAULT_MAX_PIXELS
    call_timeout_s: float = 120.0
    max_redirects: int = 5
    formats: tuple[str, ...] = WEB_FORMATS
    tls_context: ssl.SSLContext | None = None

    def __post_init__(self):
        if self.max_redirects < 0:
            raise ValueError(f"max_redirects must not be negative, not {self.max_redirects!r}")
        for name in [field.name for field in dataclasses.fields(self) if field.type in (int, float)]:
            if not getattr(self, name) > 0 and name != "max_redirects":
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("allow_hosts", "formats"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a sequence of strings, not the string {getattr(self, name)!r}")
        # The dataclass is frozen, hence the detour. Lists are welcome; _allowed has hosts in the spelling of _parse.
        for name in ("allow_hosts", "allow_ports", "formats"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "_allowed", frozenset(map(_parse_allowed_host, self.allow_hosts)))

    def __deepcopy__(self, memo) -> "ImageFetcher":
        # Immutable; and a TLS context cannot be copied.
        return self

    def with_allow_fetch(self, allow_fetch: bool | None) -> "ImageFetcher":
        """This fetcher with another `allow_fetch`; None leaves it as it is."""
        return self if allow_fetch is None else dataclasses.replace(self, allow_fetch=allow_fetch)

    def why_off(self) -> str | None:
        """The setting that switches fetching off, or None where it is on."""
        if not self.allow_fetch:
            return "allow_fetch=False"
        setting = os.environ.get(ALLOW_FETCH_VARIABLE, "1").strip().lower()
        return None if setting in ("1", "true", "yes", "on") else f"{ALLOW_FETCH_VARIABLE}={setting}"

    def budget(self) -> FetchBudget:
        """The limits of one call, for all its images together; its time starts now."""
        return FetchBudget(self.call_timeout_s, self.max_pixels_per_call)

    def fetch(self, url: str, budget: FetchBudget | None = None) -> Image.Image:
        """Fetch and decode one image.

        Args:
            url: where it is.
            budget: what is left of the limits of a call of several images; by default, the limits of one call.

        Returns:
            The first frame, fully decoded, in the mode of the file.

        Raises:
            ImageFetchError: fetching is off, the URL or an address behind it is not allowed, a limit was
                exceeded, or the answer is not an image. Names the URL, and the redirect where it happened.
        """
        if reason := self.why_off():
            raise _failure(url, url, f"fetching is off ({reason})")
        budget = budget or self.budget()
        deadline = Deadline(self.total_timeout_s, within=budget.deadline)
        hop = url
        try:
            for _ in range(self.max_redirects + 1):
                answer = self._request(_parse(hop), deadline)
                if isinstance(answer, bytes):
                    return open_image(
                        answer,
                        max_pixels=self.max_pixels,
                        source="the answer",
                        formats=self.formats,
                        claim_pixels=budget.claim_pixels,
                    )
                hop = urllib.parse.urljoin(hop, answer)
            raise ValueError(f"more than max_redirects={self.max_redirects} redirects{more('max_redirects')}")
        except http.client.HTTPException as error:
            # These quote what the server sent, whatever its length, terminal escapes included.
            reason = f"not a valid HTTP answer, {type(error).__name__}: {str(error)[:80]!a}"
            raise _failure(url, hop, reason) from error
        except (ValueError, OSError, OverflowError) as error:
            raise _failure(url, hop, str(error) or type(error).__name__) from error

    def _request(self, target: Target, deadline: Deadline) -> bytes | str:
        """One request: the body of its answer, or the location that it redirects to."""
        host_allowed = not self._allowed.isdisjoint({(target.host, None), (target.host, target.port)})
        if target.port not in self.allow_ports and (target.host, target.port) not in self._allowed:
            raise ValueError(
                f"port {target.port} is not in allow_ports={self.allow_ports}, "
                f"and '{target.authority}' not in allow_hosts"
            )
        proxy = _proxy_for(target)
        if proxy and not self.allow_proxy:
            raise ValueError(
                f"a proxy is set for {target.scheme} URLs, and behind one the address of {target.host} cannot be "
                "checked; allow_proxy=True uses the proxy, no_proxy exempts the host"
            )
        transport = Transport(
            connect_timeout_s=self.connect_timeout_s,
            first_byte_timeout_s=self.first_byte_timeout_s,
            # On top of the body come headers and chunk sizes. http.client would take any amount of both.
            max_received=self.max_bytes + self.max_bytes // 4 + 2**18,
            tls_context=self.tls_context or _default_tls_context(),
        )
        with transport.get(target, _HEADERS, deadline, any_address=host_allowed, proxy=proxy) as response:
            if response.status in _REDIRECTS:
                location = response.getheader("Location")
                if not location:
                    raise ValueError(f"HTTP {response.status} without a Location")
                # Header values arrive as latin-1; what they hold is UTF-8, or already %-encoded.
                return urllib.parse.quote(location.encode("latin-1"), safe=_URL_CHARACTERS + "#")
            return self._body(response)

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            phrase = http.client.responses.get(response.status, "(unknown status)")
            raise ValueError(f"expected HTTP status 200 and got {response.status} {phrase}")
        encoding = response.getheader("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise ValueError(f"expected no Content-Encoding, as requested, and got {encoding[:40]!r}")
        content_type = response.getheader("Content-Type", "")
        if content_type.strip().lower().startswith("text/"):
            raise ValueError(f"expected an image and got Content-Type {content_type[:60]!r}")
        declared = response.length
        if declared is not None and declared > self.max_bytes:
            raise ValueError(f"{declared} bytes declared, more than max_bytes={self.max_bytes}{more('max_bytes')}")
        body = bytearray()
        while part := response.read(_READ_SIZE):
            body += part
            if len(body) > self.max_bytes:
                raise ValueError(f"more than max_bytes={self.max_bytes} sent{more('max_bytes')}")
        if declared is not None and len(body) != declared:
            raise ValueError(f"{declared} bytes declared and only {len(body)} sent")
        return bytes(body)


def _parse(url: str) -> Target:
    """Split a URL and refuse what no image URL needs. Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        advice = "; for a file of this machine pass PIL.Image.open(path)" if parts.scheme == "file" else ""
        raise ValueError(
            f"only http and https URLs are fetched, not {parts.scheme or 'one without a scheme'!r}{advice}"
        )
    if "@" in parts.netloc:
        raise ValueError("a user name or password in a URL is not allowed")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("white space or a control character in a URL is not allowed")
    host = _normal_host(parts.hostname or "")
    port = parts.port if parts.port is not None else {"http": 80, "https": 443}[parts.scheme]
    path = urllib.parse.quote(parts.path or "/", safe=_URL_CHARACTERS)
    query = urllib.parse.quote(parts.query, safe=_URL_CHARACTERS)
    return Target(parts.scheme, host, port, f"{path}?{query}" if query else path)


def _normal_host(host: str) -> str:
    """Lower-case ASCII, international names encoded, without the root dot. Raises ValueError."""
    if not host:
        raise ValueError("the URL has no host")
    try:
        ascii_host = host.encode("idna").decode().lower().removesuffix(".")
    except UnicodeError as error:
        raise ValueError(f"{host!r} is not a host name: {error}") from None
    # IPv6 zones (%eth0) name an interface of this machine; everything else outside this set is no host at all.
    if not re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f.:]+", ascii_host):
        raise ValueError(f"{host!r} is not a host name")
    return ascii_host


def _parse_allowed_host(entry: str) -> tuple[str, int | None]:
    parts = urllib.parse.urlsplit(f"//{entry}")
    try:
        if parts.path or parts.query or parts.fragment or "@" in entry:
            raise ValueError("more than a host")
        return _normal_host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise ValueError(f"allow_hosts: expected 'host' or 'host:port', not {entry!r} ({error})") from None


def _proxy_for(target: Target) -> str | None:
    if urllib.request.proxy_bypass(target.authority):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(target.scheme) or proxies.get("all")


def _displayed(url: str) -> str:
    """A URL for error messages: printable, without passwords, not too long."""
    shown = re.sub(r"//[^/?#]*@", "//***@", url)
    return ascii(shown if len(shown) <= 200 else shown[:197] + "...")


def _failure(url: str, hop: str, reason: str) -> ImageFetchError:
    through = f", redirected to {_displayed(hop)}" if hop != url else ""
    return ImageFetchError(f"cannot fetch {_displayed(url)}{through}: {reason}")
