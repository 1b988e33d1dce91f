"""What the machine can do at best, measured on the spot: how fast a decoding step can read its weights.

Unusual: oneDNN, which torch brings beside MKL, is called by torch's own operator, because `F.linear` never asks it for
float32. On some processors it is the faster of the two.
"""

import statistics
import time
from collections import defaultdict

_LEAST_BYTES = 1.1e9  # more than any cache holds


def decoder_shapes(config: dict) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices that one decoding step reads: decoder, gated blocks and head.

    Keys and values of images are not among them: decoding reads their results.
    """
    width, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    blocks = layers // config["cross_layer_interval"]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    head = (config["vocab_size"] + config["additional_vocab_size"], width)
    return layers * ([(width, width)] * 4 + mlp) + blocks * ([(width, width)] * 2 + mlp) + [head]


def decoder_bytes(config: dict, itemsize: int = 4) -> int:
    """Bytes of these matrices."""
    return itemsize * sum(rows * columns for rows, columns in decoder_shapes(config))


class Limits:
    """Measures on the CPU or on a GPU ("cuda"); lives in a worker."""

    def __init__(self, config: dict, device: str = "cpu"):
        import torch  # here, because workers of another framework import this module

        self.torch, self.device, self.kernels = torch, device, [torch.nn.functional.linear]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            self.kernels.append(lambda x, matrix: torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], ""))
        shapes = decoder_shapes(config)
        self.matrices = defaultdict(list)
        for shape in (int(_LEAST_BYTES // decoder_bytes(config)) + 1) * shapes:
            self.matrices[shape].append(torch.randn(shape, device=device))

    def bandwidth(self) -> float:
        """Bytes per second of float32 matrix-vector products over the shapes of a model's decoder, for each shape with
        the fastest of torch's kernels and orders of the matrix in memory."""
        nbytes = seconds = 0
        for matrices in self.matrices.values():
            by_columns = [matrix.t().contiguous().t() for matrix in matrices]
            nbytes += sum(matrix.nbytes for matrix in matrices)
            seconds += min(self._seconds(kernel, way) for kernel in self.kernels for way in (matrices, by_columns))
        return nbytes / seconds

    def _seconds(self, kernel, matrices) -> float:
        """The median of five passes over all matrices."""
        vector, seconds = self.torch.randn(1, matrices[0].shape[1], device=self.device), []
        with self.torch.inference_mode():
            for _ in range(5):
                self._wait()
                start = time.perf_counter()
                for matrix in matrices:
                    kernel(vector, matrix)
                self._wait()
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def _wait(self):
        if self.device != "cpu":
            self.torch.cuda.synchronize()
