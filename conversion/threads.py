"""Work on many tensors, in one thread or several, with a progress bar; each thread has buffers of its own."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from conversion.streaming import Buffers


class Progress:
    """A progress bar over bytes, with rate and time left, for several threads; hidden where no one watches."""

    def __init__(self, title: str, total: int, shown: bool):
        self._lock = threading.Lock()
        is_hidden = not shown or not sys.stderr.isatty()
        self._bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=is_hidden, file=sys.stderr)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.close()


def map_in_threads(items: Iterable, work: Callable[[Any, Buffers], Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Items with the results of work on them, as they come; the first error ends it.

    Args:
        work: called with an item and the buffers of the thread that it runs in.
    """
    if workers == 1:
        buffers = Buffers()
        for item in items:
            yield item, work(item, buffers)
        return
    local = threading.local()

    def in_thread(item):
        if not hasattr(local, "buffers"):
            local.buffers = Buffers()
        return work(item, local.buffers)

    with ThreadPoolExecutor(workers) as executor:
        futures = {executor.submit(in_thread, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
