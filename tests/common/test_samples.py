"""The checkpoint and the photograph that come with the library."""

import subprocess
import sys

from PIL import Image

from idefics_common import IdeficsConfig, IdeficsProcessor, sample_checkpoint, sample_photograph
from idefics_common.checkpoint.safetensors_file import SafetensorsFile


def test_the_samples_are_whole():
    processor = IdeficsProcessor.from_pretrained(sample_checkpoint())
    size = processor(["What is this?", Image.open(sample_photograph())], return_tensors="np")["pixel_values"].shape[-1]
    assert size == IdeficsConfig.from_pretrained(sample_checkpoint()).vision_config.image_size
    with SafetensorsFile(sample_checkpoint() / "model.safetensors") as file:
        assert len(file) == 173


def test_the_first_load_warns_of_nothing():
    """In a process of its own: transformers says such things once."""
    code = (
        "from idefics_common import IdeficsConfig, IdeficsProcessor, sample_checkpoint\n"
        "IdeficsProcessor.from_pretrained(sample_checkpoint())\n"
        "IdeficsConfig(vocab_size=583, additional_vocab_size=3, image_token_id=585)\n"
        "IdeficsConfig(vocab_size=583, additional_vocab_size=3, image_token_id=586)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in finished.stderr.splitlines() if "PyTorch was not found" not in line]
    assert lines == ["config.json: image_token_id must be None or from 0 to 585, got 586."]
