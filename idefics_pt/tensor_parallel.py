"""Tensor parallelism of the decoupled vocabulary, as two styles that transformers' plans can name.

Unusual: only the base matrix is split, over the vocabulary. The additional one has a few rows, which every device
keeps, so transformers' own styles, which take the whole layer for one matrix, do not fit. The rest of the plan
is in `idefics_common.parameters.parallel_plans`.
"""

import torch
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, EmbeddingParallel


class _OfBase:
    """A style put around a layer's method for its base matrix, instead of around its whole forward."""

    def install_forward(self, module, mesh):
        base = module.base

        def split_base(x):
            (x,), _ = self.transform_inputs_pre_forward(module, (x,), {}, mesh)
            with self.context_around_forward(module, mesh):
                out = base(x)
            return self.transform_output_post_forward(module, out, mesh)

        module.base = split_base
        return module


class DecoupledEmbeddingParallel(_OfBase, EmbeddingParallel):
    """Rows of the base vocabulary split over devices, the looked-up rows summed."""


class DecoupledLinearParallel(_OfBase, ColwiseParallel):
    """Outputs of the base vocabulary split over devices, the logits gathered."""


def register_styles() -> None:
    """Make the two styles known to transformers, under the names that the plans use; nothing without distributed."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import Replicate

    ALL_PARALLEL_STYLES.register("decoupled_embedding", DecoupledEmbeddingParallel(shard_dim=0))
    ALL_PARALLEL_STYLES.register("decoupled_linear", DecoupledLinearParallel(output_layouts=Replicate()))
