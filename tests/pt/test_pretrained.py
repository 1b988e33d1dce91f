"""Loading and saving: interchange with transformers, strictness, initialisation, and the real sizes."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from idefics_common.parameters import Kind, expand
from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text, IdeficsModel
from tests.models import MATRIX, SMALL, small_config
from tests.pt.pairs import our_model, reference_model, torch_batch


def same_logits(first, second):
    inputs = torch_batch(first.config)
    with torch.no_grad():
        return torch.allclose(first(**inputs).logits, second(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", MATRIX)
def test_state_dict_is_the_parameter_table(variant):
    config = IdeficsConfig(**small_config(**MATRIX[variant]))
    state = IdeficsForVisionText2Text(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {p.name: p.shape for p in expand(config)}


@pytest.mark.parametrize("shards", ["one_file", "sharded", "bin"])
@pytest.mark.parametrize("variant", ["base", "tied", "vector_alphas", "no_added_vocabulary"])
def test_checkpoints_go_both_ways(variant, shards, tmp_path):
    kwargs = {"max_shard_size": "20KB"} if shards == "sharded" else {}
    reference = reference_model(**MATRIX[variant])
    reference.save_pretrained(tmp_path / "theirs", **kwargs)
    if shards == "bin":
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    ours = IdeficsForVisionText2Text.from_pretrained(tmp_path / "theirs").eval()
    assert same_logits(ours, reference)
    ours.save_pretrained(tmp_path / "ours", **kwargs)
    back, report = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same_logits(ours, back.eval())


def test_base_model_and_half_precision(tmp_path):
    model = our_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert IdeficsForVisionText2Text.from_pretrained(tmp_path).dtype == torch.bfloat16
    base = IdeficsModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(base.norm.weight, model.model.norm.weight.float())


def test_stale_buffers_are_ignored_by_name(tmp_path):
    our_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    assert same_logits(IdeficsForVisionText2Text.from_pretrained(tmp_path).eval(), our_model())


class _Explosive:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def _without(name):
    def change(directory):
        file = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors[name]
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    return change


def _with(name, tensor):
    def change(directory):
        file = directory / "model.safetensors"
        safetensors.torch.save_file(
            {**safetensors.torch.load_file(file), name: tensor}, file, metadata={"format": "pt"}
        )

    return change


def _truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _shard_missing(directory):
    model = our_model()
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    next(directory.glob("model-00002-of-*.safetensors")).unlink()


def _pickle_with_code(directory):
    (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Explosive()}, directory / "pytorch_model.bin")


def _no_config(directory):
    (directory / "config.json").unlink()


def _config_of_llama(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _config_of_another_size(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "additional_vocab_size": 4}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("model.norm.weight"), r"1 missing\n.*- model.norm.weight \(24,\)"),
        (_with("model.norm.wait", torch.ones(24)), r"1 unexpected\n.*\+ 'model.norm.wait' \(24,\)"),
        (_with("model.norm.weight", torch.ones(25)), r"! model.norm.weight expected \(24,\), found \(25,\)"),
        (_no_config, "config.json"),
        (_config_of_llama, "config.json: expected model_type 'idefics', got 'llama'"),
        (_with("model.norm.weight", torch.ones(24, dtype=torch.int32)), r"model.norm.weight.*int32"),
        (_config_of_another_size, r"! lm_head.additional_fc.weight expected \(4, 24\), found \(3, 24\)"),
        (_truncated, "model.safetensors"),
        (_shard_missing, "shard model-00002-of-.*.safetensors is missing"),
        (_pickle_with_code, "pytorch_model.bin"),
    ],
)
def test_damaged_checkpoints_are_refused(damage, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoint"
    our_model().save_pretrained(directory)
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        IdeficsForVisionText2Text.from_pretrained(directory)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", [_truncated, _shard_missing, _pickle_with_code, _no_config])
def test_damage_is_refused_without_strictness_too(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoint"
    our_model().save_pretrained(directory)
    damage(directory)
    for lenient in ({"strict": False}, {"output_loading_info": True}):
        with pytest.raises((ValueError, FileNotFoundError), match=str(directory)):
            IdeficsForVisionText2Text.from_pretrained(directory, **lenient)


def test_a_checkpoint_of_the_base_model_lacks_only_the_head(tmp_path):
    our_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 missing\n.*- lm_head.weight \(97, 24\)\n.*- lm_head.additional_fc.weight"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert torch.equal(IdeficsModel.from_pretrained(tmp_path).norm.weight, our_model().model.norm.weight)


def test_a_report_can_be_had_instead(tmp_path):
    our_model().save_pretrained(tmp_path)
    _without("model.norm.weight")(tmp_path)
    _, report = IdeficsForVisionText2Text.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"model.norm.weight"}
    assert IdeficsForVisionText2Text.from_pretrained(tmp_path, strict=False).model.norm.weight.shape == (24,)


def test_initial_values_of_every_kind():
    """Random values have the mean and the deviation they are to have, within five standard errors."""
    torch.manual_seed(0)
    sizes = {"vision_config": {**SMALL["vision_config"], "embed_dim": 400}, "pad_token_id": 5}
    config = IdeficsConfig(**small_config(**sizes, initializer_range=0.07))
    model = IdeficsForVisionText2Text(config)
    state = model.state_dict()
    seen = set()
    for parameter in expand(config):
        value, leaf = state[parameter.name], parameter.name.rpartition(".")[2]
        if parameter.kind == Kind.BIAS or (parameter.kind == Kind.LAYER_NORM and leaf == "bias"):
            assert not value.any(), parameter.name
        elif parameter.kind in (Kind.LAYER_NORM, Kind.RMS_NORM) or leaf.startswith("alpha_"):
            assert (value == 1).all(), parameter.name
        else:
            deviation = 1.0 if leaf in ("class_embedding", "latents") else 0.07
            if parameter.name == "model.embed_tokens.weight":
                assert not value[5].any()
                value = torch.cat((value[:5], value[6:]))
            count = value.numel()
            assert value.mean().abs() < 5 * deviation / count**0.5, parameter.name
            assert (value.std() - deviation).abs() < 5 * deviation / (2 * count) ** 0.5, parameter.name
        seen.add(leaf if parameter.kind == Kind.RAW else parameter.kind)
    assert seen == {*Kind, "class_embedding", "latents", "alpha_cross_attn", "alpha_dense"} - {Kind.RAW}


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
@pytest.mark.parametrize("initializer", ["zeros", "ones", "normal", "gaussian", "random"])
def test_d6_alpha_initializers(initializer, alpha_type):
    torch.manual_seed(0)
    config = small_config(
        alpha_initializer=initializer, alpha_type=alpha_type, alphas_initializer_range=0.5, num_hidden_layers=32
    )
    model = IdeficsForVisionText2Text(IdeficsConfig(**config))
    alphas = torch.cat([block.alpha_cross_attn.flatten() for block in model.model.gated_cross_attn_layers])
    assert model.model.gated_cross_attn_layers[0].alpha_dense.shape == ((1,) if alpha_type == "float" else (1, 1, 24))
    if initializer in ("zeros", "ones"):
        assert torch.equal(alphas, torch.full_like(alphas, float(initializer == "ones")))
    else:
        assert 0.2 < alphas.std().item() < 0.9
        assert alphas.mean().abs().item() < 0.4


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("config-9b.json", 1015, 8_929_679_632), ("config-80b.json", 1603, 79_967_843_624)],
)
def test_real_sizes_on_the_meta_device(name, tensors, parameters, request, tmp_path):
    shutil.copy(request.config.rootpath / "tests" / "fixtures" / "configs" / name, tmp_path / "config.json")
    config = IdeficsConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(config)
        ids = torch.zeros((1, 8), dtype=torch.long)
        logits = model(
            input_ids=ids,
            pixel_values=torch.zeros((1, 1, 3, 224, 224)),
            image_attention_mask=torch.ones((1, 8, 1), dtype=torch.long),
        ).logits
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {parameter.name: parameter.shape for parameter in expand(config)}
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())) == (tensors, parameters)
    assert logits.shape == (1, 8, 32002)
