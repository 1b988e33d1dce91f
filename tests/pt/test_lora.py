"""LoRA presets: which layers they reach, and adapters that train, survive files and merge."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from idefics_common.parameters import Part
from idefics_pt import IdeficsForVisionText2Text
from idefics_pt.lora import PRESETS, lora_config, lora_targets
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


def adapted(model) -> set[str]:
    """Names of the linear layers of a PEFT model that have adapters."""
    base = model.get_base_model()
    return {name for name, module in base.named_modules() if hasattr(module, "lora_A")}


def train(model, steps=3):
    inputs = torch_batch(model.get_base_model().config, with_labels=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model(**torch_batch(model.config)).logits


@pytest.mark.parametrize(
    ("presets", "roots"),
    [
        ("text", ["layers"]),
        ("cross_attention", ["gated_cross_attn_layers"]),
        ("resampler", ["perceiver_resampler"]),
        ("vision", ["vision_model"]),
        (("text", "cross_attention"), ["layers", "gated_cross_attn_layers"]),
    ],
)
def test_a_preset_reaches_all_linear_layers_of_its_part_and_no_others(presets, roots):
    model = our_model()
    expected = {
        f"model.{root}.{name}"
        for root in roots
        for name, module in model.model.get_submodule(root).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert sorted(lora_targets(model.config, presets)) == sorted(expected)
    assert adapted(get_peft_model(model, lora_config(model, presets))) == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "saved_modules", [None, ["embed_tokens", "lm_head"], ["additional_embedding", "additional_fc"]]
)
# PEFT unties what it trains separately, and says so
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_adapters_train_survive_files_and_merge(saved_modules, tied, tmp_path):
    base = our_model(tie_word_embeddings=tied)
    base.resize_token_embeddings(104)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora_config(base, PRESETS, r=4, modules_to_save=saved_modules))
    ids = torch.tensor([[99, 103]])
    before = logits(model), model.get_input_embeddings()(ids)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert relative_error(trained, before[0]) > 0.01
    assert torch.equal(model.get_input_embeddings()(ids), before[1]) == (saved_modules is None)

    model.save_pretrained(tmp_path / "adapter")
    fresh = IdeficsForVisionText2Text.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is IdeficsForVisionText2Text
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").eval()):
        assert relative_error(logits(model), trained) < FLOAT32_ACTIVATIONS


def test_an_adapted_model_generates():
    model = get_peft_model(our_model(), lora_config(our_model(), "text"))
    inputs = torch_batch(model.get_base_model().config)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, our_model().generate(**inputs, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize(
    ("presets", "overrides", "message"),
    [
        ("decoder", {}, r"LoRA presets are text, cross_attention, resampler, vision; got \['decoder'\]"),
        ((), {}, "got none"),
        ("resampler", {"use_resampler": False}, f"'resampler' needs a {Part.RESAMPLER}, and this model has none"),
    ],
)
def test_presets_that_name_nothing_are_refused(presets, overrides, message):
    with pytest.raises(ValueError, match=message):
        lora_config(our_model(**overrides), presets)
