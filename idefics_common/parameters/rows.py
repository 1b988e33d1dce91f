"""What a row of the parameter table is: one tensor's names in every namespace, its kind, and when it exists.

The canonical name is the key in the published checkpoints, spelling mistakes included (`pre_layrnorm`), and the
canonical layout is PyTorch's: linear kernels are (out, in), convolution kernels (out, in, height, width). Keras's
layouts are in `idefics_common.parameters.layouts`.

Keras has two namespaces. `Variable.path` follows the layers' ``name=`` arguments. Paths inside a ``.weights.h5`` file
follow attribute names, class names and order of creation: the layers of a list are numbered by class, and what a Keras
`Model` holds under an attribute that sorts after ``layers`` is filed under ``layers/<class>``, because Keras walks
attributes in alphabetical order and a `Model` has that property.

A third namespace is that of ``tf_model.h5``, which transformers 4 wrote from TensorFlow (4.57.6 was the last): layouts
are Keras's but for the base matrix of the language head, which is stored as in PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a tensor is: this decides how another framework lays it out and how training treats it."""

    LINEAR = "linear kernel"
    CONV = "convolution kernel"
    BIAS = "bias"
    EMBEDDING = "embedding"
    LAYER_NORM = "layer norm"
    RMS_NORM = "RMS norm"
    RAW = "raw"


class Part(StrEnum):
    """Which part of the model a tensor belongs to; the unit in which parameters are counted and frozen."""

    EMBEDDING = "text embedding"
    VISION = "vision tower"
    RESAMPLER = "resampler"
    DECODER = "decoder"
    CROSS_ATTENTION = "gated cross-attention"
    HEAD = "language head"


@dataclass(frozen=True)
class Row:
    """One row of the table: a template of names and how it expands.

    Attributes:
        template: canonical name with ``{i}`` for the block it is repeated over.
        keras, h5: templates of `Parameter.keras_path` and `Parameter.h5_path`; in the latter ``{nth}`` stands for the
            number of the block as Keras appends it to a class: nothing, ``_1``, ``_2``, ...
        legacy: template of `Parameter.legacy_name`.
        shape: names of axes, looked up in `expansion.dimensions`, or numbers.
        exists: whether a configuration has this tensor.
        tied_to: template of the tensor it is tied to when `tie_word_embeddings` is set.
    """

    template: str
    keras: str
    h5: str
    legacy: str
    kind: Kind
    shape: tuple[str | int, ...]
    part: Part
    exists: Callable[[object], bool]
    tied_to: str | None = None


@dataclass(frozen=True)
class Module:
    """Where a module stands in each namespace, as templates: published checkpoints, Keras names, h5, transformers 4."""

    name: str
    keras: str
    h5: str
    legacy: str

    def child(self, name: str, keras: str | None = None, h5: str | None = None, legacy_joint: str = "/") -> "Module":
        """A module inside this one; the names of the other namespaces are the same unless given."""
        return Module(
            f"{self.name}.{name}",
            f"{self.keras}/{keras or name}",
            f"{self.h5}/{h5 or name}",
            f"{self.legacy}{legacy_joint}{name}",
        )

    def row(
        self, leaf, keras_leaf, h5_index, kind, shape, part, exists, keras_child="", tied_to=None, legacy_leaf=None
    ) -> Row:
        """The row of a tensor of this module.

        Args:
            leaf: its name in published checkpoints. keras_leaf: its name in Keras.
            h5_index: how many variables Keras makes before it in the layer that holds it.
            keras_child: the layer that holds it in Keras, if that is one inside this module.
            legacy_leaf: its name in transformers 4, if that is not its name in Keras.
        """
        inside = f"/{keras_child}" if keras_child else ""
        keras, h5 = f"{self.keras}{inside}/{keras_leaf}", f"{self.h5}{inside}/vars/{h5_index}"
        legacy = f"{self.legacy}/{legacy_leaf or keras_leaf}:0"
        return Row(f"{self.name}.{leaf}", keras, h5, legacy, kind, shape, part, exists, tied_to)


@dataclass(frozen=True)
class Section:
    """Consecutive rows that repeat together, in the order of the module they describe."""

    rows: tuple[Row, ...]
    repeats: Callable[[object], int]
