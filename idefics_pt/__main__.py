"""``python -m idefics_pt generate``: ask a checkpoint about images from the command line; see `--help`.

Mirrors `idefics_tf/__main__.py`.
"""

import sys

from idefics_common import command_line


class Room(command_line.Room):
    """See `idefics_common.command_line.Room`."""

    package, framework, tensors, devices = "idefics_pt", "PyTorch", "pt", "cpu, cuda, cuda:1"

    def check_device(self, device: str) -> None:
        import torch

        torch.empty(1, device=device).item()

    def load(self, checkpoint: str, dtype: str, device: str):
        from transformers.utils import logging

        from idefics_pt import IdeficsForVisionText2Text

        logging.disable_progress_bar()
        return IdeficsForVisionText2Text.from_pretrained(checkpoint, dtype=dtype).to(device).eval()

    def generate(self, model, inputs, device: str, **settings):
        from idefics_pt.transfers import to_device

        return model.generate(**to_device(inputs, device), **settings)


def main(arguments=None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(Room(), arguments)


if __name__ == "__main__":
    sys.exit(main())
