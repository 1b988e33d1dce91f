"""The fields of an IDEFICS configuration, their defaults, and the rules that make one possible.

Plain dataclasses, free of transformers, so that the parameter table, the converter and a Keras process can read a
``config.json`` without importing torch. `configuration.config` puts the same fields on `PreTrainedConfig`. One function
checks both, so that a configuration is refused for the same reason, in the same words, wherever it is read or built.

Defaults are those of transformers 5.23. They matter: the published ``config.json`` files leave them out.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ALPHA_TYPES = ("float", "vector")
CONSTANT_ALPHA_INITIALIZERS = ("zeros", "ones")
RANDOM_ALPHA_INITIALIZERS = ("normal", "gaussian", "random")
"""Three names of one distribution: normal around 0 with `alphas_initializer_range`."""
ALPHA_INITIALIZERS = (*CONSTANT_ALPHA_INITIALIZERS, *RANDOM_ALPHA_INITIALIZERS)
"""How gates start."""

ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
"""Values of `hidden_act`: what both rooms can compute, all of transformers' that have no weights. "gelu" is the exact
one, with the error function."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""Kinds of rotary embeddings, by transformers' names. Keras has those whose frequencies are constants: default, linear
and llama3; it refuses the others itself."""

MODULE_EXCEPTIONS = ("LayerNorm", "RMSNorm", "Linear", "Embedding")
"""Kinds of module that can stay trainable in a frozen part; what each means is in the `freezing` module of each room.
"LayerNorm" means every norm, the text's RMS norms too."""


@dataclass(kw_only=True)
class VisionFields:
    """The CLIP ViT that encodes one image. `image_size` and `patch_size` are pixels along one side of a square."""

    embed_dim: int = 768
    image_size: int | list[int] | tuple[int, int] = 224
    intermediate_size: int = 5120
    patch_size: int | list[int] | tuple[int, int] = 14
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0


@dataclass(kw_only=True)
class PerceiverFields:
    """The Perceiver resampler. Whether there is one is said by `use_resampler` of the model; this copy follows it."""

    use_resampler: bool = False
    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = False


@dataclass(kw_only=True)
class IdeficsFields:
    """The LLaMA decoder, its gated cross-attention blocks, and the configurations of the two image modules."""

    vocab_size: int = 32000
    additional_vocab_size: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    dropout: float | int = 0.0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    alpha_initializer: str = "zeros"
    alphas_initializer_range: float = 0.0
    alpha_type: str = "float"
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    cross_layer_interval: int = 1
    qk_layer_norms: bool = False
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: list | tuple = ()
    freeze_lm_head: bool = False
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: list | tuple = ()
    use_resampler: bool | None = None
    vision_config: Any = None
    max_position_embeddings: int = 2048
    perceiver_config: Any = None
    rope_parameters: dict | None = None


def settle_vision_fields(config) -> None:
    """Turn pairs ``[size, size]`` into the one number that they mean, in place."""
    for field in ("image_size", "patch_size"):
        value = getattr(config, field)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            setattr(config, field, value[0])


def settle_fields(config) -> None:
    """Make `use_resampler` of the model and of its perceiver agree, in place.

    The model's own flag decides where it is given. Where it is not, the perceiver's flag does: a user who writes
    ``perceiver_config={"use_resampler": True}`` asks for a resampler. (Published files say true for the model and
    false for the perceiver, so the two cannot simply be required to agree.)

    Args:
        config: anything with the attributes of `IdeficsFields`.
    """
    if config.use_resampler is None:
        config.use_resampler = bool(config.perceiver_config.use_resampler)
    config.perceiver_config.use_resampler = config.use_resampler


def check_fields(config) -> None:
    """Refuse a configuration that no model can have. Asked when a model is built and when a file is read, not before:
    tools make configurations of a few fields and set the others later.

    Args:
        config: anything with the attributes of `IdeficsFields`, its parts among them.

    Raises:
        ValueError: naming the fields, what they must satisfy, and their values.
    """
    _check_vision(config.vision_config)
    if config.use_resampler:
        _check_positive(config.perceiver_config, "perceiver_config.", *_sizes(PerceiverFields))
    _check_positive(config, "", *(name for name in _sizes(IdeficsFields) if name != "additional_vocab_size"))
    if config.additional_vocab_size < 0:
        raise ValueError(f"additional_vocab_size must be 0 or more, got {config.additional_vocab_size}.")
    _check_divides(config, "", "hidden_size", "num_attention_heads")
    head_width = config.hidden_size // config.num_attention_heads
    if head_width > 1 and head_width % 2:
        raise ValueError(
            "hidden_size / num_attention_heads must be even, because rotary position embeddings turn pairs of "
            f"features; got {config.hidden_size} / {config.num_attention_heads}."
        )
    _check_divides(config, "", "num_hidden_layers", "cross_layer_interval")
    _check_probability(config, "", "dropout")
    pad, rows = config.pad_token_id, config.vocab_size
    if pad is not None and not (isinstance(pad, int) and -rows <= pad < rows):
        raise ValueError(
            f"pad_token_id must be None or from 0 to vocab_size - 1 = {rows - 1}, or as far below 0, counted from the "
            f"end, got {pad!r}: it is a row of the base vocabulary."
        )
    _check_choice(config, "", "hidden_act", ACTIVATIONS)
    _check_choice(config, "", "alpha_type", ALPHA_TYPES)
    _check_choice(config, "", "alpha_initializer", ALPHA_INITIALIZERS)
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_parameters: rope_type must be one of {', '.join(ROPE_TYPES)}; got {rope_type!r}.")
    for field in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):
        check_module_exceptions(getattr(config, field), field)


def _check_vision(config) -> None:
    for field in ("image_size", "patch_size"):
        value = getattr(config, field)
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"vision_config.{field} must be one number or two equal ones, got {list(value)}: the position "
                "embeddings of IDEFICS lie on a square grid."
            )
    _check_positive(config, "vision_config.", *_sizes(VisionFields), "image_size", "patch_size")
    if config.image_size < config.patch_size:
        raise ValueError(
            "vision_config.image_size must be at least vision_config.patch_size, "
            f"got {config.image_size} and {config.patch_size}."
        )
    _check_choice(config, "vision_config.", "hidden_act", ACTIVATIONS)
    _check_divides(config, "vision_config.", "embed_dim", "num_attention_heads")
    _check_probability(config, "vision_config.", "attention_dropout")


def check_module_exceptions(names: Sequence[str], argument: str) -> None:
    """Raise `ValueError` for names that are not in `MODULE_EXCEPTIONS`; `argument` is what the error calls them."""
    unknown = [name for name in names if name not in MODULE_EXCEPTIONS]
    if unknown:
        raise ValueError(f"{argument} must be names out of {', '.join(MODULE_EXCEPTIONS)}; got {unknown}.")


def fields_from_dict(values: dict, source: str = "the configuration") -> IdeficsFields:
    """Build and check plain fields from the content of a ``config.json``; keys that are no fields are left aside.

    Args:
        values: the decoded JSON object. `vision_config` and `perceiver_config` are objects too, or absent.
        source: what to call it in an error, for example the path of the file.

    Raises:
        ValueError: if the values are no IDEFICS configuration or an impossible one.
    """
    model_type = values.get("model_type", "idefics")
    if model_type != "idefics":
        raise ValueError(f"{source}: expected model_type 'idefics', got {model_type!r}.")
    try:
        config = _pick(IdeficsFields, values)
        config.vision_config = _pick(VisionFields, values.get("vision_config") or {})
        config.perceiver_config = _pick(PerceiverFields, values.get("perceiver_config") or {})
        if config.rope_parameters is None:
            config.rope_parameters = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", 10000.0))}
        settle_vision_fields(config.vision_config)
        settle_fields(config)
        check_fields(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def read_config(path: str | os.PathLike) -> IdeficsFields:
    """Read a ``config.json``, or the one inside a directory, into plain fields.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, not of IDEFICS, or impossible; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: is missing; names and shapes of the tensors are checked against it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return fields_from_dict(values, source=str(path))


def _pick(cls, values: dict):
    if not isinstance(values, dict):
        raise TypeError(f"expected an object of fields, got {type(values).__name__}.")
    known = {field.name for field in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in known})


def _sizes(cls) -> list[str]:
    """The fields that hold a whole number and nothing else."""
    return [field.name for field in fields(cls) if field.type is int]


def _check_positive(config, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{prefix}{name} must be a positive integer, got {value!r}.")


def _check_divides(config, prefix: str, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{prefix}{whole} must be a multiple of {prefix}{part}, "
            f"got {getattr(config, whole)} and {getattr(config, part)}."
        )


def _check_probability(config, prefix: str, name: str) -> None:
    if not 0 <= getattr(config, name) <= 1:
        raise ValueError(f"{prefix}{name} must be from 0 to 1, got {getattr(config, name)}.")


def _check_choice(config, prefix: str, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{prefix}{name} must be one of {', '.join(choices)}; got {getattr(config, name)!r}.")
