"""Memory that numpy fills and TensorFlow takes over, so that a value read from a file is in place without another copy.

Unusual: a tensor over such memory is never written to. TensorFlow knows that it does not own the memory; what updates a
variable in place, such as an optimizer, therefore moves the variable to memory of TensorFlow's own first.

Keras alone has this file; transformers loads the weights of `idefics_pt`.
"""

import contextlib
import math
import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A C-contiguous array of zeros that starts at a page, where any kernel of TensorFlow wants its tensors to start.

    Pages are the system's to choose, as they are where TensorFlow allocates. numpy's own memory asks for huge ones,
    which takes several times as long to get in a virtual machine whose host gives out what is touched first.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


@contextlib.contextmanager
def provided(sizes: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
    """Within, a thread puts arrays of bytes from `aligned_empty` into a dict, by name, with all their pages in place.

    The system provides a page when it is first written to, which for most weights takes longer than reading them. The
    dict has what is done when the context ends.

    Args:
        sizes: bytes wanted, by name.
    """
    arrays, is_over = {}, threading.Event()

    def provide():
        # the largest first: whoever holds the interpreter is asked for it once per array
        for name in sorted(sizes, key=sizes.get, reverse=True):
            if is_over.is_set():
                break
            array = aligned_empty((sizes[name],), np.dtype(np.uint8))
            array[:: mmap.PAGESIZE] = 0
            arrays[name] = array

    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(provide)
        try:
            yield arrays
        finally:
            is_over.set()
        finished.result()


def take_over(array: np.ndarray) -> tf.Tensor:
    """The tensor on the CPU that is an array from `aligned_empty`, sharing and keeping its memory.

    The caller forgets the array: what were written to it later, the tensor would show.
    """
    # DLPack as numpy speaks it has no bfloat16, so all dtypes travel as integers of their size
    bits = tf.experimental.dlpack.from_dlpack(array.view(f"u{array.itemsize}").__dlpack__())
    with tf.device("CPU:0"):
        return tf.bitcast(bits, tf.as_dtype(array.dtype))
