"""The interpolation matrices against torch's bicubic interpolation, the kernel of the published checkpoints."""

import numpy as np
import pytest

from idefics_common.position_grid import interpolation_matrix
from tests.requirements import needs_torch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@needs_torch
@pytest.mark.parametrize(("grid", "height", "width"), [(16, 32, 24), (16, 8, 17), (2, 4, 4), (2, 3, 1), (5, 5, 7)])
def test_t12_matrices_interpolate_as_torch_does(grid, height, width):
    import torch

    values = np.random.default_rng(0).standard_normal((1, 6, grid, grid)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values),
        scale_factor=((height + 0.1) / grid, (width + 0.1) / grid),
        mode="bicubic",
        align_corners=False,
    )
    rows, columns = interpolation_matrix(grid, height), interpolation_matrix(grid, width)
    actual = np.einsum("yi,xj,bcij->bcyx", rows, columns, values)
    assert relative_error(actual, expected) < FLOAT32_ACTIVATIONS


def test_rows_are_averages():
    matrix = interpolation_matrix(16, 37)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert (np.count_nonzero(matrix, axis=1) <= 4).all()
