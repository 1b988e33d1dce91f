"""From a `transformers.GenerationConfig` and keyword arguments to the settings of one search.

Settings are hashable, because a compiled search is kept for each of them. Lengths are arguments of the compiled search
instead. A setting that this library does not have is refused, never ignored.

In `idefics_pt` transformers does it.
"""

import copy
import itertools
from dataclasses import dataclass

from transformers import GenerationConfig

_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
# files have these, and they change nothing here; a call that gives one expects that it does
_WITHOUT_EFFECT = ("bos_token_id", "cache_implementation", "compile_config", "decoder_start_token_id", "max_cache_len")
_READ_ELSEWHERE = ("_from_model_config", "disable_compile", "return_dict_in_generate", "transformers_version")


@dataclass(frozen=True)
class Settings:
    """How to search; fields that `transformers.GenerationConfig` has mean the same.

    Attributes:
        eos_token_ids: ids that end a text, or none.
        bad_words_ids: sequences of ids that may not be written, in groups of equal length.
        top_k: 0 for no limit.
        interpolate_pos_encoding: allow images of another size than the model's.
        streams: whether tokens are handed out as soon as they are chosen.
    """

    num_beams: int
    num_return_sequences: int
    do_sample: bool
    early_stopping: bool | str
    length_penalty: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    bad_words_ids: tuple[tuple[tuple[int, ...], ...], ...]
    repetition_penalty: float
    no_repeat_ngram_size: int
    temperature: float
    top_k: int
    top_p: float
    use_cache: bool
    output_scores: bool
    output_logits: bool
    interpolate_pos_encoding: bool = False
    streams: bool = False

    @property
    def rows_per_prompt(self) -> int:
        """Rows of text for each prompt while searching."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


def complete(of_model: GenerationConfig, of_call: GenerationConfig | None, overrides: dict):
    """One full configuration: keyword arguments before `of_call`, before the model's, before transformers' defaults.

    Returns:
        the configuration, whose `max_length` is None if nobody set it; and the `overrides` that are not its fields.

    Raises:
        ValueError: if values are impossible or contradict each other, or an override has no effect here.
    """
    idle = [name for name in _WITHOUT_EFFECT if overrides.get(name) is not None]
    if idle:
        raise ValueError(
            f"{idle[0]}={overrides[idle[0]]!r} has no effect in the Keras room: prompts begin as they are "
            "given, caches have the size of the longest text, and generate has jit_compile. Leave it out."
        )
    config = copy.deepcopy(of_call) if of_call is not None else GenerationConfig()
    config.update(**of_model.to_dict(), defaults_only=True, allow_custom_entries=True)
    defaults = GenerationConfig._get_default_generation_params()
    config.update(**{name: value for name, value in defaults.items() if name not in _LENGTHS}, defaults_only=True)
    return config, config.update(**overrides)


def settings_of(config: GenerationConfig, vocabulary: int, **extra) -> Settings:
    """The settings of a configuration that `complete` has made.

    Raises:
        ValueError: if it asks for something that this library does not do; the message names it.
    """
    known = {*Settings.__dataclass_fields__, "eos_token_id", *_LENGTHS, *_WITHOUT_EFFECT, *_READ_ELSEWHERE}
    defaults = GenerationConfig._get_default_generation_params()
    refused = {
        name: value
        for name, value in config.to_dict().items()
        if name not in known and value not in (None, False) and value != defaults.get(name)
    }
    if refused:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(refused.items()))
        raise ValueError(f"The Keras room cannot generate with {listed}; idefics_pt, which uses transformers, can.")
    eos = config.eos_token_id
    eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if config.num_beams == 1 and not config.do_sample and config.num_return_sequences != 1:
        raise ValueError(
            f"num_return_sequences is {config.num_return_sequences}, but greedy search finds one text: use beams or "
            "sampling."
        )
    pad = config.pad_token_id
    return Settings(
        num_beams=config.num_beams,
        num_return_sequences=config.num_return_sequences,
        do_sample=config.do_sample,
        early_stopping=config.early_stopping,
        length_penalty=float(config.length_penalty),
        eos_token_ids=eos_token_ids,
        pad_token_id=eos_token_ids[0] if pad is None and eos_token_ids else pad,
        bad_words_ids=_bad_words(config.bad_words_ids, eos_token_ids, vocabulary),
        repetition_penalty=float(config.repetition_penalty),
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        temperature=float(config.temperature or 1.0),
        top_k=config.top_k or 0,
        top_p=float(config.top_p or 1.0),
        use_cache=config.use_cache,
        output_scores=bool(config.output_scores and config.return_dict_in_generate),
        output_logits=bool(config.output_logits and config.return_dict_in_generate),
        **extra,
    )


def _bad_words(words, eos_token_ids, vocabulary):
    if words is None:
        return ()
    is_valid = isinstance(words, (list, tuple)) and all(
        isinstance(word, (list, tuple)) and word and all(0 <= token < vocabulary for token in word) for word in words
    )
    if not is_valid or not words:
        raise ValueError(f"bad_words_ids must be a list of lists of ids in [0, {vocabulary}), got {words!r}.")
    # the end of text itself is never banned
    kept = {tuple(word) for word in words} - {(eos,) for eos in eos_token_ids}
    return tuple(tuple(group) for _, group in itertools.groupby(sorted(kept, key=lambda w: (len(w), w)), key=len))


def lengths_of(config: GenerationConfig, length, unseen_length, max_positions: int):
    """Most and least length of the result, prompt included.

    Args:
        length: of `input_ids`, a number or a scalar tensor. unseen_length: of the prompt's part that is given as
            embeddings without ids; it counts towards `max_length` and `min_length` but is not in the result.
        max_positions: bound of the default, `max_position_embeddings`.

    Raises:
        ValueError: if the prompt leaves no room for a token.
    """
    if config.max_new_tokens is not None:
        max_length = length + config.max_new_tokens
    elif config.max_length is not None:
        max_length = config.max_length - unseen_length
    else:
        default = GenerationConfig._get_default_generation_params()["max_length"]
        max_length = length + default
        if isinstance(max_length, int):
            max_length = min(max_length, max_positions)
    if config.min_new_tokens is not None:
        min_length = length + config.min_new_tokens
    else:
        min_length = (config.min_length or 0) - unseen_length
    if isinstance(length, int) and isinstance(max_length, int) and length >= max_length:
        raise ValueError(
            f"The prompt is {length} tokens long and max_length is {max_length}: that leaves nothing to generate. "
            "Raise max_length, or set max_new_tokens."
        )
    return max_length, min_length
