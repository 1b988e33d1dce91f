"""Parts of a model on the disk: the same results, whichever part it is."""

import pytest
import torch
from accelerate import infer_auto_device_map

from idefics_pt import IdeficsForVisionText2Text
from tests.pt.pairs import our_model, torch_batch

UNITS = [
    "model.embed_tokens",
    "model.vision_model",
    "model.perceiver_resampler",
    "model.layers",
    "model.gated_cross_attn_layers",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]


def outputs(model):
    """Everything a call returns and `generate` writes, with images of the model's size and of another."""
    inputs = torch_batch(model.config)
    larger = torch_batch(model.config, image_size=42)
    with torch.no_grad():
        result = model(**inputs, output_attentions=True)
        larger_logits = model(**larger, interpolate_pos_encoding=True).logits
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return [result.logits, *result.cross_attention_gates, *result.vision_attentions, larger_logits, ids]


@pytest.mark.parametrize("offloaded", [*UNITS, "everything", "the second half"])
def test_offloaded_models_give_identical_results(offloaded, tmp_path):
    model = our_model(attention="eager")
    model.save_pretrained(tmp_path)
    device_map = {unit: "disk" if unit == offloaded else "cpu" for unit in UNITS}
    if offloaded == "everything":
        device_map = {"": "disk"}
    elif offloaded == "the second half":
        half = {"cpu": model.get_memory_footprint() // 2, "disk": 10**9}
        device_map = infer_auto_device_map(model, half, no_split_module_classes=model._no_split_modules)
    split = IdeficsForVisionText2Text.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded", attn_implementation="eager"
    ).eval()
    on_disk = [parameter for parameter in split.parameters() if parameter.device.type == "meta"]
    assert on_disk or offloaded == "model.rotary_emb"
    for actual, expected in zip(outputs(split), outputs(model), strict=True):
        assert torch.equal(actual, expected)


def test_layers_stay_on_one_device():
    """However little room there is on the first device, no layer is taken apart."""
    model = our_model()
    whole = [model.model.vision_model.embeddings, *model.model.vision_model.encoder.layers]
    whole += [model.model.perceiver_resampler, *model.model.layers, *model.model.gated_cross_attn_layers]
    names = {module: name for name, module in model.named_modules()}
    for room in range(4_000, model.get_memory_footprint(), 4_000):
        devices = {"cpu": room, "disk": 10**9}
        device_map = infer_auto_device_map(model, devices, no_split_module_classes=model._no_split_modules)
        for module in whole:
            assert not any(key.startswith(f"{names[module]}.") for key in device_map), names[module]
