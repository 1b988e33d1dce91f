"""How long does the processor take to build the masks of images?

    python -m benchmarks.masks [--backend transformers ours] [--prompts 32] [--tokens 2048] [--images 4] [--threads 2]
                               [--repeats 5] [--config CONFIG]

From token ids (prompts, tokens) to the mask (prompts, tokens, images). The first and every other prompt is full; the
others end in an end of text and pads, so that both rules of the mask apply. The masks are compared before anything is
timed. --dtype and --device have no say here: masks are int64, made by numpy.
"""

import json

import numpy as np

from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, timing
from benchmarks.rounds import seconds_of_equals

_PAD, _EOS = 0, 2


class MaskBuilder:
    """Builds masks, ours or transformers'; lives in a worker."""

    def __init__(self, kind: str, image_token_id: int):
        self._make = self._transformers(image_token_id) if kind == "transformers" else self._ours(image_token_id)

    @staticmethod
    def _ours(image_token_id: int):
        from idefics_common.prompts.image_masks import image_attention_mask

        return lambda ids_BT, num_images: image_attention_mask(ids_BT, image_token_id, _EOS, num_images)

    @staticmethod
    def _transformers(image_token_id: int):
        import torch
        from transformers.models.idefics import processing_idefics as theirs

        class Tokenizer:
            eos_token_id = _EOS

            @staticmethod
            def convert_tokens_to_ids(token):
                return image_token_id

        def make(ids_BT, num_images):
            numbers, _ = theirs.image_attention_mask_for_packed_input_ids(torch.from_numpy(ids_BT), Tokenizer, "pt")
            return theirs.incremental_to_binary_attention_mask(numbers, "pt", num_classes=num_images).numpy()

        return make

    def prepare(self, ids_BT: np.ndarray, num_images: int):
        """Hold token ids (B, T)."""
        self.arguments = ids_BT, num_images

    def output(self) -> np.ndarray:
        """The mask (B, T, I)."""
        return self._make(*self.arguments)


def token_ids(vocabulary: int, prompts: int, tokens: int, images: int) -> np.ndarray:
    """Random ids (B, T) with the image token, `vocabulary` + 1, at equal distances; every other row ends early."""
    generator = np.random.default_rng(0)
    ids_BT = generator.integers(10, vocabulary, (prompts, tokens))
    ids_BT[:, 1 : 1 + images * (tokens // images) : tokens // images] = vocabulary + 1
    end = tokens - tokens // 8
    ids_BT[1::2, end] = _EOS
    ids_BT[1::2, end + 1 :] = _PAD
    return ids_BT


def main():
    parser = parser_of(__doc__, backends=("transformers", "ours"))
    parser.add_argument("--prompts", type=int, default=32, help="rows (32)")
    parser.add_argument("--tokens", type=int, default=2048, help="length of each row (2048)")
    parser.add_argument("--images", type=int, default=4, help="images of each row (4)")
    options = parsed(parser)
    vocabulary = json.loads(options.config.read_text())["vocab_size"]
    inputs = token_ids(vocabulary, options.prompts, options.tokens, options.images), options.images
    seconds = seconds_of_equals(options, MaskBuilder, inputs, "the masks", image_token_id=vocabulary + 1)
    rows = [
        {"backend": name, "prompts": options.prompts, "tokens": options.tokens, **timing(values)}
        for name, values in seconds.items()
    ]
    add_ratio(rows, "s")
    finish("masks", options, rows, ["backend", "s", "ratio"])


if __name__ == "__main__":
    main()
