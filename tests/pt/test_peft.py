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
from idefics_pt.transformers_versions import CACHE
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
TIED = ("tokens_with_lora", "tokens")  # of two tied layers PEFT adapts one otherwise, and unties them as it merges

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


@pytest.mark.parametrize(
    ("method", "tied"), [*((method, False) for method in METHODS), *((method, True) for method in TIED)]
)
def test_adapters_reach_the_whole_vocabulary(method, tied, tmp_path):
    """E5: logits, gradients, files, and merged weights, in ours and in transformers' class."""
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


VIRTUAL = 5
PROMPTS = {
    "prompt_tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "prefix_tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}


def in_front(model, ids, attention_mask, pixel_values, image_mask):
    """Logits of the text by hand: embeddings and masks, or a cache, are widened by what PEFT learns."""
    base, learned = model.get_base_model(), model.get_prompt(len(ids))
    rest = {
        "attention_mask": torch.nn.functional.pad(attention_mask, (VIRTUAL, 0), value=1),
        "pixel_values": pixel_values,
    }
    if isinstance(learned, DynamicCache):
        return base(input_ids=ids, image_attention_mask=image_mask, past_key_values=learned, **rest).logits
    embeddings = torch.cat((learned, base.get_input_embeddings()(ids)), dim=1)
    mask = torch.nn.functional.pad(image_mask, (0, 0, VIRTUAL, 0))
    return base(inputs_embeds=embeddings, image_attention_mask=mask, **rest).logits[:, VIRTUAL:]


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_virtual_tokens_train_and_generate(method, tmp_path):
    """E6: their values by hand, in training, generation and from files; the model does not know its image token."""
    inputs, (_, length) = batch(), batch()["input_ids"].shape
    labels, images = inputs.pop("labels"), (inputs["pixel_values"], inputs["image_attention_mask"])
    torch.manual_seed(0)
    model = peft.get_peft_model(our_model(), PROMPTS[method]).eval()
    is_text = inputs["attention_mask"] == 1
    by_hand = in_front(model, inputs["input_ids"], inputs["attention_mask"], *images)
    assert relative_error(by_hand[is_text].detach(), our_model()(**inputs).logits[is_text].detach()) > 1e-2
    out = model(**inputs, labels=labels)
    found = out.logits[:, -length:]
    assert relative_error(found[is_text].detach(), by_hand[is_text].detach()) < FLOAT32_ACTIVATIONS
    loss = torch.nn.functional.cross_entropy(by_hand[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    learned = next(p for p in model.prompt_encoder.parameters() if p.requires_grad)
    expected = torch.autograd.grad(loss, learned)[0]
    assert expected.abs().max() > 0
    assert relative_error(torch.autograd.grad(out.loss, learned)[0], expected) < FLOAT32_GRADIENTS

    model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(our_model(), tmp_path).eval()
    if CACHE != "past_key_values":  # PEFT 0.21 looks for that name, and without it takes each step for the first
        with pytest.raises(ValueError, match=r"attention_mask must cover|past_key_values and cache"):
            model.generate(**inputs, max_new_tokens=4)
        return
    for options in ({}, {"num_beams": 3}) + (() if method == "prefix_tuning" else ({"use_cache": False},)):
        kept = {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options, **kept)
        new = found.sequences[:, length:]
        longer = [torch.cat((x, torch.ones_like(new)), dim=1) for x in (inputs["attention_mask"],)]
        last = images[1][:, -1:].expand(-1, new.shape[1], -1)
        logits = in_front(model, found.sequences, *longer, images[0], torch.cat((images[1], last), dim=1))
        expected = logits[:, length - 1 : -1].log_softmax(dim=-1).gather(2, new.unsqueeze(2)).squeeze(2)
        scores = model.compute_transition_scores(
            found.sequences, found.scores, found.get("beam_indices"), normalize_logits="num_beams" not in options
        )
        assert relative_error(scores, expected.detach()) < FLOAT32_ACTIVATIONS
        if "num_beams" not in options:
            assert torch.equal(logits[:, length - 1 : -1].argmax(dim=-1), new)


def test_new_rows_are_saved_with_the_adapter(tmp_path):
    """E5: rows that no checkpoint has are in the adapter's file, and are not lost in another process."""
    our_model().save_pretrained(tmp_path / "base")

    def resized():
        model = IdeficsForVisionText2Text.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(104)
        return model

    base = resized()
    with torch.no_grad():
        for rows in (base.model.embed_tokens.additional_embedding.weight, base.lm_head.additional_fc.weight):
            rows[3:] = torch.randn(rows[3:].shape, generator=torch.Generator().manual_seed(0))
    inputs = batch(base.config)
    inputs["input_ids"][0, 3] = 103
    expected = base(**inputs).logits
    assert relative_error(resized()(**inputs).logits.detach(), expected.detach()) > 1e-2
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    unchanged = peft.get_peft_model(IdeficsForVisionText2Text.from_pretrained(tmp_path / "base"), config)
    unchanged.save_pretrained(tmp_path / "small")
    assert not [name for name in load_file(tmp_path / "small" / "adapter_model.safetensors") if "lora" not in name]


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["additional_embedding", "additional_fc"]])
def test_modules_to_save_beside_adapters_train_by_themselves(modules):
    """E5: `modules_to_save` leaves the two vocabularies apart; one step is that of plain torch."""
    base = our_model()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=modules))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert len(trained) == (4 if "lm_head" in modules else 2)
    model(**batch()).loss.backward()
    plain = our_model()
    plain(**batch()).loss.backward()
    for name in trained:
        source = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert relative_error(model.get_parameter(name).grad, plain.get_parameter(source).grad) < FLOAT32_GRADIENTS


def test_weights_that_cannot_be_joined_are_refused_by_name():
    """E5: what the message says works."""
    model = our_model()
    model.lm_head.additional_fc.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"DecoupledLinear .* in additional_fc, .*`modules_to_save`"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    adapted = peft.get_peft_model(our_model(), peft.LoraConfig(target_modules=["additional_fc"], r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.fill_(0.5)
    before, after = our_model()(**batch()).logits, adapted(**batch()).logits
    assert torch.equal(before[..., :97], after[..., :97])
    assert not torch.allclose(before[..., 97:], after[..., 97:])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["additional_fc"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 99]},
    ],
    ids=str,
)
def test_an_adapted_vocabulary_is_not_resized(options):
    """E5: of two layers one would have grown, or the one that PEFT saves would have been left out; nothing changes."""
    model = peft.get_peft_model(our_model(), peft.LoraConfig(**options))
    before = model(**batch()).logits
    with pytest.raises(ValueError, match="resize the vocabulary before quantising or adapting"):
        model.resize_token_embeddings(104)
    assert model.config.additional_vocab_size == 3
    assert torch.equal(model(**batch()).logits, before)


def test_adapters_alone_put_no_virtual_tokens_in_front():
    """E6: embeddings that the image mask does not cover are refused, as without an adapter."""
    model, inputs = our_model(image_token_id=None), batch()
    embeddings = torch.nn.functional.pad(model.get_input_embeddings()(inputs["input_ids"]), (0, 0, 0, 2))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    images = {name: inputs[name] for name in ("pixel_values", "image_attention_mask")}
    with pytest.raises(ValueError, match="nothing says which: give it for all"):
        model(inputs_embeds=embeddings, **images)


def test_gradients_from_before_a_join_are_dropped():
    """E5: an optimizer would go on moving the added rows, which no gradient reaches any more."""
    model, plain = our_model(), our_model()
    model(**batch()).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.join_vocabulary()
    optimizer.step()
    for layer, of_plain in ((model.lm_head, plain.lm_head), (model.model.embed_tokens, plain.model.embed_tokens)):
        layer.split()
        assert torch.equal(layer.weight, of_plain.weight)
        assert torch.equal(layer.added.weight, of_plain.added.weight)


def test_a_joined_model_resizes_and_quantises_as_ever():
    """After adapters on the vocabulary were merged, what needs two parts finds two."""
    config = peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], r=4)
    merged = peft.get_peft_model(our_model(), config).merge_and_unload().eval()
    assert merged.lm_head.is_joined
    inputs = batch()
    expected = our_model()(**inputs).logits
    assert relative_error(merged(**inputs).logits, expected.detach()) < FLOAT32_ACTIVATIONS
    merged.resize_token_embeddings(104)
    plain = our_model()
    plain.resize_token_embeddings(104)
    assert not merged.lm_head.is_joined
    assert torch.equal(merged(**inputs).logits, plain(**inputs).logits)
    assert merged.lm_head.out_features == 97
    assert merged.model.embed_tokens.num_embeddings == 97
