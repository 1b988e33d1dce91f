"""Keras's `Dense`, `Embedding` and `Conv2D`, with two of their habits changed.

First, adapters survive files. Where a layer has adapters (Keras's own `enable_lora`), Keras writes their product merged
into the matrix, and sets both factors to zero when it reads: from there on neither gets a gradient, and a resumed run
never learns again. Here matrix and factors are written as they are. A layer without adapters that reads such a file
adds the product to its matrix; one with adapters that reads a file without them keeps A, and starts from B = 0.

Second, `trainable = True` is obeyed where the flag is true already; see `Flagged`.

Keras alone has this file; in `idefics_pt` adapters are PEFT's.
"""

import keras
import numpy as np

_FACTORS = {"kernel": ("lora_kernel_a", "lora_kernel_b"), "embeddings": ("lora_embeddings_a", "lora_embeddings_b")}
_ALPHA = "lora_alpha"


class Flagged(keras.layers.Layer):
    """A layer whose flag `trainable` always reaches what is inside.

    TensorFlow skips an assignment of the value that an attribute has already. A layer of which a part is frozen is
    itself trainable, and ``layer.trainable = True`` would leave that part frozen without a word.
    """

    def __setattr__(self, name, value):
        if name == "trainable":
            keras.layers.Layer.trainable.fset(self, value)
        else:
            super().__setattr__(name, value)


class Adaptable(Flagged):
    """A layer with one matrix that adapters are for."""

    _refusal = None

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "trainable" and self.lora_enabled:
            matrix_of(self).trainable = False  # or the adapters would be of a matrix that no one else has

    def quantize(self, mode=None, type_check=True, config=None):
        """See `keras.layers.Layer.quantize`. Subclasses are allowed, for this one computes what its base does."""
        super().quantize(mode, type_check=False, config=config)

    def save_own_variables(self, store):
        """Write the layer's variables, and its adapters beside them."""
        if not self.lora_enabled:
            super().save_own_variables(store)
            return
        self.lora_enabled = False  # so that Keras merges nothing
        try:
            super().save_own_variables(store)
        finally:
            self.lora_enabled = True
        for variable in factors_of(self):
            store[variable.name] = variable
        store[_ALPHA] = np.float64(self.lora_alpha)

    def load_own_variables(self, store):
        """Read the layer's variables, with adapters or without.

        Raises:
            ValueError: if the adapters in the file have another rank or `lora_alpha` than the layer's, or the layer has
                none and is quantized, so that they cannot be added to its matrix.
        """
        if self._refusal and not list(store.keys()):
            raise ValueError(self._refusal)  # Keras has tried again by another path, and reports the last error
        names, keys = _FACTORS["kernel"] + _FACTORS["embeddings"], list(store.keys())
        in_file = [np.asarray(store[name]) for name in names if name in keys]
        alpha = float(np.asarray(store[_ALPHA])) if in_file else None
        self._refusal = self._objection(*in_file, alpha) if in_file else None
        if self._refusal:
            raise ValueError(self._refusal)
        kept = [variable.numpy() for variable in factors_of(self)] if self.lora_enabled else None
        super().load_own_variables({key: store[key] for key in keys if key not in (*names, _ALPHA)})
        if self.lora_enabled:
            a, b = factors_of(self)
            a.assign(in_file[0] if in_file else kept[0])
            if in_file:
                b.assign(in_file[1])
        elif in_file:
            _add_product(self, *in_file, alpha)

    def _objection(self, a, b, alpha) -> str | None:
        """Why adapters of a file are none for this layer; None if they are."""
        if self.lora_enabled:
            found = [a.shape, b.shape, alpha]
            expected = [*(tuple(variable.shape) for variable in factors_of(self)), float(self.lora_alpha)]
            if found != expected:
                return (
                    f"{self.path}: expected adapters of shapes {expected[0]} and {expected[1]} with lora_alpha "
                    f"{expected[2]:g}, the file has {a.shape} and {b.shape} with {alpha:g}: enable them as they were "
                    "when it was saved."
                )
        elif self.quantization_mode is not None:
            return (
                f"{self.path}: the file has adapters, and this layer is quantized and has none to take them: call "
                "enable_lora as before saving."
            )
        return None


class Dense(Adaptable, keras.layers.Dense):
    """`keras.layers.Dense`; see `Adaptable`."""


class Embedding(Adaptable, keras.layers.Embedding):
    """`keras.layers.Embedding`; see `Adaptable`."""


class Conv2D(Adaptable, keras.layers.Conv2D):
    """`keras.layers.Conv2D`; see `Adaptable`."""


def matrix_of(layer: Adaptable) -> keras.Variable:
    """The variable that adapters are added to; `kernel` and `embeddings` are sums where there are adapters."""
    return next(variable for variable in layer.weights if variable.name in _FACTORS)


def factors_of(layer: Adaptable) -> tuple[keras.Variable, keras.Variable]:
    """The variables A and B of a layer that has adapters; ``lora_alpha / lora_rank`` times A B is added."""
    return tuple(getattr(layer, name) for name in _FACTORS[matrix_of(layer).name])


def merge(layer: Adaptable) -> None:
    """Add the adapters of a layer to its matrix, and remove them. Keras quantizes a quantized matrix anew."""
    matrix = matrix_of(layer)
    merged = {}
    if layer.quantization_mode is not None:
        super(Adaptable, layer).save_own_variables(merged)
    else:
        # not Keras's own sum, which is in the precision of the computation
        _add_product(layer, *(variable.numpy() for variable in factors_of(layer)), layer.lora_alpha)
    for name in _FACTORS[matrix.name]:
        delattr(layer, name)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
    if merged:
        layer.load_own_variables(merged)


def _add_product(layer, a, b, alpha):
    matrix = matrix_of(layer)
    product = np.asarray(a, "float32") @ np.asarray(b, "float32")
    matrix.assign(np.asarray(matrix.numpy(), "float32") + alpha / a.shape[-1] * product)
