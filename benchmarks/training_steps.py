"""The two rooms and transformers in training, each behind the same methods, for `benchmarks.training`."""

import os
import time

import numpy as np

from benchmarks.options import tensorflow_device
from benchmarks.workers import Peak

_IGNORED = -100


class TorchTraining:
    """PyTorch: ours ("pt") or transformers' own ("transformers"), the vision tower frozen, all else trainable."""

    def __init__(self, kind: str, directory: str, dtype: str, device: str):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.device = torch, device
        kwargs = {"dtype": getattr(torch, dtype)}
        if kind == "transformers":
            from transformers import IdeficsForVisionText2Text
            from transformers import logging as transformers_logging

            transformers_logging.set_verbosity_error()
        else:
            from idefics_pt import IdeficsForVisionText2Text

            kwargs |= {"freeze_vision_layers": True, "freeze_text_layers": False}
        self.model = IdeficsForVisionText2Text.from_pretrained(directory, **kwargs).to(device).train()
        if kind == "transformers":
            # its from_pretrained loses what the configuration says
            self.model.model.vision_model.requires_grad_(False)

    def trainable(self) -> set[str]:
        """Names of the parameters that train."""
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def prepare(self, batch: dict):
        """Hold a batch (numpy arrays, `labels` among them) for the methods that follow."""
        self.inputs = {name: self.torch.from_numpy(value).to(self.device) for name, value in batch.items()}
        self.labels = self.inputs.pop("labels")

    def _forward_and_backward(self):
        logits = self.model(**self.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = self.labels[:, 1:].flatten()
        loss = self.torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=_IGNORED)
        loss.backward()
        self._wait()
        return loss

    def _wait(self):
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def gradients(self, names: list[str]) -> tuple[float, dict]:
        """The loss, and the gradients of some parameters, float32."""
        loss = self._forward_and_backward().item()
        found = {name: self.model.get_parameter(name).grad.float().cpu().numpy() for name in names}
        self.model.zero_grad(set_to_none=True)
        return loss, found

    def step(self) -> dict:
        """Seconds of forward and backward, and the largest number of bytes in it."""
        peak = Peak(self.torch if self.device != "cpu" else None)
        begin = time.perf_counter()
        self._forward_and_backward()
        seconds = time.perf_counter() - begin
        found = {"seconds": seconds, "peak": peak.bytes()}
        self.model.zero_grad(set_to_none=True)
        return found

    def update(self) -> float:
        """Seconds of a step of the optimiser once it has its states, which are then thrown away."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = self.torch.optim.AdamW(trainable, lr=0.0, foreach=True)
        for parameter in trainable:
            parameter.grad = self.torch.full_like(parameter, 1e-3)
        optimizer.step()
        self._wait()
        begin = time.perf_counter()
        optimizer.step()
        self._wait()
        seconds = time.perf_counter() - begin
        self.model.zero_grad(set_to_none=True)
        return seconds


class TensorFlowTraining:
    """Keras: the gradients of `idefics_tf` by a tape in a compiled function; methods as `TorchTraining`."""

    def __init__(self, kind: str, directory: str, dtype: str, device: str):
        import keras
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["OMP_NUM_THREADS"]))
        from idefics_tf import TFIdeficsForVisionText2Text

        self.tf, self.keras = tf, keras
        self.device = tensorflow_device(device)
        with tf.device(self.device):
            self.model = TFIdeficsForVisionText2Text.from_pretrained(
                directory, dtype=dtype, freeze_vision_layers=True, freeze_text_layers=False
            )
        self.variables = self.model.trainable_variables
        self._compiled = tf.function(self._forward_and_backward, autograph=False)
        self._apply = None

    def trainable(self) -> set[str]:
        """Names of the parameters that train, as PyTorch calls them."""
        return {name for name, weight in self._weights().items() if weight.variable.trainable}

    def _weights(self) -> dict:
        from idefics_tf.weights import weights_by_name

        return weights_by_name(self.model)

    def prepare(self, batch: dict):
        """Hold a batch (numpy arrays, `labels` among them) for the methods that follow."""
        with self.tf.device(self.device):
            self.batch = {name: self.tf.constant(value) for name, value in batch.items()}

    def _forward_and_backward(self, inputs, labels_BT):
        tf = self.tf
        with tf.GradientTape() as tape:
            logits = tf.cast(self.model(inputs, training=True).logits[:, :-1], tf.float32)
            targets = labels_BT[:, 1:]
            is_counted = targets != _IGNORED
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(is_counted, targets, 0), logits)
            counted = tf.cast(is_counted, tf.float32)
            loss = tf.reduce_sum(losses * counted) / tf.reduce_sum(counted)
        gradients = tape.gradient(loss, [variable.value for variable in self.variables])
        return loss, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _run(self):
        inputs = dict(self.batch)
        labels = inputs.pop("labels")
        with self.tf.device(self.device):
            loss, gradients = self._compiled(inputs, labels)
        return float(loss), gradients

    def gradients(self, names: list[str]) -> tuple[float, dict]:
        """The loss, and the gradients of some parameters by their names in PyTorch and as they lie there, float32."""
        loss, gradients = self._run()
        by_variable = {id(variable): gradient for variable, gradient in zip(self.variables, gradients, strict=True)}
        weights = self._weights()
        return loss, {
            name: weights[name].layout.inverse(np.asarray(by_variable[id(weights[name].variable)], np.float32))
            for name in names
        }

    def step(self) -> dict:
        """Seconds of forward and backward, and the largest number of bytes in it."""
        peak = Peak()
        begin = time.perf_counter()
        self._run()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "peak": peak.bytes()}

    def update(self) -> float:
        """Seconds of a step of the optimiser once it has its states, which stay: a traced function never lets go."""
        if self._apply is None:
            self._apply = self._optimizer_step()
            self._apply()
        begin = time.perf_counter()
        self._apply()
        return time.perf_counter() - begin

    def _optimizer_step(self):
        optimizer = self.keras.optimizers.AdamW(learning_rate=0.0)
        optimizer.build(self.variables)
        gradients = [self.tf.fill(variable.shape, self.tf.cast(1e-3, variable.dtype)) for variable in self.variables]
        return self.tf.function(lambda: optimizer.apply(gradients, self.variables), autograph=False)


def training_steps(kind: str, **kwargs):
    """The backend called `kind`: "pt", "tf" or "transformers"."""
    return (TensorFlowTraining if kind == "tf" else TorchTraining)(kind, **kwargs)
