"""Draw where the shipped model looks in a photograph while it names it.

    python examples/attention_map.py [PHOTOGRAPH] [--prompt TEXT] [--out FILE]

Prints the photograph's map as text and writes it over the photograph as a PNG: red is where the attention is.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from idefics_pt import IdeficsForVisionText2Text, IdeficsProcessor
from idefics_pt.attention_maps import cross_attention_map

FASHION = Path(__file__).parent / "fashion"
SHADES = " .:-=+*#%@"
SIDE = 280


def relative_to_largest(shares: np.ndarray) -> np.ndarray:
    """Shares of attention divided by the largest, 0 to 1; all zero where nothing was looked at."""
    return shares / (shares.max() or 1.0)


def overlay(photograph: Image.Image, shares: np.ndarray) -> Image.Image:
    """The photograph in grey with red where the shares of attention (G, G) are high; SIDE pixels square."""
    grey = np.asarray(photograph.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    heat = Image.fromarray(relative_to_largest(shares)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    red = np.clip(np.asarray(heat), 0, 1)
    picture = np.stack([grey + (255 - grey) * red, grey * (1 - red), grey * (1 - red)], axis=-1)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photograph", nargs="?", type=Path, default=FASHION / "photos" / "test" / "00000.png")
    parser.add_argument("--prompt", default="What is this?")
    parser.add_argument("--out", type=Path, default=Path("demo-output/attention-map.png"))
    options = parser.parse_args()

    processor = IdeficsProcessor.from_pretrained(FASHION / "checkpoint")
    model = IdeficsForVisionText2Text.from_pretrained(FASHION / "checkpoint", attn_implementation="eager").eval()
    photograph = Image.open(options.photograph)
    inputs = processor(["User:", photograph, options.prompt, "\nAssistant:"], return_tensors="pt")
    processor.generation_config(model)
    tokens = model.generate(**inputs, max_new_tokens=20)
    written = tokens[0, inputs["input_ids"].shape[1] :]

    shares = cross_attention_map(model, inputs)[0].numpy()
    print(f"{options.photograph}: {processor.decode(written, skip_special_tokens=True).strip()}")
    print(f"{shares.sum():.0%} of the attention lies on the patches, spread like this:\n")
    for row in relative_to_largest(shares):
        print("    " + "".join(2 * SHADES[int(share * (len(SHADES) - 1))] for share in row))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    overlay(photograph, shares).save(options.out)
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
