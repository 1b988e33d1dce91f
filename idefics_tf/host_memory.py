"""Memory that numpy fills and TensorFlow takes over, so that a value read from a file needs no further copy.

TensorFlow never writes to such memory, because it does not own it: what updates a variable in place, such as an
optimizer, first moves the variable to memory of TensorFlow's own.

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
    """A C-contiguous array of zeros that starts at a page, which is aligned enough for any kernel of TensorFlow.

    numpy's allocator would ask for huge pages, and in a virtual machine these can take several times as long to get.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


@contextlib.contextmanager
def provided(sizes: dict[str, int]) -> Iterator[dict[str, np.ndarray]]:
    """Allocate arrays of bytes in a thread while the context runs, into the dict that it yields.

    The arrays are from `aligned_empty`, with every page touched: the system provides a page at its first write, which
    for most weights takes longer than reading them. Arrays that are not ready when the context ends are left out.

    Args:
        sizes: bytes wanted, by name.
    """
    arrays, is_over = {}, threading.Event()

    def provide():
        # the largest first: each array waits once for the interpreter's lock
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
    """A tensor on the CPU that shares the memory of an array from `aligned_empty`, and keeps it.

    The array must not be written to afterwards: the tensor would change with it.
    """
    # DLPack as numpy speaks it has no bfloat16, so all dtypes travel as integers of their size
    bits = tf.experimental.dlpack.from_dlpack(array.view(f"u{array.itemsize}").__dlpack__())
    with tf.device("CPU:0"):
        return tf.bitcast(bits, tf.as_dtype(array.dtype))
