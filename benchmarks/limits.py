"""What the machine can do at best, measured on the spot: the rates that every other figure is a share of.

Two rates, both of float32: bytes per second of matrix-vector products over the shapes of a model's decoder, with more
than 1 GB of matrices so that no cache holds them; and multiply-adds per second of a matrix product.
"""

import statistics
import time

import torch

from benchmarks.workload import TOKENS_PER_IMAGE
from idefics_common.configuration.fields import fields_from_dict
from idefics_common.scaling import PRECISIONS, Hardware, Workload, first_token_seconds
from idefics_pt.cpu.onednn import by_columns, linear

_LEAST_BYTES = 1.1e9
_KERNELS = (torch.nn.functional.linear, linear)  # MKL and oneDNN


def decoder_shapes(config: dict) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices that one decoding step reads: decoder, gated blocks and head.

    Keys and values of images are not among them: decoding reads their results.
    """
    width, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    gated = layers // config["cross_layer_interval"]
    head = (config["vocab_size"] + config["additional_vocab_size"], width)
    return layers * ([(width, width)] * 4 + mlp) + gated * ([(width, width)] * 2 + mlp) + [head]


def decoder_bytes(config: dict, itemsize: int = 4) -> int:
    """Bytes of these matrices."""
    return itemsize * sum(rows * columns for rows, columns in decoder_shapes(config))


def prompt_seconds(config: dict, images: list[int], bandwidth: float, rate: float) -> float:
    """The least time until the first token of a batch of `prompts` with so many images in each row, in float32."""
    most = max(images)
    workload = Workload(len(images), most, most * TOKENS_PER_IMAGE, encoded_images=sum(images))
    hardware = Hardware("this machine", bandwidth, rate)
    return first_token_seconds(fields_from_dict(config), PRECISIONS["float32"], workload, hardware).total


class Limits:
    """Measures both rates, on the CPU or on a GPU ("cuda"); lives in a worker."""

    def __init__(self, config: dict, device: str = "cpu"):
        shapes = decoder_shapes(config)
        copies = int(_LEAST_BYTES // decoder_bytes(config)) + 1
        self.matrices = [torch.randn(shape, device=device) for shape in copies * shapes]
        self.by_columns = [by_columns(matrix) for matrix in self.matrices] if device == "cpu" else None
        self.vectors = {columns: torch.randn(1, columns, device=device) for _, columns in shapes}
        self.square = torch.randn(2048, 2048, device=device)
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.inference_mode()
    def bandwidth(self) -> float:
        """Bytes per second of matrix-vector products, with the fastest of torch's kernels and orders of the matrices in
        memory; the median of five passes over all."""
        ways = [(kernel, self.matrices) for kernel in _KERNELS]
        if self.by_columns:
            ways.append((linear, self.by_columns))
        return sum(matrix.nbytes for matrix in self.matrices) / min(self._seconds(*way) for way in ways)

    def _seconds(self, kernel, matrices) -> float:
        seconds = []
        for _ in range(5):
            self._wait()
            start = time.perf_counter()
            for matrix in matrices:
                kernel(self.vectors[matrix.shape[1]], matrix)
            self._wait()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    @torch.inference_mode()
    def multiply_adds(self) -> float:
        """Multiply-adds per second of a square matrix product, with the faster kernel; the median of five."""
        best = float("inf")
        for kernel in _KERNELS:
            seconds = []
            for _ in range(5):
                self._wait()
                start = time.perf_counter()
                kernel(self.square, self.square)
                self._wait()
                seconds.append(time.perf_counter() - start)
            best = min(best, statistics.median(seconds))
        return self.square.shape[0] ** 3 / best
