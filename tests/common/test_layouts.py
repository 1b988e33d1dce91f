"""Keras layouts: invertible, one for each kind, and shapes that follow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters import Kind, expand
from idefics_common.parameters.layouts import CONVOLUTION, KERAS_LAYOUTS, LINEAR
from tests.models import MATRIX, small_config


@given(data=st.data(), kind=st.sampled_from(list(Kind)))
def test_inverse_undoes_apply(data, kind):
    layout = KERAS_LAYOUTS[kind]
    rank = len(layout.axes) if layout.axes else data.draw(st.integers(0, 4))
    shape = data.draw(st.tuples(*[st.integers(0, 5)] * rank))
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    applied = layout.apply(array)
    assert applied.shape == layout.shape(shape)
    assert np.array_equal(layout.inverse(applied), array)
    assert np.array_equal(layout.apply(layout.inverse(applied)), applied)


def test_axes_go_where_keras_wants_them():
    kernel = np.arange(6).reshape(2, 3)
    assert np.array_equal(LINEAR.apply(kernel), kernel.T)
    filters = np.arange(120).reshape(5, 4, 3, 2)  # out, in, height, width
    assert CONVOLUTION.apply(filters)[2, 1, 3, 4] == filters[4, 3, 2, 1]
    assert CONVOLUTION.shape(filters.shape) == (3, 2, 4, 5)


@pytest.mark.parametrize("variant", MATRIX)
def test_every_parameter_has_a_layout_of_its_rank(variant):
    for parameter in expand(fields_from_dict(small_config(**MATRIX[variant]))):
        layout = KERAS_LAYOUTS[parameter.kind]
        assert layout.axes is None or len(layout.axes) == len(parameter.shape)
