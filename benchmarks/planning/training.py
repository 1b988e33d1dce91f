"""Bytes that training holds whatever the batch: weights, gradients and the optimiser's states.

What autograd saves for the backward pass comes on top; it depends on the batch, on gradient checkpointing and on what
the device computes again, and is measured, not planned (`python -m benchmarks.training`).
"""

from dataclasses import dataclass

from benchmarks.planning.sizes import Precision
from idefics_common.configuration.fields import check_module_exceptions
from idefics_common.parameters import Kind, Parameter, Part, expand

_EXCEPTED_KINDS = {
    "LayerNorm": {Kind.LAYER_NORM, Kind.RMS_NORM},
    "RMSNorm": {Kind.RMS_NORM},
    "Linear": {Kind.LINEAR, Kind.BIAS},
    "Embedding": {Kind.EMBEDDING},
}
_BASE_VOCABULARY = {Part.EMBEDDING: "model.embed_tokens.weight", Part.HEAD: "lm_head.weight"}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of all parameters, of the gradients of those that train, and of two states of Adam for each of these.

    All are in the precision of the parameter, as PyTorch keeps them.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes at the end of the backward pass."""
        return self.weights + self.gradients + self.optimizer


def is_trainable(parameter: Parameter, config) -> bool:
    """Whether a parameter trains under the freezing that `config` asks for; a tied one is asked where it is defined.

    Raises:
        ValueError: if the configuration excepts a kind of module that there is not.
    """
    if parameter.part in _BASE_VOCABULARY:
        frozen = config.freeze_lm_head and (parameter.part is Part.HEAD or config.tie_word_embeddings)
        if parameter.part is Part.EMBEDDING:
            frozen = frozen or config.freeze_text_layers
        return not (frozen and parameter.name == _BASE_VOCABULARY[parameter.part])
    if parameter.part is Part.DECODER and config.freeze_text_layers:
        return parameter.kind in _excepted(config.freeze_text_module_exceptions)
    if parameter.part is Part.VISION and config.freeze_vision_layers:
        return parameter.kind in _excepted(config.freeze_vision_module_exceptions)
    return True


def training_memory(config, precision: Precision) -> TrainingMemory:
    """Bytes that a training step holds besides activations; ValueError for quantised weights, which do not train."""
    if precision.quantized_parts:
        raise ValueError(f"weights in {precision.name} do not train; choose a precision without quantised parts.")
    parameters = [parameter for parameter in expand(config) if parameter.tied_to is None]
    trainable = sum(precision.parameter_bytes(p) for p in parameters if is_trainable(p, config))
    return TrainingMemory(sum(map(precision.parameter_bytes, parameters)), trainable, 2 * trainable)


def _excepted(names) -> set[Kind]:
    check_module_exceptions(names, "exceptions")
    return set().union(*(_EXCEPTED_KINDS[name] for name in names))
