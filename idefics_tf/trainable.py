"""What of a model trains, counted by part: a table to look at before a long run.

Unusual: adapters (`idefics_tf.lora`) count for the part they are in.

Mirrors `idefics_pt/trainable.py`.
"""

import math

from idefics_common.parameters import Part
from idefics_common.parameters.trainable import TrainableParameters
from idefics_tf.lora import adapted_layers
from idefics_tf.weights import weights_by_name


def trainable_parameters(model) -> TrainableParameters:
    """Count the parameters of a `TFIdeficsForVisionText2Text` or `TFIdeficsModel`, by part."""
    counts = TrainableParameters(dict.fromkeys(Part, 0), dict.fromkeys(Part, 0))
    variables = [(weight.parameter.part, weight.variable) for weight in weights_by_name(model).values()]
    if model.has_head:
        for parameter, layer in adapted_layers(model).values():
            variables += [(parameter.part, layer.lora_kernel_a), (parameter.part, layer.lora_kernel_b)]
    for part, variable in variables:
        size = math.prod(variable.shape)
        counts.total[part] += size
        counts.trainable[part] += size if variable.trainable else 0
    return counts
