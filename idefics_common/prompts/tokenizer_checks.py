"""What IDEFICS needs of a tokenizer, and whether a tokenizer and a model belong together. No tensors."""

from idefics_common.prompts.prompt import FAKE_TOKEN, IMAGE_TOKEN


def has_token(tokenizer, token: str) -> bool:
    """Whether `token` is one id of the tokenizer, special or not, whichever version of transformers saved it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and (token_id != tokenizer.unk_token_id or token == tokenizer.unk_token)


def check_image_tokens(tokenizer) -> None:
    """Refuse a tokenizer that would spell the image tokens as text.

    Raises:
        ValueError: naming the token that is missing.
    """
    for token in (FAKE_TOKEN, IMAGE_TOKEN):
        if not has_token(tokenizer, token):
            raise ValueError(
                f"the tokenizer has no token {token}, so prompts cannot hold images; add it with "
                f'tokenizer.add_special_tokens({{"additional_special_tokens": [...]}}) or load the checkpoint\'s own.'
            )


def check_tokenizer(tokenizer, config) -> None:
    """Refuse a tokenizer that does not fit a model: image tokens missing, or ids beyond the embedding.

    Args:
        tokenizer: of transformers.
        config: an IDEFICS configuration, with `vocab_size` and `additional_vocab_size`.

    Raises:
        ValueError: naming the missing token, or the first tokens whose id has no row in the embedding.
    """
    check_image_tokens(tokenizer)
    rows = config.vocab_size + config.additional_vocab_size
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    if beyond:
        shown = ", ".join(f"{token!r} = {token_id}" for token_id, token in beyond[:5])
        raise ValueError(
            f"the tokenizer has {len(beyond)} tokens beyond the model's vocabulary of {rows} "
            f"(vocab_size {config.vocab_size} + additional_vocab_size {config.additional_vocab_size}): {shown}"
            f"{', ...' if len(beyond) > 5 else ''}."
        )
