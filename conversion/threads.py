"""Work on many tensors, in one thread or several, with a progress bar; each thread has its own buffers."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from conversion.streaming import Buffers


class Threads(AbstractContextManager):
    """Threads that share a progress bar over bytes, with rate and time left.

    Args:
        title: of the bar. total: bytes in all.
        shown: show the bar, if standard error is a terminal.
        count: how many threads; by default one per processor, two at most.
    """

    def __init__(self, title: str, total: int, shown: bool, count: int | None):
        self._count = count or min(2, os.cpu_count() or 1)
        self._lock = threading.Lock()
        # None lets tqdm ask whether it is a terminal
        self._bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None if shown else True)

    def advance(self, nbytes: int) -> None:
        """Move the bar on; for any thread."""
        with self._lock:
            self._bar.update(nbytes)

    def map(self, items: Iterable, work: Callable[[Any, Buffers], Any]) -> Iterator[tuple[Any, Any]]:
        """Items with the results of work on them, as they come; the first error ends it.

        Args:
            work: called with an item and the buffers of the thread that it runs in.
        """
        if self._count == 1:
            buffers = Buffers()
            for item in items:
                yield item, work(item, buffers)
            return
        local = threading.local()

        def start_thread():
            local.buffers = Buffers()

        with ThreadPoolExecutor(self._count, initializer=start_thread) as executor:
            futures = {executor.submit(lambda item: work(item, local.buffers), item): item for item in items}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, *exc_info) -> None:
        self._bar.close()
