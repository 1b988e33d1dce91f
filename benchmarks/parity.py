"""Measure how far both rooms are from transformers' IDEFICS, and keep the README's table of differences.

For every model of the configuration matrix of the tests, with the same random weights on all sides, in float32 on the
CPU: the largest difference of logits, of hidden states, of the loss and of its gradients, relative to their scale, over
batches with left padding, with right padding, and with larger images and interpolated positions; and whether greedy and
beam search give the same tokens.

    python -m benchmarks.parity                      print the table
    python -m benchmarks.parity --write README.md    put it between the table's markers
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tensorflow as tf
import torch
import transformers

from benchmarks.pages import between_marks, markdown
from idefics_tf.weights import weights_by_name
from tests.equivalence.pairs import to_numpy
from tests.models import MATRIX, batch
from tests.pt.pairs import CALLS, oracle_loss, our_model, parity_call, reference_model, torch_batch
from tests.tf.random_models import tf_model
from tests.tolerances import relative_error

BEGIN, END = "<!-- parity table: python -m benchmarks.parity --write README.md -->", "<!-- end of parity table -->"
ROOMS = ("PyTorch", "Keras")
DIFFERENCES = ("logits", "hidden states", "loss", "gradients")
SEARCHES = {"greedy": {}, "beam": {"num_beams": 3}}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


class PyTorchRoom:
    """Our PyTorch model with one attention implementation."""

    def __init__(self, attention: str, overrides: dict):
        self.model = our_model("cpu", attention, **overrides)

    def run(self, inputs: dict, labels, **kwargs) -> tuple[dict, dict]:
        """Values by the names of `DIFFERENCES` but the last, and gradients by name of the parameter."""
        self.model.zero_grad()
        outputs = self.model(**inputs, labels=labels, output_hidden_states=True, **kwargs)
        outputs.loss.backward()
        gradients = {name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None}
        return _values(outputs, outputs.loss), gradients

    def generate(self, **kwargs) -> np.ndarray:
        """Ids of the batch with left padding."""
        return self.model.generate(**torch_batch(self.model.config), **kwargs).numpy()


class KerasRoom:
    """Our Keras model; methods as `PyTorchRoom`."""

    def __init__(self, overrides: dict):
        self.model = tf_model(**overrides)

    def run(self, inputs: dict, labels, **kwargs) -> tuple[dict, dict]:
        """Values by the names of `DIFFERENCES` but the last, and gradients by name of the parameter."""
        arrays = {name: value.numpy() for name, value in inputs.items()} | {"labels": labels.numpy()}
        with tf.GradientTape() as tape:
            outputs = self.model(arrays, output_hidden_states=True, **kwargs)
        weights = weights_by_name(self.model)
        found = tape.gradient(outputs.loss, [weight.variable.value for weight in weights.values()])
        gradients = {
            name: weight.layout.inverse(to_numpy(gradient))
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
            if gradient is not None
        }
        return _values(outputs, outputs.loss), gradients

    def generate(self, **kwargs) -> np.ndarray:
        """Ids of the batch with left padding."""
        return self.model.generate(batch(self.model.config), **kwargs, disable_compile=True).numpy()


def _values(outputs, loss) -> dict:
    hidden = [to_numpy(state) for state in outputs.hidden_states]
    return {"logits": [to_numpy(outputs.logits)], "hidden states": hidden, "loss": [to_numpy(loss)]}


def measure(variant: str) -> dict[str, dict]:
    """One model: for each room the largest differences by name, and for "greedy" and "beam" if tokens are the same.

    Search is measured on the batch with left padding, as prompts for generation are padded. Each attention is compared
    with the same one of transformers: they differ in what padding attends to.
    """
    overrides = MATRIX[variant]
    pairs = [
        ("PyTorch", PyTorchRoom("eager", overrides), "eager"),
        ("PyTorch", PyTorchRoom("sdpa", overrides), "sdpa"),
        ("Keras", KerasRoom(overrides), "eager"),
    ]
    result = {name: dict.fromkeys(DIFFERENCES, 0.0) | dict.fromkeys(SEARCHES, True) for name, _, _ in pairs}
    for name, room, attention in pairs:
        reference = reference_model("cpu", attention, **overrides)
        for call in CALLS:
            for what, error in differences(room, reference, call).items():
                result[name][what] = max(result[name][what], error)
        for search, kwargs in SEARCHES.items():
            ids = reference.generate(**torch_batch(reference.config), **kwargs, **GREEDY).numpy()
            result[name][search] &= np.array_equal(room.generate(**kwargs, **GREEDY), ids)
    return result


def differences(room, reference, call: str) -> dict[str, float]:
    """Relative differences in one row of `tests.pt.pairs.CALLS`, by the names of `DIFFERENCES`."""
    reference.zero_grad()
    inputs, kwargs = parity_call(call, reference.config)
    labels = inputs.pop("labels")
    outputs = reference(**inputs, output_hidden_states=True, **kwargs)
    loss = oracle_loss(outputs.logits, labels)
    loss.backward()
    expected = _values(outputs, loss)
    values, found = room.run(inputs, labels, **kwargs)
    gradients = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    least_scale = 1e-3 * max(np.abs(gradient).max() for gradient in gradients.values())
    compared = [relative_error(found[name], gradients[name], least_scale) for name in gradients if name in found]
    return {
        what: max(relative_error(a, e) for a, e in zip(values[what], expected[what], strict=True)) for what in values
    } | {"gradients": max(compared)}


def table(rows: dict[str, dict[str, dict]]) -> str:
    """The rows as a Markdown table."""
    cells = []
    for variant, row in rows.items():
        cells.append([variant.replace("_", " ")])
        for room in ROOMS:
            cells[-1] += [f"{row[room][what]:.1e}" for what in DIFFERENCES]
            cells[-1].append("same" if all(row[room][search] for search in SEARCHES) else "**differ**")
    return (
        f"Measured against transformers {transformers.__version__} with torch {torch.__version__.partition('+')[0]} "
        f"and TensorFlow {tf.__version__}, float32, CPU, one thread; differences are relative to scale, the largest of "
        "three batches: left padding, right padding, interpolated positions; in PyTorch the larger of eager and sdpa. "
        "Tokens are those of greedy and of beam search with left padding.\n\n"
    ) + markdown(["model", *(f"{room}: {what}" for room in ROOMS for what in (*DIFFERENCES, "tokens"))], cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="file whose table is to be replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    rows = {variant: measure(variant) for variant in MATRIX}
    text = table(rows)
    print(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(between_marks(page, BEGIN, END, text), encoding="utf-8")
    worst = {room: {what: max(row[room][what] for row in rows.values()) for what in DIFFERENCES} for room in ROOMS}
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
