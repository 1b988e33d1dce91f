"""Generation settings that every IDEFICS checkpoint wants: image tokens are never written, and a turn's end stops.

The ids come from the tokenizer, so a model without one, such as a randomly built one, has no such settings.
"""

from idefics_common.prompts.prompt import END_OF_UTTERANCE_TOKEN, FAKE_TOKEN, IMAGE_TOKEN
from idefics_common.prompts.tokenizer_checks import has_token


def fill_generation_config(generation_config, tokenizer):
    """Fill what a `GenerationConfig` leaves open from a checkpoint's tokenizer; what it sets already stays.

    Args:
        generation_config: a `transformers.GenerationConfig`, changed in place.
        tokenizer: the checkpoint's tokenizer.

    Returns:
        the same `generation_config`: `bad_words_ids` also has the image tokens, `eos_token_id` also has
        ``<end_of_utterance>`` where the tokenizer knows it, and `bos_token_id` and `pad_token_id` are set.
    """
    banned = [
        [tokenizer.convert_tokens_to_ids(token)] for token in (FAKE_TOKEN, IMAGE_TOKEN) if has_token(tokenizer, token)
    ]
    known = generation_config.bad_words_ids or []
    generation_config.bad_words_ids = [*known, *(ids for ids in banned if ids not in known)] or None

    eos = tokenizer.eos_token_id if generation_config.eos_token_id is None else generation_config.eos_token_id
    stops = list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]
    if has_token(tokenizer, END_OF_UTTERANCE_TOKEN):
        end_of_utterance = tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE_TOKEN)
        if end_of_utterance not in stops:
            stops.append(end_of_utterance)
    generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(generation_config, name) is None:
            setattr(generation_config, name, getattr(tokenizer, name))
    return generation_config
