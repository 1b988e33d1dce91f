"""Memory that numpy fills and TensorFlow takes over: shared, aligned, kept alive, and never written to."""

import gc
import mmap
import resource
import sys
import time
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import idefics_tf.host_memory
from idefics_tf.host_memory import aligned_empty, provided, take_over

_BITS = {2: tf.uint16, 4: tf.uint32}


def memory_of(tensor) -> np.ndarray:
    """The bits of a tensor on the CPU in place."""
    return np.asarray(memoryview(tf.bitcast(tensor, _BITS[tensor.dtype.size])))


def filled(shape, dtype="float32") -> np.ndarray:
    array = aligned_empty(shape, np.dtype(dtype))
    array[...] = np.arange(array.size).reshape(shape)
    return array


@pytest.fixture
def garbage_of_this_test_only():
    """Collecting all of a long process takes a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("garbage_of_this_test_only")
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5)])
def test_a_variable_shares_the_memory_and_keeps_it(shape, dtype):
    array = filled(shape, dtype)
    expected, address = array.copy(), array.ctypes.data
    assert address % 64 == 0
    variable = keras.Variable(np.zeros(shape), dtype=array.dtype.name)
    variable.assign(take_over(array))
    assert np.shares_memory(memory_of(variable.value.value()), array.view(f"u{array.itemsize}"))
    memory = weakref.ref(array.base)
    del array
    gc.collect()
    assert memory() is not None
    np.testing.assert_array_equal(variable.numpy(), expected)
    del variable
    gc.collect()
    assert memory() is None


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted by thread")
def test_provided_memory_needs_no_more_pages():
    sizes = {"small": 10, "none": 0, "large": 4000 * mmap.PAGESIZE}
    with provided(sizes) as arrays:
        end = time.monotonic() + 300  # so that a size that is forgotten fails the test instead of hanging it
        while len(arrays) < len(sizes) and time.monotonic() < end:
            time.sleep(0.001)
    assert {name: array.nbytes for name, array in arrays.items()} == sizes
    assert all(array.ctypes.data % 64 == 0 and not array.any() for array in arrays.values())
    before = page_faults()
    arrays["large"].fill(1)
    assert page_faults() - before < 100


def test_providing_memory_ends_with_the_context(monkeypatch):
    """Else it would go on for half an hour."""

    def slow(shape, dtype):
        time.sleep(0.02)
        return aligned_empty(shape, dtype)

    monkeypatch.setattr(idefics_tf.host_memory, "aligned_empty", slow)
    sizes = dict.fromkeys(range(10**5), 1)
    with pytest.raises(KeyboardInterrupt), provided(sizes) as arrays:
        raise KeyboardInterrupt
    assert len(arrays) < len(sizes)


def test_memory_that_cannot_be_had_is_an_error():
    with pytest.raises((OSError, OverflowError, MemoryError)), provided({"too large": 2**62}):
        pass


def add_one(variable):
    variable.value.assign_add(tf.ones_like(variable.value))


def scatter(variable):
    variable.value.scatter_nd_update([[0]], [[-1.0] * 64])


def optimizing(make_optimizer):
    """An update by an optimizer, whose own variables are made here: a `tf.function` may make none."""

    def prepare(variable):
        optimizer = make_optimizer()
        optimizer.build([variable])
        return lambda variable: optimizer.apply([tf.ones_like(variable.value)])

    return prepare


UPDATES = {
    "add_one": lambda variable: add_one,
    "scatter": lambda variable: scatter,
    "sgd": optimizing(lambda: keras.optimizers.SGD(1.0, momentum=0.9)),
    "adamw": optimizing(lambda: keras.optimizers.AdamW(0.1)),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_updates_in_place_go_to_memory_of_tensorflow(update, compiled):
    array = filled((64, 64))
    expected = array.copy()
    variable = keras.Variable(np.zeros((64, 64)), dtype="float32")
    variable.assign(take_over(array))
    prepared, ran_eagerly = UPDATES[update](variable), []

    def function():
        ran_eagerly.append(tf.executing_eagerly())
        prepared(variable)

    if compiled != "eager":
        function = tf.function(function, jit_compile=compiled == "xla")
    function()
    function()
    assert not np.array_equal(variable.numpy(), expected)
    assert set(ran_eagerly) == {compiled == "eager"}
    np.testing.assert_array_equal(array, expected)
