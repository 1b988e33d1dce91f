"""Changing the size of the vocabulary.

A model with an additional vocabulary grows and shrinks there: its base matrix stays, ids keep their meaning, and
trained rows are kept. A model without one is resized as transformers does it.

Mirrors `idefics_tf/resizing.py`. Axes: see `idefics_common`.
"""

import torch
from torch import nn

from idefics_pt.joined import Decoupled
from idefics_pt.layers import DecoupledEmbedding, DecoupledLinear


def check_resizable(parts) -> None:
    """Raise `ValueError` if a tool's own layer is in the place of an embedding, of a head, or of its added rows."""
    for part in parts:
        found = part.added if isinstance(part, Decoupled) else part
        if found is part or type(found) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"{type(found).__name__} is in the place of a layer of the vocabulary: resize the vocabulary before "
                "quantising or adapting it."
            )


def resize_additional_embedding(embedding: DecoupledEmbedding, size: int, std: float | None) -> None:
    """Give `embedding` an additional vocabulary of `size` rows, keeping those it has.

    Args:
        std: standard deviation of new rows around zero; None for the mean of the base rows, which disturbs the
            probabilities of a trained model least.
    """
    embedding.split()
    old, new = embedding.additional_embedding, None
    if size > 0:
        new = _initialized(nn.Embedding(size, embedding.embedding_dim, device="meta"))
        new.weight = _resized(embedding.weight, old, size, std)
    embedding.additional_embedding, embedding.num_additional_embeddings = new, size


def resize_additional_outputs(head: DecoupledLinear, size: int, std: float | None) -> None:
    """Give a language head `size` additional outputs, keeping those it has; see `resize_additional_embedding`."""
    head.split()
    old, new = head.additional_fc, None
    if size > 0:
        new = _initialized(nn.Linear(head.in_features, size, bias=False, device="meta"))
        new.weight = _resized(head.weight, old, size, std)
    head.additional_fc, head.out_additional_features = new, size


def as_decoupled(head: nn.Linear) -> DecoupledLinear:
    """The plain linear layer that transformers puts in place of a language head, as the class it was."""
    decoupled = DecoupledLinear(head.in_features, head.out_features, freeze_base=not head.weight.requires_grad)
    decoupled.weight = head.weight
    return _initialized(decoupled)


def _initialized(module: nn.Module) -> nn.Module:
    """Mark a module that has its weights, or transformers would draw them anew when the model is next initialised."""
    module._is_hf_initialized = True
    return module


@torch.no_grad()
def _resized(base, old, size, std):
    rows = base.new_empty((size, base.shape[1]))
    if std is None:
        rows.copy_(base.float().mean(dim=0).expand_as(rows))
    else:
        rows.normal_(0.0, std)
    if old is not None:
        kept = min(size, len(old.weight))
        rows[:kept] = old.weight[:kept]
    return nn.Parameter(rows)
