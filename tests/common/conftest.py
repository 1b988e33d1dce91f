import pytest
from hypothesis import settings

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
    """Small limits, and the one local server allowed."""
    return ImageFetcher(
        allow_hosts=[server.host], total_timeout_s=10, first_byte_timeout_s=10, max_bytes=2**20, max_pixels=10**6
    )
