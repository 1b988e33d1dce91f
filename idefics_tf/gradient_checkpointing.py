"""Gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016): less memory, more time.

A block is recomputed as a pure function of its inputs, its weights, and the seeds of its dropouts, drawn before. So
both runs drop the same elements, in eager execution and in graphs, on one replica or many. `keras.remat` would draw new
masks in the backward pass, and gradients would be silently wrong.

In `idefics_pt` transformers does this.
"""

import keras
import tensorflow as tf


class CheckpointedLayer(keras.layers.Layer):
    """A block that can forget its activations in training, and compute them again for the backward pass."""

    gradient_checkpointing = False

    def run(self, function, *arguments, training: bool):
        """``function(*arguments)``, recomputed in the backward pass if checkpointing is on and this is training.

        Args:
            function: uses no variables but this layer's weights, and no random numbers but from seeds among its
                arguments. It must cast this layer's own variables: Keras does not when the function runs again.
            arguments: tensors and anything else, in any nesting.
        """
        if training and self.gradient_checkpointing:
            return recompute(self, function, *arguments)
        return function(*arguments)


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
