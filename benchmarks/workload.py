"""What is asked of the models: prompts of text and images at a chosen size, and a checkpoint of random weights."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

TOKENS_PER_IMAGE = 24
DEFAULT_CONFIG = Path(__file__).parents[1] / "tests" / "fixtures" / "configs" / "config-370m.json"


def prompts(config: dict, images_per_row: list[int], tokens_per_image: int = TOKENS_PER_IMAGE, seed: int = 0) -> dict:
    """Inputs of a batch as numpy arrays, padded on the left as prompts are.

    Every image brings `tokens_per_image` ids: start of text or the token around images, the image token, the token
    around images once more, and random words; the mask is the processor's: each position sees the last image.

    Returns:
        input_ids, attention_mask (B, T) int64, pixel_values (B, I, 3, size, size) float32 and image_attention_mask
        (B, T, I) int64.
    """
    generator = np.random.default_rng(seed)
    vocabulary, size = config["vocab_size"], config["vision_config"]["image_size"]
    around, image = vocabulary, vocabulary + 1
    rows, num_images, length = len(images_per_row), max(images_per_row), tokens_per_image * max(images_per_row)
    ids_BT = np.zeros((rows, length), np.int64)
    mask_BTI = np.zeros((rows, length, num_images), np.int64)
    for row, count in enumerate(images_per_row):
        start = length - tokens_per_image * count
        for number in range(count):
            words = generator.integers(10, vocabulary, tokens_per_image - 3)
            place = slice(start + number * tokens_per_image, start + (number + 1) * tokens_per_image)
            ids_BT[row, place] = [around, image, around, *words]
            mask_BTI[row, place.start + 1 : place.stop + 1, number] = 1
            if number:
                mask_BTI[row, place.start, number - 1] = 1
    pixels = np.zeros((rows, num_images, 3, size, size), np.float32)
    for row, count in enumerate(images_per_row):
        pixels[row, :count] = generator.standard_normal((count, 3, size, size), dtype=np.float32)
    return {
        "input_ids": ids_BT,
        "attention_mask": (ids_BT != 0).astype(np.int64),
        "pixel_values": pixels,
        "image_attention_mask": mask_BTI,
    }


def random_model(config_file: Path, seed: int = 0) -> Path:
    """The directory of a checkpoint with this configuration and random weights, made once per machine.

    The weights are those that the models start from, with the gates open (``alpha_initializer`` "ones"); three
    safetensors files.
    """
    content = config_file.read_bytes()
    name = f"idefics-benchmark-{hashlib.sha256(content + bytes([seed])).hexdigest()[:12]}"
    directory = Path(tempfile.gettempdir()) / name
    if not (directory / "model.safetensors.index.json").exists():
        import torch

        from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text

        torch.manual_seed(seed)
        model = IdeficsForVisionText2Text(IdeficsConfig(**json.loads(content)))
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(directory, max_shard_size=nbytes // 3 + 2**26)
    return directory
