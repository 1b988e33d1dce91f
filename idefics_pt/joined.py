"""The vocabulary in one matrix, for tools that read `weight` of a vocabulary layer as the whole of it.

Unusual: a layer is joined in place. Its `weight`, the same parameter as before, then has the rows of the additional
vocabulary too, behind the base ones; files and the layer's results stay as they are. PEFT's adapters join the layer
that they are put around, and TRL's trainers the head that they multiply by; other tools need `join_vocabulary`. PEFT
tells a model nothing: that it is at work is seen where it takes the model, or a layer, as part of a module of its own.

Mirrored by nothing in `idefics_tf`. Axes: see `idefics_common`.
"""

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class Decoupled:
    """What the two layers with a base and an additional vocabulary have in common; they set:

    Attributes:
        weight: the base rows; all of them while the layer is joined.
        own_size: how many base rows there are, if there are others.
        added_name: the attribute with the module that has the added rows. size_name: that with the number of rows of
            `weight`, as tools read it.
    """

    @property
    def added(self):
        """The module of the additional vocabulary, or None."""
        return getattr(self, self.added_name)

    @property
    def base_size(self) -> int:
        """How many rows the base vocabulary has."""
        return getattr(self, self.size_name) if self.added is None else self.own_size

    @property
    def is_joined(self) -> bool:
        """Whether `weight` has the rows of the additional vocabulary too."""
        if self.added is None:
            return False
        if torch.jit.is_tracing():  # which would take sizes of tensors for values
            return getattr(self, self.size_name) > self.own_size
        return self.weight.dim() == 2 and self.weight.shape[0] > self.own_size

    def join(self) -> None:
        """Join the vocabulary in `weight`. A layer that is tied to this one has the same parameter, and is joined too.

        Raises:
            ValueError: if the weights are not plain tensors of one kind: quantised, sharded or adapted.
        """
        if self.added is None:
            return
        if not self.is_joined:
            weight, rows = self.weight, self.added.weight
            is_plain = type(self.added) in (nn.Linear, nn.Embedding) and type(weight) is type(rows) is nn.Parameter
            if not is_plain or weight.dtype != rows.dtype or weight.device != rows.device:
                raise ValueError(
                    f"{type(self).__name__} keeps the additional vocabulary apart, in {self.added_name}, and these "
                    "weights cannot be joined with it because they are quantised, sharded, adapted or elsewhere. For "
                    f"PEFT, adapt {self.added_name} alone, or name it in `modules_to_save`; for TRL, leave it out: "
                    f'`exclude_modules=["{self.added_name}"]`.'
                )
            self.added_trains = rows.requires_grad
            whole = torch.cat((weight.data, rows.data))
            weight.data, rows.data = whole, whole[self.base_size :]
            weight.grad = rows.grad = None  # an optimizer that was made before would go on with these
            rows.requires_grad_(False)
        setattr(self, self.size_name, len(self.weight))

    def split(self) -> None:
        """Undo `join`."""
        if self.is_joined:
            whole, rows = self.weight.data, self.added.weight
            self.weight.data, self.weight.grad = whole[: self.base_size].clone(), None
            rows.data = whole[self.base_size :].clone()
            rows.requires_grad_(self.added_trains)
        setattr(self, self.size_name, self.base_size)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        base, added = f"{prefix}weight", f"{prefix}{self.added_name}.weight"
        if self.is_joined and added in state_dict and len(state_dict.get(base, ())) == self.base_size:
            state_dict[base] = torch.cat((state_dict[base], state_dict[added].to(state_dict[base])))
        super()._load_from_state_dict(state_dict, prefix, *args)


def by_parts(module, state, prefix, local_metadata):
    """After the state of a `Decoupled` layer is taken: its parts by their names, row by row, as files want it."""
    weight = state[f"{prefix}weight"]
    if module.is_joined:
        state[f"{prefix}{module.added_name}.weight"] = weight[module.base_size :]
        weight = weight[: module.base_size]
    state[f"{prefix}weight"] = weight.contiguous()


def join_vocabulary(layers) -> None:
    """Join the layers for a tool that reads, and may train, `weight`.

    Raises:
        ValueError: if the additional vocabulary trains and the base one does not, which one parameter cannot.
    """
    for layer in layers:
        if layer.added is None or layer.is_joined:
            continue
        if layer.added.weight.requires_grad and not layer.weight.requires_grad:
            raise ValueError(
                f"The additional vocabulary in {layer.added_name} trains and the base one does not; joined they are "
                f"one parameter. Let both train, or neither: `requires_grad_` of `weight` or of `{layer.added_name}`."
            )
    for layer in layers:
        layer.join()


def reads_head(forward) -> bool:
    """Whether a forward that replaces the model's is one of TRL's, which multiply by `lm_head.weight` themselves."""
    return getattr(forward, "__globals__", {}).get("__name__", "").startswith("trl.")


def _note_peft(module, name, child):
    """Called for each module that becomes part of another one: what PEFT calls `base_layer` is joined; a whole model
    that it calls `base_model`, without an adapter between, is one that it puts virtual tokens in front of."""
    if not type(module).__module__.startswith("peft."):
        return
    if name == "base_layer" and isinstance(child, Decoupled):
        child.join()
    if name == "base_model" and hasattr(type(child), "has_virtual_tokens"):  # adapters pass on what they lack
        child.base_model.has_virtual_tokens = True


register_module_module_registration_hook(_note_peft)
