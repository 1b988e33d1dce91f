"""``python -m idefics_pt generate``: ask a checkpoint about images from the command line."""

import argparse
import sys
from collections.abc import Callable

import torch
from transformers import TextStreamer
from transformers.utils import logging

from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor
from idefics_pt.transfers import to_device

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    generate.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: as in the files")
    generate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args(arguments)


def generate(options: argparse.Namespace) -> None:
    """Run ``generate``: print the answer as it comes.

    Raises:
        ValueError, OSError: for a checkpoint, an image or a prompt that cannot be used; the message says which.
    """
    logging.disable_progress_bar()
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}.")
    _check_device(options.device)
    _check_config(options.model)
    files = "the processor (preprocessor_config.json, tokenizer.json and what belongs to them)"
    processor = _load(files, options.model, IdeficsProcessor.from_pretrained)
    model = _load("the model", options.model, IdeficsForVisionText2Text.from_pretrained, dtype=DTYPES[options.dtype])
    model = model.to(options.device).eval()
    processor.generation_config(model)
    prompt = options.prompt
    if options.chat:
        parts = [{"type": "image"}] * len(options.image) if "<image>" not in prompt else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = to_device(processor(text=prompt, images=options.image, return_tensors="pt"), options.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        first_sentence = str(error).partition(". ")[0]
        raise ValueError(f"--device {device} cannot be used: {first_sentence}") from error


def _check_config(checkpoint: str) -> None:
    """Refuse a checkpoint of another kind; transformers warns and builds an IDEFICS with whatever fields agree."""
    settings, _ = _load("config.json", checkpoint, IdeficsConfig.get_config_dict)
    if settings.get("model_type") != IdeficsConfig.model_type:
        raise ValueError(
            f"{checkpoint}: config.json has model_type {settings.get('model_type')!r}, expected "
            f"{IdeficsConfig.model_type!r}."
        )
    _load("config.json", checkpoint, IdeficsConfig.from_pretrained)


def _load(what: str, checkpoint: str, load: Callable, **options):
    """Load a part of a checkpoint; whatever its files are like, a failure is a ValueError that names them."""
    try:
        return load(checkpoint, **options)
    except Exception as error:
        # transformers, huggingface_hub and tokenizers let KeyError, their own classes and bare Exception escape
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{checkpoint}: {what} cannot be loaded: {reason}") from error


def main(arguments=None) -> int:
    """Run the command line; returns the exit code: 0, or 1 after a message about what is wrong."""
    options = parse_arguments(arguments)
    try:
        generate(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # some messages have lines, and lists in them
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
