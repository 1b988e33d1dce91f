"""How many parameters of a model train, by part: a table to print before a long run.

Adapters (`idefics_tf.lora`) count for the part they are in. Mirrors `idefics_pt/trainable.py`.
"""

import math

from idefics_common.parameters.trainable import TrainableParameters
from idefics_tf.adaptable import factors_of
from idefics_tf.lora import adapted_layers
from idefics_tf.weights import weights_by_name


def trainable_parameters(model) -> TrainableParameters:
    """Count the parameters of a `TFIdeficsForVisionText2Text` or `TFIdeficsModel`, by part."""
    variables = [(weight.parameter.part, weight.variable) for weight in weights_by_name(model).values()]
    if model.has_head:
        for parameter, layer in adapted_layers(model).values():
            variables += [(parameter.part, variable) for variable in factors_of(layer)]
    return TrainableParameters.count((part, math.prod(v.shape), v.trainable) for part, v in variables)
