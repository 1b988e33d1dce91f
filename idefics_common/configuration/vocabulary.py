"""How large a vocabulary is, and becomes when it is resized: the arithmetic that both rooms share."""


class VocabularySize(int):
    """The size of a base vocabulary, which knows that of the additional one.

    A number like any other, but two of them differ if both have an additional vocabulary, of different sizes. Tools
    that compare `vocab_size` of a model with that of its checkpoint, to see if it was resized (PEFT), or of two models,
    to see if they share a tokenizer (assisted decoding), then see the additional vocabulary as well.
    """

    def __new__(cls, base: int, additional: int):
        size = super().__new__(cls, base)
        size.additional = additional
        return size

    def __eq__(self, other):
        mine, others = self.additional, getattr(other, "additional", 0)
        return int(self) == other and (mine == others or 0 in (mine, others))

    def __ne__(self, other):
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self):
        return int, (int(self),)


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
