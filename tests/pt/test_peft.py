"""PEFT on the vocabulary and in front of the text (E5, E6), by PEFT's own ways, not our presets.

The right values are those of transformers' own IDEFICS with the same weights and adapters, and one vocabulary that is
as large as ours is with the additional one: there PEFT meets an embedding and a linear layer like any other.
"""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DynamicCache

from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text
from idefics_pt.joined import Decoupled
from tests.models import random_weights, small_config
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, relative_error

VOCABULARY = ["lm_head", "embed_tokens"]
FEED = {"target_modules": ["lm_head", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS = {
    "lora": peft.LoraConfig(target_modules=[*VOCABULARY, "q_proj"], r=4),
    "rank_stabilised": peft.LoraConfig(target_modules=VOCABULARY, r=4, use_rslora=True),
    "dora": peft.LoraConfig(target_modules=[*VOCABULARY, "o_proj"], r=4, use_dora=True),
    "adalora": peft.AdaLoraConfig(target_modules=["lm_head", "o_proj"], init_r=4, target_r=2, total_step=9),
    "ia3": peft.IA3Config(**FEED),
    "loha": peft.LoHaConfig(target_modules=["lm_head"], r=4),
    "lokr": peft.LoKrConfig(target_modules=["lm_head"], r=4),
    "vera": peft.VeraConfig(target_modules=["lm_head", "q_proj"], r=4),
    "oft": peft.OFTConfig(target_modules=["lm_head"], r=0, oft_block_size=4),
    "tokens_with_lora": peft.LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices=[5, 96, 97, 99]),
    "tokens": peft.TrainableTokensConfig(token_indices=[5, 99], target_modules=["embed_tokens"]),
    "tokens_of_head": peft.LoraConfig(target_modules=["q_proj"], r=4, trainable_token_indices={"lm_head": [7, 98]}),
}
TIED = ("tokens_with_lora", "tokens")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),  # PEFT's advice on tied weights
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def whole_reference(tied):
    """transformers' own model, with one vocabulary of a hundred tokens."""
    config = IdeficsConfig(**small_config(tie_word_embeddings=tied))
    weights = {name: torch.from_numpy(value) for name, value in random_weights(config).items()}
    for base, added in (("lm_head", "additional_fc"), ("model.embed_tokens", "additional_embedding")):
        rows = weights.pop(f"{base}.{added}.weight")
        weights[f"{base}.weight"] = torch.cat((weights[f"{base}.weight"], rows))
    one = small_config(vocab_size=100, additional_vocab_size=0, tie_word_embeddings=tied)
    model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**one))
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def adapted(base, method, like=None):
    """A model with an adapter of random values, or of those of another model."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, METHODS[method]).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and like is None:
            parameter.add_(0.2 * torch.randn(parameter.shape))
        elif parameter.requires_grad:
            parameter.copy_(like.get_parameter(name))
    return model


def batch(config=None):
    return torch_batch(config or IdeficsConfig(**small_config()), with_labels=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_reach_the_whole_vocabulary(method, tied, tmp_path):
    """E5: logits, gradients, files, and merged weights, in ours and in transformers' class."""
    if tied and method not in TIED:
        pytest.skip("PEFT adapts one of two tied layers, and then unties them as it merges")
    base, inputs = our_model(tie_word_embeddings=tied), batch()
    base.save_pretrained(tmp_path / "base")
    if method == "vera":
        base.join_vocabulary()  # it asks for sizes before it takes a layer
    plain = base(**inputs).logits
    model = adapted(base, method)
    reference = adapted(whole_reference(tied), method, like=model)
    out, expected = model(**inputs), reference(**inputs)
    assert out.logits.shape[2] == 100
    assert relative_error(out.logits.detach(), expected.logits.detach()) < FLOAT32_ACTIVATIONS
    assert relative_error(out.logits.detach(), plain.detach()) > 1e-3
    loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    out.loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad and p.grad is not None}
    assert gradients
    for name, gradient in gradients.items():
        assert relative_error(model.get_parameter(name).grad, gradient, 1e-4) < FLOAT32_GRADIENTS, name

    model.save_pretrained(tmp_path / "adapter")
    fresh = IdeficsForVisionText2Text.from_pretrained(tmp_path / "base")
    if method == "vera":
        fresh.join_vocabulary()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=method == "lora").eval()
    assert torch.equal(loaded(**inputs).logits, out.logits)
    merged = loaded.merge_and_unload()
    assert relative_error(merged(**inputs).logits.detach(), out.logits.detach()) < 5 * FLOAT32_ACTIVATIONS
    merged.save_pretrained(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(found["model.embed_tokens.weight"]) == 97
    assert len(found["model.embed_tokens.additional_embedding.weight"]) == 3
    for cls in (IdeficsForVisionText2Text, transformers.IdeficsForVisionText2Text):
        again = cls.from_pretrained(tmp_path / "merged").eval()
        assert (
            relative_error(again(**inputs | {"labels": None}).logits.detach(), out.logits.detach())
            < 5 * FLOAT32_ACTIVATIONS
        )
