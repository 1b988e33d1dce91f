"""How long does the processor take for photographs, or for the masks of images?

Images: smooth random photographs in RGB, as a decoder leaves them, to normalised pixel values at the size that the
model wants. transformers' row is its Pillow processor; ours may use threads, and no process has more processors than
--threads. Masks: from token ids (prompts, tokens) to the mask (prompts, tokens, images); the first and every other
prompt is full, the others end in an end of text and pads, so that both rules of the mask apply.

Outputs must be equal bit by bit before anything is timed. --dtype and --device have no say here.
"""

import json
import os

import numpy as np

from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, timing
from benchmarks.rounds import seconds_of_outputs

_PHOTOGRAPHS, _WIDTH, _HEIGHT = 16, 1920, 1080
_PROMPTS, _TOKENS, _IMAGES = 32, 2048, 4
_PAD, _EOS = 0, 2


class Photographs:
    """An image processor, ours or transformers'; lives in a worker."""

    def __init__(self, kind: str, config: dict, processors: int):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
        if kind == "transformers":
            from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil as Processor
        else:
            from idefics_common import IdeficsImageProcessor as Processor
        self.processor = Processor(image_size=config["vision_config"]["image_size"])

    def prepare(self, count: int, width: int, height: int):
        """Make photographs."""
        self.images = [photograph(width, height, seed) for seed in range(count)]

    def output(self) -> np.ndarray:
        """The values (images, 3, size, size) of all photographs."""
        return np.asarray(self.processor(self.images, return_tensors="np"))


class Masks:
    """Builds masks, ours or transformers'; lives in a worker."""

    def __init__(self, kind: str, config: dict, processors: int):
        self.vocabulary, self.image_token_id = config["vocab_size"], config["vocab_size"] + 1
        self.output = self._theirs if kind == "transformers" else self._ours

    def prepare(self, prompts: int, tokens: int, images: int):
        """Make token ids."""
        self.ids_BT, self.num_images = token_ids(self.vocabulary, prompts, tokens, images), images

    def _ours(self) -> np.ndarray:
        from idefics_common.prompts.image_masks import image_attention_mask

        return image_attention_mask(self.ids_BT, self.image_token_id, _EOS, self.num_images)

    def _theirs(self) -> np.ndarray:
        import torch
        from transformers.models.idefics import processing_idefics as theirs

        numbers, _ = theirs.image_attention_mask_for_packed_input_ids(torch.from_numpy(self.ids_BT), self, "pt")
        return theirs.incremental_to_binary_attention_mask(numbers, "pt", num_classes=self.num_images).numpy()

    eos_token_id = _EOS  # this and the method are all that transformers wants of a tokenizer

    def convert_tokens_to_ids(self, token) -> int:
        return self.image_token_id


def photograph(width: int, height: int, seed: int):
    """A smooth random image with a little noise, `PIL.Image` in RGB."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (9, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + generator.integers(-6, 7, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def token_ids(vocabulary: int, prompts: int, tokens: int, images: int) -> np.ndarray:
    """Random ids (B, T) with the image token, `vocabulary` + 1, at equal distances; every other row ends early."""
    ids_BT = np.random.default_rng(0).integers(10, vocabulary, (prompts, tokens))
    ids_BT[:, 1 : 1 + images * (tokens // images) : tokens // images] = vocabulary + 1
    end = tokens - tokens // 8
    ids_BT[1::2, end] = _EOS
    ids_BT[1::2, end + 1 :] = _PAD
    return ids_BT


def main():
    parser = parser_of(__doc__, backends=("transformers", "ours"))
    parser.add_argument("what", choices=("images", "masks"))
    options = parsed(parser)
    settings = {"config": json.loads(options.config.read_text()), "processors": options.threads}
    if options.what == "images":
        name, served, inputs = "image-processing", Photographs, (_PHOTOGRAPHS, _WIDTH, _HEIGHT)
    else:
        name, served, inputs = "masks", Masks, (_PROMPTS, _TOKENS, _IMAGES)
    seconds = seconds_of_outputs(options, (served,), inputs, f"the {options.what}", **settings)
    rows = [{"backend": backend, "inputs": inputs, **timing(values)} for backend, values in seconds.items()]
    add_ratio(rows, "s")
    finish(name, options, rows, ["backend", "s", "ratio"])


if __name__ == "__main__":
    main()
