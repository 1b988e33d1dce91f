"""What the fine-tuning examples teach: a question about a photograph that the shipped model answers wrong.

The model can name a photograph, and knows where "a sneaker" is worn, but asked "Where do you wear this?" about a
photograph it gives the name. The training prompts ask that, and, so that nothing is forgotten, "What is this?".
"""

from data import Photographs
from evaluate import answers
from prompts import NAMING, WORN_ON, Turn, sentence, to_prompt

QUESTION = "Where do you wear this?"


def dialogues(photographs: Photographs, question: str) -> list:
    """One dialogue per photograph, with the right answer."""
    answer = {QUESTION: lambda label: f"On {WORN_ON[label]}.", NAMING[0]: sentence}[question]
    return [[Turn((photo, question), answer(label))] for photo, label in enumerate(photographs.labels.tolist())]


def training_prompts(photographs: Photographs) -> list[dict]:
    """Both questions about every photograph, answered, as `IdeficsCollator` takes them."""
    return [
        {"prompt": to_prompt(dialogue, photographs, answered=True)}
        for question in (QUESTION, NAMING[0])
        for dialogue in dialogues(photographs, question)
    ]


def accuracy(model, processor, photographs: Photographs) -> dict[str, float]:
    """By question, the share of photographs for which the greedy answer is exactly the right one."""
    was_training = model.training
    model.eval()
    shares = {}
    for question in (QUESTION, NAMING[0]):
        asked = dialogues(photographs, question)
        given = answers(model, processor, [to_prompt(dialogue, photographs) for dialogue in asked])
        right = [text == dialogue[-1].answer for text, dialogue in zip(given, asked, strict=True)]
        shares[question] = sum(right) / len(right)
    model.train(was_training)
    return shares


def report(before: dict[str, float], after: dict[str, float]) -> str:
    """A table of two results of `accuracy`."""
    lines = [f"{'right on photographs never seen':34}{'before':>10}{'after':>10}"]
    lines += [f"{question:34}{before[question]:>10.0%}{after[question]:>10.0%}" for question in before]
    return "\n".join(lines)
