"""Small layers that every part of the decoder shares: RMS norm, gated MLP, and the two decoupled vocabulary layers.

Unusual: the vocabulary is decoupled. Ids below `vocab_size` live in the base matrix, which fine-tuning may freeze;
ids from `vocab_size` on (the image tokens) live in a small matrix of their own, which always trains. Both classes stay
`nn.Embedding` and `nn.Linear` with the base matrix as `weight`, so that published keys, weight tying and adapters find
what they expect.

Mirrors `idefics_tf/layers.py`. Axes: see `idefics_common`.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from idefics_common.calls.text import check_id_range
from idefics_pt.cpu.onednn import by_columns, linear, project
from idefics_pt.cpu.recomputed import project_gated, rms_norm
from idefics_pt.fused import Fusable


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


def dropout(x, rate: float, module):
    """`F.dropout` while `module` trains; else x, without the call, which takes longer than a sum in a decoding step."""
    return F.dropout(x, p=rate) if module.training else x


class GatedMLP(Fusable):
    """LLaMA's MLP: ``down(act(gate(x)) * up(x))``, no biases (Shazeer, "GLU variants improve transformer", 2020)."""

    same_input = ("gate_proj", "up_proj")

    def __init__(self, width: int, hidden_width: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, width, bias=False)
        self.up_proj = nn.Linear(width, hidden_width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_BTD):
        gate_BTF, up_BTF = self.project_same_input(hidden_BTD)
        return project_gated(self.down_proj, self.act_fn, gate_BTF, up_BTF)


class DecoupledEmbedding(nn.Embedding):
    """Embedding of a base vocabulary and, after it, an additional one held in `additional_embedding`.

    Args:
        num_embeddings: size of the base vocabulary.
        num_additional_embeddings: size of the additional one; 0 makes this an ordinary embedding.
        embedding_dim: width D.
        freeze_base: whether the base matrix is not to train. The additional one always trains.
        padding_idx: row that starts at zero, or None.
    """

    def __init__(self, num_embeddings, num_additional_embeddings, embedding_dim, freeze_base=False, padding_idx=None):
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx)
        self.num_additional_embeddings = num_additional_embeddings
        self.weight.requires_grad_(not freeze_base)
        self.additional_embedding = (
            nn.Embedding(num_additional_embeddings, embedding_dim) if num_additional_embeddings > 0 else None
        )

    def forward(self, ids_BT):
        """Look up ids (B, T), any integer dtype; returns (B, T, D).

        Raises:
            ValueError: if an id lies outside both vocabularies. Checked on the CPU; an accelerator, where looking would
                stop it at every step, fails with its own index assertion.
        """
        if ids_BT.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_ids(ids_BT)
        if self.additional_embedding is None:
            return self.base(ids_BT)
        base_BTD = self.base(ids_BT.clamp(max=self.num_embeddings - 1))
        additional_BTD = self.additional_embedding((ids_BT - self.num_embeddings).clamp(min=0))
        return torch.where((ids_BT >= self.num_embeddings).unsqueeze(-1), additional_BTD, base_BTD)

    def base(self, ids_BT):
        """Look up ids of the base vocabulary; apart from `forward` because tensor parallelism splits just this."""
        return F.embedding(ids_BT, self.weight)

    def _check_ids(self, ids_BT):
        if ids_BT.numel() == 0:
            return
        lowest, highest = (int(extreme) for extreme in torch.aminmax(ids_BT))
        check_id_range(lowest, highest, self.num_embeddings, self.num_additional_embeddings)

    def extra_repr(self):
        return f"{self.num_embeddings} + {self.num_additional_embeddings}, {self.embedding_dim}"


class DecoupledLinear(nn.Linear):
    """Language head over a base vocabulary and, after it, an additional one held in `additional_fc`.

    Args:
        in_features: width D.
        out_features: size of the base vocabulary.
        out_additional_features: size of the additional one; 0 makes this an ordinary linear layer.
        freeze_base: whether the base matrix is not to train. The additional one always trains.
    """

    def __init__(self, in_features, out_features, out_additional_features=0, freeze_base=False):
        super().__init__(in_features, out_features, bias=False)
        self.out_additional_features = out_additional_features
        self.weight.requires_grad_(not freeze_base)
        self.register_state_dict_post_hook(_by_rows)
        self.additional_fc = (
            nn.Linear(in_features, out_additional_features, bias=False) if out_additional_features > 0 else None
        )

    def forward(self, hidden_BTD):
        logits_BTV = self.base(hidden_BTD)
        if self.additional_fc is None:
            return logits_BTV
        return torch.cat((logits_BTV, project(self.additional_fc, hidden_BTD)), dim=-1)

    @torch.inference_mode(False)
    def fuse_projections(self):
        """Let the base matrix lie in memory as decoding reads it faster; see `by_columns`."""
        if type(self) is DecoupledLinear and not self.weight.is_inference():
            self.weight.data = by_columns(self.weight.data)

    @torch.inference_mode(False)
    def unfuse_projections(self):
        """Undo `fuse_projections`."""
        if type(self) is DecoupledLinear:
            self.weight.data = self.weight.data.contiguous()

    def base(self, hidden_BTD):
        """Logits of the base vocabulary; apart from `forward` because tensor parallelism splits just this."""
        return linear(hidden_BTD, self.weight)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features} + {self.out_additional_features}"


def whole_head(head):
    """For code that reads `weight` and `bias` of a head as those of the whole vocabulary, and multiplies by itself.

    Args:
        head: a `DecoupledLinear` with an additional vocabulary, or what PEFT put in its place.

    Returns:
        an object with `weight` (V, D), both matrices joined, through which gradients reach both, and `bias`; a head
        with an adapter as it is, for whoever asks for one.

    Raises:
        ValueError: if the additional matrix has an adapter, which such code would leave out.
    """
    if hasattr(head, "base_layer"):
        return head
    additional = head.additional_fc
    if hasattr(additional, "base_layer"):
        raise ValueError(
            "lm_head.additional_fc has an adapter, and TRL multiplies by the weights themselves, so that it would not "
            'train: name it in modules_to_save instead, modules_to_save=["additional_fc", "additional_embedding"].'
        )
    return SimpleNamespace(weight=torch.cat((head.weight, additional.weight)), bias=None)


def _by_rows(module, state, prefix, local_metadata):
    """After the state of a head is taken: file formats want its matrix row by row."""
    state[f"{prefix}weight"] = state[f"{prefix}weight"].contiguous()
