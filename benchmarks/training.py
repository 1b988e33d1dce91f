"""How long does a step of training take, and how much memory?

    python -m benchmarks.training [--backend transformers pt tf] [--images 4/1/1/1 4/4/4/4] [--tokens 256]
                                  [--dtype float32] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

Forward and backward of a batch, one row for each number of images in --images, all rows of --tokens tokens; the vision
tower is frozen and all else trains. The optimiser, AdamW, is timed apart: one step after all parameters have states.
Its rate is 0, which costs as much as any other and leaves the weights as they are.

All backends compute the cross entropy of their logits with the same labels outside of the model, because transformers
cannot do so inside with an added vocabulary. The loss, some gradients and the list of what trains are compared before
anything is timed. Memory is the largest resident set of the process in a forward and backward, the optimiser's states
not included.
"""

import argparse
import json
from functools import partial

import numpy as np

from benchmarks.options import add_common, common
from benchmarks.report import add_ratio, keep, median, median_of_known, print_table, timing
from benchmarks.rounds import in_turns, refuse_above, relative_difference, started
from benchmarks.workload import prompts, random_model

_GRADIENTS = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.1}  # relative; the tests have the bounds of exactness
# Its MLPs have millions of ReLUs; the few inputs that are almost 0 fall on one side or the other by rounding, and each
# moves a gradient by some 1e-4 of its scale: transformers' and ours are both as far as that from those in float64.
_RESAMPLER = 10
_COMPARED = (
    "lm_head.weight",
    "lm_head.additional_fc.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.gated_cross_attn_layers.0.alpha_cross_attn",
    "model.gated_cross_attn_layers.0.cross_attn.k_proj.weight",
    "model.gated_cross_attn_layers.0.cross_attn.v_proj.weight",
    "model.norm.weight",
    "model.perceiver_resampler.latents",
)


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
    return {**batch, "labels": np.where(ids_BT < config["vocab_size"], ids_BT, -100)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    parser.add_argument("--images", nargs="+", default=["4/1/1/1", "4/4/4/4"], help="of each row, row by row")
    parser.add_argument("--tokens", type=int, default=256, help="of each row (256)")
    options = common(parser)
    config = json.loads(options.config.read_text())
    start = partial(
        started,
        options,
        "benchmarks.training_steps:training_steps",
        directory=str(random_model(options.config)),
        dtype=options.dtype,
        device=options.device,
    )
    with start() as workers:
        trainable = {name: worker.call("trainable") for name, worker in workers.items()}
        first = options.backend[0]
        for name, names in trainable.items():
            if names != trainable[first]:
                raise SystemExit(f"{name}: other parameters train than with {first}: {names ^ trainable[first]}.")
        compared = [name for name in _COMPARED if name in trainable[first]]
        rows = [row for images in options.images for row in measure(workers, config, images, options, compared)]
    with start() as workers:  # others: what forward and backward leave in memory has no room beside three optimisers
        updates = in_turns(workers, options.repeats, "update")
    for row in rows:
        row["optimiser s"] = median(updates[row["backend"]])
    add_ratio(rows, "optimiser s", "optimiser ratio")
    columns = [
        "images",
        "backend",
        "s",
        "ratio",
        "peak GB",
        "peak ratio",
        "compile s",
        "optimiser s",
        "optimiser ratio",
    ]
    print_table(columns, [[row[column] for column in columns] for row in rows])
    keep("training", vars(options), rows)


def measure(workers: dict, config: dict, images: str, options, compared: list[str]) -> list[dict]:
    """One row of the table for each backend: forward and backward of one batch."""
    batch = training_batch(config, [int(count) for count in images.split("/")], options.tokens)
    reference, compiling, differences = None, {}, {}
    for name, worker in workers.items():
        worker.call("prepare", batch)
        compiling[name] = worker.call("step")["seconds"]  # a graph's first run compiles it
        loss, gradients = worker.call("gradients", compared)
        if reference is None:
            reference = loss, gradients
        bound = _GRADIENTS[options.dtype]
        refuse_above(bound, abs(loss - reference[0]) / abs(reference[0]), name, "losses")
        differences[name] = max(
            refuse_above(
                bound * (_RESAMPLER if ".perceiver_resampler." in key else 1),
                relative_difference(gradients[key], reference[1][key]),
                name,
                f"gradients of {key}",
            )
            for key in compared
        )
    steps = in_turns(workers, options.repeats, "step")
    rows = []
    for name, measured in steps.items():
        seconds = [step["seconds"] for step in measured]
        peak = median_of_known(step["peak"] for step in measured)
        rows.append(
            {
                "images": images,
                "backend": name,
                **timing(seconds),
                "peak GB": None if peak is None else peak / 1e9,
                "compile s": max(0.0, compiling[name] - median(seconds)),
                "gradients differ": differences[name],
            }
        )
    add_ratio(rows, "s")
    add_ratio(rows, "peak GB", "peak ratio")
    return rows


if __name__ == "__main__":
    main()
