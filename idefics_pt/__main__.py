"""``python -m idefics_pt generate``: ask a checkpoint about images from the command line."""

import argparse
import sys

import torch
from transformers import TextStreamer
from transformers.utils import logging

from idefics_pt import IdeficsForVisionText2Text, IdeficsProcessor


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Read the command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m idefics_pt", description="IDEFICS in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a prompt about images, token by token")
    generate.add_argument("--model", required=True, help="checkpoint directory, or id on the hub")
    generate.add_argument(
        "--image", action="append", default=[], help="file or URL; several times for several, in the prompt's order"
    )
    generate.add_argument(
        "--prompt", required=True, help="text; <image> marks the place of an image, else images come before it"
    )
    generate.add_argument("--chat", action="store_true", help="ask as a user of an instruct model, in its chat format")
    generate.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto: as in the files")
    generate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> None:
    """Run ``generate``: print the answer as it comes.

    Raises:
        ValueError, OSError: for a checkpoint, an image or a prompt that cannot be used; the message says which.
    """
    logging.disable_progress_bar()
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype, None)
    if dtype is None or (dtype != "auto" and not dtype.is_floating_point):
        raise ValueError(f"--dtype must be float32, bfloat16, float16 or auto, got {options.dtype!r}.")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}.")
    processor = IdeficsProcessor.from_pretrained(options.model)
    model = IdeficsForVisionText2Text.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    processor.generation_config(model)
    prompt = options.prompt
    if options.chat:
        parts = [{"type": "image"}] * len(options.image) if "<image>" not in prompt else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=options.image, return_tensors="pt").to(options.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )


def main(arguments=None) -> int:
    """Run the command line; returns the exit code: 0, or 1 after a message about what is wrong."""
    options = parse_arguments(arguments)
    try:
        generate(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
