"""How large a vocabulary becomes when it is resized: the arithmetic that both rooms share."""


def rounded_size(config, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
    """The size of the whole vocabulary: `new_num_tokens`, or as it is for None, rounded up to a multiple."""
    total = config.vocab_size + config.additional_vocab_size if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        total = -(-total // pad_to_multiple_of) * pad_to_multiple_of
    return total


def additional_size(config, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
    """How large the additional vocabulary has to be for a total of `new_num_tokens`, rounded up to a multiple.

    Raises:
        ValueError: if the total is less than the base vocabulary.
    """
    total = rounded_size(config, new_num_tokens, pad_to_multiple_of)
    if total < config.vocab_size:
        raise ValueError(
            f"new_num_tokens must be at least vocab_size {config.vocab_size}, got {total}: it counts the base "
            "vocabulary and the additional one, and only the additional one can change."
        )
    return total - config.vocab_size
