"""Gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016): less memory, more time.

A block is recomputed as a pure function of its inputs, its weights, and the seeds of its dropouts, drawn before. So
both runs drop the same elements, in eager execution and in graphs, on one replica or many. `keras.remat` would draw new
masks in the backward pass, and gradients would be silently wrong.

In `idefics_pt` transformers does this.
"""

import keras
import tensorflow as tf

from idefics_tf.layers import Composite


class CheckpointedLayer(Composite):
    """A block that can forget its activations in training, and compute them again for the backward pass.

    Subclasses have `_forward`, whose last argument are seeds for its dropouts. It uses no variables but this layer's
    weights, and no other random numbers. It must cast this layer's own variables: Keras does not when it runs again.
    """

    gradient_checkpointing = False
    num_dropouts = 3

    def __init__(self, dropout: float, **kwargs):
        super().__init__(**kwargs)
        self.dropout = dropout

    def build(self, input_shape=None):
        if self.dropout > 0:
            self.seeds = keras.random.SeedGenerator(name="seeds")
        super().build()

    def run(self, *arguments, training: bool):
        """``self._forward(*arguments, seeds)``, recomputed in the backward pass if checkpointing is on.

        Args:
            arguments: tensors and anything else, in any nesting.
            training: whether this is training. Without it, or without dropout, the seeds are None.
        """
        seeds = [None] * self.num_dropouts
        if training and self.dropout > 0:
            seeds = [tf.cast(self.seeds.next(), "int32") for _ in seeds]
        if training and self.gradient_checkpointing:
            return recompute(self, self._forward, *arguments, seeds)
        return self._forward(*arguments, seeds)


def recompute(layer: keras.layers.Layer, function, *arguments):
    """``function(*arguments)``, of which only arguments and results are kept for the gradient; see `CheckpointedLayer`.

    Gradients flow to the floating-point tensors among the arguments and to the trainable weights of `layer`.
    """
    flat = tf.nest.flatten(arguments)
    places = [i for i, value in enumerate(flat) if tf.is_tensor(value) and value.dtype.is_floating]
    # Variables uncast, so that mixed precision's cast is recomputed too: otherwise a cast copy of all weights would be
    # kept in memory. The public `value` is the cast one.
    trained = [weight for weight in layer.weights if weight.trainable]
    frozen = [(weight, tf.stop_gradient(weight._value)) for weight in layer.weights if not weight.trainable]
    structure = []

    def pure(*tensors):
        inputs, values = tensors[: len(places)], tensors[len(places) :]
        replaced = dict(zip(places, inputs, strict=True))
        mapping = [*frozen, *zip(trained, values, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = function(*tf.nest.pack_sequence_as(arguments, [replaced.get(i, x) for i, x in enumerate(flat)]))
        structure[:] = [outputs]
        return [value for value in tf.nest.flatten(outputs) if value is not None]

    values = [tf.convert_to_tensor(weight._value) for weight in trained]
    tensors = iter(tf.recompute_grad(pure)(*(flat[i] for i in places), *values))
    return tf.nest.map_structure(lambda value: None if value is None else next(tensors), structure[0])
