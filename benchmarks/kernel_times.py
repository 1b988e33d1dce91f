"""How long each operation that `idefics_common.scaling.kernels` lists takes by itself, on this machine's CPU.

An operation is timed as it would meet the caches in the model: it takes turns between several inputs and its last
results stay alive, so that what it reads was written a few tensors ago; matrices take turns over as much memory as the
weights of the model take, because tables of pages have to fit into caches too; and as in the model, where a product
that reads weights stands before nearly every other operation, one runs before each, and Python takes a little time
between the two, outside of the clock.
"""

import time

import torch
from torch.nn import functional as F
from transformers.activations import GELUActivation

from idefics_common.scaling.kernels import LAYER_NORM, RMS_NORM, SILU, SUM, Attention, Pass, Product
from idefics_pt.cpu.onednn import by_columns, linear, project_and_activate
from idefics_pt.layers import RMSNorm

_TURNS = 3  # inputs that take turns, and results that stay: about as many tensors as a layer holds at a time
_BETWEEN = 1e-4  # seconds, about what a layer takes between two products; a thread that waits does not start at once
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 10, 0.02


class KernelTimes:
    """Times operations of one model.

    Args:
        numbers: memory for matrices, as much as the weights of the model take; any values.
        config: of the model; the product that runs before each operation is the first one of its decoder's MLP, of a
            few rows.
    """

    def __init__(self, numbers: torch.Tensor, config):
        self._numbers, self._turn = numbers, 0
        self._before = self._product(Product(4, config.hidden_size, 2 * config.intermediate_size, is_fused=True))

    @torch.inference_mode()
    def seconds(self, kernel) -> list[float]:
        """Seconds of some runs of an operation, after one that warms up."""
        run, seconds = self.make(kernel), []
        alive = [self._run_next(run)] * _TURNS
        end = time.perf_counter() + _SECONDS
        while len(seconds) < _LEAST_RUNS or (len(seconds) < _MOST_RUNS and time.perf_counter() < end):
            self._run_next(self._before)
            start = time.perf_counter() + _BETWEEN
            while time.perf_counter() < start:
                continue
            start = time.perf_counter()
            result = self._run_next(run)
            seconds.append(time.perf_counter() - start)
            alive[len(seconds) % _TURNS] = result
        return seconds

    def _run_next(self, run):
        self._turn += 1
        return run(self._turn)

    def make(self, kernel):
        """A function of the number of the turn that runs an operation once."""
        makers = {Product: self._product, Attention: self._attention, Pass: self._pass}
        return makers[type(kernel)](kernel)

    def _product(self, product: Product):
        inputs = [torch.full((1, product.rows, product.inner), 0.5) for _ in range(_TURNS)]
        shape = (product.outer, product.inner)
        # the values do not matter, so matrices that lie by columns are the same numbers under another shape
        is_tall = product.is_fused and not by_columns(torch.empty(shape)).is_contiguous()
        matrices = [x.view(shape[::-1]).t() if is_tall else x.view(shape) for x in self._apart(shape[0] * shape[1])]
        if not product.with_gelu:
            return lambda turn: linear(inputs[turn % _TURNS], matrices[turn % len(matrices)])
        layers = [torch.nn.Linear(*shape[::-1], device="meta") for _ in matrices]
        for layer, matrix in zip(layers, matrices, strict=True):
            layer.weight, layer.bias = torch.nn.Parameter(matrix), torch.nn.Parameter(torch.zeros(len(matrix)))
        gelu = GELUActivation()
        return lambda turn: project_and_activate(layers[turn % len(layers)], gelu, inputs[turn % _TURNS])

    def _attention(self, attention: Attention):
        batch, heads, queries, keys, width, is_causal, has_mask = attention
        inputs = [torch.full((batch, queries, heads, width), 0.5).transpose(1, 2) for _ in range(_TURNS)]
        shape = (2, batch, keys, heads, width)
        keys_values = [x.view(shape).transpose(2, 3) for x in self._apart(2 * batch * keys * heads * width)]
        mask_BHTS = torch.arange(keys).lt(keys // 2 + 1).expand(batch, 1, queries, -1).clone() if has_mask else None

        def run(turn):
            key, value = keys_values[turn % len(keys_values)]
            query = inputs[turn % _TURNS]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BHTS, is_causal=is_causal)

        return run

    def _pass(self, kernel: Pass):
        kind, rows, width = kernel
        pairs = [(torch.full((rows, width), 0.5), torch.full((rows, width), 0.5)) for _ in range(_TURNS)]
        weight, norm = torch.ones(width), RMSNorm(width, 1e-6).requires_grad_(False)
        functions = {
            SUM: torch.add,
            LAYER_NORM: lambda x, _: F.layer_norm(x, (width,), weight, weight),
            RMS_NORM: lambda x, _: norm(x),
            SILU: lambda x, _: F.silu(x),
        }
        return lambda turn: functions[kind](*pairs[turn % _TURNS])

    def _apart(self, count: int) -> list[torch.Tensor]:
        """Tensors of so many numbers, side by side, as many as there is room for; at least one."""
        if count > len(self._numbers):
            return [torch.full((count,), 0.01)]
        return [x for x in self._numbers.split(count) if len(x) == count]
