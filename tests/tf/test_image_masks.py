"""Masks derived from tokens in TensorFlow, against the numpy rule of the core."""

import numpy as np
import pytest

from idefics_common.prompts.image_masks import image_attention_mask
from idefics_tf.image_masks import mask_from_tokens

IMAGE, EOS = 7, 2


@pytest.mark.parametrize("eos", [None, EOS, [EOS]])
def test_mask_from_tokens_is_the_rule_of_the_core(eos):
    ids = np.random.default_rng(0).choice([IMAGE, EOS, 1, 3, 4], size=(200, 12), p=[0.2, 0.15, 0.25, 0.2, 0.2])
    expected = image_attention_mask(ids, IMAGE, EOS if eos else None, num_images=3)
    assert np.array_equal(mask_from_tokens(ids, IMAGE, eos, 3), expected.astype(bool))
    assert not np.array_equal(mask_from_tokens(ids, IMAGE, 3, 3), expected.astype(bool))
