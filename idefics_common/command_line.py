"""The command line of both rooms: ``python -m idefics_pt generate ...`` and ``python -m idefics_tf generate ...``.

Arguments are read before anything large is imported, so that ``--help`` and a mistyped option answer at once: this
module imports nothing but the standard library, and a room that is run so leaves its framework for later (`is_run`).
"""

import argparse
import importlib
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

DTYPES = ("auto", "float32", "bfloat16", "float16")


def is_run(package: str) -> bool:
    """Whether Python was started with ``-m`` and this package, which it imports on its way to the program."""
    if sys.argv[:1] != ["-m"]:  # as long as the program is looked for
        return False
    started = itertools.pairwise(sys.orig_argv)
    return any(flag[:1] == "-" and flag[-1:] == "m" and name == package for flag, name in started)


class Room(ABC):
    """What commands need of a framework. Methods may import it, the module that defines the room may not at its top.

    Attributes:
        package: the name of the room's package.
        framework: for people.
        tensors: the framework as `return_tensors` spells it.
        devices: some names of devices, for people.
    """

    package: ClassVar[str]
    framework: ClassVar[str]
    tensors: ClassVar[str]
    devices: ClassVar[str]

    @abstractmethod
    def check_device(self, device: str) -> None:
        """Raise an exception whose first sentence says why, if nothing can be computed on a device."""

    @abstractmethod
    def load(self, checkpoint: str, dtype: str, device: str):
        """The model of a directory or of the hub, ready to generate. `dtype` is one of `DTYPES`."""

    @abstractmethod
    def generate(self, model, inputs, device: str, **settings):
        """Generate from what the processor made, with these keywords of `generate`."""


def run(room: Room, arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 1 after a message about what is wrong."""
    options = _parser(room).parse_args(arguments)
    try:
        _import_all(room)
        options.run(room, options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # some messages have lines, and lists in them
        return 1
    return 0


def _import_all(room: Room) -> None:
    """Import what the room has left for later. Raises ValueError if its framework cannot be imported."""
    package = importlib.import_module(room.package)
    try:
        if not hasattr(package, package.__all__[0]):
            importlib.reload(package)
    except ImportError as error:
        raise ValueError(f"{room.framework} cannot be used: {error}") from error


def _parser(room: Room) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {room.package}", description=f"IDEFICS in {room.framework}.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="continue a prompt about images, token by token")
    generate.set_defaults(run=_generate)
    generate.add_argument("--model", required=True, help="checkpoint directory, or id on the hub")
    generate.add_argument(
        "--image", action="append", default=[], help="file or URL; several times for several, in the prompt's order"
    )
    generate.add_argument(
        "--prompt", required=True, help="text; <image> marks the place of an image, else images come before it"
    )
    generate.add_argument("--chat", action="store_true", help="ask as a user of an instruct model, in its chat format")
    generate.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: as in the files")
    generate.add_argument("--device", default="cpu", help=f"{room.devices}, ...")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    return parser


def _generate(room: Room, options: argparse.Namespace) -> None:
    """Print the answer as it comes.

    Raises:
        ValueError, OSError: for a checkpoint, an image or a prompt that cannot be used; the message says which.
    """
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}.")
    try:
        room.check_device(options.device)
    except Exception as error:  # frameworks raise what they like for a device that they were not built for
        first_sentence = str(error).partition(". ")[0]
        raise ValueError(f"--device {options.device} cannot be used: {first_sentence}") from error
    processor, model = _open(room, options)
    processor.generation_config(model)
    prompt = options.prompt
    if options.chat:
        parts = [{"type": "image"}] * len(options.image) if "<image>" not in prompt else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=prompt, images=options.image, return_tensors=room.tensors)

    from transformers import TextStreamer

    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    room.generate(model, inputs, options.device, streamer=streamer, **settings)


def _open(room: Room, options: argparse.Namespace):
    """The processor and the model of a checkpoint."""
    from idefics_common import IdeficsConfig, IdeficsProcessor

    settings, _ = _load("config.json", options.model, IdeficsConfig.get_config_dict)
    # transformers warns of a checkpoint of another kind, and builds an IDEFICS with whatever fields agree
    if settings.get("model_type") != IdeficsConfig.model_type:
        raise ValueError(
            f"{options.model}: config.json has model_type {settings.get('model_type')!r}, expected "
            f"{IdeficsConfig.model_type!r}."
        )
    _load("config.json", options.model, IdeficsConfig.from_pretrained)
    files = "the processor (preprocessor_config.json, tokenizer.json and what belongs to them)"
    processor = _load(files, options.model, IdeficsProcessor.from_pretrained)
    return processor, _load("the model", options.model, room.load, options.dtype, options.device)


def _load(what: str, checkpoint: str, load: Callable, *arguments):
    """Load a part of a checkpoint; whatever its files are like, a failure is a ValueError that names them."""
    try:
        return load(checkpoint, *arguments)
    except Exception as error:
        # transformers, huggingface_hub and tokenizers let KeyError, their own classes and bare Exception escape
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{checkpoint}: {what} cannot be loaded: {reason}") from error
