"""E7: every option of `generate` is honoured or refused, as docs/integrations.md says.

Honoured ones are held against transformers' own IDEFICS with the same weights where it is right, and otherwise against
loops of plain forward passes. Their ids are of the additional vocabulary, too (97 to 99 in these models).
"""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkDetector,
    WatermarkingConfig,
)
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from idefics_common import sample_checkpoint
from idefics_pt.transformers_versions import CACHE
from tests.pt.pairs import our_model, reference_model, torch_batch
from tests.pt.test_beams import rows_read
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
GREEDY = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
BEAMS = {"num_beams": 3}
SAMPLING = {"do_sample": True, "temperature": 2.0}
ENDS = [15, 96, 12, 90, 45, 63, 74, 48, 58, 43, 81, 84]  # ids that beams meet soon
RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def favouring(token):
    def process(input_ids, scores):
        scores = scores.clone()
        scores[:, token] += 5.0
        return scores

    return LogitsProcessorList([process])


def ending_at(length):
    return StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= length)])


# by option: what is given with it, and its value, which `filled` completes
AS_TRANSFORMERS = {
    "max_length": ({"max_new_tokens": None}, 12),
    "max_new_tokens": ({}, 3),
    "min_length": ({"eos_token_id": "written"}, 14),
    "min_new_tokens": ({"eos_token_id": "written"}, 5),
    "early_stopping": ({**BEAMS, "eos_token_id": ENDS, "max_new_tokens": 12}, True),
    "max_time": ({}, 0.0),
    "do_sample": ({"temperature": 2.0}, True),
    "num_beams": ({}, 3),
    "temperature": ({"do_sample": True}, 3.0),
    "top_k": (SAMPLING, 2),
    "top_p": (SAMPLING, 0.2),
    "min_p": (SAMPLING, 0.3),
    "top_h": (SAMPLING, 0.2),
    "typical_p": (SAMPLING, 0.3),
    "epsilon_cutoff": (SAMPLING, 0.02),
    "eta_cutoff": (SAMPLING, 0.5),
    "repetition_penalty": ({}, 5.0),
    "encoder_repetition_penalty": ({}, 5.0),
    "length_penalty": ({**BEAMS, "eos_token_id": "written"}, -5.0),
    "no_repeat_ngram_size": ({"max_new_tokens": 30}, 1),
    "encoder_no_repeat_ngram_size": ({"max_new_tokens": 30}, 1),
    "bad_words_ids": ({}, [[99], [98], [64], [6, 10]]),
    "forced_eos_token_id": ({}, 98),
    "exponential_decay_length_penalty": ({"eos_token_id": 98}, (1, 3.0)),
    "suppress_tokens": ({}, [99, 64]),
    "begin_suppress_tokens": ({}, "written first"),
    "sequence_bias": ({}, [[[98], 6.0], [[98, 97], 20.0]]),
    "watermarking_config": ({}, WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")),
    "num_return_sequences": (SAMPLING, 2),
    "eos_token_id": ({}, "written"),
    "pad_token_id": ({"eos_token_id": "written"}, 98),
    "logits_processor": ({}, favouring(98)),
    "stopping_criteria": ({}, ending_at(11)),
    "use_cache": ({}, False),
}
WITHOUT_EFFECT_ON_TOKENS = ("use_cache",)


@pytest.fixture(scope="module")
def pair():
    return our_model(), reference_model()


@pytest.fixture
def inputs(pair):
    return torch_batch(pair[0].config)


@pytest.fixture
def one(inputs):
    """One prompt with two images, without padding."""
    return {name: value[:1] for name, value in inputs.items()}


def generate(model, inputs, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(**inputs, **{**GREEDY, **kwargs})


def filled(value, model, inputs):
    """Ids that greedy search writes first, in place of "written first", or second, in place of "written"."""
    if value not in ("written", "written first"):
        return value
    return generate(model, inputs)[:, inputs["input_ids"].shape[1] + (value == "written")].unique().tolist()


@pytest.mark.parametrize("option", AS_TRANSFORMERS)
def test_tokens_are_those_of_transformers(option, pair, inputs):
    ours, reference = pair
    rest, value = AS_TRANSFORMERS[option]
    rest = {name: filled(other, ours, inputs) for name, other in rest.items()}
    value = filled(value, ours, inputs)
    tokens = generate(ours, inputs, **{**rest, option: value})
    assert torch.equal(tokens, generate(reference, inputs, **{**rest, option: value}))
    changes = not torch.equal(tokens, generate(ours, inputs, **rest))
    assert changes != (option in WITHOUT_EFFECT_ON_TOKENS)


@pytest.mark.parametrize("option", ["renormalize_logits", "remove_invalid_values"])
def test_scores_are_those_of_transformers(option, pair, inputs):
    scores = []
    for model in copy.deepcopy(pair):
        if option == "remove_invalid_values":
            with torch.no_grad():
                model.lm_head.weight[5] = float("nan")
        outputs = generate(model, inputs, **{option: True}, suppress_tokens=[98], **RECORDED)
        scores.append(torch.stack(outputs.scores))
    actual, expected = scores
    assert not actual.isnan().any()
    finite = actual > -1e30
    assert finite.sum() == actual.numel() * 99 / 100
    assert relative_error(actual[finite], expected[finite]) < FLOAT32_ACTIVATIONS
    if option == "renormalize_logits":
        assert torch.allclose(actual.exp().sum(dim=-1), torch.ones(()))


def test_outputs_are_those_of_transformers(pair, one):
    flags = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    fields = ("scores", "logits", "attentions", "hidden_states")
    kwargs = dict.fromkeys(("return_dict_in_generate", *flags), True)
    ours, reference = (model(attention="eager") for model in (our_model, reference_model))
    actual, expected = (generate(model, one, **kwargs) for model in (ours, reference))
    for field in fields:
        for x, y in zip(actual[field], expected[field], strict=True):
            x, y = (value if isinstance(value, tuple) else (value,) for value in (x, y))
            for part, other in zip(x, y, strict=True):
                assert relative_error(part, other) < FLOAT32_ACTIVATIONS
    bare = generate(ours, one, return_dict_in_generate=True)
    assert torch.equal(bare.sequences, actual.sequences)
    assert all(bare[field] is None for field in fields if field in bare)


def test_texts_begin_with_the_given_tokens(pair, one):
    ours, _ = pair
    first = torch.tensor([[98]])
    text = {"attention_mask": torch.ones_like(first)}
    assert torch.equal(ours.generate(**GREEDY, bos_token_id=98), generate(ours, {**text, "input_ids": first}))
    assert torch.equal(ours.generate(first, **text, **GREEDY), generate(ours, {**text, "input_ids": first}))
    config = GenerationConfig(**GREEDY)
    assert torch.equal(ours.generate(**one, generation_config=config), generate(ours, one))
    # the token that is forced comes second, after a single one
    forced = generate(ours, {**text, "input_ids": first}, forced_bos_token_id=97)
    assert forced[0, 1] == 97


@pytest.mark.parametrize("kwargs", [BEAMS, {"do_sample": True, "num_return_sequences": 3}])
def test_allowed_tokens_are_asked_for_by_prompt(kwargs, pair, inputs):
    ours, _ = pair
    allowed = [[5, 97], [98, 11], [99, 20], [30, 31]]
    tokens = generate(ours, inputs, prefix_allowed_tokens_fn=lambda row, ids: allowed[row], **kwargs)
    new = tokens[:, inputs["input_ids"].shape[1] :].unflatten(0, (len(allowed), -1))
    for of_prompt, ids in zip(new, allowed, strict=True):
        assert torch.isin(of_prompt, torch.tensor(ids)).all()
    assert (new > 96).any()


@torch.no_grad()
def guided_by_hand(model, inputs, scale, negative):
    """Greedy search over `scale` times what the prompt adds to the log-probabilities of `negative` alone."""
    ids, new = inputs["input_ids"], []
    for _ in range(GREEDY["max_new_tokens"]):
        rest = {"input_ids": torch.cat((ids, *new), dim=1), "pixel_values": inputs["pixel_values"]}
        missing = len(new)
        rest["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, missing), value=1)
        mask = inputs["image_attention_mask"]
        rest["image_attention_mask"] = torch.cat((mask, mask[:, -1:].expand(-1, missing, -1)), dim=1)
        with_prompt = model(**rest).logits[:, -1].log_softmax(dim=-1)
        without = model(torch.cat((negative, *new), dim=1)).logits[:, -1].log_softmax(dim=-1)
        new.append((without + scale * (with_prompt - without)).argmax(dim=-1, keepdim=True))
    return torch.cat((ids, *new), dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_is_away_from_text_without_images(use_cache, pair, inputs):
    ours, _ = pair
    kwargs = {"guidance_scale": 3.0, "use_cache": use_cache}
    plain = generate(ours, inputs)
    last = inputs["input_ids"][:, -1:]
    guided = generate(ours, inputs, **kwargs)
    assert torch.equal(guided, guided_by_hand(ours, inputs, 3.0, last))
    negative = torch.tensor([[5, 98, 7]]).expand(4, -1)
    kwargs |= {"negative_prompt_ids": negative, "negative_prompt_attention_mask": torch.ones_like(negative)}
    by_negative = generate(ours, inputs, **kwargs)
    assert torch.equal(by_negative, guided_by_hand(ours, inputs, 3.0, negative))
    assert not torch.equal(guided, plain)
    assert not torch.equal(by_negative, guided)
    # samples of a prompt are guided by its own negative prompt
    kwargs |= {"negative_prompt_ids": inputs["input_ids"], "do_sample": True}
    kwargs["negative_prompt_attention_mask"] = inputs["attention_mask"]
    samples = generate(ours, inputs, **kwargs, num_return_sequences=2)
    repeated = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        kwargs[name] = kwargs[name].repeat_interleave(2, dim=0)
    assert torch.equal(samples, generate(ours, repeated, **kwargs))


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_a_watermark_is_found_by_transformers(scheme, pair, one):
    ours, _ = pair
    mark = WatermarkingConfig(bias=8.0, seeding_scheme=scheme)
    detector = WatermarkDetector(model_config=ours.config, device="cpu", watermarking_config=mark)
    marked = generate(ours, one, watermarking_config=mark, max_new_tokens=40, **RECORDED)
    prompt = one["input_ids"].shape[1]
    found = detector(marked.sequences[:, prompt:], return_dict=True)
    assert found.prediction.all()
    assert found.green_fraction > 0.9
    plain = generate(ours, one, max_new_tokens=40)
    assert not detector(plain[:, prompt:], return_dict=True).prediction.any()
    # a token of the additional vocabulary is never a green one
    raised = torch.stack(marked.scores) - torch.stack(marked.logits) > 1.0
    assert raised.any()
    assert not raised[..., ours.config.vocab_size :].any()


def test_synthid_watermarks_reach_the_whole_vocabulary(pair, one):
    ours, reference = pair
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[654, 400, 836, 123, 340])
    kwargs = {"watermarking_config": mark, "do_sample": True, "top_k": 0, **RECORDED}
    actual, expected = (generate(model, one, **kwargs) for model in (ours, reference))
    assert torch.equal(actual.sequences, expected.sequences)
    changed = ~torch.isclose(torch.stack(actual.scores), torch.stack(actual.logits).log_softmax(-1), atol=1e-3)
    assert changed[..., ours.config.vocab_size :].any()


@pytest.mark.filterwarnings("error:These arguments have no effect")  # E10: the tokenizer has one
@pytest.mark.parametrize(("stop", "length"), [("dJ", 3), ("J<end_of_", 4), ("<end_of_utterance>", 4), ("coat)", 6)])
def test_strings_end_a_text(stop, length):
    ours = our_model(vocab_size=583, additional_vocab_size=3)  # the sizes of the shipped tokenizer
    tokenizer = AutoTokenizer.from_pretrained(sample_checkpoint())
    inputs = {name: value[:1] for name, value in torch_batch(ours.config).items()}
    prompt = inputs["input_ids"].shape[1]
    text = tokenizer.convert_tokens_to_ids(["▁put", "▁d", "J", "<end_of_utterance>", "▁coat", ")", "▁put", "▁put"])

    def write(input_ids, scores):
        return scores + 100 * torch.nn.functional.one_hot(torch.tensor(text[input_ids.shape[1] - prompt]), 586)

    kwargs = {"logits_processor": LogitsProcessorList([write]), "stop_strings": stop, "tokenizer": tokenizer}
    tokens = generate(ours, inputs, max_new_tokens=8, **kwargs)
    assert tokens[0, prompt:].tolist() == text[:length]


@pytest.mark.parametrize("implementation", ["dynamic", "static", "sliding_window", "hybrid_chunked"])
@pytest.mark.parametrize("kwargs", [{}, BEAMS])
def test_caches_are_of_the_kind_that_was_asked_for(kwargs, implementation, pair, inputs):
    ours, _ = pair
    room = {} if implementation == "dynamic" else {"max_cache_len": 64}
    outputs = generate(ours, inputs, cache_implementation=implementation, **kwargs, **room, **RECORDED)
    cache = outputs[CACHE]
    assert cache.is_compileable == bool(room)
    assert cache.get_max_length() == (64 if room else -1)
    assert torch.equal(outputs.sequences, generate(ours, inputs, **kwargs))


@pytest.mark.parametrize("kwargs", [{}, BEAMS])
def test_a_quantized_cache_keeps_what_transformers_keeps(kwargs, pair, inputs):
    ours, reference = pair
    kwargs = {**kwargs, **RECORDED, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    actual, expected = (generate(model, inputs, **kwargs) for model in (ours, reference))
    assert torch.equal(actual.sequences, expected.sequences)
    exact = generate(ours, inputs, **{**kwargs, "cache_implementation": None, "cache_config": None})
    assert torch.equal(actual.scores[0], exact.scores[0])
    assert not torch.equal(actual.scores[1], exact.scores[1])


@pytest.mark.parametrize("size", [1, 4, 9, 20])
@pytest.mark.parametrize("use_resampler", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_a_prompt_is_read_in_chunks(masks, use_resampler, size):
    ours = our_model(use_resampler=use_resampler)
    inputs = torch_batch(ours.config)
    if not masks:
        inputs.pop("image_attention_mask")
    with rows_read(ours) as shapes:
        in_chunks = generate(ours, inputs, prefill_chunk_size=size)
    assert torch.equal(in_chunks, generate(ours, inputs))
    assert shapes[0] == (4, min(size, 9))
    assert sum(length for _, length in shapes) == 9 + 5


@pytest.mark.parametrize("disabled", [False, True])
def test_steps_are_compiled_as_configured(disabled, one):
    ours, graphs = our_model(), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    kwargs = {"cache_implementation": "static", "compile_config": config, "disable_compile": disabled}
    torch._dynamo.reset()
    assert torch.equal(generate(ours, one, **kwargs), generate(ours, one))
    assert len(graphs) == (0 if disabled else 1)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_drafts_as_its_configuration_says(schedule, one):
    ours, assistant = our_model(), our_model()
    assistant.generation_config.update(
        num_assistant_tokens=2, num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0
    )
    with rows_read(ours) as shapes:
        tokens = generate(ours, one, assistant_model=assistant, max_new_tokens=7)
    assert torch.equal(tokens, generate(ours, one, max_new_tokens=7))
    # two drafts, all right, and one more: 3 + 3 + 1 tokens, or 3 and then more drafts
    assert len(shapes) == {"constant": 3, "heuristic": 2}[schedule]
    assert assistant.generation_config.num_assistant_tokens == {"constant": 2, "heuristic": 6}[schedule]


def test_candidates_come_from_the_prompt(one):
    ours = our_model()
    plain = generate(ours, one, max_new_tokens=20)
    again = {"input_ids": plain, "attention_mask": torch.ones_like(plain), "pixel_values": one["pixel_values"]}
    mask = one["image_attention_mask"]
    again["image_attention_mask"] = torch.cat((mask, mask[:, -1:].expand(-1, 20, -1)), dim=1)
    expected = generate(ours, again)
    passes = []
    for kwargs in ({}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}):
        with rows_read(ours) as shapes:
            assert torch.equal(generate(ours, again, **kwargs), expected)
        passes.append([length for _, length in shapes[1:]])
    assert max(passes[0]) == 1 < max(passes[1])


@torch.no_grad()
def test_an_ensemble_of_model_and_assistant(one):
    ours, assistant, weight = our_model(), our_model(seed=1), 0.4
    assistant.generation_config.update(num_assistant_tokens=1, assistant_confidence_threshold=0.0)
    tokens = generate(ours, one, assistant_model=assistant, assistant_ensemble_weight=weight)
    mask = one["image_attention_mask"]

    def probabilities(model, ids):
        seen = torch.cat((mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1)), dim=1)
        return model(ids, pixel_values=one["pixel_values"], image_attention_mask=seen).logits[:, -1].softmax(dim=-1)

    ids = one["input_ids"]
    length = ids.shape[1] + GREEDY["max_new_tokens"]
    while ids.shape[1] < length:
        target, draft = probabilities(ours, ids), probabilities(assistant, ids)
        if ids.shape[1] == length - 1:  # no room for a draft and the token after it
            draft = target
        chosen = (weight * target + (1 - weight) * draft).argmax(dim=-1, keepdim=True)
        ids = torch.cat((ids, chosen), dim=1)
        if chosen == draft.argmax() and ids.shape[1] < length:
            ids = torch.cat((ids, probabilities(ours, ids).argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(tokens, ids)
    assert not torch.equal(tokens, generate(ours, one))


def test_an_assistant_stops_where_it_is_unsure(pair, one):
    ours, _ = pair
    kwargs = {"is_assistant": True, **RECORDED}
    sure = generate(ours, one, assistant_confidence_threshold=0.0, **kwargs)
    assert torch.equal(sure.sequences, generate(ours, one))
    likeliest = torch.stack(sure.scores).softmax(dim=-1).amax(dim=-1).flatten()
    bound = likeliest.median().item() + 1e-6
    unsure = generate(ours, one, assistant_confidence_threshold=bound, **kwargs)
    assert len(unsure.scores) == (likeliest < bound).nonzero()[0].item() + 1


class _Collected(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_tokens_are_streamed(pair, one):
    ours, _ = pair
    for kwargs in ({}, {"assistant_model": our_model(seed=1)}):
        streamer = _Collected()
        tokens = generate(ours, one, streamer=streamer, **kwargs)
        assert streamer.tokens == [*tokens[0].tolist(), "end"]


def test_ranks_wait_for_each_other(pair, inputs, tmp_path):
    ours, _ = pair
    expected = generate(ours, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch.equal(generate(ours, inputs, synced_gpus=True), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_searches_of_others_get_the_images(pair, one, tmp_path, monkeypatch):
    ours, _ = pair
    given = {}

    def search(model, input_ids, logits_processor, stopping_criteria, generation_config, own=None, **model_kwargs):
        given.update(model_kwargs, own=own)
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    expected = generate(ours, one)
    assert torch.equal(generate(ours, one, custom_generate=search, own=3), expected)
    assert given["own"] == 3
    assert given["pixel_values"] is one["pixel_values"]
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, **kwargs):\n    kwargs['max_new_tokens'] = 2\n    return model.generate(**kwargs)\n"
    )
    tokens = generate(ours, one, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(tokens, expected[:, : one["input_ids"].shape[1] + 2])


# by option: what is given, and words of the message
REFUSED = {
    "assistant_early_exit": ({"assistant_early_exit": 2}, "does not support assistant_early_exit=2 here: IDEFICS was"),
    "token_healing": ({"token_healing": True, "tokenizer": object()}, "without the image tokens"),
    "use_mtp": ({"use_mtp": True}, "use_mtp=True"),
    "speculation_type": ({"speculation_type": "dflash"}, "speculation_type='dflash'"),
    "decoder_start_token_id": ({"decoder_start_token_id": 3}, "decoder_start_token_id=3"),
    "low_memory": ({"low_memory": True}, "low_memory=True"),
    "continuous_batching_config": ({"continuous_batching_config": {"block_size": 4}}, "continuous_batching_config="),
    "assistant_lookbehind": ({"assistant_lookbehind": 3}, "assistant_lookbehind=3"),
    "target_lookbehind": ({"target_lookbehind": 3}, "target_lookbehind=3"),
    "assistant_tokenizer": ({"assistant_tokenizer": object()}, "does not support assistant_tokenizer"),
    # transformers moved the code of these to the Hub
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires `trust_remote_code=True`"),
    "dola_layers": ({"dola_layers": "high"}, "Dola Generation requires `trust_remote_code=True`"),
    "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2}, "Group Beam Search requires `trust_remote_code=True`"),
    "diversity_penalty": ({"num_beams": 4, "diversity_penalty": 0.5}, "group beam search alone reads it"),
    "constraints": ({"num_beams": 2, "constraints": [object()]}, "Constrained Beam Search requires"),
    "force_words_ids": ({"num_beams": 2, "force_words_ids": [[5]]}, "Constrained Beam Search requires"),
}
REFUSED_IN_PART = {
    "penalty_alpha where nothing reads it": ({"penalty_alpha": 0.6, "do_sample": True}, "contrastive search alone"),
    "dola_layers with beams": ({"dola_layers": "low", "num_beams": 2}, "DoLa alone reads it"),
    "num_beam_groups without beams": ({"num_beam_groups": 2}, "group beam search alone reads it"),
    "cache_config": ({"cache_config": {"nbits": 4}}, 'cache_implementation="quantized" alone reads it'),
    "max_matching_ngram_size": ({"max_matching_ngram_size": 2}, "prompt_lookup_num_tokens alone reads it"),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, "assisted decoding alone reads it"),
    "negative_prompt_ids": ({"negative_prompt_ids": torch.ones(4, 2).long()}, "for guidance_scale, which is not set"),
    "guidance with beams": ({"guidance_scale": 2.0, "num_beams": 2}, "use neither beams nor assisted decoding"),
    "guidance with an assistant": ({"guidance_scale": 2.0, "prompt_lookup_num_tokens": 2}, "use neither beams nor"),
    "SynthID with beams": (
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3), "num_beams": 2},
        "watermarking_config='SynthIDTextWatermarkingConfig'",
    ),
    "caches that are offloaded": ({"cache_implementation": "offloaded"}, "the model is on the CPU already"),
    "static caches that are offloaded": ({"cache_implementation": "offloaded_static"}, "on the CPU already"),
    "paged caches": ({"cache_implementation": "paged"}, "would answer without the images"),
    "strings without a tokenizer": ({"stop_strings": "x"}, "you must pass the model's tokenizer"),
    "streams of beams": ({"streamer": _Collected(), "num_beams": 2}, "`streamer` cannot be used with beam search"),
    "chunks of embeddings": (
        {"prefill_chunk_size": 2, "inputs_embeds": torch.ones(4, 9, 24), "input_ids": None},
        "inputs_embeds are read at once",
    ),
    "bad_words_ids": ({"bad_words_ids": [[5], [7, 100]]}, r"\[0, 100\), 97 of the base vocabulary and 3 added ones"),
    "suppress_tokens": ({"suppress_tokens": [5, 100]}, "suppress_tokens=.*got 100"),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens=.*got -1"),
    "forced_bos_token_id": ({"forced_bos_token_id": 100}, "forced_bos_token_id=100"),
    "forced_eos_token_id": ({"forced_eos_token_id": [5, 100]}, "forced_eos_token_id="),
    "sequence_bias": ({"sequence_bias": {(5, 100): 2.0}}, "sequence_bias=.*got 100"),
    "sequence_bias as a list": ({"sequence_bias": [[[100], -1]]}, "sequence_bias=.*got 100"),
    "an old option": ({"return_legacy_cache": True}, "return_legacy_cache"),
    "another old option": ({"use_model_defaults": True}, "use_model_defaults"),
    "features of other models": ({"mm_encoder_outputs": {"image": torch.ones(1)}}, "no use for mm_encoder_outputs"),
    "both directions": ({"is_causal": False}, "no use for is_causal"),
}


def state(model, cache):
    """All that a call may change and has to leave alone."""
    tensors = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    names = {name for name in vars(model) if "cache" in name}
    images = cache.image_memory
    return model.config.to_dict(), model.generation_config.to_dict(), names, images, tensors


def assert_same_state(actual, expected):
    *rest, images, tensors = actual
    *expected_rest, expected_images, expected_tensors = expected
    assert rest == expected_rest
    assert images is expected_images
    assert all(map(torch.equal, tensors, expected_tensors))


@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_IN_PART])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_refused_changes_nothing(case, inputs):
    kwargs, message = {**REFUSED, **REFUSED_IN_PART}[case]
    model, cache = our_model(), DynamicCache(config=our_model().config)
    following = {name: value[:, :9] for name, value in inputs.items() if name != "pixel_values"}
    head = {**following, **{name: following[name][:, :5] for name in ("input_ids", "attention_mask")}}
    with torch.no_grad():
        model(**head, pixel_values=inputs["pixel_values"], past_key_values=cache, use_cache=True)
    before, expected = state(model, cache), generate(model, inputs)
    with pytest.raises(ValueError, match=message):
        generate(model, {**following, "past_key_values": cache, **kwargs})
    # and as a setting of the model, where it is one
    settings = {name: value for name, value in kwargs.items() if hasattr(GenerationConfig(), name)}
    others = {name: value for name, value in kwargs.items() if name not in settings}
    other = copy.deepcopy(model)
    other.generation_config.update(**settings)
    with pytest.raises(ValueError, match=message):
        generate(other, {**inputs, **others})
    assert_same_state(state(model, cache), before)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, {**following, "past_key_values": cache}), expected)


def test_an_error_inside_leaves_the_configuration_alone(inputs):
    model = our_model()
    before, expected = (model.config.to_dict(), model.generation_config.to_dict()), generate(model, inputs)

    def fail(input_ids, scores):
        raise RuntimeError("from a logits processor")

    for kwargs in ({}, BEAMS, {"do_sample": True}):
        with pytest.raises(RuntimeError, match="from a logits processor"):
            generate(model, inputs, logits_processor=LogitsProcessorList([fail]), **kwargs)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert torch.equal(generate(model, inputs), expected)


def test_continuous_batching_is_refused():
    model = our_model()
    for call in (model.init_continuous_batching, lambda: model.generate_batch([[5, 6]])):
        with pytest.raises(ValueError, match="would answer without the images"):
            call()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_assistant_tokens": 3},
        {"num_assistant_tokens_schedule": "heuristic"},
        {"assistant_confidence_threshold": 0.9},
    ],
)
def test_settings_of_an_assistant_are_its_own(settings, pair, one):
    ours, _ = pair
    (name,) = settings
    with pytest.raises(ValueError, match=f"does not support {name}=.*set it there"):
        generate(ours, one, assistant_model=our_model(seed=1), **settings)


def test_assistants_need_the_same_vocabulary(pair, one):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"\[0, 100\), 97 .* and 3 added ones; it has \[0, 101\), 97 .* and 4 added"):
        generate(ours, one, assistant_model=our_model(additional_vocab_size=4))


def table():
    """Name and status of every option in the table of docs/integrations.md."""
    section = re.search(r"^## Generation\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE)
    return {name: status for names, status in rows for name in re.findall(r"`(\w+)`", names)}


def test_e7_the_table_has_every_option_of_the_installed_transformers():
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"}
    of_generate = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    popped = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}  # taken out of `kwargs` by name
    assert table().keys() == names | of_generate | popped


def test_e7_the_table_says_what_is_tested():
    """An option that is said to be honoured is given in some test above, and one that is refused is in `REFUSED`."""
    assert {name for name, status in table().items() if status == "refused"} == REFUSED.keys()
    own_text = Path(__file__).read_text().partition("# by option: what is given, and words of the message")[0]
    for name in table().keys() - REFUSED.keys():
        assert re.search(rf"\b{name}\b", own_text), name
