"""Two processors for tests: that of `tests/fixtures/processor_v4`, as transformers 4.57.6 saved it, with the images
beside it, and one with a token for each character."""

import functools
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from idefics_common.images.processing import IdeficsImageProcessor
from idefics_common.prompts.processor import IdeficsProcessor
from idefics_common.prompts.prompt import SPECIAL_TOKENS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "processor_v4"


def load_processor(**kwargs) -> IdeficsProcessor:
    return IdeficsProcessor.from_pretrained(FIXTURE / "processor", **kwargs)


def letters_processor(**kwargs) -> IdeficsProcessor:
    """One token for each character, so that lengths can be counted by hand."""
    tokens = ["<unk>", "<s>", "</s>", *SPECIAL_TOKENS, *map(chr, range(10, 127))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        **kwargs,
    )
    return IdeficsProcessor(IdeficsImageProcessor(image_size=28), tokenizer)


@functools.cache
def picture(name: str = "rgb") -> Image.Image:
    """rgb, grey, rgba or palette."""
    image = Image.open(FIXTURE / f"{name}.png")
    image.load()
    return image
