"""LoRA (Hu et al., 2021) on Keras's own `Dense.enable_lora`, by the presets of `idefics_common.parameters.lora`.

Adapters are read and written in PEFT's format, ``adapter_config.json`` and ``adapter_model.safetensors``, so those
trained by `idefics_pt` or PEFT work here, and the other way round; neither torch nor PEFT is needed. Keras has no
dropout on adapters: `lora_dropout` of a configuration is not applied.

Mirrors `idefics_pt/lora.py`, which leaves the work to PEFT.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

from idefics_common.checkpoint import CheckpointError, compare_names_and_shapes, open_checkpoint
from idefics_common.checkpoint.safetensors_writer import TensorToWrite, write_safetensors
from idefics_common.parameters import Kind, Parameter, Part
from idefics_common.parameters.lora import PRESETS, lora_parameters, lora_targets, module_name
from idefics_tf.freezing import set_trainable
from idefics_tf.quantization import linear_layers, quick_deletion
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
# PEFT's settings that do not change what a model computes, and those that are read here
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type", "layers_pattern",
    "layers_to_transform", "lora_alpha", "r", "bias", "runtime_config",
}  # fmt: skip


def enable_lora(model, presets: str | Iterable[str], r: int = 16, lora_alpha: float | None = None) -> None:
    """Freeze a model, and give linear layers adapters that train. Call `compile` after this.

    Args:
        model: a `TFIdeficsForVisionText2Text`.
        presets: see `idefics_common.parameters.lora.lora_targets`.
        r: rank of the adapters.
        lora_alpha: their output is scaled by ``lora_alpha / r``; twice the rank unless given.

    Raises:
        ValueError: as `lora_targets`; or if the model has adapters, or no language head.
    """
    alpha = 2 * r if lora_alpha is None else lora_alpha
    _enable(model, {module_name(parameter): r for parameter in lora_parameters(model.config, presets)}, alpha)


def adapted_layers(model) -> dict[str, tuple[Parameter, keras.layers.Dense]]:
    """Layers that have adapters, with the row of their kernel in the parameter table, by canonical name."""
    return {name: pair for name, pair in _linear_layers(model).items() if pair[1].lora_enabled}


def merge_adapters(model) -> None:
    """Add adapters to their kernels and remove them; freezing is then as the configuration says.

    Call `compile` after this.
    """
    with quick_deletion():
        for _, layer in adapted_layers(model).values():
            # not `Dense.kernel`, which is a sum in the precision of the computation where there are adapters
            kernel = next(variable for variable in layer.weights if variable.name == "kernel")
            added = layer.lora_kernel_a.numpy() @ layer.lora_kernel_b.numpy()
            kernel.assign(np.asarray(kernel.numpy(), "float32") + layer.lora_alpha / layer.lora_rank * added)
            del layer.lora_kernel_a, layer.lora_kernel_b
            layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
    set_trainable(model, True)
    model.apply_freezing()


def save_adapters(model, directory: str | os.PathLike) -> None:
    """Write adapters as PEFT does; its `PeftModel.from_pretrained` and `load_adapters` read them.

    Raises:
        ValueError: if the model has no adapters.
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("The model has no adapters to save: call enable_lora first.")
    layer = next(iter(adapted.values()))[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": layer.lora_rank,
        "lora_alpha": layer.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapted),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (_, layer) in adapted.items():
        for peft_name, variable in _adapters_of(name, layer).items():
            shape = tuple(reversed(variable.shape))
            tensors[peft_name] = TensorToWrite(
                np.dtype(variable.dtype), shape, lambda variable=variable: np.ascontiguousarray(variable.numpy().T)
            )
    write_safetensors(directory / _WEIGHTS, tensors)
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapters(model, directory: str | os.PathLike, trainable: bool = False) -> None:
    """Give a model the adapters that PEFT or `save_adapters` has written; everything else of it is frozen.

    Args:
        model: a `TFIdeficsForVisionText2Text` without adapters.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: whether the adapters train.

    Raises:
        CheckpointError: a ValueError: if a tensor belongs to no linear layer of the model, is missing or has another
            shape, or the configuration asks for what Keras's LoRA does not do; the message names it.
        FileNotFoundError: if a file is missing.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG)
    with open_checkpoint(directory / _WEIGHTS) as checkpoint:
        ranks, expected = {}, {}
        for name, (parameter, _) in _linear_layers(model).items():
            name_a, name_b = _peft_names(name)
            if name_a in checkpoint:
                outputs, inputs = parameter.shape
                ranks[name] = rank = checkpoint.info(name_a).shape[0]
                expected |= {name_a: (rank, inputs), name_b: (outputs, rank)}
        compare_names_and_shapes(checkpoint.infos, expected).raise_if_bad(checkpoint.path)
        if set(ranks.values()) != {config["r"]}:
            problem = f"r is {config['r']}, but the adapters have ranks {sorted(set(ranks.values()))}"
            raise CheckpointError(directory / _CONFIG, problem)
        _enable(model, ranks, config["lora_alpha"])
        for name, (_, layer) in adapted_layers(model).items():
            for peft_name, variable in _adapters_of(name, layer).items():
                variable.assign(checkpoint.read(peft_name).astype("float32").T)
                variable.trainable = trainable


def _linear_layers(model) -> dict[str, tuple[Parameter, keras.layers.Dense]]:
    """The linear layers inside a model, the language head aside, by canonical name."""
    if not model.has_head:
        raise ValueError(f"Adapters are for models with a language head, got a {type(model).__name__}.")
    layers = {id(variable): layer for layer in linear_layers(model) for variable in layer.weights}
    return {
        module_name(weight.parameter): (weight.parameter, layers[id(weight.variable)])
        for weight in weights_by_name(model).values()
        if weight.parameter.kind is Kind.LINEAR and weight.parameter.part is not Part.HEAD
    }


def _enable(model, ranks: dict[str, int], lora_alpha: float) -> None:
    layers = _linear_layers(model)
    if any(layer.lora_enabled for _, layer in layers.values()):
        raise ValueError("The model has adapters already: merge_adapters(model) first.")
    if model.is_quantized:
        raise ValueError("A quantized model takes no adapters: enable them, train and merge before quantizing.")
    set_trainable(model, False)
    for name, rank in ranks.items():
        _, layer = layers[name]
        layer.enable_lora(rank, lora_alpha)


def _adapters_of(name: str, layer: keras.layers.Dense) -> dict[str, keras.Variable]:
    """Variables of a layer's adapter by PEFT's names; PEFT has them transposed."""
    return dict(zip(_peft_names(name), (layer.lora_kernel_a, layer.lora_kernel_b), strict=True))


def _peft_names(name: str) -> tuple[str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


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
