"""Memory that numpy fills and TensorFlow takes over, so that a value read from a file is in place without another copy.

Unusual: a tensor over such memory is never written to. TensorFlow knows that it does not own the memory; what updates a
variable in place, such as an optimizer, therefore moves the variable to memory of TensorFlow's own first.

Keras alone has this file; transformers loads the weights of `idefics_pt`.
"""

import math

import numpy as np
import tensorflow as tf

_ALIGNMENT = 64  # bytes; TensorFlow's kernels rely on it


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that starts where TensorFlow wants its tensors to start."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def take_over(array: np.ndarray) -> tf.Tensor:
    """The tensor on the CPU that is an array from `aligned_empty`, sharing and keeping its memory.

    The caller forgets the array: what were written to it later, the tensor would show.
    """
    # DLPack as numpy speaks it has no bfloat16, so all dtypes travel as integers of their size
    bits = tf.experimental.dlpack.from_dlpack(array.view(f"u{array.itemsize}").__dlpack__())
    with tf.device("CPU:0"):
        return tf.bitcast(bits, tf.as_dtype(array.dtype))
