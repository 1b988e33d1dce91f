"""How many parameters of a model train, by part: a table to print before a long run.

Unusual: parameters are found by walking the model, not by their names, so adapters of PEFT, which live inside the
layers they adapt, count for the part they are in, and wrappers (PEFT, DDP, FSDP2, compiled models) do not matter.

Mirrors `idefics_tf/trainable.py`.
"""

from torch import nn

from idefics_common.parameters import MODEL, Part, expand
from idefics_common.parameters.trainable import TrainableParameters
from idefics_pt.pretrained import IdeficsPreTrainedModel


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Count the parameters of a model that holds an IDEFICS, by part.

    Args:
        model: an `IdeficsModel`, an `IdeficsForVisionText2Text`, or a wrapper around one.

    Raises:
        ValueError: if there is no IDEFICS in `model`.
    """
    idefics = [module for module in model.modules() if isinstance(module, IdeficsPreTrainedModel)]
    if not idefics:
        raise ValueError(f"expected an IDEFICS model or a wrapper around one, got {type(model).__name__}.")
    parts = _parts_of_children(idefics[0].config)
    part_of = {}
    for parent in reversed(idefics):  # the inner model first: what the head is tied to is defined there
        for name, child in parent.named_children():
            for parameter in child.parameters() if name in parts else ():
                part_of.setdefault(parameter, parts[name])
    return TrainableParameters.count((part, p.numel(), p.requires_grad) for p, part in part_of.items())


def _parts_of_children(config) -> dict[str, Part]:
    """The part that each direct child of the models belongs to, by the names of the parameter table."""
    prefix = f"{MODEL.name}."
    return {parameter.name.removeprefix(prefix).partition(".")[0]: parameter.part for parameter in expand(config)}
