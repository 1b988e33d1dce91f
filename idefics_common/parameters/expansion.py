"""The tensors of one model: the parameter table, expanded from a configuration.

Everything that is known of a tensor comes from here: its names and layouts, its shape, what it is tied to, which part
of the model it belongs to.

`config` is `IdeficsFields` or an `IdeficsConfig`; this module needs no transformers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from idefics_common.parameters.rows import Kind, Part
from idefics_common.parameters.table import TABLE, num_cross_layers


@dataclass(frozen=True)
class Parameter:
    """One tensor of one model.

    Attributes:
        name: canonical name, the key in a published checkpoint.
        shape: in PyTorch's layout.
        kind, part: see `Kind` and `Part`.
        keras_path: `Variable.path` in Keras, below the name of the model.
        h5_path: path of the dataset in a Keras ``.weights.h5`` file.
        legacy_name: name in a ``tf_model.h5`` of transformers 4, below the name of the model.
        tied_to: the canonical name of the tensor that this one is the same as, or None. A tied tensor need not be in
            a file, and in Keras there is none.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    part: Part
    keras_path: str
    h5_path: str
    legacy_name: str
    tied_to: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def dimensions(config) -> dict[str, int]:
    """The sizes of all axes that shapes are written in."""
    vision, perceiver = config.vision_config, config.perceiver_config
    return {
        "V": int(config.vocab_size),
        "additional V": config.additional_vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "text K": config.hidden_size // config.num_attention_heads,
        "E": vision.embed_dim,
        "vision F": vision.intermediate_size,
        "C": vision.num_channels,
        "patch": vision.patch_size,
        "P": (vision.image_size // vision.patch_size) ** 2 + 1,
        "L": perceiver.resampler_n_latents,
        "perceiver H*K": perceiver.resampler_n_heads * perceiver.resampler_head_dim,
        "perceiver K": perceiver.resampler_head_dim,
        "perceiver F": 4 * vision.embed_dim,
    }


def expand(config) -> tuple[Parameter, ...]:
    """Every tensor of the model that `config` describes, tied ones included, in the order of its modules."""
    sizes = dimensions(config)
    return tuple(
        Parameter(
            name=row.template.format(i=i),
            shape=tuple(sizes[axis] if isinstance(axis, str) else axis for axis in row.shape),
            kind=row.kind,
            part=row.part,
            keras_path=row.keras.format(i=i),
            h5_path=row.h5.format(nth=f"_{i}" if i else ""),
            legacy_name=row.legacy.format(i=i),
            tied_to=row.tied_to if config.tie_word_embeddings else None,
        )
        for section in TABLE
        for i in range(section.repeats(config))
        for row in section.rows
        if row.exists(config)
    )


def count_parameters(parameters: Iterable[Parameter]) -> dict[Part, int]:
    """Number of elements per part, each tied tensor counted once, where it is defined."""
    counts = dict.fromkeys(Part, 0)
    for parameter in parameters:
        if parameter.tied_to is None:
            counts[parameter.part] += parameter.size
    return counts


def stale_buffer_names(config) -> frozenset[str]:
    """Names that older checkpoints carry and that are no parameters: rotary frequencies and position indices.

    They are recomputed from the configuration, so a reader drops them, by these exact names and no others.
    """
    names = {"model.vision_model.embeddings.position_ids"}
    names.update(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_hidden_layers))
    names.update(
        f"model.gated_cross_attn_layers.{i}.cross_attn.rotary_emb.inv_freq" for i in range(num_cross_layers(config))
    )
    return frozenset(names)
