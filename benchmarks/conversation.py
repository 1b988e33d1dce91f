"""How long until the first token of the second answer, when the cache of the first has seen the images?

    python -m benchmarks.conversation [--backend transformers pt tf] [--images 16] [--question 24] [--new-tokens 16]
                                      [--dtype float32] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

A prompt of --images images is answered with --new-tokens tokens; then a question of --question tokens follows. Warm: it
is asked with the cache of the first turn and without images. Cold: the whole text and the images are read anew, which
is all that transformers is asked for. The first answer is compared with the first backend's, and the warm second one
with the cold, before anything is timed.

Calls of the vision tower, the resampler and the projections of images to keys and values are counted in the first turn,
which reads as a cold one does, and in a warm one; if the first has none, something is wrong with the counting. In
TensorFlow they are counted where each turn's graph is traced: what is not called there is in no part of the graph.
"""

import argparse
import json

import numpy as np

from benchmarks.conversation_turns import IMAGE_WORK
from benchmarks.options import add_common, common
from benchmarks.report import add_ratio, keep, print_table, timing
from benchmarks.rounds import in_turns, refuse_other, started
from benchmarks.workload import prompts, random_model

_ANSWER = 4  # tokens of the second answer that are compared


def second_turn(first: dict, sequences: np.ndarray, question: np.ndarray) -> dict:
    """Inputs of the second turn: all of the text so far and the question, which sees what the first answer saw."""
    ids_BT = np.concatenate((sequences, question), axis=1)
    missing = (0, ids_BT.shape[1] - first["input_ids"].shape[1])
    return {
        "input_ids": ids_BT,
        "attention_mask": np.pad(first["attention_mask"], ((0, 0), missing), constant_values=1),
        "pixel_values": first["pixel_values"],
        "image_attention_mask": np.pad(first["image_attention_mask"], ((0, 0), missing, (0, 0)), mode="edge"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common(parser, backends=("transformers", "pt", "tf"))
    parser.add_argument("--images", type=int, default=16, help="images of the prompt (16)")
    parser.add_argument("--question", type=int, default=24, help="tokens of the second question (24)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the first answer (16)")
    parser.add_argument("--unfused", action="store_true", help="ours without fused projections")
    options = common(parser)
    config = json.loads(options.config.read_text())
    first = prompts(config, [options.images])
    question = np.random.default_rng(1).integers(10, config["vocab_size"], (1, options.question))
    with started(
        options,
        "benchmarks.conversation_turns:conversation",
        directory=str(random_model(options.config)),
        dtype=options.dtype,
        device=options.device,
        fused=not options.unfused,
    ) as workers:
        rows = measure(workers, first, question, options)
    for name in options.backend:
        add_ratio([row for row in rows if row["backend"] == name], "s", "of cold")
    add_ratio(rows, "s")
    columns = ["backend", "turn", "s", "of cold", "ratio", *IMAGE_WORK]
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    keep("conversation", vars(options), rows)


def measure(workers: dict, first: dict, question: np.ndarray, options) -> list[dict]:
    """Rows of the table: the cold turn of each backend, then the warm ones of ours."""
    warm_ones = {name: worker for name, worker in workers.items() if name != "transformers"}
    answer, work = None, {}
    for name, worker in workers.items():
        sequences, work[name, "cold"] = worker.call("first_turn", first, options.new_tokens)
        answer = sequences if answer is None else answer
        if options.dtype == "float32":
            refuse_other(sequences, answer, name, "first answers")
        # all go on from one text, so that the second turns are the same wherever they run
        worker.call("prepare", second_turn(first, answer, question))
        cold = worker.call("answer", _ANSWER, False)
        if name in warm_ones:
            if not work[name, "cold"]["vision tower"]:
                raise SystemExit(f"{name}: the vision tower was not counted where it has to run: {work[name, 'cold']}.")
            warm, work[name, "warm"] = worker.call("counted_answer", _ANSWER)
            if options.dtype == "float32" and not np.array_equal(warm, cold):
                raise SystemExit(f"{name}: with the cache it answers {warm}, without {cold}.")
            worker.call("first_token", True)
        worker.call("first_token", False)
    seconds = {(name, "cold"): runs for name, runs in in_turns(workers, options.repeats, "first_token", False).items()}
    seconds |= {
        (name, "warm"): runs for name, runs in in_turns(warm_ones, options.repeats, "first_token", True).items()
    }
    return [
        {"backend": name, "turn": turn, "images": options.images, **timing(runs), **(work[name, turn] or {})}
        for (name, turn), runs in seconds.items()
    ]


if __name__ == "__main__":
    main()
