"""The frameworks that are compared, each behind the same methods; they live in workers (`benchmarks.workers`).

A backend imports its framework when it is made, so that a worker holds one framework only. Axes: see `idefics_common`.
"""

import os
import time

import numpy as np

from benchmarks.workers import Peak
from benchmarks.workload import random_model


class TorchBackend:
    """PyTorch: ours ("pt", or "pt float32" whatever the precision of the others) or transformers' own ("transformers").

    Args:
        directory: of a checkpoint; without one, `load` is to be called.
        dtype: name of the precision. device: "cpu" or "cuda".
        fused: for ours, projections fused for inference (`fuse_projections`).
        quantized: for ours, linear layers of the decoder in int8 (`quantize_int8`).
    """

    def __init__(self, kind, directory=None, dtype="float32", device="cpu", fused=True, quantized=False):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.device, self.is_ours = torch, device, kind != "transformers"
        self.dtype = torch.float32 if kind == "pt float32" else getattr(torch, dtype)
        self.fused, self.quantized = fused, quantized and kind == "pt"
        if self.is_ours:
            from idefics_pt import IdeficsForVisionText2Text
        else:
            from transformers import IdeficsForVisionText2Text
            from transformers import logging as transformers_logging

            transformers_logging.set_verbosity_error()
        self.model_class = IdeficsForVisionText2Text
        if directory is not None:
            self.load(directory)

    def load(self, directory: str, **kwargs):
        """Load the model; more arguments of ours go to `from_pretrained`."""
        self.model = self.model_class.from_pretrained(directory, dtype=self.dtype, **kwargs).to(self.device).eval()
        self.model.generation_config.update(eos_token_id=None, pad_token_id=0)
        if self.is_ours and self.fused:
            self.model.fuse_projections()
        if self.quantized:
            self.model.quantize_int8()

    def prepare(self, inputs: dict):
        """Hold these inputs (numpy arrays) for the methods that follow."""
        self.inputs = {name: self.torch.from_numpy(value).to(self.device) for name, value in inputs.items()}

    def logits(self) -> np.ndarray:
        """Next-token logits (B, V) of the prompt, float32."""
        with self.torch.inference_mode():
            return self.model(**self.inputs).logits[:, -1].float().cpu().numpy()

    def generate(self, new_tokens: int) -> tuple[list[float], np.ndarray]:
        """Seconds until each token has come, and the ids (B, T)."""
        clock = _Clock(self.wait)
        start = time.perf_counter()
        ids = self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, use_cache=True
        )
        return [moment - start for moment in clock.moments], self.array(ids)

    def array(self, tensor) -> np.ndarray:
        """A tensor as a numpy array."""
        return tensor.cpu().numpy()

    def wait(self):
        """Until all that was queued is done."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def peak(self) -> Peak:
        """The memory of the device from now on."""
        return Peak(self.torch if self.device != "cpu" else None)


class _Clock:
    """A streamer that notes when each token comes."""

    def __init__(self, wait):
        self.wait, self.moments, self.is_prompt = wait, [], True

    def put(self, value):
        if not self.is_prompt:
            self.wait()
            self.moments.append(time.perf_counter())
        self.is_prompt = False

    def end(self):
        """Nothing is left to note."""


class TensorFlowBackend:
    """Keras: the compiled `generate` of `idefics_tf`, the loop by XLA if `kind` is "tf xla"; else as `TorchBackend`.

    Raises:
        ValueError: if TensorFlow has no such device; by itself it would compute on the CPU without a word.
    """

    inter_op_threads = 1  # operations of a decoding step follow one another

    def __init__(self, kind, directory=None, dtype="float32", device="cpu", **of_torch):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["OMP_NUM_THREADS"]))
        tf.config.threading.set_inter_op_parallelism_threads(self.inter_op_threads)
        from idefics_tf import TFIdeficsForVisionText2Text

        processor = "GPU" if device == "cuda" else "CPU"
        if not tf.config.list_physical_devices(processor):
            raise ValueError(f"--device {device} needs a {processor} that TensorFlow {tf.__version__} can use.")
        self.tf, self.is_xla, self.dtype, self.device = tf, kind == "tf xla", dtype, f"/{processor}:0"
        self.model_class = TFIdeficsForVisionText2Text
        if directory is not None:
            self.load(directory)

    def load(self, directory: str, **kwargs):
        """Load the model; more arguments go to `from_pretrained`."""
        with self.tf.device(self.device):
            self.model = self.model_class.from_pretrained(directory, dtype=self.dtype, **kwargs)
        self.model.generation_config.update(eos_token_id=None, pad_token_id=0)

    def prepare(self, inputs: dict):
        """Hold these inputs (numpy arrays) for the methods that follow."""
        with self.tf.device(self.device):
            self.inputs = {name: self.tf.constant(value) for name, value in inputs.items()}

    def logits(self) -> np.ndarray:
        """Next-token logits (B, V) of the prompt, float32, without a graph."""
        with self.tf.device(self.device):
            return np.asarray(self.model(self.inputs).logits[:, -1], np.float32)

    def generate(self, new_tokens: int) -> tuple[list[float], np.ndarray]:
        """Seconds until each token has come, and the ids (B, T).

        XLA's loop tells of no token before it has them all: the first is that of a search for one token, in the same
        graph, and the others lie evenly between it and the last.
        """
        clock = _Clock(lambda: None)
        if not self.is_xla:
            start = time.perf_counter()
            ids = self.model.generate(**self.inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
            return [moment - start for moment in clock.moments], ids.numpy()
        seconds = []
        for length in (1, new_tokens):
            start = time.perf_counter()
            found = self.model.generate(**self.inputs, max_new_tokens=length, do_sample=False, jit_compile=True)
            ids = found.numpy()
            seconds.append(time.perf_counter() - start)
        return np.linspace(*seconds, new_tokens).tolist(), ids

    def array(self, tensor) -> np.ndarray:
        """A tensor as a numpy array."""
        return tensor.numpy()

    def wait(self):
        """Until all that was queued is done."""
        self.tf.test.experimental.sync_devices()

    def peak(self) -> Peak:
        """The memory of this process from now on."""
        return Peak()


def of_model(options) -> dict:
    """Arguments of a backend with the random model that a command line asks for."""
    return {"directory": str(random_model(options.config)), "dtype": options.dtype, "device": options.device}
