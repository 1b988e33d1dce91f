"""Bytes that training holds: weights, gradients, the optimiser's states, and what autograd saves for the backward pass.

Saved activations follow what each layer of `idefics_pt` keeps for its gradients with fused attention, counted tensor by
tensor; norms keep their input in float32 whatever the precision. Parts in front of the first trainable parameter save
nothing: a frozen vision tower costs no more than in inference. A frozen decoder saves less, but not nothing, because
gradients of the gated blocks pass through it. In float32 on the CPU layers keep less, see `idefics_pt.cpu.recomputed`.
"""

from dataclasses import dataclass

from idefics_common.configuration.fields import check_module_exceptions
from idefics_common.parameters import Kind, Parameter, Part, iterate
from idefics_common.scaling.sizes import Precision, Sizes, Workload

_EXCEPTED_KINDS = {
    "LayerNorm": {Kind.LAYER_NORM, Kind.RMS_NORM},
    "RMSNorm": {Kind.RMS_NORM},
    "Linear": {Kind.LINEAR, Kind.BIAS},
    "Embedding": {Kind.EMBEDDING},
}
_BASE_VOCABULARY = {Part.EMBEDDING: "model.embed_tokens.weight", Part.HEAD: "lm_head.weight"}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step.

    Attributes:
        weights: of all parameters. gradients: of those that train.
        optimizer: two states of Adam for each of those, in the precision of the parameter, as PyTorch keeps them.
        activations: what the forward pass saves.
        recomputed: with checkpointing, what the largest layer saves when the backward pass runs it again; else 0.
        loss: logits, their log-probabilities in float32 and the gradient of those.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    loss: int

    @property
    def peak(self) -> int:
        """The most bytes alive at once: at the loss, or at the end of the backward pass. In between, gradients appear
        as activations go; gradients of the step before are gone."""
        return self.weights + self.optimizer + max(self.activations + self.loss, self.gradients + self.recomputed)


def is_trainable(parameter: Parameter, config) -> bool:
    """Whether a parameter trains under the freezing that `config` asks for; a tied one is asked where it is defined.

    Raises:
        ValueError: if the configuration excepts a kind of module that there is not.
    """
    if parameter.part in _BASE_VOCABULARY:
        frozen = config.freeze_text_layers if parameter.part is Part.EMBEDDING else config.freeze_lm_head
        return not (frozen and parameter.name == _BASE_VOCABULARY[parameter.part])
    if parameter.part is Part.DECODER and config.freeze_text_layers:
        return parameter.kind in _excepted(config.freeze_text_module_exceptions)
    if parameter.part is Part.VISION and config.freeze_vision_layers:
        return parameter.kind in _excepted(config.freeze_vision_module_exceptions)
    return True


def training_memory(config, precision: Precision, workload: Workload, checkpointing: bool = False) -> TrainingMemory:
    """Bytes of a training step on the prompts of a workload, its `new_tokens` aside.

    Args:
        checkpointing: gradient checkpointing of vision, decoder and gated layers: each saves its input, and one layer
            at a time what it needs.

    Raises:
        ValueError: for a precision with quantised weights, which do not train.
    """
    if precision.quantized_parts:
        raise ValueError(f"weights in {precision.name} do not train; choose a precision without quantised parts.")
    parameters = [parameter for parameter in iterate(config) if parameter.tied_to is None]
    trainable = sum(precision.parameter_bytes(p) for p in parameters if is_trainable(p, config))
    activations, recomputed = _saved_bytes(config, precision, workload, checkpointing)
    return TrainingMemory(
        weights=sum(map(precision.parameter_bytes, parameters)),
        gradients=trainable,
        optimizer=2 * trainable,
        activations=activations,
        recomputed=recomputed,
        loss=workload.positions * Sizes.of(config).V * (precision.bytes_per_value + 8),
    )


def _excepted(names) -> set[Kind]:
    check_module_exceptions(names, "exceptions")
    return set().union(*(_EXCEPTED_KINDS[name] for name in names))


def _saved_bytes(config, precision: Precision, workload: Workload, checkpointing: bool) -> tuple[int, int]:
    """What the forward pass saves, and what the largest layer saves when it runs again."""
    sizes, width = Sizes.of(config), precision.bytes_per_value
    positions, images = workload.positions, workload.num_encoded
    layer = positions * _decoder_layer(sizes, width, trains=_trains(config, Part.DECODER))
    block = _gated_block(config, sizes, width, workload)
    layers = [(sizes.layers, layer, positions * sizes.D * width), (sizes.blocks, block, positions * sizes.D * width)]
    if _trains(config, Part.VISION):
        tokens = images * sizes.P
        saved = tokens * width * (8 * sizes.E + 2 * sizes.vision_F)
        layers.append((sizes.vision_layers, saved, tokens * sizes.E * width))
    outside = images * _resampler(config, sizes, width)
    if checkpointing:
        return outside + sum(count * given for count, _, given in layers), max(saved for _, saved, _ in layers)
    return outside + sum(count * saved for count, saved, _ in layers), 0


def _decoder_layer(sizes: Sizes, width: int, trains: bool) -> int:
    """Per position: the inputs of both norms; queries, keys, values and result of attention; gate, its activation and
    up. The weights of norms and linear layers need their own inputs only where they train."""
    of_weights = 4 * sizes.D + sizes.F if trains else 0
    statistics = 4 * (2 + sizes.H)
    return 2 * 4 * sizes.D + width * (4 * sizes.D + 3 * sizes.F + of_weights) + statistics


def _gated_block(config, sizes: Sizes, width: int, workload: Workload) -> int:
    """All positions and images: as a decoder layer that trains, with both branches before their gates, and a copy of
    attention's result; keys and values are of the images, and the mask is a term of every score."""
    mlp_branch = 4 * sizes.D + width * (3 * sizes.D + 4 * sizes.F)
    if workload.images == 0:
        return workload.positions * mlp_branch
    norms = 4 + width if config.qk_layer_norms else 0
    attention_branch = 4 * sizes.D + width * 6 * sizes.D + norms * sizes.D
    memory = workload.images * sizes.memory_tokens
    images = workload.batch * memory * (2 * width + norms) * sizes.D
    statistics = 4 * (2 + 2 * sizes.H)
    return workload.positions * (attention_branch + mlp_branch + memory * width + statistics) + images


def _resampler(config, sizes: Sizes, width: int) -> int:
    """One image: what text attends to, and for each block latents before and after their norm, sources, queries, keys,
    values and result of attention, and the MLP; the features that all blocks read are one tensor."""
    features = sizes.memory_tokens * sizes.E
    if not sizes.depth:
        return features * width
    sources = sizes.P + sizes.L
    norms = (sources + sizes.L) * sizes.inner if config.perceiver_config.qk_layer_norms_perceiver else 0
    attention = (2 * sizes.L + sources) * sizes.E + (3 * sizes.L + 2 * sources) * sizes.inner + norms
    mlp = 6 * sizes.L * sizes.E
    return width * (features + sizes.P * sizes.E + sizes.depth * (attention + mlp))


def _trains(config, part: Part) -> bool:
    """Whether any parameter of a part trains; it then counts as if all did, so exceptions to freezing cost too much."""
    return any(is_trainable(parameter, config) for parameter in iterate(config) if parameter.part is part)
