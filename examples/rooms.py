"""Who answers in the demo: one room for each framework, and all of them together.

A room turns prompts into greedy answers. PyTorch's loads the shipped checkpoint; TensorFlow's loads what
`convert-weights` has made of it.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prompts import LONGEST_ANSWER, Dialogue, to_prompt

from idefics_common import IdeficsProcessor

Room = Callable[[Sequence[list]], list[str]]
_PROMPT_LENGTH = 128 - LONGEST_ANSWER


def convert_to_keras(checkpoint: Path, directory: Path) -> None:
    """Run `convert-weights` as a command of its own, as on a terminal; it replaces what an earlier demo has written.

    Raises:
        subprocess.CalledProcessError: if it did not prove that both are the same model; it has said why.
    """
    arguments = [str(checkpoint), str(directory), "--to", "keras", "--verify", "forward", "--overwrite"]
    print(f"$ convert-weights {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "conversion.cli", *arguments], check=True)
    print()


def pytorch_room(checkpoint: Path) -> Room:
    """PyTorch, from a directory in the home format."""
    from evaluate import answers

    from idefics_pt import IdeficsForVisionText2Text

    processor = IdeficsProcessor.from_pretrained(checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint).eval()
    return lambda prompts: answers(model, processor, prompts)


def tensorflow_room(directory: Path) -> Room:
    """Keras on TensorFlow, from a directory that `convert-weights --to keras` has written, and nothing else."""
    from idefics_tf import TFIdeficsForVisionText2Text

    processor = IdeficsProcessor.from_pretrained(directory)
    model = TFIdeficsForVisionText2Text.from_pretrained(directory)

    def answer(prompts: Sequence[list]) -> list[str]:
        # padded to one length, so that `generate` compiles for one bucket of lengths instead of two
        inputs = processor(prompts, padding="max_length", max_length=_PROMPT_LENGTH, return_tensors="tf")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    return answer


class Panel:
    """Rooms that are asked the same questions, and what they disagreed about.

    Args:
        rooms: by the name of their framework.

    Attributes:
        count: the number of questions so far.
        first_difference: None, or the first question that was not answered by all rooms with the same words.
    """

    def __init__(self, rooms: dict[str, Room]):
        self.rooms = rooms
        self.count = 0
        self.first_difference: str | None = None

    def ask(self, dialogues: Sequence[Dialogue], photographs=None) -> dict[str, list[str]]:
        """Every room's answers to the last questions of the dialogues."""
        prompts = [to_prompt(dialogue, photographs) for dialogue in dialogues]
        given = {name: room(prompts) for name, room in self.rooms.items()}
        for dialogue, *texts in zip(dialogues, *given.values(), strict=True):
            self.count += 1
            if len(set(texts)) > 1 and self.first_difference is None:
                question = " ".join(
                    f"[photograph {item}]" if isinstance(item, int) else item for item in dialogue[-1].question
                )
                said = ", ".join(f"{name}: {text!r}" for name, text in zip(given, texts, strict=True))
                self.first_difference = f"question {self.count}, {question}: {said}"
        return given
