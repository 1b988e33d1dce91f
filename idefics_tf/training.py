"""The built-in loss, and how Keras's `fit`, `evaluate` and `predict` use it.

Unusual: `compile(optimizer)` needs no loss. Labels go in with the other inputs, or as targets, and the model computes
its loss from them; metrics passed to `compile` see the predicted positions alone, (N,) labels and (N, V) logits.
Several replicas report and train as one device would, also where they hold different numbers of rows and labels.

Keras alone has this file; PyTorch users bring their own loop or transformers' `Trainer`.
"""

import inspect
import warnings
from collections.abc import Mapping

import keras
import tensorflow as tf
from keras import ops

from idefics_common.calls.text import check_label_range, check_label_shape
from idefics_tf.gradient_accumulation import accumulate_on_replicas, check_accumulation, steps_of
from idefics_tf.inputs import as_tensors

IGNORE_INDEX = -100


def check_labels(labels, logits_BTV):
    """Refuse labels that are not one for each position, or, in eager execution, beyond the vocabulary.

    Raises:
        ValueError: naming what was expected.
    """
    check_label_shape(labels.shape, logits_BTV.shape)
    if tf.executing_eagerly():
        counted = tf.boolean_mask(labels, ops.not_equal(labels, IGNORE_INDEX))
        if len(counted):
            check_label_range(int(ops.min(counted)), int(ops.max(counted)), logits_BTV.shape[-1])


def causal_lm_loss(logits_BTV, labels_BT, sample_weight=None):
    """Cross entropy of the next token.

    Args:
        logits_BTV: logits, over the whole vocabulary, the additional one included.
        labels_BT: ids, -100 where a token is not to be predicted; not shifted. Any integer dtype.
        sample_weight: (B,) or (B, T), what the loss of each label is multiplied by. As with Keras's own losses, the
            mean stays one over the number of labels, whatever the sum of the weights.

    Returns:
        scalar float32, the mean over labels that are not -100, the first of each row aside; 0 if there are none.

    Raises:
        ValueError: for weights of another shape.
    """
    targets, is_counted = _targets(labels_BT)
    logits = ops.cast(logits_BTV[:, :-1], "float32")
    losses = ops.sparse_categorical_crossentropy(ops.where(is_counted, targets, 0), logits, from_logits=True)
    if sample_weight is not None:
        losses *= _weights_of_targets(sample_weight, labels_BT)
    total = ops.sum(ops.where(is_counted, losses, 0.0))
    return ops.divide_no_nan(total, _count(is_counted))


def _targets(labels_BT):
    targets = ops.cast(labels_BT, "int32")[:, 1:]
    return targets, targets != IGNORE_INDEX


def _count(is_counted):
    return ops.sum(ops.cast(is_counted, "float32"))


def _weights_of_targets(sample_weight, labels_BT):
    """Weights (B, T - 1), from one for each row, or for each label."""
    weights, shape = ops.cast(sample_weight, "float32"), tf.shape(labels_BT)
    if weights.shape.rank == 1:
        weights = ops.expand_dims(weights, -1)
    elif weights.shape.rank is None:  # Keras's graphs leave the rank open after having seen weights of two
        weights = tf.reshape(weights, (shape[0], -1))
    if weights.shape.rank != 2 or weights.shape[1] not in (None, 1, labels_BT.shape[1]):
        raise ValueError(
            f"sample_weight must have shape (batch,) or (batch, text_len), one weight for each row or for each label; "
            f"got {tuple(weights.shape)} for labels {tuple(labels_BT.shape)}."
        )
    return tf.broadcast_to(weights, shape)[:, 1:]


class CausalLMTrainer(keras.Model):
    """The steps of Keras's training loops for a model whose inputs may hold `labels`."""

    def compile(self, *args, **kwargs):
        """See `keras.Model.compile`; without `loss`, the model computes its own. XLA is off by default.

        Raises:
            ValueError: if `loss_weights` come without `loss`, or the optimizer accumulates gradients in a way that the
                replicas of the model's strategy cannot.
        """
        given = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs).arguments
        if given.get("loss") is None and given.get("loss_weights") is not None:
            raise ValueError("loss_weights weigh what `loss` names, but no `loss` was given.")
        replicas = self.distribute_strategy.num_replicas_in_sync
        accumulates = replicas > 1 and check_accumulation(given.get("optimizer"))
        self.loss = self._compile_loss = self._compile_metrics = None  # Keras keeps those of an earlier call
        super().compile(*args, **kwargs)
        if accumulates:
            accumulate_on_replicas(self.optimizer)

    def fit(self, *args, **kwargs):
        """See `keras.Model.fit`; `sample_weight` may be (B,) or (B, T), also where the labels are among the inputs.

        Raises:
            ValueError: if `class_weight` is given: it weighs rows by one class each, and here a row has many labels.
        """
        return super().fit(**_weighable(super().fit, args, kwargs))

    def evaluate(self, *args, **kwargs):
        """See `keras.Model.evaluate`, and `fit` for `sample_weight`."""
        return super().evaluate(**_weighable(super().evaluate, args, kwargs))

    def train_on_batch(self, *args, **kwargs):
        """See `keras.Model.train_on_batch`, and `fit` for `sample_weight` and `class_weight`."""
        return super().train_on_batch(**_weighable(super().train_on_batch, args, kwargs))

    def test_on_batch(self, *args, **kwargs):
        """See `keras.Model.test_on_batch`, and `fit` for `sample_weight`."""
        return super().test_on_batch(**_weighable(super().test_on_batch, args, kwargs))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a batch: the model's own, or what `compile` was given as `loss`, which then gets the logits.

        Args:
            sample_weight: see `causal_lm_loss`; for a `loss` given to `compile`, as Keras takes it.

        Returns:
            scalar. With several replicas, the loss of the whole batch over their number, so that their sum is what one
            device would compute; the gradient is that of this replica's rows, and gradients are to be added up.

        Raises:
            ValueError: if there are no labels, or two.
        """
        labels = _labels(x, y)
        if self.loss is not None:
            return self._compiled_loss(labels, y_pred.logits, sample_weight, training)
        if labels is None:
            raise ValueError(
                "There is nothing to compute a loss from: give `labels` with the other inputs, or as targets, or "
                "pass `loss` to compile()."
            )
        if y_pred.loss is None or sample_weight is not None:
            labels = as_tensors({"labels": labels}, self.config)["labels"]
            check_labels(labels, y_pred.logits)
            loss = causal_lm_loss(y_pred.logits, labels, sample_weight)
        else:
            loss = y_pred.loss
        parts = [(loss, _count(_targets(labels)[1]))]
        if self.losses:
            parts.append((ops.sum(ops.stack(self.losses)), _rows(y_pred.logits)))
        return _of_all_replicas(*parts)

    def _compiled_loss(self, y, logits, sample_weight, training):
        """What `loss` makes of the rows of all replicas, over their number: only it knows what it is a mean of."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        context = tf.distribute.get_replica_context()
        if replicas == 1 or context is None:
            return super().compute_loss(None, y, logits, sample_weight, training)
        y, logits, sample_weight = keras.tree.map_structure(
            lambda value: None if value is None else _of_all_rows(tf.convert_to_tensor(value)),
            (y, logits, sample_weight),
        )
        loss = super().compute_loss(None, y, logits, sample_weight, training)
        reduction = getattr(keras.tree.flatten(self.loss)[0], "reduction", "sum_over_batch_size")
        return loss / replicas if reduction == "sum" else loss  # means Keras has divided already

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        labels = _labels(x, y)
        if self.loss is not None:
            return super().compute_metrics(x, labels, y_pred and y_pred.logits, sample_weight)
        if all(metric.name == "loss" for metric in self.metrics):
            return self.get_metrics_result()  # and no selection of tokens, which XLA could not compile
        targets, is_counted = _targets(labels)
        logits = tf.boolean_mask(y_pred.logits[:, :-1], is_counted)
        if sample_weight is not None:
            sample_weight = tf.boolean_mask(_weights_of_targets(sample_weight, labels), is_counted)
        return super().compute_metrics(x, tf.boolean_mask(targets, is_counted), logits, sample_weight)

    def make_train_function(self, force=False):
        """See `keras.Model.make_train_function`. What trains may change after `compile`: then it is traced anew.

        Raises:
            ValueError: if variables train that the optimizer has no states for.
        """
        if self.optimizer is not None and self.optimizer.built:
            known = {id(variable) for variable in self.optimizer._trainable_variables}
            new = [variable.path for variable in self.trainable_variables if id(variable) not in known]
            if new:
                raise ValueError(
                    f"{len(new)} variables train that did not when the optimizer was built, such as {new[0]}: call "
                    "compile() again, with a new optimizer."
                )
        super().make_train_function(force)

    def train_step(self, data):
        return _reducible(self._train(data))

    def _train(self, data):
        """Keras's step, but for variables that the loss does not depend on: they stay as they are, without a warning.

        A warning would be wrong. The loss depends on all variables but the last norm of the vision tower, which makes
        a pooled state for those who want it; and, in a batch of text, but for those that images go through.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
            # Keras adds up the losses of replicas, and weighs those of batches by their rows
            reported = loss * tf.distribute.get_strategy().num_replicas_in_sync
            rows = tf.shape(next(value for value in tf.nest.flatten(x) if value is not None))[0]
            self._loss_tracker.update_state(reported, sample_weight=rows)
            scaled = loss if self.optimizer is None else self.optimizer.scale_loss(loss)
        variables = self.trainable_weights
        gradients = tape.gradient(scaled, variables)
        if steps_of(self.optimizer):
            gradients = [self._accumulable(*pair) for pair in zip(gradients, variables, strict=True)]
        reached = [pair for pair in zip(gradients, variables, strict=True) if pair[0] is not None]
        if reached:
            if not self.optimizer.built:  # for all that trains, as Keras does, whatever this batch reaches
                self.optimizer.build(variables)
            self.optimizer.apply_gradients(reached)
        elif variables:
            raise ValueError(
                f"The loss depends on none of the {len(variables)} variables that train, such as {variables[0].path}."
            )
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _accumulable(self, gradient, variable):
        """A gradient as it is added up: 0 where a batch of text does not reach a variable that other batches do.

        Keras updates the variables that the last batch reaches, by the sum: what others reached would not train.
        """
        if gradient is not None or getattr(variable, "overwrite_with_gradient", False):
            return gradient
        is_reachable = all(variable is not other for other in self.model.vision_model.post_layernorm.weights)
        return tf.zeros_like(variable.value) if is_reachable else None

    def test_step(self, data):
        return _reducible(super().test_step(data))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # To learn shapes, Keras 3.15 averages the first batch over replicas, which fails for a dict with several
        # workers; the first replica's part has the same shapes. No public method runs early enough to override.
        if iterator is not None and self.distribute_strategy.num_replicas_in_sync > 1:
            first_of = self.distribute_strategy.experimental_local_results
            _, _, batches = next(iter(iterator))
            data_batch = tf.nest.map_structure(lambda values: first_of(values)[0], next(batches))
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


def _reducible(logs):
    """Metrics of one replica so that Keras 3.15 can average them: with several workers it fails on scalars."""
    if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
        return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
    return logs


def _weighable(loop, args, kwargs) -> dict:
    """The arguments of one of Keras's loops, with labels as targets where weights are given, which Keras drops else."""
    given = inspect.signature(loop).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    if given.get("class_weight") is not None:
        raise ValueError(
            "class_weight weighs rows that have one class each, but a row of text has many labels: give sample_weight "
            "of shape (batch,) or (batch, text_len) instead."
        )
    if given.get("sample_weight") is not None:
        given["x"], given["y"] = _targets_apart(given.get("x"), given.get("y"))
    validation = given.get("validation_data")
    if isinstance(validation, (tuple, list)) and len(validation) == 3 and validation[2] is not None:
        given["validation_data"] = (*_targets_apart(*validation[:2]), validation[2])
    return given


def _targets_apart(inputs, targets):
    if targets is not None or not isinstance(inputs, Mapping) or "labels" not in inputs:
        return inputs, targets
    return {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]


def _labels(inputs, targets):
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if labels is not None and targets is not None:
        raise ValueError("There are labels with the other inputs, and targets (y) too: give only one of them.")
    return labels if targets is None else targets


def _rows(logits_BTV):
    return ops.cast(tf.shape(logits_BTV)[0], "float32")


def _of_all_rows(values):
    """Values (B, ...) of all replicas, one after the other, with their gradients; `all_gather` fails with workers."""
    context, replicas = tf.distribute.get_replica_context(), tf.distribute.get_strategy().num_replicas_in_sync
    number, rows = context.replica_id_in_sync_group, tf.shape(values)[0]
    counts = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.one_hot(number, replicas, rows, 0, dtype=tf.int32))
    before = tf.reduce_sum(counts[:number])
    padding = [(before, tf.reduce_sum(counts) - before - rows), *[(0, 0)] * (len(values.shape) - 1)]
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.pad(values, padding))


def _of_all_replicas(*parts):
    """The loss of all replicas over their number, whose gradient is that of this replica's part.

    Keras adds up the gradients of the replicas, and reports the mean of their losses by numbers of rows. So each has to
    return the same value, but the gradient of its own rows.

    Args:
        parts: the losses to add up, each with the weight of this replica in the mean over all.
    """
    context = tf.distribute.get_replica_context()
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas == 1 or context is None:
        return ops.sum(ops.stack([loss for loss, _ in parts]))

    def total(value):
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(value))

    own = ops.sum(ops.stack([ops.divide_no_nan(loss * weight, total(weight)) for loss, weight in parts]))
    return own + tf.stop_gradient(total(own) / replicas - own)
