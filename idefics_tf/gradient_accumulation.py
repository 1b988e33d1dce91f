"""Gradient accumulation on several replicas, which Keras 3.15 has for one device alone (keras-team/keras#20582).

Keras decides in each replica whether a step updates the weights, and adds gradients up inside that condition, where
TensorFlow lets no replicas meet. Here they meet in every step, and each device decides for its own copy of a variable.
So what is accumulated, clipped and applied is the gradient of all replicas, as on one device.

In `idefics_pt` the training loop does this.
"""

import functools

import keras
import tensorflow as tf


def accumulate_on_replicas(optimizer: keras.optimizers.Optimizer) -> None:
    """Make an optimizer with `gradient_accumulation_steps` work on several replicas."""
    # Keras says of this method that backends may override it; there is no public one between counting and applying
    optimizer._backend_apply_gradients = functools.partial(_apply, optimizer)


def check_accumulation(optimizer) -> bool:
    """Whether an optimizer, or the name of one, accumulates gradients.

    Raises:
        ValueError: if it does so in a way that several replicas cannot.
    """
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    steps = steps_of(optimizer)
    if steps and (scaled or optimizer.use_ema):
        why = "a LossScaleOptimizer" if scaled else "use_ema=True"
        raise ValueError(
            f"gradient_accumulation_steps={steps} does not work with {why} on several replicas: "
            "leave out one of them, or train on one device."
        )
    return bool(steps)


def steps_of(optimizer) -> int | None:
    """The `gradient_accumulation_steps` of an optimizer, or of the one inside a `LossScaleOptimizer`; None if none."""
    both = optimizer, getattr(optimizer, "inner_optimizer", None)
    return next((o.gradient_accumulation_steps for o in both if getattr(o, "gradient_accumulation_steps", None)), None)


def _apply(optimizer, grads, variables) -> None:
    """`optimizer._backend_apply_gradients` within a replica: accumulate these gradients, or update with their mean."""
    context, steps = tf.distribute.get_replica_context(), optimizer.gradient_accumulation_steps
    is_update = (optimizer._iterations + 1) % steps == 0
    stores = [optimizer._accumulated_gradients[optimizer._get_variable_index(variable)].value for variable in variables]
    grads = context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.convert_to_tensor(grad) for grad in grads])
    totals = [grad + store for grad, store in zip(grads, stores, strict=True)]
    means = optimizer._clip_gradients([total / steps for total in totals])
    variables = [variable.value for variable in variables]

    def on_all_devices(strategy, totals, means, is_update, learning_rate):
        for variable, store, total, mean in zip(variables, stores, totals, means, strict=True):
            arguments = (store, total, mean, is_update, learning_rate)
            strategy.extended.update(variable, on_one_device, args=arguments, group=False)

    def on_one_device(variable, store, total, mean, is_update, learning_rate):
        def update():
            if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
                variable.assign_sub(variable * tf.cast(optimizer.weight_decay * learning_rate, variable.dtype))
            optimizer.update_step(mean, variable, learning_rate)
            store.assign(tf.zeros_like(store))

        def accumulate():
            store.assign(total)

        tf.cond(is_update, update, accumulate)

    context.merge_call(on_all_devices, args=(totals, means, is_update, optimizer.learning_rate))
