"""Limits of one call on all images that its prompts name: time and pixels, shared by the threads that load them."""

import threading

from idefics_common.fetching.transport import Deadline
from idefics_common.images.decoding import more


class FetchBudget:
    """The time and the pixels that a call has left. Safe to share between threads.

    Args:
        call_timeout_s: seconds for all images of the call together, counted from now.
        max_pixels_per_call: pixels, width x height, of all of them together.
    """

    def __init__(self, call_timeout_s: float, max_pixels_per_call: int):
        self.deadline = Deadline(call_timeout_s, "for all images of one call (call_timeout_s)")
        self._max_pixels = max_pixels_per_call
        self._claimed = 0
        self._lock = threading.Lock()

    def claim_pixels(self, count: int) -> None:
        """Take pixels for an image about to be decoded. Raises ValueError if the call has fewer left."""
        with self._lock:
            claimed = self._claimed + count
            if claimed > self._max_pixels:
                raise ValueError(
                    f"with it the images of one call have {claimed} pixels, more than "
                    f"max_pixels_per_call={self._max_pixels}; it was not decoded{more('max_pixels_per_call')}"
                )
            self._claimed = claimed
