"""`make demo`: the shipped IDEFICS answers questions about photographs that it has never seen, in both frameworks.

Converts the checkpoint for Keras, prints photographs with questions and answers, a conversation about several of them
and the accuracy on the 200 shipped test photographs, and writes a contact sheet of those. Each framework has a column;
the exit code is 0 only if all have answered all questions with the same words.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FASHION = Path(__file__).parent / "fashion"
sys.path.insert(0, str(FASHION))

import numpy as np  # noqa: E402
from data import Photographs, load_shipped  # noqa: E402
from drawing import beside, colour_depth, contact_sheet, half_blocks, painted  # noqa: E402
from prompts import THINGS, Dialogue, Turn, naming, ordinal, sentence, yes_no  # noqa: E402
from rooms import Panel, Room, convert_to_keras, pytorch_room, tensorflow_room  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOMS = ("PyTorch", "TensorFlow")
BATCH = 50
WIDTH = 28


def open_room(name: str, checkpoint: Path, out: Path) -> Room:
    """One of `ROOMS`; TensorFlow's answers from the checkpoint as converted into a folder of `out`."""
    if name == "PyTorch":
        return pytorch_room(checkpoint)
    convert_to_keras(checkpoint, out / "keras")
    return tensorflow_room(out / "keras")


def show_questions(panel: Panel, photographs: Photographs, numbers: Sequence[int], depth: str) -> None:
    """Each photograph with three questions about it."""
    for number in numbers:
        label = int(photographs.labels[number])
        other = (label + 3) % len(THINGS)
        dialogues = [naming(number, label), yes_no(number, label, label), yes_no(number, label, other)]
        given = panel.ask(dialogues, photographs)
        lines = ["", f"{'question':32}" + "".join(f"{name:22}" for name in panel.rooms) + "truth", ""]
        for row, dialogue in enumerate(dialogues):
            question = f"{dialogue[0].question[-1]:32}"
            truth = dialogue[0].answer
            cells = [painted(f"{texts[row]:22}", texts[row] == truth, depth) for texts in given.values()]
            lines.append(question + "".join(cells) + truth)
        print("\n".join(beside(half_blocks(photographs.pixels[number], depth), lines, widths=[WIDTH])), end="\n\n")


def show_conversation(panel: Panel, photographs: Photographs, numbers: Sequence[int], depth: str) -> None:
    """A conversation about three photographs; the first room's answers become part of the next prompt."""
    first, second, third = numbers
    labels = [int(photographs.labels[number]) for number in numbers]
    drawings = [half_blocks(photographs.pixels[number], depth) for number in numbers]
    print("\n".join(beside(*drawings, widths=[WIDTH] * 3)))
    print("".join(f"{f'photograph {letter}':{WIDTH + 3}}" for letter in "ABC").rstrip(), end="\n\n")
    letters = dict(zip(numbers, "ABC", strict=True))
    turns = [
        *ordinal([first, second], labels[:2], 0),
        Turn(("What is the second picture?",), sentence(labels[1])),
        *naming(third, labels[2], "And this?"),
        Turn(("What was the first picture?",), sentence(labels[0])),
    ]
    width = max(len(name) for name in panel.rooms)
    history: Dialogue = []
    for turn in turns:
        given = {name: text for name, (text,) in panel.ask([[*history, turn]], photographs).items()}
        asked = " ".join(f"[photograph {letters[item]}]" if isinstance(item, int) else item for item in turn.question)
        print(f"  {'User':{width}}  {asked}")
        for name, answer in given.items():
            print(f"  {name:{width}}  {painted(answer, answer == turn.answer, depth)}")
        print(f"  {'truth':{width}}  {turn.answer}\n")
        history.append(Turn(turn.question, next(iter(given.values()))))


def measure(panel: Panel, photographs: Photographs, sheet: Path) -> None:
    """Naming accuracy on all shipped photographs, by class, and the contact sheet of the first room's answers."""
    order = np.argsort(photographs.labels, kind="stable")
    given: dict[str, list[str]] = {name: [] for name in panel.rooms}
    with tqdm(total=len(order) * len(panel.rooms), desc="naming the shipped photographs", unit="photo") as progress:
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH].tolist()
            dialogues = [naming(number, int(photographs.labels[number])) for number in numbers]
            for name, texts in panel.ask(dialogues, photographs).items():
                given[name] += texts
                progress.update(len(texts))
    truth = [sentence(int(label)) for label in photographs.labels[order]]
    right = {name: np.array(texts) == np.array(truth) for name, texts in given.items()}
    print(f"\n{'class':24}" + "".join(f"{name:>12}" for name in panel.rooms))
    for label, thing in enumerate(THINGS):
        of_class = photographs.labels[order] == label
        print(f"{thing:24}" + "".join(f"{right[name][of_class].mean():>12.0%}" for name in panel.rooms))
    print(f"{f'all {len(order)}':24}" + "".join(f"{right[name].mean():>12.1%}" for name in panel.rooms))
    name = next(iter(panel.rooms))
    columns = len(order) // len(THINGS)
    contact_sheet(photographs.pixels[order], given[name], right[name], columns, sheet)
    print(f"\ncontact sheet, one row per class: {sheet}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=FASHION / "checkpoint")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for what is written")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS, help="who answers")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    depth = colour_depth()
    photographs = load_shipped("test")
    panel = Panel({name: open_room(name, options.checkpoint, options.out) for name in options.rooms})

    print("Questions about photographs (Fashion-MNIST, test split)\n")
    show_questions(panel, photographs, [0, 61, 122, 183], depth)
    print("A conversation about three photographs\n")
    show_conversation(panel, photographs, [18, 2, 44], depth)
    print("Questions without a photograph\n")
    texts = [("What do you run in?", "A sneaker."), ("Where do you wear a coat?", "On the upper body.")]
    given = panel.ask([[Turn((question,), answer)] for question, answer in texts])
    print(f"  {'question':32}" + "".join(f"{name:22}" for name in panel.rooms) + "truth\n")
    for row, (question, truth) in enumerate(texts):
        cells = "".join(painted(f"{answers[row]:22}", answers[row] == truth, depth) for answers in given.values())
        print(f"  {question:32}{cells}{truth}")
    print()
    measure(panel, photographs, options.out / "contact-sheet.png")
    print(f"{time.perf_counter() - start:.0f} seconds in all")
    if panel.first_difference:
        print(f"The rooms differ: {panel.first_difference}", file=sys.stderr)
        return 1
    if len(panel.rooms) > 1:
        print(f"{' and '.join(panel.rooms)} gave the same {panel.count} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
