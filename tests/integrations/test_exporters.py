"""Row E14: what transformers' exporters make of a model computes the model's values, at other sizes too.

The right values are the model's own, in one plain forward over the whole text without a cache.
"""

import logging

import pytest
import torch
from torch.nn import functional as F
from transformers import GenerationConfig, StaticCache
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

from idefics_pt.growing_cache import GrowingCache
from tests.models import SMALL
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

EXPORTERS = {"dynamo": (DynamoExporter, DynamoConfig), "onnx": (OnnxExporter, OnnxConfig)}
SHALLOW = {
    "num_hidden_layers": 2,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}
"""Exporting takes as long as there are layers."""
NO_RESAMPLER = {**SHALLOW, "use_resampler": False, "cross_layer_interval": 1}
CAPACITY = 16
SIZES = {"exported": (4, 9, 2), "fewer": (2, 5, 1), "longer": (3, 12, 3), "one row": (1, 6, 2)}
"""Rows, positions and images of prompts; the first is what the model is exported with."""


@pytest.fixture(autouse=True)
def _quiet(caplog):
    # torch's message about classes in an archive has an argument too few
    caplog.set_level(logging.ERROR, logger="torch._export.serde.serialize")


def prompt(rows, length, images):
    """Row 0 starts with padding, and its second half sees the last image; the others see all from position 1 on."""
    generator = torch.Generator().manual_seed(rows * length)
    image_mask = torch.ones(rows, length, images, dtype=torch.long)
    image_mask[:, 0] = 0
    image_mask[0, length // 2 :, :-1] = 0
    attention_mask = torch.ones(rows, length, dtype=torch.long)
    attention_mask[0, 0] = 0
    return {
        "input_ids": torch.randint(3, 97, (rows, length), generator=generator),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(rows, images, 3, 28, 28, generator=generator),
        "image_attention_mask": image_mask,
    }


def exporter(name):
    make, config = EXPORTERS[name]
    return make(), config(dynamic=True)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def prefix(inputs, length):
    """The first positions, with all images."""
    return {name: tensor if name == "pixel_values" else tensor[:, :length] for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    ("name", "attention", "overrides"), [("dynamo", "sdpa", NO_RESAMPLER), ("onnx", "eager", SHALLOW)]
)
@torch.no_grad()
def test_e14_the_whole_model_with_images(name, attention, overrides):
    model = our_model(attention=attention, **overrides)
    export, config = exporter(name)
    exported = export.export(model, {**prompt(*SIZES["exported"]), "use_cache": False}, config)
    for size in SIZES.values():
        inputs = prompt(*size)
        expected = model(**inputs).logits
        assert relative_error(exported(**inputs).logits[:, 1:], expected[:, 1:]) < FLOAT32_ACTIVATIONS, size
    other = exported(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert relative_error(other[:, 1:], expected[:, 1:]) > 100 * FLOAT32_ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "attention", "several"),
    [("dynamo", "eager", False), ("dynamo", "sdpa", True), ("onnx", "sdpa", True)],
)
@torch.no_grad()
def test_e14_generation_with_caches_and_images(name, attention, several, tmp_path):
    model = our_model(attention=attention, **SHALLOW)
    export, config = exporter(name)
    exported = export.export_for_generation(model, torch_batch(model.config), config, multi_token_decode=several)
    if name == "dynamo":
        exported.save_pretrained(tmp_path)
        exported = type(exported).from_pretrained(tmp_path)
    read, head, step = (exported.runners[part] for part in ("language_model", "lm_head", "decode"))
    for size in SIZES.values():
        whole = prompt(*size)
        length = size[1] - 3
        expected = model(**whole).logits
        first = prefix(whole, length)
        outputs = read(**first, position_ids=positions(first), past_key_values=GrowingCache())
        logits = head(hidden_BTD=outputs.last_hidden_state)
        cache = outputs.past_key_values
        assert relative_error(logits[:, 1:], expected[:, 1:length]) < FLOAT32_ACTIVATIONS, size
        for start, stop in ((length, length + 2), (length + 2, length + 3)) if several else ((length, length + 1),):
            outputs = step(
                input_ids=whole["input_ids"][:, start:stop],
                attention_mask=whole["attention_mask"][:, :stop],
                position_ids=positions(whole)[:, start:stop],
                past_key_values=cache,
                image_attention_mask=whole["image_attention_mask"][:, stop - 1 : stop],
            )
            cache = outputs.past_key_values
            assert relative_error(outputs.logits, expected[:, start:stop]) < FLOAT32_ACTIVATIONS, size


@torch.no_grad()
def test_e14_steps_on_a_static_cache():
    """Such a cache has a number of rows of its own, transformers' choice; length and images are free."""
    model = our_model(**SHALLOW)
    export, config = exporter("dynamo")
    settings = GenerationConfig(cache_implementation="static", max_cache_len=CAPACITY, do_sample=False, pad_token_id=0)
    exported = export.export_for_generation(
        model, torch_batch(model.config), config, generation_config=settings, multi_token_decode=True
    )
    for _, length, images in SIZES.values():
        whole = prompt(4, length, images)
        start = length - 2
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        model(**prefix(whole, start), past_key_values=cache)
        may_see = torch.arange(CAPACITY) <= torch.arange(start, length)[:, None]
        may_see = may_see & (F.pad(whole["attention_mask"], (0, CAPACITY - length), value=1) != 0)[:, None]
        logits = exported.runners["decode"](
            input_ids=whole["input_ids"][:, start:],
            attention_mask=may_see[:, None],
            position_ids=positions(whole)[:, start:],
            past_key_values=cache,
            image_attention_mask=whole["image_attention_mask"][:, -1:],
        ).logits
        assert relative_error(logits, model(**whole).logits[:, start:]) < FLOAT32_ACTIVATIONS
