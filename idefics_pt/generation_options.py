"""Options of `generate` that are refused, before anything has changed. docs/integrations.md has a table of all options.

Unusual: an option that the call at hand would not read is refused too, where transformers passes over it without a
word. What transformers itself refuses or warns of is left to it.

Mirrors `idefics_tf/generation_settings.py`.
"""

from typing import NamedTuple

from transformers import GenerationConfig


class _Unread(NamedTuple):
    """An option that is refused unless something reads it.

    Attributes:
        why: what the message says. is_read: from a `GenerationConfig` and the name of a search, whether it is read.
    """

    why: str
    is_read: object = lambda config, mode: False


_CODE_OF_THE_HUB = "{} alone reads it, whose code transformers moved to the Hub (`custom_generate`)"
_OTHER_TOKENIZER = "assistants with a tokenizer of their own are not supported"
_UNREAD = {
    "assistant_early_exit": _Unread("IDEFICS was not trained to answer from an earlier layer"),
    "token_healing": _Unread(
        "it makes the prompt anew from its text, without the image tokens; end the prompt where a token ends, or use "
        "prefix_allowed_tokens_fn"
    ),
    "use_mtp": _Unread("IDEFICS has no layers that predict several tokens"),
    "speculation_type": _Unread("its drafts are of other models; use assistant_model or prompt_lookup_num_tokens"),
    "decoder_start_token_id": _Unread("it is for models with an encoder of text"),
    "low_memory": _Unread("transformers has no such beam search any more"),
    "continuous_batching_config": _Unread("continuous batching takes no images"),
    "assistant_lookbehind": _Unread(_OTHER_TOKENIZER),
    "target_lookbehind": _Unread(_OTHER_TOKENIZER),
    "cache_config": _Unread(
        'cache_implementation="quantized" alone reads it',
        lambda config, mode: config.cache_implementation == "quantized",
    ),
    "max_matching_ngram_size": _Unread(
        "prompt_lookup_num_tokens alone reads it", lambda config, mode: config.prompt_lookup_num_tokens is not None
    ),
    "assistant_ensemble_weight": _Unread(
        "assisted decoding alone reads it", lambda config, mode: mode == "assisted_generation" or config.is_assistant
    ),
    "penalty_alpha": _Unread(
        _CODE_OF_THE_HUB.format("contrastive search"), lambda config, mode: mode == "contrastive_search"
    ),
    "dola_layers": _Unread(_CODE_OF_THE_HUB.format("DoLa"), lambda config, mode: mode == "dola_generation"),
    **dict.fromkeys(
        ("num_beam_groups", "diversity_penalty"),
        _Unread(_CODE_OF_THE_HUB.format("group beam search"), lambda config, mode: mode == "group_beam_search"),
    ),
}
_OF_THE_ASSISTANT = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
_IDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "suppress_tokens",
)


def check_options(model, mode, config: GenerationConfig, mode_kwargs: dict) -> None:
    """Refuse what this model cannot do.

    Args:
        mode: transformers' `GenerationMode`. config: complete, with defaults. mode_kwargs: arguments of the search.

    Raises:
        ValueError: naming the option, its value and the reason.
    """
    defaults = GenerationConfig._get_default_generation_params()

    def is_set(name):
        value = getattr(config, name, None)
        return value is not None and value is not False and value != defaults.get(name)

    for name, option in _UNREAD.items():
        if is_set(name) and not option.is_read(config, mode):
            _refuse(name, getattr(config, name), option.why)
    if None in (config.suppress_tokens or ()):
        why = "TRL fills it from config.image_token_id, so set model.config.image_token_id = processor.image_token_id"
        _refuse("suppress_tokens", config.suppress_tokens, why)
    vocabulary = model.config.vocab_size + model.config.additional_vocab_size
    for name in _IDS:
        for token in _ids_of(name, getattr(config, name)):
            if not 0 <= token < vocabulary:
                _refuse(name, getattr(config, name), f"ids must lie in {_vocabulary_of(model.config)}, got {token}")
    if config.cache_implementation == "paged":
        refuse_continuous_batching()
    if (config.cache_implementation or "").startswith("offloaded") and model.device.type == "cpu":
        _refuse("cache_implementation", config.cache_implementation, "the model is on the CPU already")
    if config.num_beams > 1 or mode == "assisted_generation":
        # what these two remember of the text so far is neither reordered with beams nor cropped with candidates
        why = "it follows one text token by token; use neither beams nor assisted decoding"
        if config.guidance_scale not in (None, 1):
            _refuse("guidance_scale", config.guidance_scale, why)
        if hasattr(config.watermarking_config, "ngram_len"):
            _refuse("watermarking_config", type(config.watermarking_config).__name__, why)
    _check_assistant(model, config, mode_kwargs, is_set)


def refuse_continuous_batching():
    """Raises `ValueError`."""
    raise ValueError(
        "Continuous batching (generate_batch, cache_implementation='paged') takes token ids alone and would answer "
        "without the images; give generate a batch of prompts."
    )


def check_model_arguments(model_kwargs: dict, known) -> None:
    """Refuse arguments that transformers lets through for the models of others. Raises `ValueError`."""
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None and name not in known)
    if unknown:
        raise ValueError(f"generate of IDEFICS has no use for {', '.join(unknown)}. Images are given as pixel_values.")


def _refuse(name: str, value, why: str):
    raise ValueError(f"generate does not support {name}={value!r} here: {why}.")


def _vocabulary_of(config) -> str:
    added = getattr(config, "additional_vocab_size", 0)
    return f"[0, {config.vocab_size + added}), {config.vocab_size} of the base vocabulary and {added} added ones"


def _ids_of(name: str, value):
    """All token ids in the value of an option, however nested; what is malformed is left to transformers."""
    if name == "sequence_bias" and isinstance(value, list):
        value = [pair[0] for pair in value if isinstance(pair, list | tuple) and pair]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple | dict):
        for element in value:
            yield from _ids_of("", element)


def _check_assistant(model, config, mode_kwargs, is_set):
    if mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError(f"generate does not support assistant_tokenizer: {_OTHER_TOKENIZER}.")
    assistant = mode_kwargs.get("assistant_model")
    if assistant is None:
        return
    own, others = (_vocabulary_of(of.config.get_text_config()) for of in (model, assistant))
    if own != others:
        raise ValueError(f"assistant_model must have the vocabulary of the model, {own}; it has {others}.")
    for name in _OF_THE_ASSISTANT:
        value, used = getattr(config, name), getattr(assistant.generation_config, name)
        if is_set(name) and value != used:
            _refuse(
                name, value, f"the assistant_model's generation_config says {used!r}, and is what is read: set it there"
            )
