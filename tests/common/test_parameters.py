"""The parameter table against what published shapes, transformers' models and arithmetic say."""

import pytest
import transformers

from idefics_common.configuration.fields import fields_from_dict, read_config
from idefics_common.parameters import Part, count_parameters, expand, stale_buffer_names
from tests.models import MATRIX, small_config
from tests.requirements import needs_torch

COUNTS = {
    "config-370m.json": (387, 371_121_544),
    "config-9b.json": (1015, 8_929_679_632),
    "config-80b.json": (1603, 79_967_843_624),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_real_sizes(name, request):
    config = read_config(request.config.rootpath / "tests" / "fixtures" / "configs" / name)
    tensors, parameters = COUNTS[name]
    assert len(expand(config)) == tensors
    assert sum(count_parameters(expand(config)).values()) == parameters


@needs_torch
@pytest.mark.parametrize("variant", MATRIX)
def test_names_and_shapes_are_those_of_transformers(variant):
    import torch

    kwargs = small_config(**MATRIX[variant])
    with torch.device("meta"):
        reference = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**kwargs))
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    config = fields_from_dict(kwargs)
    assert {p.name: p.shape for p in expand(config)} == expected
    assert sum(count_parameters(expand(config)).values()) == sum(p.numel() for p in reference.parameters())


def test_ties_follow_the_configuration():
    tied = {p.name: p.tied_to for p in expand(fields_from_dict(small_config(tie_word_embeddings=True))) if p.tied_to}
    assert tied == {
        "lm_head.weight": "model.embed_tokens.weight",
        "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
    }
    assert not any(p.tied_to for p in expand(fields_from_dict(small_config())))
    assert count_parameters(expand(fields_from_dict(small_config(tie_word_embeddings=True))))[Part.HEAD] == 0


def test_stale_buffers_are_no_parameters():
    config = fields_from_dict(small_config())
    stale = stale_buffer_names(config)
    assert len(stale) == 1 + config.num_hidden_layers + config.num_hidden_layers // config.cross_layer_interval
    assert not stale & {p.name for p in expand(config)}
