"""E7: caches that quantise keys and values with optimum-quanto and HQQ."""

import pytest
import torch

from idefics_pt.transformers_versions import CACHE
from tests.pt.pairs import our_model, reference_model, torch_batch

QUANTIZED = {"nbits": 4, "q_group_size": 24, "residual_length": 4}


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize(("backend", "axes"), [("quanto", 0), ("hqq", 1)])
def test_quantized_caches_keep_what_transformers_keeps(backend, axes, kwargs):
    ours, reference = our_model(), reference_model()
    inputs = torch_batch(ours.config)
    options = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    options |= {"return_dict_in_generate": True, "output_scores": True, "cache_implementation": "quantized"}
    options["cache_config"] = {"backend": backend, "axis_key": axes, "axis_value": axes, **QUANTIZED}
    actual = ours.generate(**inputs, **options)
    exact = ours.generate(**inputs, **{**options, "cache_implementation": None, "cache_config": None})
    assert not torch.allclose(actual.scores[1], exact.scores[1], atol=1e-3)
    assert actual[CACHE].image_memory.key_values[0][0].dtype == torch.float32
    if "prefill_chunk_size" in kwargs:  # which transformers' own class refuses with images
        whole = ours.generate(**inputs, **{**options, "prefill_chunk_size": None})
        assert torch.allclose(actual.scores[0], whole.scores[0], atol=3.0)
        return
    assert torch.equal(actual.sequences, reference.generate(**inputs, **options).sequences)
