"""The three that are compared, each behind the same methods; they live in workers (`benchmarks.workers`).

A backend imports its framework when it is made, so that a worker holds one framework only.
"""

import os
import time

import numpy as np

from benchmarks.options import tensorflow_device


class TorchBackend:
    """PyTorch: ours ("pt") or transformers' own ("transformers").

    Args:
        directory: of a checkpoint. dtype: name of the precision.
        fused: for ours, projections fused for inference (`fuse_projections`).
        quantized: for ours, linear layers of the decoder in int8 (`quantize_int8`).
    """

    def __init__(self, kind, directory, dtype="float32", device="cpu", fused=True, quantized=False):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.kind, self.device = torch, kind, device
        if kind == "transformers":
            from transformers import IdeficsForVisionText2Text
            from transformers import logging as transformers_logging

            transformers_logging.set_verbosity_error()
        else:
            from idefics_pt import IdeficsForVisionText2Text
        model = IdeficsForVisionText2Text.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        if kind == "pt" and fused:
            model.fuse_projections()
        if quantized:
            model.quantize_int8()
        self.model = model

    def prepare(self, inputs: dict):
        """Hold these inputs (numpy arrays) for the methods that follow."""
        self.inputs = {name: self.torch.from_numpy(value).to(self.device) for name, value in inputs.items()}

    def logits(self) -> np.ndarray:
        """Next-token logits (B, V) of the prompt, float32."""
        with self.torch.inference_mode():
            return self.model(**self.inputs).logits[:, -1].float().cpu().numpy()

    def generate(self, new_tokens: int, **kwargs) -> tuple[list[float], np.ndarray]:
        """Seconds until each token has come, and the ids (B, T)."""
        clock = _Clock(self._wait)
        start = time.perf_counter()
        ids = self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, use_cache=True, **kwargs
        )
        return [moment - start for moment in clock.moments], ids.cpu().numpy()

    def _wait(self):
        if self.device != "cpu":
            self.torch.cuda.synchronize()


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
    """Keras: the compiled `generate` of `idefics_tf`, the loop by XLA if `kind` is "tf xla"; else as `TorchBackend`."""

    def __init__(self, kind, directory, dtype="float32", device="cpu"):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["OMP_NUM_THREADS"]))
        tf.config.threading.set_inter_op_parallelism_threads(1)
        from idefics_tf import TFIdeficsForVisionText2Text

        self.tf, self.is_xla = tf, kind == "tf xla"
        self.device = tensorflow_device(device)
        with tf.device(self.device):
            self.model = TFIdeficsForVisionText2Text.from_pretrained(directory, dtype=dtype)
        self.model.generation_config.update(eos_token_id=None, pad_token_id=0)

    def prepare(self, inputs: dict):
        """Hold these inputs (numpy arrays) for the methods that follow."""
        with self.tf.device(self.device):
            self.inputs = {name: self.tf.constant(value) for name, value in inputs.items()}

    def logits(self) -> np.ndarray:
        """Next-token logits (B, V) of the prompt, float32."""
        found = self.model.generate(
            **self.inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return found.logits[0].numpy()

    def generate(self, new_tokens: int, **kwargs) -> tuple[list[float], np.ndarray]:
        """Seconds until each token has come, and the ids (B, T).

        XLA's loop tells of no token before it has them all: the first is that of a search for one token, in the same
        graph, and the others lie evenly between it and the last.
        """
        if self.is_xla:
            seconds = {}
            for length in (1, new_tokens):
                start = time.perf_counter()
                found = self.model.generate(
                    **self.inputs, max_new_tokens=length, do_sample=False, jit_compile=True, **kwargs
                )
                ids = found.numpy()
                seconds[length] = time.perf_counter() - start
            return np.linspace(seconds[1], seconds[new_tokens], new_tokens).tolist(), ids
        clock = _Clock(lambda: None)
        start = time.perf_counter()
        ids = self.model.generate(**self.inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **kwargs)
        return [moment - start for moment in clock.moments], ids.numpy()


def backend(kind: str, fused: bool, quantized=False, in_torch=TorchBackend, in_tensorflow=TensorFlowBackend, **kwargs):
    """The backend called `kind`: "pt", "pt float32" (whatever the precision of the others), "tf", "tf xla" or
    "transformers".

    Args:
        fused, quantized: for "pt"; the others have no such step.
        in_torch, in_tensorflow: their classes.
    """
    if kind.startswith("tf"):
        return in_tensorflow(kind, **kwargs)
    if kind == "pt float32":
        return in_torch("pt", fused=fused, **{**kwargs, "dtype": "float32"})
    return in_torch(kind, fused=fused, quantized=quantized and kind == "pt", **kwargs)
