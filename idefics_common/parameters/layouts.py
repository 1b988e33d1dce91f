"""How Keras lays out each kind of tensor, as invertible objects.

The canonical layout is PyTorch's. A layout is chosen by the kind of a tensor, from the parameter table, never by its
shape. Applying a layout gives a view: nothing is copied until someone wants the result contiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from idefics_common.parameters.rows import Kind


@dataclass(frozen=True)
class Layout:
    """An order of axes.

    Attributes:
        axes: for each axis of the result, the axis of the canonical tensor that it is; None leaves a tensor of any rank
            as it is.
    """

    axes: tuple[int, ...] | None = None

    def apply(self, array: np.ndarray) -> np.ndarray:
        """A canonical array in this layout. Raises `ValueError` for an array of another rank."""
        return array if self.axes is None else np.transpose(array, self.axes)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """An array in this layout, canonical again; ``inverse(apply(x))`` is ``x``."""
        return array if self.axes is None else np.transpose(array, np.argsort(self.axes))

    def shape(self, canonical_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in this layout of a tensor of a canonical shape."""
        order = range(len(canonical_shape)) if self.axes is None else self.axes
        return tuple(canonical_shape[axis] for axis in order)


IDENTITY = Layout()
LINEAR = Layout((1, 0))
"""(out, in) to (in, out)."""
CONVOLUTION = Layout((2, 3, 1, 0))
"""(out, in, height, width) to (height, width, in, out)."""

KERAS_LAYOUTS: dict[Kind, Layout] = {
    **dict.fromkeys(Kind, IDENTITY),
    Kind.LINEAR: LINEAR,
    Kind.CONV: CONVOLUTION,
}
"""The layout of each kind of tensor in Keras."""
