"""The built-in loss, and how Keras's `fit`, `evaluate` and `predict` use it.

Unusual: `compile(optimizer)` needs no loss. Labels go in with the other inputs, or as targets, and the model computes
its loss from them; metrics passed to `compile` see the predicted positions alone, (N,) labels and (N, V) logits.

Keras alone has this file; PyTorch users bring their own loop or transformers' `Trainer`.
"""

import warnings
from collections.abc import Mapping

import keras
import tensorflow as tf
from keras import ops

from idefics_common.calls.text import check_label_range, check_label_shape

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


def causal_lm_loss(logits_BTV, labels_BT):
    """Cross entropy of the next token.

    Args:
        logits_BTV: logits, over the whole vocabulary, the additional one included.
        labels_BT: ids, -100 where a token is not to be predicted; not shifted. Any integer dtype.

    Returns:
        scalar float32, the mean over labels that are not -100, the first of each row aside; 0 if there are none.
    """
    targets, is_counted = _targets(labels_BT)
    logits = ops.cast(logits_BTV[:, :-1], "float32")
    losses = ops.sparse_categorical_crossentropy(ops.where(is_counted, targets, 0), logits, from_logits=True)
    total = ops.sum(ops.where(is_counted, losses, 0.0))
    return ops.divide_no_nan(total, _count(is_counted))


def _targets(labels_BT):
    targets = ops.cast(labels_BT, "int32")[:, 1:]
    return targets, targets != IGNORE_INDEX


def _count(is_counted):
    return ops.sum(ops.cast(is_counted, "float32"))


class CausalLMTrainer(keras.Model):
    """The steps of Keras's training loops for a model whose inputs may hold `labels`."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a batch: the model's own, or what `compile` was given as `loss`, which then gets the logits.

        Raises:
            ValueError: if there are no labels, or weights for a loss that has no use for them.
        """
        if self.loss is not None:
            return super().compute_loss(x, y, y_pred.logits, sample_weight, training)
        if sample_weight is not None:
            raise ValueError("sample_weight has no meaning for the built-in loss: put -100 in the labels instead.")
        labels = _labels(x, y)
        if labels is None:
            raise ValueError(
                "There is nothing to compute a loss from: give `labels` with the other inputs, or as targets, or "
                "pass `loss` to compile()."
            )
        loss = causal_lm_loss(y_pred.logits, labels) if y_pred.loss is None else y_pred.loss
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return ops.sum(ops.stack([_share_of_all_replicas(loss, labels), *(added / replicas for added in self.losses)]))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self.loss is not None:
            return super().compute_metrics(x, y, y_pred and y_pred.logits, sample_weight)
        if all(metric.name == "loss" for metric in self.metrics):
            return self.get_metrics_result()  # and no selection of tokens, which XLA could not compile
        targets, is_counted = _targets(_labels(x, y))
        logits = tf.boolean_mask(y_pred.logits[:, :-1], is_counted)
        return super().compute_metrics(x, tf.boolean_mask(targets, is_counted), logits)

    def make_train_function(self, force=False):
        """See `keras.Model.make_train_function`. What trains may change after `compile`: then it is traced anew.

        Raises:
            ValueError: if variables train that the optimizer has no states for.
        """
        trained = tuple(id(variable) for variable in self.trainable_variables)
        if self.optimizer is not None and self.optimizer.built:
            known = {id(variable) for variable in self.optimizer._trainable_variables}
            new = [variable.path for variable in self.trainable_variables if id(variable) not in known]
            if new:
                raise ValueError(
                    f"{len(new)} variables train that did not when the optimizer was built, such as {new[0]}: call "
                    "compile() again, with a new optimizer."
                )
        super().make_train_function(force or trained != self._traced_for)
        self._traced_for = trained

    _traced_for = ()

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


def _labels(inputs, targets):
    if targets is not None:
        return targets
    return inputs.get("labels") if isinstance(inputs, Mapping) else None


def _share_of_all_replicas(loss, labels_BT):
    """This replica's part of the mean over the labels of all replicas; Keras adds the parts up."""
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return loss
    _, is_counted = _targets(labels_BT)
    count = _count(is_counted)
    count_of_all = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)
    return ops.divide_no_nan(loss * count, count_of_all)
