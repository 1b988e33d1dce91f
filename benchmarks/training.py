"""How long does a step of training take, and how much memory?

Forward and backward of a batch, one row for each number of images in --images, all rows of --tokens tokens; the vision
tower is frozen and all else trains. The optimiser is not timed: it is the framework's own.

All backends compute the cross entropy of their logits with the same labels outside of the model, because transformers
cannot do so inside with an added vocabulary. The loss, some gradients and the list of what trains are compared before
anything is timed. Memory is the largest resident set of the process in a forward and backward.
"""

import json
import time
from statistics import median

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, median_of_known, timing
from benchmarks.rounds import in_turns, refuse_above, started
from benchmarks.workload import prompts

_IGNORED = -100
_GRADIENTS = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.1}  # relative; the tests have the bounds of exactness
# Its MLPs have millions of ReLUs; the few inputs that are almost 0 fall on one side or the other by rounding, and each
# moves a gradient by some 1e-4 of its scale: transformers' and ours are both as far as that from those in float64.
_RESAMPLER = 10
_COMPARED = (
    "lm_head.weight",
    "lm_head.additional_fc.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.gated_cross_attn_layers.0.alpha_cross_attn",
    "model.gated_cross_attn_layers.0.cross_attn.k_proj.weight",
    "model.norm.weight",
    "model.perceiver_resampler.latents",
)


class _Training:
    """The vision tower frozen, all else trainable; lives in a worker."""

    def step(self) -> dict:
        """Seconds of forward and backward, and the largest number of bytes in it."""
        peak = self.peak()
        begin = time.perf_counter()
        found = self.run()
        seconds = time.perf_counter() - begin
        del found  # letting go of the gradients is no part of it
        return {"seconds": seconds, "peak": peak.bytes()}


class TorchTraining(_Training, TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def load(self, directory: str):
        """Load the model, ready to train."""
        super().load(directory, **({"freeze_vision_layers": True, "freeze_text_layers": False} if self.is_ours else {}))
        self.model.train()
        if not self.is_ours:
            # its from_pretrained loses what the configuration says
            self.model.model.vision_model.requires_grad_(False)

    def trainable(self) -> set[str]:
        """Names of the parameters that train."""
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def run(self):
        """Forward and backward; the loss, and the gradients by name."""
        inputs = dict(self.inputs)
        targets = inputs.pop("labels")[:, 1:].flatten()
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = self.torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=_IGNORED)
        loss.backward()
        self.wait()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return loss, gradients

    def gradients(self, names: list[str]) -> tuple[float, dict]:
        """The loss, and the gradients of some parameters, float32."""
        loss, found = self.run()
        return loss.item(), {name: self.array(found[name].float()) for name in names}


class TensorFlowTraining(_Training, TensorFlowBackend):
    """Keras: the gradients of `idefics_tf` by a tape in a compiled function; methods as `TorchTraining`."""

    inter_op_threads = 0  # as many as TensorFlow sees fit

    def load(self, directory: str):
        """Load the model, ready to train."""
        super().load(directory, freeze_vision_layers=True, freeze_text_layers=False)
        from idefics_tf.weights import weights_by_name

        self.variables, self.weights = self.model.trainable_variables, weights_by_name(self.model)
        self._compiled = self.tf.function(self._forward_and_backward, autograph=False)

    def trainable(self) -> set[str]:
        """Names of the parameters that train, as PyTorch calls them."""
        return {name for name, weight in self.weights.items() if weight.variable.trainable}

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

    def run(self):
        """Forward and backward; the loss and all gradients."""
        inputs = dict(self.inputs)
        labels = inputs.pop("labels")
        with self.tf.device(self.device):
            loss, gradients = self._compiled(inputs, labels)
        return float(loss), gradients

    def gradients(self, names: list[str]) -> tuple[float, dict]:
        """The loss, and the gradients of some parameters by their names in PyTorch and as they lie there, float32."""
        loss, gradients = self.run()
        by_variable = {id(variable): gradient for variable, gradient in zip(self.variables, gradients, strict=True)}
        return loss, {
            name: weight.layout.inverse(np.asarray(by_variable[id(weight.variable)], np.float32))
            for name, weight in self.weights.items()
            if name in names
        }


def training_batch(config: dict, images_per_row: list[int], tokens: int) -> dict:
    """Inputs and labels of a batch whose rows all have `tokens` tokens, however many images; as numpy arrays.

    Raises:
        SystemExit: if the images of a row do not share its tokens equally.
    """
    rows = []
    for seed, count in enumerate(images_per_row):
        if count < 1 or tokens % count:
            raise SystemExit(f"--images: {count} images do not share {tokens} tokens equally.")
        rows.append(prompts(config, [count], tokens // count, seed=seed))
    num_images = max(images_per_row)
    for row, count in zip(rows, images_per_row, strict=True):
        missing = (0, num_images - count)
        row["pixel_values"] = np.pad(row["pixel_values"], ((0, 0), missing, (0, 0), (0, 0), (0, 0)))
        row["image_attention_mask"] = np.pad(row["image_attention_mask"], ((0, 0), (0, 0), missing))
    batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    ids_BT = batch["input_ids"]
    return {**batch, "labels": np.where(ids_BT < config["vocab_size"], ids_BT, _IGNORED)}


def measure(workers: dict, config: dict, images: str, options, compared: list[str]) -> list[dict]:
    """One row of the table for each backend: forward and backward of one batch."""
    batch = training_batch(config, [int(count) for count in images.split("/")], options.tokens)
    losses, gradients, compiling = {}, {}, {}
    for name, worker in workers.items():
        worker.call("prepare", batch)
        compiling[name] = worker.call("step")["seconds"]  # a graph's first run compiles it
        losses[name], gradients[name] = worker.call("gradients", compared)
    bound = _GRADIENTS[options.dtype]
    refuse_above(bound, {name: np.array(loss) for name, loss in losses.items()}, "losses")
    differences = [
        refuse_above(
            bound * (_RESAMPLER if ".perceiver_resampler." in key else 1),
            {name: found[key] for name, found in gradients.items()},
            f"gradients of {key}",
        )
        for key in compared
    ]
    rows = []
    for name, steps in in_turns(workers, options.repeats, "step").items():
        seconds = [step["seconds"] for step in steps]
        rows.append(
            {
                "images": images,
                "backend": name,
                **timing(seconds),
                "peak GB": median_of_known((step["peak"] for step in steps), 1e9),
                "compile s": max(0.0, compiling[name] - median(seconds)),
                "gradients differ": max(difference[name] for difference in differences),
            }
        )
    add_ratio(rows, "s")
    add_ratio(rows, "peak GB", "peak ratio")
    return rows


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--images", nargs="+", default=["4/1/1/1", "4/4/4/4"], help="of each row, row by row")
    parser.add_argument("--tokens", type=int, default=256, help="of each row (256)")
    options = parsed(parser)
    config = json.loads(options.config.read_text())
    settings = of_model(options) | {"fused": False}
    with started(options, TorchTraining, TensorFlowTraining, **settings) as workers:
        trainable = {name: worker.call("trainable") for name, worker in workers.items()}
        first = trainable[options.backend[0]]
        for name, names in trainable.items():
            if names != first:
                raise SystemExit(f"{name}: other parameters train than with {options.backend[0]}: {names ^ first}.")
        compared = [name for name in _COMPARED if name in first]
        rows = [row for images in options.images for row in measure(workers, config, images, options, compared)]
    columns = ["images", "backend", "s", "ratio", "peak GB", "peak ratio", "compile s"]
    finish("training", options, rows, columns)


if __name__ == "__main__":
    main()
