"""The configuration: transformers' fields and defaults, files both ways, and impossible values refused."""

import json

import pytest
import transformers

from idefics_common.configuration.config import IdeficsConfig, IdeficsPerceiverConfig, IdeficsVisionConfig
from idefics_common.configuration.fields import ACTIVATIONS, ROPE_TYPES, check_fields, fields_from_dict, read_config
from tests.models import MATRIX, small_config
from tests.requirements import needs_torch

PAIRS = [
    (IdeficsConfig, transformers.IdeficsConfig),
    (IdeficsVisionConfig, transformers.models.idefics.configuration_idefics.IdeficsVisionConfig),
    (IdeficsPerceiverConfig, transformers.models.idefics.configuration_idefics.IdeficsPerceiverConfig),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_fields_and_defaults_are_those_of_transformers(ours, theirs):
    assert ours().to_dict() == theirs().to_dict()
    assert ours.model_type == theirs.model_type
    assert ours.attribute_map == theirs.attribute_map


@pytest.mark.parametrize("variant", MATRIX)
def test_files_go_both_ways(variant, tmp_path):
    kwargs = small_config(**MATRIX[variant])
    IdeficsConfig(**kwargs).save_pretrained(tmp_path / "ours")
    transformers.IdeficsConfig(**kwargs).save_pretrained(tmp_path / "theirs")
    expected = IdeficsConfig(**kwargs).to_dict()
    for back in (
        transformers.AutoConfig.from_pretrained(tmp_path / "ours"),
        IdeficsConfig.from_pretrained(tmp_path / "theirs"),
    ):
        assert {**back.to_dict(), "_name_or_path": ""} == expected


@pytest.mark.parametrize("variant", MATRIX)
def test_plain_fields_are_the_configuration(variant, tmp_path):
    config = IdeficsConfig(**small_config(**MATRIX[variant]))
    config.save_pretrained(tmp_path)
    plain = read_config(tmp_path)
    for part, of_config in ((plain, config), (plain.vision_config, config.vision_config)):
        for name, value in vars(part).items():
            if name not in ("vision_config", "perceiver_config"):
                expected = getattr(of_config, name)
                assert value == (list(expected) if isinstance(value, list) else expected), name


def test_published_files_leave_defaults_out():
    config = fields_from_dict(
        {"model_type": "idefics", "use_resampler": True, "perceiver_config": {"resampler_depth": 6}}
    )
    assert (config.hidden_size, config.vision_config.embed_dim, config.perceiver_config.use_resampler) == (
        4096,
        768,
        True,
    )


def test_d14_resampler_flag_of_the_perceiver_counts():
    asked = {"use_resampler": True}
    assert IdeficsConfig(perceiver_config=asked).use_resampler is True
    assert fields_from_dict({"perceiver_config": asked}).use_resampler is True
    # the model's own flag decides where it is given: so say the published files
    assert IdeficsConfig(use_resampler=True, perceiver_config={"use_resampler": False}).perceiver_config.use_resampler
    assert IdeficsConfig(use_resampler=False, perceiver_config=asked).use_resampler is False
    assert IdeficsConfig().use_resampler is False


IMPOSSIBLE = [
    (
        {"num_hidden_layers": 5, "cross_layer_interval": 2},
        "num_hidden_layers must be a multiple of cross_layer_interval, got 5 and 2",
    ),
    ({"hidden_size": 25}, "hidden_size must be a multiple of num_attention_heads, got 25 and 3"),
    ({"hidden_size": 9}, "must be even, because rotary .* got 9 / 3"),
    ({"alpha_type": "matrix"}, "alpha_type must be one of float, vector; got 'matrix'"),
    ({"alpha_initializer": "twos"}, "alpha_initializer must be one of zeros, .* got 'twos'"),
    ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    ({"additional_vocab_size": -1}, "additional_vocab_size must be 0 or more, got -1"),
    ({"dropout": 1.1}, "dropout must be from 0 to 1, got 1.1"),
    (
        {"vision_config": {"image_size": 13, "patch_size": 14}},
        "vision_config.image_size must be at least vision_config.patch_size, got 13 and 14",
    ),
    (
        {"vision_config": {"image_size": [28, 56]}},
        r"vision_config.image_size must be one number or two equal ones, got \[28, 56\]",
    ),
    ({"vision_config": {"embed_dim": 21, "num_attention_heads": 2}}, "vision_config.embed_dim must be a multiple"),
    (
        {"perceiver_config": {"resampler_n_latents": 0}},
        "perceiver_config.resampler_n_latents must be a positive integer",
    ),
    (
        {"vision_config": {"num_hidden_layers": -3}},
        "vision_config.num_hidden_layers must be a positive integer, got -3",
    ),
    ({"vision_config": {"hidden_act": "nope"}}, "vision_config.hidden_act must be one of gelu, .*; got 'nope'"),
    ({"hidden_act": "nope"}, "hidden_act must be one of gelu, .*; got 'nope'"),
    ({"pad_token_id": 97}, "pad_token_id must be None or from 0 to vocab_size - 1 = 96, .* got 97"),
    ({"pad_token_id": -98}, "pad_token_id must be None or from 0 .* got -98"),
    (
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 10000.0}},
        "rope_parameters: rope_type must be one of default, .*; got 'foo'",
    ),
    (
        {"freeze_text_module_exceptions": ["LayerNorm", "BatchNorm"]},
        r"freeze_text_module_exceptions must be names out of LayerNorm, .*; got \['BatchNorm'\]",
    ),
    (
        {"freeze_vision_module_exceptions": ["BatchNorm"]},
        r"freeze_vision_module_exceptions must be names out of LayerNorm, RMSNorm, Linear, Embedding; got \['Batch",
    ),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_d7_impossible_configurations_are_refused(change, message, tmp_path):
    config = IdeficsConfig(**small_config(**change))  # E16: tools make such, and set other fields later
    with pytest.raises(ValueError, match=message):
        check_fields(config)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small_config(**change)))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(tmp_path)


@needs_torch
def test_names_are_those_that_the_rooms_know():
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}
    assert set(ACTIVATIONS) == {name for name in ACT2FN if not [*ACT2FN[name].parameters()]}


@pytest.mark.parametrize("fields", [{"hidden_size": 32}, {"num_hidden_layers": 3, "cross_layer_interval": 4}, {}])
def test_e16_partial_configurations_can_be_made_completed_and_saved(fields, tmp_path):
    config = IdeficsConfig(**fields)
    assert IdeficsVisionConfig(embed_dim=30).embed_dim == 30
    config.update({"num_attention_heads": 4, "cross_layer_interval": 1})
    check_fields(config)
    config.save_pretrained(tmp_path)
    assert IdeficsConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("pad_token_id", [None, 0, 96, -1])
def test_pads_of_the_base_vocabulary_are_possible(pad_token_id):
    check_fields(IdeficsConfig(**small_config(pad_token_id=pad_token_id)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"model_type": "llama"}', "got 'llama'"),
    ],
)
def test_files_that_are_no_configuration_are_named(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json.*{message}"):
        read_config(tmp_path)


def test_square_pairs_of_sizes_are_one_number():
    config = IdeficsConfig(vision_config={"image_size": [28, 28], "patch_size": (14, 14)})
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (28, 14)
