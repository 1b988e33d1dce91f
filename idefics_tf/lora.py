"""LoRA (Hu et al., 2021) on Keras's own `enable_lora`, by the presets of `idefics_common.parameters.lora`.

Adapters are read and written in PEFT's format, ``adapter_config.json`` and ``adapter_model.safetensors``, so those
trained by `idefics_pt` or PEFT work here, and the other way round; neither torch nor PEFT is needed. That goes for
adapters of any linear layer, embedding or convolution, also those of Keras's own ``layer.enable_lora``, and for modules
that train as they are beside them (`modules_to_save`). Keras has no dropout on adapters: `lora_dropout` of a
configuration is not applied.

Keras's files keep adapters too, see `idefics_tf.adaptable`. Mirrors `idefics_pt/lora.py`, which leaves the work to
PEFT.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

from idefics_common.checkpoint import Checkpoint, CheckpointError, compare_names_and_shapes, open_checkpoint
from idefics_common.checkpoint.safetensors_writer import TensorToWrite, write_safetensors
from idefics_common.parameters import Kind, Parameter, Part, expand
from idefics_common.parameters.layouts import KERAS_LAYOUTS, LINEAR, Layout
from idefics_common.parameters.lora import PRESETS, lora_parameters, lora_targets, module_name, saved_parameters
from idefics_tf.adaptable import Adaptable, factors_of, matrix_of, merge
from idefics_tf.freezing import train_only
from idefics_tf.layers import adapted_sublayers, sublayers
from idefics_tf.quantization import quick_deletion
from idefics_tf.weights import weights_by_name

__all__ = [
    "PRESETS",
    "adapted_layers",
    "enable_lora",
    "load_adapters",
    "lora_targets",
    "merge_adapters",
    "save_adapters",
]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's settings that do not change what a model computes, and those that are read here
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type", "layers_pattern",
    "layers_to_transform", "lora_alpha", "r", "bias", "runtime_config", "alpha_pattern", "rank_pattern",
    "modules_to_save",
}  # fmt: skip


def enable_lora(
    model,
    presets: str | Iterable[str],
    r: int = 16,
    lora_alpha: float | None = None,
    modules_to_save: Iterable[str] = (),
) -> None:
    """Freeze a model, and give linear layers adapters that train. Call `compile` after this.

    Args:
        model: a `TFIdeficsForVisionText2Text`.
        presets: see `idefics_common.parameters.lora.lora_targets`.
        r: rank of the adapters.
        lora_alpha: their output is scaled by ``lora_alpha / r``; twice the rank unless given.
        modules_to_save: modules that train too, as they are, by their names in PyTorch: for the rows of the additional
            vocabulary "additional_embedding" and "additional_fc".

    Raises:
        ValueError: as `lora_targets`; or if the model has adapters, or no language head, or no such module.
    """
    alpha = 2 * r if lora_alpha is None else lora_alpha
    layers = {module_name(parameter): (r, alpha) for parameter in lora_parameters(model.config, presets)}
    _enable(model, layers, saved_parameters(model.config, modules_to_save))


def adapted_layers(model) -> dict[str, tuple[Parameter, Adaptable]]:
    """Layers that have adapters, with the row of their matrix in the parameter table, by canonical name."""
    return {name: pair for name, pair in _adaptable_layers(model).items() if pair[1].lora_enabled}


def merge_adapters(model) -> None:
    """Add adapters to their matrices and remove them; freezing is then as the configuration says.

    Call `compile` after this.
    """
    with quick_deletion():
        for layer in adapted_sublayers(model).values():
            merge(layer)
    model.modules_to_save = ()
    model.trainable = True
    model.apply_freezing()


def save_adapters(model, directory: str | os.PathLike) -> None:
    """Write adapters as PEFT does; its `PeftModel.from_pretrained` and `load_adapters` read them.

    What trains beside the adapters, or was given or loaded as `modules_to_save`, is written with them.

    Raises:
        ValueError: if the model has no adapters, or something trains that PEFT's format has no place for.
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("The model has no adapters to save: call enable_lora first.")
    modules, saved = _saved(model, adapted)
    _refuse_tied(model, [*adapted, *(parameter.name for parameter in saved)])
    ranks = {name: layer.lora_rank for name, (_, layer) in adapted.items()}
    alphas = {name: layer.lora_alpha for name, (_, layer) in adapted.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapted),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": modules or None,
    }
    tensors = {}
    for name, (parameter, layer) in adapted.items():
        for (peft_name, shape), variable in zip(
            _peft_tensors(name, parameter, layer.lora_rank).items(), factors_of(layer), strict=True
        ):
            tensors[peft_name] = _to_write(variable, shape, _layout_of(shape))
    weights = weights_by_name(model)
    for parameter in saved:
        tensors[_PREFIX + parameter.name] = _to_write(
            weights[parameter.name].variable, parameter.shape, KERAS_LAYOUTS[parameter.kind]
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / _WEIGHTS, tensors)
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapters(model, directory: str | os.PathLike, trainable: bool = False) -> None:
    """Give a model the adapters that PEFT or `save_adapters` has written; everything else of it is frozen.

    Args:
        model: a `TFIdeficsForVisionText2Text` without adapters.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: whether the adapters train, and the modules that trained beside them.

    Raises:
        CheckpointError: a ValueError: if a tensor belongs to no layer of the model, is missing or has another shape, or
            the configuration asks for what Keras's LoRA does not do; the message names it.
        FileNotFoundError: if a file is missing.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG)
    try:
        saved = saved_parameters(model.config, config.get("modules_to_save") or ())
    except ValueError as error:
        raise CheckpointError(directory / _CONFIG, str(error)) from error
    with open_checkpoint(directory / _WEIGHTS) as checkpoint:
        whole = {_PREFIX + parameter.name: parameter for parameter in saved} | _vocabulary_in(checkpoint, model.config)
        adapters, expected = {}, {name: parameter.shape for name, parameter in whole.items()}
        for name, (parameter, _) in _adaptable_layers(model).items():
            name_a, _ = _peft_tensors(name, parameter, 0)
            if name_a in checkpoint:
                rank = checkpoint.info(name_a).shape[0]
                adapters[name] = rank, _by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
                expected |= _peft_tensors(name, parameter, rank)
        compare_names_and_shapes(checkpoint.infos, expected).raise_if_bad(checkpoint.path)
        _check_ranks(directory / _CONFIG, config, adapters)
        _enable(model, adapters, saved)
        for name, (parameter, layer) in adapted_layers(model).items():
            peft = _peft_tensors(name, parameter, layer.lora_rank).items()
            for (peft_name, shape), variable in zip(peft, factors_of(layer), strict=True):
                value = _layout_of(shape).apply(checkpoint.read(peft_name).astype("float32"))
                variable.assign(value.reshape(variable.shape))
        weights = weights_by_name(model)
        for peft_name, parameter in whole.items():
            _, variable, layout = weights[parameter.name]
            variable.assign(layout.apply(checkpoint.read(peft_name)).astype(variable.dtype))
    if not trainable:
        train_only(model, ())


def _vocabulary_in(checkpoint: Checkpoint, config) -> dict[str, Parameter]:
    """Matrices of the vocabulary in a file of adapters: PEFT writes them if it adapts them, or if their size is new."""
    found = {}
    for parameter in expand(config):
        if parameter.part in (Part.EMBEDDING, Part.HEAD) and parameter.tied_to is None:
            for name in (parameter.name, f"{module_name(parameter)}.base_layer.weight"):
                if _PREFIX + name in checkpoint:
                    found[_PREFIX + name] = parameter
    return found


def _adaptable_layers(model) -> dict[str, tuple[Parameter, Adaptable]]:
    """The linear layers, embeddings and convolutions of a model, by canonical name."""
    if not model.has_head:
        raise ValueError(f"Adapters are for models with a language head, got a {type(model).__name__}.")
    layers = {id(matrix_of(layer)): layer for layer in sublayers(model) if isinstance(layer, Adaptable)}
    return {
        module_name(weight.parameter): (weight.parameter, layers[id(weight.variable)])
        for weight in weights_by_name(model).values()
        if id(weight.variable) in layers
    }


def _enable(model, adapters: dict[str, tuple[int, float]], saved: Iterable[Parameter]) -> None:
    """Freeze a model but for new adapters, given by the layers' names with rank and alpha, and these parameters."""
    layers = _adaptable_layers(model)
    if adapted_sublayers(model):
        raise ValueError("The model has adapters already: merge_adapters(model) first.")
    if model.is_quantized:
        raise ValueError("A quantized model takes no adapters: enable them, train and merge before quantizing.")
    _refuse_tied(model, [*adapters, *(parameter.name for parameter in saved)])
    weights = weights_by_name(model)
    train = [weights[parameter.name].variable for parameter in saved]
    for name, (rank, alpha) in adapters.items():
        _, layer = layers[name]
        layer.enable_lora(rank, alpha)
        train += factors_of(layer)
    train_only(model, train)
    model.modules_to_save = tuple(dict.fromkeys(module_name(parameter) for parameter in saved))


def _saved(model, adapted: Iterable[str]) -> tuple[list[str], list[Parameter]]:
    """The modules that are written as they are, and their parameters; see `save_adapters`."""
    modules = set(model.modules_to_save)
    trained = {id(variable) for variable in model.trainable_variables}
    for name, weight in weights_by_name(model).items():
        if id(weight.variable) in trained:
            module = module_name(weight.parameter)
            inside = next((layer for layer in adapted if f"{layer}.".startswith(f"{module}.")), None)
            if inside:
                raise ValueError(
                    f"{name} trains, and PEFT's format has no place for it beside the adapters of {inside}: freeze it, "
                    "or call merge_adapters and save_pretrained."
                )
            modules.add(module)
    outermost = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
    return sorted(outermost), saved_parameters(model.config, outermost)


def _refuse_tied(model, names: Iterable[str]) -> None:
    """Refuse what PEFT takes apart: there, adapters and saved modules are of the embedding or of the head, not both."""
    ties = [(parameter.name, parameter.tied_to) for parameter in expand(model.config) if parameter.tied_to]
    tied = {name for pair in ties for name in pair}
    for name in names:
        if f"{name.removesuffix('.weight')}.weight" in tied:
            raise ValueError(
                f"{name}: the head is tied to the embedding in this model, and in PEFT's format each has adapters or "
                "values of its own: leave the vocabulary as it is, or merge_adapters and save_pretrained."
            )


def _peft_tensors(name: str, parameter: Parameter, rank: int) -> dict[str, tuple[int, ...]]:
    """PEFT's names and shapes of the two factors of a layer's adapter, A and B."""
    outputs, *inputs = parameter.shape
    if parameter.kind is Kind.EMBEDDING:  # (V, D): A looks up and B projects
        outputs, inputs = parameter.shape[1], [outputs]
    ending = "lora_embedding_{}" if parameter.kind is Kind.EMBEDDING else "lora_{}.weight"
    ones = (1,) * (len(parameter.shape) - 2)
    return {
        f"{_PREFIX}{name}.{ending.format('A')}": (rank, *inputs),
        f"{_PREFIX}{name}.{ending.format('B')}": (outputs, rank, *ones),
    }


def _layout_of(shape: tuple[int, ...]) -> Layout:
    """How Keras lays out a factor that has this shape in PEFT: as the kernel of a layer of its own."""
    return LINEAR if len(shape) == 2 else KERAS_LAYOUTS[Kind.CONV]


def _to_write(variable: keras.Variable, shape: tuple[int, ...], layout: Layout) -> TensorToWrite:
    def value():
        return np.ascontiguousarray(layout.inverse(variable.numpy().reshape(layout.shape(shape))))

    return TensorToWrite(np.dtype(variable.dtype), shape, value)


def _by_pattern(config: dict, field: str, name: str, default):
    """PEFT's settings of single layers: the keys are regular expressions for the ends of names."""
    patterns = config.get(field) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _check_ranks(path: Path, config: dict, adapters: dict[str, tuple[int, float]]) -> None:
    for name, (rank, _) in adapters.items():
        expected = _by_pattern(config, "rank_pattern", name, config["r"])
        if rank != expected:
            raise CheckpointError(path, f"r is {expected}, but the adapters of {name} have rank {rank}")


def _read_config(path: Path) -> dict:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise CheckpointError(path, f"peft_type must be LORA, got {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(path, f"bias must be none, since Keras adapts kernels alone; got {config['bias']!r}")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        # PiSSA, OLoRA and others change the weights of the base model too
        raise CheckpointError(path, f"init_lora_weights {config['init_lora_weights']!r} changes the base model")
    # PEFT's many variants change what the numbers mean; each is off where its setting is None, False or {}
    active = sorted(key for key, value in config.items() if value and key not in _HARMLESS)
    if active:
        raise CheckpointError(path, f"Keras's LoRA cannot do {', '.join(active)}")
    return config
