"""Quantisers of other people on our models: what they give is held against plain layers with the rounded weights, and
against transformers' own IDEFICS."""

import json
import shutil

import bitsandbytes
import peft
import pytest
import safetensors.torch
import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from optimum import quanto
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, HqqConfig, QuantoConfig, TorchAoConfig

from idefics_pt import IdeficsForVisionText2Text
from idefics_pt.lora import lora_config
from tests.models import SMALL
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import relative_error

CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "fp4_double_bfloat16": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao_vocabulary": lambda: TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True),
    "quanto": lambda: QuantoConfig(weights="int8"),
    "quanto_head": lambda: QuantoConfig(weights="int8", modules_to_not_convert=["perceiver_resampler"]),
}
SAVING = ["nf4", "fp4_double_bfloat16", "int8", "torchao", "torchao_vocabulary"]
# bfloat16 has 8 bits; bitsandbytes' int8 rounds inputs, and one step of that may fall differently
SAME = {"fp4_double_bfloat16": 2e-2, "int8": 2e-3}
# multiples of 64, which blocks of 4 bits want
WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vision_config": {**SMALL["vision_config"], "embed_dim": 64, "intermediate_size": 256},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_head_dim": 64},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of checkpoints that are not quantised, by whether there is a resampler."""
    directories = {}
    for use_resampler in (True, False):
        directories[use_resampler] = tmp_path_factory.mktemp("plain")
        our_model(use_resampler=use_resampler, **WIDE).save_pretrained(directories[use_resampler])
    return directories


def load(directory, method=None, kind=IdeficsForVisionText2Text):
    options = {} if method is None else {"quantization_config": CONFIGS[method]()}
    return kind.from_pretrained(directory, **options).eval()


def theirs(directory, method=None):
    model = load(directory, method, transformers.IdeficsForVisionText2Text)
    for module in model.modules():  # to compute with weights as they are stored, which ours does unasked
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model):
    return model(**torch_batch(model.config)).logits.float()


def rounded_weight(module):
    """The weight of a layer of any tool as plain numbers, by that tool's own means; None for other layers."""
    weight = getattr(module, "weight", None)
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(
            weight.data,
            module.state.SCB if weight.SCB is None else weight.SCB,  # the first call moves it
        )
    if isinstance(module, HQQLinear):
        return module.dequantize()
    if isinstance(module, quanto.QModuleMixin):
        return module.qweight.dequantize()
    if isinstance(weight, torch.Tensor) and type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    return None


@torch.no_grad()
def with_rounded_weights(plain, quantized):
    """`plain` with the weights that a quantised model has, and the names of its layers that are quantised."""
    rounded = {name: rounded_weight(module) for name, module in quantized.named_modules()}
    rounded = {name: weight for name, weight in rounded.items() if weight is not None}
    for name, weight in rounded.items():
        plain.get_submodule(name).weight.copy_(weight)
    return plain, set(rounded)


LINEAR = {"nf4", "fp4_double_bfloat16", "int8", "torchao", "quanto"}


@pytest.mark.parametrize("use_resampler", [True, False])
@pytest.mark.parametrize("method", CONFIGS)
def test_e1_from_pretrained_quantises(method, use_resampler, saved):
    """Every linear layer but those of the vocabulary; logits are those of plain layers with the rounded weights."""
    directory = saved[use_resampler]
    model, plain = load(directory, method), load(directory)
    expected = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    exact, unrounded = logits(plain), logits(model)
    plain, names = with_rounded_weights(plain, model)
    if method in LINEAR:
        assert names == expected - {"lm_head.additional_fc"}
    else:
        assert "lm_head" in names
    assert relative_error(unrounded, logits(plain)) < {"int8": 0.1}.get(method, SAME.get(method, 1e-5))
    assert relative_error(unrounded, exact) > 1e-3
    model.fuse_projections()
    assert all(getattr(module, "fused", None) is None for module in model.modules())
    assert torch.equal(logits(model), unrounded)


@pytest.mark.parametrize("method", SAVING)
def test_e2_saved_after_use_and_exchanged_with_transformers(method, saved, tmp_path):
    """Saving changes nothing, a checkpoint goes both ways, and what was loaded quantised is saved, or dequantised."""
    same = SAME.get(method, 1e-5)
    model, reference = load(saved[True], method), theirs(saved[True], method)
    expected = logits(model)
    assert relative_error(expected, logits(reference)) < same
    model.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(model), expected)
    again = load(tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    assert relative_error(logits(theirs(tmp_path / "ours")), expected) < same
    assert torch.equal(logits(load(tmp_path / "theirs")), expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    if method.startswith("torchao"):
        return  # has no way back
    weights = {name: rounded_weight(again.get_submodule(name)) for name in ("model.layers.0.self_attn.q_proj",)}
    again.dequantize().save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain")
    assert all(type(module).__module__.partition(".")[0] != "bitsandbytes" for module in plain.modules())
    for name, weight in weights.items():
        torch.testing.assert_close(plain.get_submodule(name).weight.data, weight.float())
    assert relative_error(logits(plain), expected) < {"int8": 0.1}.get(method, same)


@pytest.mark.parametrize(
    ("method", "checkpointing", "targets"),
    [
        ("nf4", None, "names"),
        ("nf4", "reentrant", "presets"),
        ("nf4", "not_reentrant", "presets"),
        ("int8", None, "presets"),
        ("int8", "reentrant", "names"),
    ],
)
def test_e1_qlora_has_the_gradients_of_plain_layers(method, checkpointing, targets, saved):
    """After an inference call, which rearranges 4-bit weights; the plain layers have the rounded weights."""
    quantized = load(saved[True], method)
    logits(quantized)
    plain, _ = with_rounded_weights(load(saved[True]), quantized)
    loss, gradients, adapted = qlora_step(quantized, checkpointing, targets)
    expected_loss, expected, plain = qlora_step(plain, None, targets)
    assert gradients.keys() == expected.keys()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-3, name
    logits(adapted.eval())
    merged, expected = adapted.merge_and_unload(), plain.merge_and_unload()
    for name, module in merged.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):  # the sum is rounded: half the largest step of each
            error = relative_error(rounded_weight(module), expected.get_submodule(name).weight)
            assert error < {"nf4": 0.16, "int8": 5e-3}[method], name


def qlora_step(model, checkpointing, targets):
    """Loss and gradients of one step with adapters that are not zero, and the model with them."""
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
    )
    if targets == "presets":
        config = lora_config(model, ["text", "cross_attention", "vision", "resampler"], r=2)
    else:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(0)
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    for weight in trained.values():
        weight.data.normal_(std=0.05, generator=generator)
    loss = adapted(**torch_batch(model.config, with_labels=True)).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trained.items()}, adapted


def hqq_by_hand(model):
    """As people do it who go through the layers themselves, the head among them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            config = BaseQuantizeConfig(nbits=8, group_size=None, axis=1)
            model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu"))


def hqq_by_hqq(model):
    config = BaseQuantizeConfig(nbits=8, group_size=None, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")


def quanto_frozen(model):
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


DIRECT = {
    "torchao": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "quanto": lambda model: quanto.quantize(model, weights=quanto.qint8),
    "quanto_frozen": quanto_frozen,
    "hqq": hqq_by_hqq,
    "hqq_by_hand": hqq_by_hand,
}


@pytest.mark.parametrize("tool", ["torchao_loaded", "quanto_loaded", "torchao", "quanto_frozen", "hqq"])
def test_adapters_over_other_tools_have_the_gradients_of_plain_layers(tool, saved):
    if tool.endswith("_loaded"):
        quantized = load(saved[True], tool.removesuffix("_loaded"))
    else:
        quantized = load(saved[True])
        DIRECT[tool](quantized)
    plain, _ = with_rounded_weights(load(saved[True]), quantized)
    loss, gradients, _ = qlora_step(quantized, None, "names")
    expected_loss, expected, _ = qlora_step(plain, None, "names")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("tool", DIRECT)
def test_e4_tools_that_are_called_on_a_model_keep_the_whole_vocabulary(tool, tmp_path):
    """Logits of plain layers with the rounded weights, the added rows' among them; what cannot follow is refused."""
    plain, model = our_model(**WIDE), our_model(**WIDE)
    DIRECT[tool](model)
    exact, unrounded = logits(plain), logits(model)
    assert unrounded.shape == exact.shape
    plain, names = with_rounded_weights(plain, model)
    assert "model.layers.0.self_attn.q_proj" in names
    assert relative_error(unrounded, logits(plain)) < 1e-5
    assert relative_error(unrounded[..., -3:], logits(plain)[..., -3:]) < 1e-5
    assert 1e-4 < relative_error(unrounded, exact) < 0.1
    model.fuse_projections()
    assert torch.equal(logits(model), unrounded)
    if tool == "quanto":  # its weights are plain numbers until they are frozen
        return
    with pytest.raises(ValueError, match=r"model\.\S+ and \d+ more are quantised by another tool: config.json could"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"quantised by another tool: load the original checkpoint"):
        model.quantize_int8()
    assert torch.equal(logits(model), unrounded)


def test_int8_of_activations_too():
    """torch's and torchao's dynamic int8, whose rounding of inputs no plain layer has."""
    for quantize in (
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True),
        lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
    ):
        plain, model = our_model(**WIDE), our_model(**WIDE)
        quantize(model)
        assert 1e-4 < relative_error(logits(model), logits(plain)) < 0.15
        with pytest.raises(ValueError, match="quantised by another tool"):
            model.quantize_int8()


def test_e4_a_head_that_lost_the_additional_vocabulary_is_named():
    model = our_model(**WIDE)
    model.lm_head = nn.Linear(128, 97, bias=False)
    with pytest.raises(ValueError, match=r"lm_head is a Linear with 97 outputs.*3 of the additional vocabulary"):
        logits(model)
    model.lm_head = nn.Identity()  # for its hidden states
    assert logits(model).shape[-1] == 128


def test_a_quantised_vocabulary_is_not_resized():
    model = our_model(**WIDE)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="weight is quantised by another tool: resize the vocabulary before"):
        model.resize_token_embeddings(101)
    assert model.config.additional_vocab_size == 3


def test_a_model_whose_vocabulary_is_left_alone_is_resized(saved):
    model = load(saved[True], "nf4")
    inputs, before = torch_batch(model.config), logits(model)
    model.resize_token_embeddings(102)
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[..., :100], before) < 1e-6


def test_layers_that_bitsandbytes_computes_wrongly_are_named(tmp_path):
    """It takes scales of other blocks where rows are no multiple of 64; the layer is right when it is left out."""
    our_model(use_resampler=False, **{**WIDE, "intermediate_size": 80}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wrong scales .* of 64: model.layers.0.mlp.down_proj, .*skip_"):
        load(tmp_path, "nf4")
    skipping = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path, quantization_config=skipping).eval()
    plain, names = with_rounded_weights(load(tmp_path), model)
    assert names
    assert relative_error(logits(model), logits(plain)) < 1e-5


def test_hqq_through_transformers_is_not_there_yet(saved):
    """transformers refuses it by name, for its own classes too; docs/integrations.md calls HQQ itself."""
    with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
        IdeficsForVisionText2Text.from_pretrained(saved[True], quantization_config=HqqConfig(nbits=4, group_size=64))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """Directories of quantised checkpoints, by method, and of the plain one."""
    directories = {"plain": saved[True]}
    for method in ("nf4", "int8", "torchao"):
        directories[method] = tmp_path_factory.mktemp(method)
        load(saved[True], method).save_pretrained(directories[method])
    return directories


def head_in_int8(tensors, plain):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def one_layer_plain(tensors, plain):
    for name in [name for name in tensors if name.startswith(Q_PROJ)]:
        del tensors[name]
    tensors[f"{Q_PROJ}.weight"] = plain[f"{Q_PROJ}.weight"]


def one_scale_missing(tensors, plain):
    del tensors[f"{Q_PROJ}.weight.absmax"]


CONTRADICTIONS = {
    # tensors of, change of tensors, configuration of, message
    "head_in_nf4": ("nf4", head_in_int8, "nf4", r"'lm_head.weight': is int8 and has no scale .*expected floating"),
    "head_in_int8": ("int8", head_in_int8, "int8", r"'lm_head.weight': is int8 and has no scale 'lm_head.SCB'"),
    "head_in_torchao": ("torchao", head_in_int8, "torchao", r"'lm_head.weight': int8, is not floating point"),
    "head_in_plain": ("plain", head_in_int8, "plain", r"'lm_head.weight': is int8; expected floating point.*Load the"),
    "layer_in_nf4": ("nf4", one_layer_plain, "nf4", rf"'{Q_PROJ}.weight': float32, has no scale"),
    "layer_in_int8": ("int8", one_layer_plain, "int8", rf"'{Q_PROJ}.weight': float32, has no scale"),
    "scale": ("nf4", one_scale_missing, "nf4", rf"'{Q_PROJ}.weight': is uint8 and has no scale"),
    "nf4_undeclared": ("nf4", None, "plain", r"is uint8, as bitsandbytes in 4 bits writes it.*dequantize\(\)"),
    "int8_undeclared": ("int8", None, "plain", r"is int8, as bitsandbytes in 8 bits writes it"),
    "torchao_undeclared": ("torchao", None, "plain", r"_weight_qdata': is int8, as torchao writes it"),
    "nf4_claimed": ("plain", None, "nf4", "config.json says quantised by bitsandbytes in 4 bits, but all"),
    "torchao_claimed": ("plain", None, "torchao", "config.json says quantised by torchao, but all tensors"),
    "nf4_for_int8": ("nf4", None, "int8", "written by bitsandbytes in 4 bits, and config.json says .* 8 bits"),
    "int8_for_nf4": ("int8", None, "nf4", "written by bitsandbytes in 8 bits, and config.json says .* 4 bits"),
    "torchao_for_nf4": ("torchao", None, "nf4", "written by torchao, and config.json says bitsandbytes"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_e2_tensors_and_configuration_agree(case, strict, quantized, tmp_path):
    tensors_of, change, configuration_of, message = CONTRADICTIONS[case]
    directory = tmp_path / "checkpoint"
    shutil.copytree(quantized[tensors_of], directory)
    shutil.copy(quantized[configuration_of] / "config.json", directory)
    if change is not None:
        file = directory / "model.safetensors"
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = safetensors.torch.load_file(file)
        change(tensors, safetensors.torch.load_file(quantized["plain"] / "model.safetensors"))
        safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=message):
        IdeficsForVisionText2Text.from_pretrained(directory, strict=strict)


def test_e2_a_wish_that_a_quantised_checkpoint_cannot_follow_is_refused(quantized):
    """transformers drops it with a warning."""
    wishes = {
        "fp4_double_bfloat16": "bnb_4bit_compute_dtype='bfloat16' for 'float32', bnb_4bit_quant_type='fp4' for 'nf4'",
        "int8": "load_in_4bit=False for True",
        "torchao": "quant_method='torchao' for 'bitsandbytes'",
    }
    for method, message in wishes.items():
        with pytest.raises(ValueError, match=f"is quantised already, .*{message}"):
            load(quantized["nf4"], method)
    assert torch.equal(logits(load(quantized["nf4"], "nf4")), logits(load(quantized["nf4"])))


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_quantised(saved, tmp_path):
    shutil.copytree(saved[True], tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({**config, "additional_vocab_size": 4}))
    with pytest.raises(ValueError, match=r"additional_fc.weight expected \(4, 128\), found \(3, 128\)"):
        load(tmp_path / "checkpoint", "nf4")


def test_generates_what_the_logits_say(saved):
    """Greedy, on a cache, against whole forward passes: decoding has one row where reading has many."""
    for method in ("nf4", "quanto_head"):
        model = load(saved[True], method)
        inputs = torch_batch(model.config)
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        image_mask, start = inputs["image_attention_mask"], inputs["input_ids"].shape[1]
        whole = {
            "input_ids": ids,
            "attention_mask": F.pad(inputs["attention_mask"], (0, 3), value=1),
            "image_attention_mask": torch.cat((image_mask, *[image_mask[:, -1:]] * 3), dim=1),
            "pixel_values": inputs["pixel_values"],
        }
        with torch.no_grad():
            assert torch.equal(model(**whole).logits[:, start - 1 : -1].argmax(-1), ids[:, start:])
