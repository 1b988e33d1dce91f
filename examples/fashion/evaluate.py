"""Measures the checkpoint by exact match of generated answers, through the processor and greedy `generate`.

    python examples/fashion/evaluate.py --checkpoint FOLDER [--data FOLDER] [--limit 500]

Every bar uses each of the 10,000 test photographs once per question: naming (four wordings by turns), yes/no (the
photograph's own class and a random other one), two photographs (5,000 pairs, in both orders, asked for the first
and for the second), questions without a photograph, and naming with the photographs shuffled among the questions.
Prints a table and, last, one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from data import DEBIAN_FOLDER, Photographs, load_idx
from prompts import (
    LONGEST_ANSWER,
    NAMING,
    ORDINAL,
    THINGS,
    YES_NO,
    Dialogue,
    naming,
    ordinal,
    text_questions,
    to_prompt,
    yes_no,
)
from tqdm import tqdm

from idefics_common import IdeficsProcessor
from idefics_pt import IdeficsForVisionText2Text

BATCH_SIZE = 250


def answers(model, processor, prompts: Sequence[list], description: str | None = None) -> list[str]:
    """The greedy answer to every prompt, without its `<end_of_utterance>` and edge spaces.

    With a description, a progress bar shows it.
    """
    texts: list[str] = []
    starts = range(0, len(prompts), BATCH_SIZE)
    for start in tqdm(starts, desc=description, unit="batch", leave=False, disable=description is None):
        inputs = processor(prompts[start : start + BATCH_SIZE], return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]
    return texts


def matches(model, processor, photographs: Photographs, dialogues: list[Dialogue], description: str) -> np.ndarray:
    """Boolean, one per dialogue: is the generated answer to its last question exactly the expected one?"""
    given = answers(model, processor, [to_prompt(dialogue, photographs) for dialogue in dialogues], description)
    return np.array([text == dialogue[-1].answer for text, dialogue in zip(given, dialogues, strict=True)])


def naming_dialogues(labels: np.ndarray) -> list[Dialogue]:
    return [naming(photo, int(label), NAMING[photo % len(NAMING)]) for photo, label in enumerate(labels)]


def naming_accuracy(model, processor, photographs: Photographs) -> float:
    dialogues = naming_dialogues(photographs.labels)
    return float(matches(model, processor, photographs, dialogues, "naming").mean())


def shuffled_accuracy(model, processor, photographs: Photographs, rng: np.random.Generator) -> float:
    """Naming where every question comes with another question's photograph: chance, unless the text gives it away."""
    shuffled = Photographs(photographs.pixels[rng.permutation(len(photographs))], photographs.labels)
    return float(matches(model, processor, shuffled, naming_dialogues(photographs.labels), "shuffled").mean())


def yes_no_accuracy(model, processor, photographs: Photographs, rng: np.random.Generator) -> float:
    """Balanced: every photograph is asked once with its own class and once with another."""
    dialogues = []
    for photo, label in enumerate(photographs.labels.tolist()):
        other = (label + int(rng.integers(1, len(THINGS)))) % len(THINGS)
        dialogues += [
            yes_no(photo, label, label, YES_NO[photo % len(YES_NO)]),
            yes_no(photo, label, other, YES_NO[photo % len(YES_NO)]),
        ]
    return float(matches(model, processor, photographs, dialogues, "yes/no").mean())


def two_photograph_accuracy(
    model, processor, photographs: Photographs, rng: np.random.Generator
) -> tuple[float, float]:
    """(both answers right, averaged over the two orders; all four answers of both orders right)."""
    order = rng.permutation(len(photographs) // 2 * 2).reshape(-1, 2)
    dialogues = []
    for number, (left, right) in enumerate(order.tolist()):
        question = ORDINAL[number % len(ORDINAL)]
        for pair in ([left, right], [right, left]):
            labels = [int(photographs.labels[photo]) for photo in pair]
            dialogues += [ordinal(pair, labels, which, question) for which in range(2)]
    right = matches(model, processor, photographs, dialogues, "two photographs").reshape(-1, 2, 2)
    both = right.all(axis=2)
    return float(both.mean()), float(both.all(axis=1).mean())


def text_accuracy(model, processor) -> tuple[float, float]:
    """(all questions without a photograph, those of them that training never saw)."""
    trained, held_out = text_questions()
    dialogues = [[turn] for turn in trained + held_out]
    right = matches(model, processor, None, dialogues, "text only")
    return float(right.mean()), float(right[len(trained) :].mean())


def evaluate(model, processor, photographs: Photographs, seed: int = 0) -> dict[str, float]:
    """Every bar, by name."""
    rng = np.random.default_rng(seed)
    both_answers, both_orders = two_photograph_accuracy(model, processor, photographs, rng)
    text, text_held_out = text_accuracy(model, processor)
    return {
        "naming": naming_accuracy(model, processor, photographs),
        "yes_no": yes_no_accuracy(model, processor, photographs, rng),
        "two_photographs": both_answers,
        "two_photographs_both_orders": both_orders,
        "text_only": text,
        "text_only_held_out": text_held_out,
        "naming_shuffled": shuffled_accuracy(model, processor, photographs, rng),
    }


# The bars that the example must pass; chance for the shuffled photographs is 10 %.
BARS = {"naming": 0.88, "yes_no": 0.90, "two_photographs": 0.80, "text_only": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--limit", type=int, help="only the first photographs of the test split")
    arguments = parser.parse_args()
    everything = load_idx(arguments.data, "test")
    photographs = Photographs(everything.pixels[: arguments.limit], everything.labels[: arguments.limit])
    processor = IdeficsProcessor.from_pretrained(arguments.checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(arguments.checkpoint).eval()

    start = time.perf_counter()
    results = evaluate(model, processor, photographs)
    print(f"{'exact match':32}{'measured':>10}{'bar':>8}")
    for name, value in results.items():
        bar = f"{BARS[name]:.0%}" if name in BARS else ""
        print(f"{name.replace('_', ' '):32}{value:>10.2%}{bar:>8}")
    seconds = round(time.perf_counter() - start)
    print(json.dumps({"photographs": len(photographs), "seconds": seconds} | results))


if __name__ == "__main__":
    main()
