"""All tolerances of the tests, in one place: measured, then set at about five times the measured value.

Errors are relative to scale: the largest absolute difference over the largest absolute value of the reference.
"""

import numpy as np

FLOAT32_ACTIVATIONS = 1e-5
"""Logits and hidden states of whole models in float32 on the CPU; the bound of the design."""

FLOAT32_GRADIENTS = 1e-4
"""Gradients of the loss in float32 on the CPU; the bound of the design."""


def relative_error(actual, expected, least_scale: float = 0.0) -> float:
    """Largest absolute difference of two arrays over the largest absolute value of `expected`.

    Args:
        least_scale: the scale where `expected` is smaller than this, for quantities that are zero but for rounding.

    Raises:
        AssertionError: if the shapes differ.
    """
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    if expected.size == 0:
        return 0.0
    scale = max(np.abs(expected).max(), least_scale)
    difference = np.abs(actual - expected).max()
    return float(difference / scale) if scale > 0 else float(difference)


HALF_PRECISION = {"bfloat16": 0.12, "float16": 0.02}
"""Logits of small models in half precision against the same weights in float32."""

INT8 = {"small": 0.1, "fashion": 0.04}
"""Logits of quantized models against the same weights in float32: of the small random ones, and of the shipped one."""

INT8_PT = 0.15
"""Logits of small random models with int8 weights and activations in PyTorch against float32; measured 0.037."""
