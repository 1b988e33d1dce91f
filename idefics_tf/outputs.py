"""What the models return. The documented fields come first and in the documented order, so that tuples agree too.

An output is a named tuple of the fields that are there; a field that is not there reads as None. Keras's training loops
and `tf.function` take named tuples apart and put them together again, which they cannot do with transformers'
`ModelOutput`; and `predict` cannot join a None over batches.

Mirrors `idefics_pt/outputs.py`. Axes: see `idefics_common`.
"""

import functools
from collections import namedtuple


class Output:
    """Base of the outputs: fields by attribute, by name in brackets, or by number; None for what is not there."""

    __slots__ = ()
    documented: tuple[str, ...] = ()

    @classmethod
    def of(cls, **fields):
        """An output of those fields that are not None."""
        unknown = [name for name in fields if name not in cls.documented]
        assert not unknown, f"{cls.__name__} has no fields {unknown}"
        names = tuple(name for name in cls.documented if fields.get(name) is not None)
        return _with_fields(cls, names)(*(fields[name] for name in names))

    def __getattr__(self, name):
        if name in type(self).documented:
            return
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self.documented)}.")

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)

    def keys(self):
        """Names of the fields that are there."""
        return self._fields

    def to_tuple(self) -> tuple:
        """The fields that are there, as a plain tuple."""
        return tuple(self)


@functools.cache
def _with_fields(cls, names):
    return type(cls.__name__, (cls, namedtuple(cls.__name__, names)), {"__slots__": ()})


_DECODER_FIELDS = (
    "past_key_values",
    "hidden_states",
    "attentions",
    "image_hidden_states",
    "cross_attentions",
    "cross_attention_gates",
    "vision_attentions",
    "perceiver_attentions",
)


class TFIdeficsModelOutput(Output):
    """Output of `TFIdeficsModel`: the fields of `idefics_pt.outputs.IdeficsModelOutput`, documented there.

    `past_key_values` is an `idefics_tf.cache.TFIdeficsCache` with the positions and images of this call.
    """

    __slots__ = ()
    documented = ("last_hidden_state", *_DECODER_FIELDS)


class TFIdeficsCausalLMOutput(Output):
    """Output of `TFIdeficsForVisionText2Text`: fields as of `TFIdeficsModelOutput`, and `loss` and `logits`.

    The loss is a scalar, and only there with labels; logits are (B, T, V).
    """

    __slots__ = ()
    documented = ("loss", "logits", *_DECODER_FIELDS)


class TFVisionOutput(Output):
    """Output of the vision tower; see `idefics_tf.vision.VisionTransformer`."""

    __slots__ = ()
    documented = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")


class TFIdeficsGenerateOutput(Output):
    """Output of `generate` with `return_dict_in_generate`; R rows while searching, V tokens.

    Attributes:
        sequences: ids (B * num_return_sequences, length).
        sequences_scores: of beam search, with `output_scores`: the final score of each sequence, float32.
        scores: with `output_scores`: for each step what tokens were chosen by, (R, V) float32: processed logits, in
            beam search log probabilities. Within a `tf.function` one tensor (steps, R, V).
        logits: with `output_logits`: the same before processing.
        beam_indices: of beam search: the row that each new token was added to, then -1.
        past_key_values: not of beam search: a cache for the next call. The last token is not in it.
    """

    __slots__ = ()
    documented = ("sequences", "sequences_scores", "scores", "logits", "beam_indices", "past_key_values")
