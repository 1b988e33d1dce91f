"""Masks of images against a plain statement of the rule, and against transformers' own loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from idefics_common.prompts.image_masks import image_attention_mask

PAD, BOS, EOS, WORD, IMAGE = 0, 1, 2, 5, 7

token_ids = arrays(
    np.int64,
    st.tuples(st.integers(1, 3), st.integers(1, 24)),
    elements=st.sampled_from([PAD, BOS, EOS, WORD, IMAGE, IMAGE]),
)


def visible_images(row: list[int], num_images: int) -> list[list[int]]:
    """The rule, word for word, for one row."""
    seen, last, rows = None, -1, []
    for token in row:
        if token == IMAGE:
            last += 1
            seen = last
        rows.append([int(image == seen) for image in range(num_images)])
        if token == EOS:
            seen = None
    return rows


@given(ids_BT=token_ids, num_images=st.integers(1, 8))
def test_mask_follows_the_rule(ids_BT, num_images):
    mask = image_attention_mask(ids_BT, IMAGE, EOS, num_images)
    assert mask.dtype == np.int64
    assert mask.tolist() == [visible_images(row, num_images) for row in ids_BT.tolist()]


@given(ids_BT=token_ids, num_images=st.integers(1, 8), eos_is_pad=st.booleans())
def test_mask_equals_transformers(ids_BT, num_images, eos_is_pad):
    torch = pytest.importorskip("torch")
    from transformers.models.idefics import processing_idefics as reference

    eos = PAD if eos_is_pad else EOS

    class Tokenizer:
        eos_token_id = eos

        @staticmethod
        def convert_tokens_to_ids(token):
            return {"<image>": IMAGE}[token]

    expected, _ = reference.image_attention_mask_for_packed_input_ids(torch.from_numpy(ids_BT), Tokenizer, "pt")
    expected = reference.incremental_to_binary_attention_mask(expected, "pt", num_classes=num_images)
    np.testing.assert_array_equal(image_attention_mask(ids_BT, IMAGE, eos, num_images), expected.numpy())


def test_any_of_several_ends_of_text_hides_the_image_from_what_follows():
    ids = [[IMAGE, EOS, WORD, IMAGE, PAD, WORD]]
    mask = image_attention_mask(ids, IMAGE, [EOS, PAD], 2)[0]
    assert mask.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1], [0, 1], [0, 0]]


def test_p11_text_after_an_image_sees_it():
    ids = [[BOS, WORD, IMAGE, WORD, WORD, IMAGE, WORD, EOS, WORD]]
    mask = image_attention_mask(np.array(ids), IMAGE, EOS, 2)
    assert mask[0].tolist() == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 0]]


def test_without_image_or_end_tokens():
    ids = np.array([[WORD, EOS, WORD]])
    assert not image_attention_mask(ids, None, EOS, 1).any()
    assert image_attention_mask(np.array([[IMAGE, EOS, WORD]]), IMAGE, None, 1).all()


@pytest.mark.parametrize(
    ("shape", "num_images", "message"),
    [((4,), 1, r"\(batch, text length\), got \(4,\)"), ((1, 4), 0, "at least 1, got 0")],
)
def test_bad_arguments_are_named(shape, num_images, message):
    with pytest.raises(ValueError, match=message):
        image_attention_mask(np.zeros(shape, dtype=np.int64), IMAGE, EOS, num_images)
