"""``python -m idefics_tf generate``: ask a checkpoint about images from the command line; see `--help`.

Mirrors `idefics_pt/__main__.py`.
"""

import os
import sys

from idefics_common import command_line


class Room(command_line.Room):
    """See `idefics_common.command_line.Room`."""

    package, framework, tensors, devices = "idefics_tf", "Keras on TensorFlow", "tf", "cpu, gpu, gpu:1"

    def check_device(self, device: str) -> None:
        import tensorflow as tf

        # TensorFlow itself would compute on the CPU instead
        kind, _, number = device.partition(":")
        devices = [known.name.removeprefix("/device:").lower() for known in tf.config.list_logical_devices()]
        if f"{kind}:{number or 0}" not in devices:
            raise ValueError(f"TensorFlow has {', '.join(devices)} here")

    def load(self, checkpoint: str, dtype: str, device: str):
        import tensorflow as tf

        from idefics_tf import TFIdeficsForVisionText2Text

        with tf.device(device):
            return TFIdeficsForVisionText2Text.from_pretrained(checkpoint, dtype=dtype)

    def generate(self, model, inputs, device: str, **settings):
        import tensorflow as tf

        with tf.device(device):
            # one answer takes less time than to compile for it
            return model.generate(inputs, disable_compile=True, **settings)


def main(arguments=None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(Room(), arguments)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # standard error is for what concerns the answer
    sys.exit(main())
