"""Small IDEFICS models and batches that no bug can hide in.

Dimensions differ pairwise, so a transposed axis cannot pass; every parameter is random, gates, norms, biases and the
additional vocabulary included, because at their default values (``tanh(0) = 0``, ones, zeros) whole blocks could be
missing unnoticed; rows differ in the number of images, padding and where text begins to see.
"""

import numpy as np

from idefics_common.parameters import Kind, expand

SMALL = {
    "vocab_size": 97,
    "additional_vocab_size": 3,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "cross_layer_interval": 2,
    "alpha_initializer": "ones",
    "qk_layer_norms": True,
    "use_resampler": True,
    "freeze_text_layers": False,
    "freeze_vision_layers": False,
    "vision_config": {
        "embed_dim": 20,
        "image_size": 28,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 36,
    },
    "perceiver_config": {
        "resampler_n_latents": 6,
        "resampler_depth": 2,
        "resampler_n_heads": 3,
        "resampler_head_dim": 10,
        "qk_layer_norms_perceiver": True,
    },
}
"""Keyword arguments of the smallest configuration that has every part; of `IdeficsConfig`, ours or transformers'."""

_PLAIN_RESAMPLER = {**SMALL["perceiver_config"], "qk_layer_norms_perceiver": False}

MATRIX = {
    "base": {},
    "no_resampler": {"use_resampler": False},
    "no_qk_norms": {"qk_layer_norms": False},
    "no_perceiver_norms": {"perceiver_config": _PLAIN_RESAMPLER, "cross_layer_interval": 1},
    "vector_alphas": {"alpha_type": "vector"},
    "every_layer": {"cross_layer_interval": 1},
    "every_fourth_layer": {"cross_layer_interval": 4, "use_resampler": False, "alpha_type": "vector"},
    "no_added_vocabulary": {"additional_vocab_size": 0, "perceiver_config": _PLAIN_RESAMPLER},
    "tied": {"tie_word_embeddings": True},
    "tied_no_added_vocabulary": {
        "tie_word_embeddings": True,
        "additional_vocab_size": 0,
        "qk_layer_norms": False,
        "cross_layer_interval": 4,
    },
    "fewest_norms": {
        "tie_word_embeddings": True,
        "additional_vocab_size": 0,
        "qk_layer_norms": False,
        "perceiver_config": _PLAIN_RESAMPLER,
        "cross_layer_interval": 4,
        "alpha_type": "vector",
    },
    "fewest_parts": {
        "tie_word_embeddings": True,
        "additional_vocab_size": 0,
        "qk_layer_norms": False,
        "use_resampler": False,
        "cross_layer_interval": 1,
        "alpha_type": "vector",
    },
}
"""Overrides of `SMALL`, by name: each changes what the model is made of. Every two choices of what a model is made of
meet in at least one row, see `tests/test_models.py`."""


_VISION = SMALL["vision_config"]

UNUSUAL = {
    "heads_of_one_feature": {"hidden_size": 3, "cross_layer_interval": 1},
    "patches_that_do_not_fill_the_image": {"vision_config": {**_VISION, "image_size": 33}},
    "activations": {"hidden_act": "mish", "vision_config": {**_VISION, "hidden_act": "laplace"}},
    "a_resampler_without_heads_that_is_not_there": {
        "use_resampler": False,
        "perceiver_config": {"resampler_n_heads": 0},
    },
    "dropout_of_everything": {"dropout": 1.0},
}
"""Overrides of `SMALL` that nobody publishes, and that transformers' class builds and runs."""


def small_config(**overrides) -> dict:
    """`SMALL` with overrides, as keyword arguments of a configuration."""
    return {**SMALL, **overrides}


def random_weights(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for every parameter of `config`, by canonical name, in PyTorch's layout.

    Scales are such that activations, scores and gates are of order one, so that every block matters and none saturates.
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for parameter in expand(config):
        if parameter.tied_to is not None:
            weights[parameter.name] = weights[parameter.tied_to]
            continue
        noise = generator.standard_normal(parameter.shape)
        is_norm_scale = parameter.kind in (Kind.LAYER_NORM, Kind.RMS_NORM) and parameter.name.endswith("weight")
        if is_norm_scale:
            value = 1 + 0.2 * noise
        elif parameter.kind in (Kind.LINEAR, Kind.CONV):
            fan_in = np.prod(parameter.shape[1:])
            value = noise / np.sqrt(fan_in)
        elif parameter.name.rpartition(".")[2].startswith("alpha_"):
            value = 0.7 + 0.3 * noise
        else:
            value = 0.5 * noise
        weights[parameter.name] = value.astype(np.float32)
    return weights


def batch(config, *, image_size: int | None = None, padding_side: str = "left", seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for four rows of nine positions and up to two images.

    Row 0 has text before its first image, then two images; row 1 has no image; row 2 is padded and has one; row 3 sees
    its first image from the start, then both at once, which no processor makes but a caller may.
    """
    vision = config.vision_config
    generator = np.random.default_rng(seed)
    rows, length, images = 4, 9, 2
    vocabulary = config.vocab_size + config.additional_vocab_size
    input_ids = generator.integers(3, vocabulary, (rows, length))
    input_ids[0, 3] = vocabulary - 1  # of the additional vocabulary, if there is one
    attention_mask = np.ones((rows, length), dtype=np.int64)
    padded = slice(0, 3) if padding_side == "left" else slice(length - 3, length)
    attention_mask[2, padded] = 0
    input_ids[2, padded] = config.pad_token_id
    image_mask = np.zeros((rows, length, images), dtype=np.int64)
    image_mask[0, 2:5, 0] = 1
    image_mask[0, 5:, 1] = 1
    image_mask[2, 4:, 0] = 1
    image_mask[3, :, 0] = 1
    image_mask[3, 6:, 1] = 1
    size = image_size or vision.image_size
    pixels = generator.standard_normal((rows, images, vision.num_channels, size, size)).astype(np.float32)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": pixels,
        "image_attention_mask": image_mask,
    }


def labels_of(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Labels for a batch: its ids, -100 at padding and at every fourth position."""
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[:, ::4] = -100
    return labels
