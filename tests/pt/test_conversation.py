"""Images encoded once and used again: given as features, and remembered by a cache over a conversation."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from tests.models import SMALL
from tests.pt.pairs import our_model, reference_image_states, reference_model, torch_batch
from tests.pt.test_generation import GREEDY, counted_calls, image_work
from tests.tolerances import FLOAT32_ACTIVATIONS, HALF_PRECISION, relative_error


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("use_resampler", [True, False])
def test_d10_generation_from_image_features(use_resampler, use_cache):
    model = our_model(use_resampler=use_resampler)
    inputs = torch_batch(model.config)
    expected = model.generate(**inputs, **GREEDY)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        vision = model.model.vision_model(pixels.flatten(0, 1)).last_hidden_state.unflatten(0, pixels.shape[:2])
        features = model.encode_images(pixels)
    form = "perceiver_embeddings" if use_resampler else "image_encoder_embeddings"
    for images in ({"image_encoder_embeddings": vision}, {form: features}):
        tokens = model.generate(**inputs, **images, use_cache=use_cache, num_beams=2, **GREEDY)
        assert torch.equal(tokens, model.generate(**inputs, pixel_values=pixels, num_beams=2, **GREEDY))
        with counted_calls(vision=model.model.vision_model) as counts:
            assert torch.equal(model.generate(**inputs, **images, use_cache=use_cache, **GREEDY), expected)
        assert counts["vision"] == 0


def test_features_need_the_module_they_came_from():
    model = our_model(use_resampler=False)
    inputs = torch_batch(model.config)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="the model has no resampler"):
        model(**inputs, perceiver_embeddings=torch.ones(4, 2, 6, 20))


@torch.no_grad()
def test_skipped_images_have_zero_states():
    model, inputs = our_model(), torch_batch(our_model().config)
    seen = inputs["image_attention_mask"].bool().any(dim=1)
    sizes = []
    hook = model.model.vision_model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    states = model(**inputs).image_hidden_states
    hook.remove()
    assert sizes == [seen.sum().item()] == [5]
    assert states[~seen].abs().max() == 0.0
    expected = reference_image_states(reference_model(), inputs["pixel_values"])
    assert relative_error(states[seen], expected[seen]) < FLOAT32_ACTIVATIONS


def question(tokens, config, length=4, seed=5):
    """A conversation so far, with one more question at its end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat((tokens, torch.randint(3, config.vocab_size, (len(tokens), length), generator=generator)), dim=1)


def extended(mask, length):
    """A mask over positions, its last one repeated up to `length`."""
    return torch.cat((mask, mask[:, -1:].repeat_interleave(length - mask.shape[1], dim=1)), dim=1)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_conversation_goes_on_without_image_work(cache_class):
    model = our_model()
    inputs = torch_batch(model.config)
    kwargs = {"max_cache_len": 40} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **kwargs)
    first = model.generate(**inputs, past_key_values=cache, **GREEDY)
    ids = question(first, model.config)
    following = {
        "input_ids": ids,
        "attention_mask": extended(inputs["attention_mask"], ids.shape[1]),
        "image_attention_mask": extended(inputs["image_attention_mask"], ids.shape[1]),
    }
    expected = model.generate(**following, pixel_values=inputs["pixel_values"], **GREEDY)
    repeated = copy.deepcopy(cache)
    with counted_calls(**image_work(model)) as counts:
        assert torch.equal(model.generate(**following, past_key_values=cache, **GREEDY), expected)
        # a caller of transformers' model gives the images again; they are known, and cost nothing
        again = model.generate(**following, pixel_values=inputs["pixel_values"], past_key_values=repeated, **GREEDY)
        assert torch.equal(again, expected)
    assert not any(counts.values())


def test_a_conversation_goes_on_with_a_new_image():
    model = our_model()
    inputs = torch_batch(model.config)
    pixels = inputs.pop("pixel_values")
    only_first = {**inputs, "image_attention_mask": inputs["image_attention_mask"][..., :1]}
    cache = DynamicCache(config=model.config)
    first = model.generate(**only_first, pixel_values=pixels[:, :1], past_key_values=cache, **GREEDY)
    ids = question(first, model.config)
    mask = torch.nn.functional.pad(extended(only_first["image_attention_mask"], ids.shape[1]), (0, 1))
    mask[:, -3:] = torch.tensor([0, 1])
    following = {
        "input_ids": ids,
        "attention_mask": extended(inputs["attention_mask"], ids.shape[1]),
        "image_attention_mask": mask,
    }
    expected = model.generate(**following, pixel_values=pixels, **GREEDY)
    again = copy.deepcopy(cache)
    with counted_calls(**image_work(model)) as counts:
        answer = model.generate(**following, pixel_values=pixels[:, 1:], past_key_values=cache, **GREEDY)
    assert torch.equal(answer, expected)
    assert counts["vision tower"] == counts["image keys"] == 1
    # all images given again, the mask over these alone: they take the place of those of the cache
    assert torch.equal(model.generate(**following, pixel_values=pixels, past_key_values=again, **GREEDY), expected)


class _Collected(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(None)


def test_streamers_assisted_decoding_and_other_caches():
    model = our_model()
    inputs = {name: value[:1] for name, value in torch_batch(model.config).items()}
    expected = model.generate(**inputs, **GREEDY)
    streamer = _Collected()
    model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.tokens == [*expected[0].tolist(), None]
    for options in (
        {"assistant_model": our_model(seed=1)},
        {"assistant_model": our_model()},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
    ):
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected), options


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches_take_the_images_along(implementation, device):
    if device == "cpu":
        pytest.skip("transformers offloads caches from an accelerator only")
    model = our_model(device)
    inputs = torch_batch(model.config, device)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=implementation), expected)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_kernels_for_self_attention(attention, device):
    if device == "cpu":
        pytest.skip(
            "the kernels are for accelerators; torch's flex attention does not compile for short rows on the CPU"
        )
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    sizes = {"hidden_size": 96, "vision_config": {**SMALL["vision_config"], "embed_dim": 64}}
    model = our_model(device, dtype=torch.bfloat16, **sizes)
    other = our_model(device, attention, dtype=torch.bfloat16, **sizes)
    inputs = torch_batch(model.config, device)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = model(**inputs).logits[real], other(**inputs).logits[real]
    assert relative_error(actual.float().cpu(), expected.float().cpu()) < HALF_PRECISION["bfloat16"]
