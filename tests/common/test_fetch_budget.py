"""Limits on all images of one call together: how many, how many pixels, how long, and how many at full size at once."""

import base64
import copy
import dataclasses
import os
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from idefics_common.fetching.budget import FetchBudget
from idefics_common.fetching.fetcher import ImageFetcher, ImageFetchError
from idefics_common.images.loading import load_images
from idefics_common.images.processing import IdeficsImageProcessor
from tests.common.hostile_server import encoded, reply
from tests.common.processors import FIXTURE, letters_processor

PNG = encoded()  # 6 x 4 pixels


def load(urls, fetcher):
    return load_images(urls, [f"image {index}" for index in range(len(urls))], fetcher)


def urls_of(server, count, answer=None):
    return [server.url(f"/{index}.png", answer or reply(PNG)) for index in range(count)]


def test_too_many_urls_are_refused_before_the_first_is_fetched(server, fetcher):
    fetcher = dataclasses.replace(fetcher, max_images_per_call=20)
    urls = urls_of(server, 21)
    with pytest.raises(ImageFetchError, match=r"^image 22: one call names 21 image URLs.*max_images_per_call=20"):
        load([*urls[:2], urls[0], urls[1], *urls[2:]], fetcher)
    assert server.seen == []
    on_hand = [f"data:image/png;base64,{base64.b64encode(PNG).decode()}", str(FIXTURE / "rgb.png")]
    assert len(load([*urls[:20], urls[0], *on_hand], fetcher)) == 23
    assert len(server.seen) == 20


@pytest.mark.parametrize("through", ["url", "data"])
def test_pixels_of_a_call_are_limited_and_not_those_of_the_next(server, fetcher, through):
    fetcher = dataclasses.replace(fetcher, max_pixels_per_call=10 * 6 * 4)
    if through == "url":
        sources = urls_of(server, 30)
    else:
        sources = [f"data:image/png;n={n};base64,{base64.b64encode(PNG).decode()}" for n in range(30)]
    for _ in range(2):
        assert len(load(sources[:10], fetcher)) == 10
    message = r"6 x 4 pixels: with it the images of one call have 264 pixels, more than max_pixels_per_call=240"
    with pytest.raises(ValueError, match=rf"^image \d+: .*{message}"):
        load(sources, fetcher)
    with pytest.raises(ImageFetchError, match="max_pixels_per_call=20"):
        dataclasses.replace(fetcher, max_pixels_per_call=20).fetch(server.url("/a.png", reply(PNG)))


def test_pixels_claimed_in_threads_are_all_counted():
    budget = FetchBudget(call_timeout_s=60, max_pixels_per_call=8 * 500)
    threads = [threading.Thread(target=lambda: [budget.claim_pixels(1) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="have 4001 pixels"):
        budget.claim_pixels(1)


def test_one_deadline_holds_for_all_urls_of_a_call(clock, server, fetcher):
    """Not one of them is late by itself; what eight threads have begun when the time is up are all that are sent."""

    def slow(connection):
        clock.jump(15)
        reply(PNG)(connection)

    fetcher = dataclasses.replace(fetcher, call_timeout_s=60, total_timeout_s=1000)
    with pytest.raises(ImageFetchError, match=r"not done within 60 s for all images of one call \(call_timeout_s\)"):
        load(urls_of(server, 100, slow), fetcher)
    assert len(server.seen) <= 4 + 8
    assert load(urls_of(server, 1, slow), fetcher)[0].size == (6, 4)


@pytest.mark.parametrize("make", [lambda: IdeficsImageProcessor(image_size=28), letters_processor])
def test_few_images_are_held_at_full_size_at_once(make):
    alive, most = weakref.WeakValueDictionary(), []

    class Fetcher(ImageFetcher):
        def fetch(self, url, budget=None):
            image = Image.new("RGB", (90, 60), (int(url[-2:]), 0, 0))
            alive[url] = image
            most.append(len(alive))
            return image

    processor = make()
    processor.fetcher = Fetcher()
    urls = [f"https://example.com/{number}" for number in range(20, 70)]
    is_alone = isinstance(processor, IdeficsImageProcessor)
    pixels = processor(urls) if is_alone else processor(urls, return_tensors="np")["pixel_values"][0]
    assert len(pixels) == len(most) == 50
    assert max(most) <= 2 * min(os.cpu_count(), 8)
    in_memory = IdeficsImageProcessor(image_size=28)([Image.new("RGB", (90, 60), (n, 0, 0)) for n in range(20, 70)])
    np.testing.assert_array_equal(np.asarray(pixels), in_memory)


@pytest.mark.parametrize("name", ["max_images_per_call", "max_pixels_per_call", "call_timeout_s"])
def test_impossible_limits_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, not 0"):
        ImageFetcher(**{name: 0})


def test_a_copied_fetcher_is_the_same():
    fetcher = ImageFetcher()
    assert copy.deepcopy([fetcher])[0] is fetcher
