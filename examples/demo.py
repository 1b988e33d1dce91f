"""`make demo`: the shipped IDEFICS answers questions about photographs that it has never seen.

Prints photographs with questions and answers, a conversation about several of them and the accuracy on the 200
shipped test photographs, and writes a contact sheet of those. A "room" is one framework's way to answer; with
several rooms each gets its own column.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

FASHION = Path(__file__).parent / "fashion"
sys.path.insert(0, str(FASHION))

import numpy as np  # noqa: E402
from data import Photographs, load_shipped  # noqa: E402
from drawing import beside, colour_depth, contact_sheet, half_blocks, painted  # noqa: E402
from prompts import THINGS, Dialogue, Turn, naming, ordinal, sentence, to_prompt, yes_no  # noqa: E402
from tqdm import tqdm  # noqa: E402

Room = Callable[[Sequence[list]], list[str]]
BATCH = 50
WIDTH = 28


def pytorch_room(checkpoint: Path) -> Room:
    from evaluate import answers

    from idefics_common import IdeficsProcessor
    from idefics_pt import IdeficsForVisionText2Text

    processor = IdeficsProcessor.from_pretrained(checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint).eval()
    return lambda prompts: answers(model, processor, prompts)


ROOMS: dict[str, Callable[[Path], Room]] = {"PyTorch": pytorch_room}


def ask(rooms: dict[str, Room], dialogues: list[Dialogue], photographs: Photographs | None) -> dict[str, list[str]]:
    """Every room's answers to the last questions of the dialogues."""
    prompts = [to_prompt(dialogue, photographs) for dialogue in dialogues]
    return {name: room(prompts) for name, room in rooms.items()}


def show_questions(rooms: dict[str, Room], photographs: Photographs, numbers: Sequence[int], depth: str) -> None:
    """Each photograph with three questions about it."""
    for number in numbers:
        label = int(photographs.labels[number])
        other = (label + 3) % len(THINGS)
        dialogues = [naming(number, label), yes_no(number, label, label), yes_no(number, label, other)]
        given = ask(rooms, dialogues, photographs)
        lines = ["", f"{'question':32}" + "".join(f"{name:22}" for name in rooms) + "truth", ""]
        for row, dialogue in enumerate(dialogues):
            question = f"{dialogue[0].question[-1]:32}"
            truth = dialogue[0].answer
            cells = [painted(f"{texts[row]:22}", texts[row] == truth, depth) for texts in given.values()]
            lines.append(question + "".join(cells) + truth)
        print("\n".join(beside(half_blocks(photographs.pixels[number], depth), lines, widths=[WIDTH])), end="\n\n")


def show_conversation(rooms: dict[str, Room], photographs: Photographs, numbers: Sequence[int], depth: str) -> None:
    """A conversation about three photographs; every answer becomes part of the next prompt."""
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
    for name, room in rooms.items():
        history: Dialogue = []
        print(name)
        for turn in turns:
            (answer,) = room([to_prompt([*history, turn], photographs)])
            asked = " ".join(
                f"[photograph {letters[item]}]" if isinstance(item, int) else item for item in turn.question
            )
            print(f"  User:      {asked}")
            print(f"  Assistant: {painted(answer, answer == turn.answer, depth)}   (truth: {turn.answer})")
            history.append(Turn(turn.question, answer))
        print()


def measure(rooms: dict[str, Room], photographs: Photographs, sheet: Path) -> None:
    """Naming accuracy on all shipped photographs, by class, and the contact sheet of the first room's answers."""
    order = np.argsort(photographs.labels, kind="stable")
    given: dict[str, list[str]] = {name: [] for name in rooms}
    with tqdm(total=len(order) * len(rooms), desc="naming the shipped photographs", unit="photo") as progress:
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH].tolist()
            dialogues = [naming(number, int(photographs.labels[number])) for number in numbers]
            for name, texts in ask(rooms, dialogues, photographs).items():
                given[name] += texts
                progress.update(len(texts))
    truth = [sentence(int(label)) for label in photographs.labels[order]]
    right = {name: np.array(texts) == np.array(truth) for name, texts in given.items()}
    print(f"\n{'class':24}" + "".join(f"{name:>12}" for name in rooms))
    for label, thing in enumerate(THINGS):
        of_class = photographs.labels[order] == label
        print(f"{thing:24}" + "".join(f"{right[name][of_class].mean():>12.0%}" for name in rooms))
    print(f"{f'all {len(order)}':24}" + "".join(f"{right[name].mean():>12.1%}" for name in rooms))
    name = next(iter(rooms))
    columns = len(order) // len(THINGS)
    contact_sheet(photographs.pixels[order], given[name], right[name], columns, sheet)
    print(f"\ncontact sheet, one row per class: {sheet}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=FASHION / "checkpoint")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the contact sheet")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="who answers")
    arguments = parser.parse_args()
    start = time.perf_counter()
    depth = colour_depth()
    photographs = load_shipped("test")
    rooms = {name: ROOMS[name](arguments.checkpoint) for name in arguments.rooms}

    print("Questions about photographs (Fashion-MNIST, test split)\n")
    show_questions(rooms, photographs, [0, 61, 122, 183], depth)
    print("A conversation about three photographs\n")
    show_conversation(rooms, photographs, [18, 2, 44], depth)
    print("Questions without a photograph\n")
    texts = [("What do you run in?", "A sneaker."), ("Where do you wear a coat?", "On the upper body.")]
    dialogues = [[Turn((question,), answer)] for question, answer in texts]
    given = ask(rooms, dialogues, None)
    for row, (question, truth) in enumerate(texts):
        cells = "".join(painted(f"{answers[row]:22}", answers[row] == truth, depth) for answers in given.values())
        print(f"  {question:32}{cells}{truth}")
    print()
    measure(rooms, photographs, arguments.out / "contact-sheet.png")
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    main()
