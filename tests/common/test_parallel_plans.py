"""The plans for several devices, in full, for a model that has every part and for one that has not."""

import subprocess
import sys

from idefics_common.configuration.fields import fields_from_dict
from idefics_common.parameters.parallel_plans import fully_sharded_plan, tensor_parallel_plan
from tests.models import small_config

DECODER_AND_VISION = {
    "embed_tokens": "decoupled_embedding",
    "vision_model.encoder.layers.*.self_attn.k_proj": "colwise",
    "vision_model.encoder.layers.*.self_attn.v_proj": "colwise",
    "vision_model.encoder.layers.*.self_attn.q_proj": "colwise",
    "vision_model.encoder.layers.*.self_attn.out_proj": "rowwise",
    "vision_model.encoder.layers.*.mlp.fc1": "colwise",
    "vision_model.encoder.layers.*.mlp.fc2": "rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "gated_cross_attn_layers.*.cross_attn.q_proj": "colwise",
    "gated_cross_attn_layers.*.cross_attn.k_proj": "colwise",
    "gated_cross_attn_layers.*.cross_attn.v_proj": "colwise",
    "gated_cross_attn_layers.*.cross_attn.o_proj": "rowwise",
    "gated_cross_attn_layers.*.mlp.gate_proj": "colwise",
    "gated_cross_attn_layers.*.mlp.up_proj": "colwise",
    "gated_cross_attn_layers.*.mlp.down_proj": "rowwise",
}
CROSS_ATTENTION_NORMS = {
    "gated_cross_attn_layers.*.cross_attn.q_layer_norm": "replicated_with_grad_allreduce",
    "gated_cross_attn_layers.*.cross_attn.k_layer_norm": "replicated_with_grad_allreduce",
}
RESAMPLER = {
    "perceiver_resampler.blocks.*.0.q_layer_norm": "replicated_with_grad_allreduce",
    "perceiver_resampler.blocks.*.0.k_layer_norm": "replicated_with_grad_allreduce",
    "perceiver_resampler.blocks.*.0.q_proj": "colwise",
    "perceiver_resampler.blocks.*.0.k_proj": "colwise",
    "perceiver_resampler.blocks.*.0.v_proj": "colwise",
    "perceiver_resampler.blocks.*.0.output_proj": "rowwise",
    "perceiver_resampler.blocks.*.1.fc": "colwise",
    "perceiver_resampler.blocks.*.1.c_proj": "rowwise",
}


def fields(**overrides):
    return fields_from_dict(small_config(**overrides))


def test_tensor_parallel_plan():
    assert tensor_parallel_plan(fields()) == DECODER_AND_VISION | CROSS_ATTENTION_NORMS | RESAMPLER
    assert tensor_parallel_plan(fields(use_resampler=False, qk_layer_norms=False)) == DECODER_AND_VISION


def test_fully_sharded_plan():
    free = ["embed_tokens", "layers.*", "gated_cross_attn_layers.*", "vision_model.encoder.layers.*"]
    expected = {**dict.fromkeys(free, "free_full_weight"), "norm": "keep_full_weight"}
    assert fully_sharded_plan(fields(use_resampler=False)) == expected
    assert fully_sharded_plan(fields()) == {**expected, "perceiver_resampler": "free_full_weight"}


def test_plans_need_no_framework():
    code = (
        "import sys, idefics_common.parameters.parallel_plans\n"
        "assert not {'torch', 'keras', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
