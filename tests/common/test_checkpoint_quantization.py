"""Tensors and config.json agree on quantisation, or the checkpoint is refused with a tensor's name (E2)."""

import json
from pathlib import Path

import numpy as np
import pytest

from idefics_common.checkpoint import CheckpointError, TensorInfo
from idefics_common.checkpoint.quantization import check_quantization, declared_quantization, refuse_quantized

Q = "model.layers.0.self_attn.q_proj"
PLAIN = {"lm_head.weight": np.float32, "model.vision_model.embeddings.position_ids": np.int64}
STORED = {
    "plain": {f"{Q}.weight": np.float16},
    "4": {f"{Q}.weight": np.uint8, f"{Q}.weight.absmax": np.float32, f"{Q}.weight.quant_map": np.float32},
    "8": {f"{Q}.weight": np.int8, f"{Q}.SCB": np.float32, f"{Q}.weight_format": np.uint8},
    "torchao": {f"{Q}._weight_qdata": np.int8, f"{Q}._weight_scale": np.float32},
    "quanto": {f"{Q}.weight._data": np.int8, f"{Q}.weight._scale": np.float32},
    "gptq": {f"{Q}.qweight": np.int32, f"{Q}.scales": np.float16},
}
DECLARED = {
    "plain": None,
    "4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "8": {"load_in_8bit": True},  # as older versions wrote it
    "torchao": {"quant_method": "torchao"},
    "quanto": {"quant_method": "quanto"},
    "gptq": {"quant_method": "gptq"},
}


def infos(stored: dict) -> dict[str, TensorInfo]:
    dtypes = {name: np.dtype(dtype) for name, dtype in {**PLAIN, **stored}.items()}
    return {name: TensorInfo(name, dtype, (1,), dtype.itemsize, Path("x"), 0) for name, dtype in dtypes.items()}


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("stored", STORED)
def test_only_what_is_declared_is_stored(stored, declared):
    found = infos(STORED[stored])
    if stored == declared:
        check_quantization("x", found, DECLARED[declared])
    else:
        with pytest.raises(CheckpointError, match=r"config\.json") as caught:
            check_quantization("x", found, DECLARED[declared])
        assert caught.value.tensor == (None if stored == "plain" else next(iter(STORED[stored])))
    if stored == declared == "plain":
        refuse_quantized("x", found, None)
        return
    with pytest.raises(CheckpointError):
        refuse_quantized("x", found, DECLARED[declared])


def test_the_message_says_what_to_do():
    with pytest.raises(CheckpointError) as caught:
        refuse_quantized("model.safetensors", infos(STORED["8"]), DECLARED["8"])
    assert str(caught.value) == (
        f"model.safetensors: tensor '{Q}.weight': is int8, quantised by bitsandbytes in 8 bits: expected floating "
        "point. Load the original checkpoint. What bitsandbytes made can also be turned back in PyTorch: "
        "IdeficsForVisionText2Text.from_pretrained(...).dequantize().save_pretrained(...)."
    )


@pytest.mark.parametrize("method", ["4", "8"])
def test_a_weight_without_its_scale_is_named(method):
    found = infos({**STORED[method], "lm_head.weight": np.int8})
    with pytest.raises(CheckpointError, match=r"lm_head.weight': is int8 and has no scale 'lm_head"):
        check_quantization("x", found, DECLARED[method])


@pytest.mark.parametrize("declared", ["int8", [], 4])
def test_a_declaration_of_another_type_is_refused(declared, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": declared}))
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json must be an object"):
        check_quantization("x", infos({}), declared_quantization(tmp_path))
