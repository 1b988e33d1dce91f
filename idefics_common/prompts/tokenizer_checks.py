"""What IDEFICS needs of a tokenizer."""

from idefics_common.prompts.prompt import FAKE_TOKEN, IMAGE_TOKEN


def has_token(tokenizer, token: str) -> bool:
    """Whether `token` is one id of the tokenizer, special or not, whichever version of transformers saved it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and (token_id != tokenizer.unk_token_id or token == tokenizer.unk_token)


def check_image_tokens(tokenizer) -> None:
    """Raise `ValueError` for a tokenizer without the image tokens, which it would split like words."""
    for token in (FAKE_TOKEN, IMAGE_TOKEN):
        if not has_token(tokenizer, token):
            raise ValueError(
                f"the tokenizer has no token {token}, so prompts cannot hold images; add it with "
                f'tokenizer.add_special_tokens({{"additional_special_tokens": [...]}}) or load the checkpoint\'s own.'
            )
