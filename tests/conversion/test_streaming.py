"""Blocks: transposing, casting and its error, comparing bits."""

import ml_dtypes
import numpy as np
import pytest

from conversion import ConversionError
from conversion.streaming import Buffers, CastError, cast, row_blocks, same_bits, transpose_into

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 16), (200, 129)])
def test_transposing(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    out = np.zeros(shape[::-1], dtype)
    transpose_into(out, values.T)
    np.testing.assert_array_equal(out, values.T)


@pytest.mark.parametrize(("shape", "expected"), [((10, 3), [4, 4, 2]), ((3, 100), [1, 1, 1]), ((4,), [4])])
def test_rows_of_a_block(shape, expected):
    """As many as fit in 48 bytes of 4 each, one at least, and all of them."""
    blocks = list(row_blocks(shape, 4, 48))
    assert [len(rows) for rows in blocks] == expected
    assert [row for rows in blocks for row in rows] == list(range(shape[0]))


def test_buffers_are_used_again():
    buffers = Buffers()
    first = buffers.array("a", (4, 4), np.dtype(np.float32))
    assert np.shares_memory(first, buffers.array("a", (2, 3), BFLOAT16))
    assert not np.shares_memory(first, buffers.array("b", (4, 4), np.dtype(np.float32)))


def test_a_cast_rounds_to_nearest_and_its_error_is_exact():
    values = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -3.0, np.nan, np.inf], np.float32)
    rounded = cast(values, BFLOAT16, Buffers())
    np.testing.assert_array_equal(rounded.astype(np.float32), np.array([1, 1, 1 + 2**-7, -3, np.nan, np.inf], "f4"))
    error = CastError()
    error.add(values, rounded, "x")
    error.add(values[:1], rounded[:1], "x")
    assert error.largest == 2**-9
    assert error.mean == 2 * 2**-9 / 7


def test_a_value_out_of_range_is_an_error():
    values = np.array([1.0, -7e4], np.float32)
    with pytest.raises(ConversionError, match="tensor x: float16 cannot hold 70000"):
        CastError().add(values, cast(values, np.dtype(np.float16), Buffers()), "x")


def test_which_casts_lose_nothing():
    """Decided by the dtypes; held against every value of the narrower one."""
    names = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
    every = np.arange(2**16, dtype=np.uint16)
    for name, narrow in names.items():
        for wide in ("float32", "float64"):
            values = every.view(narrow)
            assert np.can_cast(narrow, np.dtype(wide))
            with np.errstate(invalid="ignore"):
                back = values.astype(wide).astype(narrow)
                assert ((back == values) | np.isnan(values)).all(), name
    assert np.can_cast(np.dtype("f4"), np.dtype("f8"))
    for source, target in (("f8", "f4"), ("f4", "f2"), ("f2", BFLOAT16), (BFLOAT16, "f2"), ("f4", BFLOAT16)):
        assert not np.can_cast(np.dtype(source), np.dtype(target))


def test_bits_are_compared_and_not_values():
    zeros = np.zeros(3, np.float32)
    assert not same_bits(zeros, -zeros)
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert same_bits(nans, nans.copy())
    assert not same_bits(nans[:1], nans[1:])
