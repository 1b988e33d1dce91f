"""Bicubic interpolation of a grid of position embeddings, as two small explicit matrices shared by both rooms.

Frameworks disagree about bicubic interpolation: torch's kernel has a = -0.75, TensorFlow's a = -0.5, which moves the
interpolated grid by 11 % and logits by 1.7e-4. Interpolation is linear in the grid, so it is written here once as a
matrix for each axis; a room only multiplies: ``out[y, x] = sum_ij rows[y, i] * columns[x, j] * grid[i, j]``.

Source: R. Keys, "Cubic convolution interpolation for digital image processing", 1981, with a = -0.75, sample points at
pixel centres and the border repeated. The scale is ``(size + 0.1) / grid_size``, as in DINO and the reference model.
"""

import numpy as np

_A = -0.75
_SIZE_OFFSET = 0.1


def interpolation_matrix(grid_size: int, size: int) -> np.ndarray:
    """The matrix that resamples one axis of a grid.

    Args:
        grid_size: number of positions that the model has along one side.
        size: number of positions wanted.

    Returns:
        float32 array (size, grid_size); each row sums to 1 and has at most four weights that are not zero.
    """
    # float32 throughout: the position of a sample decides between neighbours, so it has to round as torch's does
    scale = np.float32(1.0 / ((size + _SIZE_OFFSET) / grid_size))
    centre = scale * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    left = np.floor(centre).astype(np.int64)
    offset = (centre - left).astype(np.float32)
    matrix = np.zeros((size, grid_size), dtype=np.float32)
    rows = np.arange(size)
    for tap in range(-1, 3):
        column = np.clip(left + tap, 0, grid_size - 1)
        np.add.at(matrix, (rows, column), _keys_kernel(np.abs(offset - tap)))
    return matrix


def _keys_kernel(distance: np.ndarray) -> np.ndarray:
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0)).astype(np.float32)
