"""Image masks that cover fewer positions than the text of the call (E6): what was added sees the right thing, or is
refused. The right thing is one forward pass with a mask for all positions."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.appended_text import IMAGE, LAYOUTS, appended_text
from tests.pt.pairs import our_model, tensors
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error


@pytest.fixture(scope="module")
def model():
    return our_model()


@pytest.fixture
def knows(model, monkeypatch):
    """Whether the configuration knows the image token, set by a call."""
    return lambda token: monkeypatch.setattr(model.config, "image_token_id", token, raising=False)


def text_logits(model, inputs, call=None, **kwargs):
    """Logits where there is text; the others mean nothing."""
    logits = (model if call is None else call)(**inputs, **kwargs).logits
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits[mask[:, -logits.shape[1] :] == 1]


def inputs_of(model, layout):
    inputs, whole_mask = appended_text(model.config, layout)
    inputs = tensors(inputs)
    return inputs, {**inputs, "image_attention_mask": torch.from_numpy(whole_mask)}


@pytest.mark.parametrize(
    ("layout", "token", "compiled"),
    [(layout, IMAGE, compiled) for layout in LAYOUTS for compiled in (False, True)]
    + [("left", None, False), ("right", None, False)],
)
@torch.no_grad()
def test_appended_text_sees_what_the_text_before_saw(layout, token, compiled, model, knows):
    """E6: prompts and completions side by side, with the mask of the prompts."""
    torch._dynamo.reset()
    knows(token)
    inputs, whole = inputs_of(model, layout)
    assert inputs["image_attention_mask"].shape[1] < inputs["input_ids"].shape[1]
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    expected = text_logits(model, whole)
    assert relative_error(text_logits(model, inputs, call), expected) < FLOAT32_ACTIVATIONS
    blind = torch.nn.functional.pad(inputs["image_attention_mask"], (0, 0, 0, 4))[:, : inputs["input_ids"].shape[1]]
    assert relative_error(text_logits(model, {**inputs, "image_attention_mask": blind}), expected) > 1e-3


@torch.no_grad()
def test_appended_text_sees_the_same_on_caches(model, knows):
    """E6: a static cache, and one that begins with keys and values of no text, as prefix tuning has it."""
    knows(IMAGE)
    inputs, whole = inputs_of(model, "left")
    expected = text_logits(model, whole)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert relative_error(text_logits(model, inputs, past_key_values=cache), expected) < FLOAT32_ACTIVATIONS

    def prefixed(some):
        width = model.config.hidden_size // model.config.num_attention_heads
        generator = torch.Generator().manual_seed(0)
        shape = (3, model.config.num_attention_heads, 5, width)
        layers = [
            tuple(torch.randn(shape, generator=generator) for _ in range(2))
            for _ in range(model.config.num_hidden_layers)
        ]
        mask = torch.nn.functional.pad(some["attention_mask"], (5, 0), value=1)
        return text_logits(model, {**some, "attention_mask": mask}, past_key_values=DynamicCache(layers))

    assert relative_error(prefixed(inputs), prefixed(whole)) < FLOAT32_ACTIVATIONS
    assert relative_error(prefixed(inputs), expected) > 1e-3


@torch.no_grad()
def test_a_mask_of_one_row_is_for_all_positions(model):
    inputs, _ = inputs_of(model, "left")
    inputs["image_attention_mask"] = torch.tensor([[[1, 0]], [[0, 1]], [[0, 0]]])
    whole = {**inputs, "image_attention_mask": inputs["image_attention_mask"].expand(-1, 10, -1)}
    assert torch.equal(text_logits(model, inputs), text_logits(model, whole))


def virtual(model, inputs, count=4):
    """The inputs as embeddings with virtual tokens in front, as PEFT makes them."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    rows, _, width = embeddings.shape
    tokens = torch.randn((1, count, width), generator=torch.Generator().manual_seed(1)).expand(rows, -1, -1)
    kept = {name: inputs[name] for name in ("pixel_values", "image_attention_mask")}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (count, 0), value=1)
    return {"inputs_embeds": torch.cat((tokens, embeddings), dim=1), "attention_mask": mask, **kept}


@pytest.mark.parametrize("token", [IMAGE, None])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_virtual_tokens_in_front_see_nothing(token, compiled, model, knows, monkeypatch):
    """E6: prompt tuning; without an image token they are known if they are PEFT's."""
    torch._dynamo.reset()
    knows(token)
    monkeypatch.setattr(model.model, "has_virtual_tokens", token is None)
    _, whole = inputs_of(model, "left")
    inputs = virtual(model, whole)
    mask = torch.nn.functional.pad(whole["image_attention_mask"], (0, 0, 4, 0))
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    expected = text_logits(model, {**inputs, "image_attention_mask": mask})
    assert relative_error(text_logits(model, inputs, call), expected) < FLOAT32_ACTIVATIONS


@torch.no_grad()
def test_what_is_ambiguous_is_refused(model, knows):
    """E6: embeddings that were appended, ids that were put in front, and embeddings of which nothing is known."""
    inputs, whole = inputs_of(model, "left")
    behind = virtual(model, whole)
    behind["inputs_embeds"] = behind["inputs_embeds"].roll(-4, dims=1)
    behind["attention_mask"] = behind["attention_mask"].roll(-4, dims=1)
    with pytest.raises(ValueError, match=r"covers 10 of the 14 positions of inputs_embeds.*nothing says which"):
        model(**behind)
    knows(IMAGE)
    with pytest.raises(ValueError, match=r"10 of the 14 positions of inputs_embeds.*in front of"):
        model(**behind)
    in_front = {**inputs, "image_attention_mask": whole["image_attention_mask"]}
    for name in ("input_ids", "attention_mask"):
        in_front[name] = torch.nn.functional.pad(whole[name], (2, 0), value=1)
    with pytest.raises(ValueError, match=r"covers 10 of the 12 positions of input_ids.*behind"):
        model(**in_front)
    short = {**inputs, "image_attention_mask": inputs["image_attention_mask"][:2]}
    with pytest.raises(ValueError, match="with batch 3"):
        model(**short)
