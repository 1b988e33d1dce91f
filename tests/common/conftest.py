import time

import pytest
from hypothesis import settings

from idefics_common.fetching import transport
from idefics_common.fetching.fetcher import ImageFetcher
from tests.common.hostile_server import serving

# an example may take as long as the machine needs: the first one imports torch
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("IDEFICS_ALLOW_FETCH", raising=False)


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def fetcher(server):
    """Small limits but for time, and the one local server allowed."""
    return ImageFetcher(
        allow_hosts=[server.host],
        connect_timeout_s=60,
        total_timeout_s=60,
        first_byte_timeout_s=60,
        max_bytes=2**20,
        max_pixels=10**6,
    )


class Clock:
    """What deadlines are measured by: the time, and jumps."""

    def __init__(self):
        self._jumped = 0.0

    def jump(self, seconds: float) -> None:
        self._jumped += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._jumped


@pytest.fixture
def clock(monkeypatch):
    """Lets time pass at once, at a moment that a test chooses, where a real second more or less decides nothing."""
    clock = Clock()
    monkeypatch.setattr(transport, "time", clock)
    return clock
