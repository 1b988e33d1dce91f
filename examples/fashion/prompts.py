"""What the small IDEFICS is asked, and what it should answer: dialogues about Fashion-MNIST photographs.

A `Dialogue` is a list of turns. A turn's question is a list of strings and photograph numbers (an `int` is an
index into the photographs of the split at hand), its answer a string. `to_prompt` turns a dialogue into the
list of strings and images that `IdeficsProcessor` takes, in the format of the published instruct checkpoints:

    User:<image>What is this?<end_of_utterance>
    Assistant: An ankle boot.<end_of_utterance>

Kinds of dialogue: naming, yes/no, two or three photographs in one question, a conversation over several turns,
and questions without a photograph. Questions without a photograph come from templates filled with class names;
every `HELD_OUT_EVERY`-th (question, class) pair never appears in training and measures whether the template was
learned rather than the sentence.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# In the order of the Fashion-MNIST labels 0..9.
THINGS = (
    "a T-shirt",
    "a pair of trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
ORDINALS = ("first", "second", "third")

NAMING = ("What is this?", "What do you see?", "What does the picture show?", "Name this.")
YES_NO = ("Is this {}?", "Do you see {}?", "Does the picture show {}?")
ORDINAL = ("What is the {} picture?", "What does the {} picture show?", "Name the {} picture.")
WHICH = ("Which picture shows {}?", "Where do you see {}?")
SAME = ("Do the pictures show the same?", "Are these the same?")
NEXT = ("And this?", "And what is this?", *NAMING)
RECALL = ("What was the {} picture?", "What did the {} picture show?")

WORN_ON = (
    "the upper body", "the legs", "the upper body", "the whole body", "the upper body",
    "the feet", "the upper body", "the feet", "the hand", "the feet",
)  # fmt: skip
# Template -> the answer for each class, in label order.
TEXT_TEMPLATES = {
    "Where do you wear {}?": tuple(f"On {part}." for part in WORN_ON),
    "Where does {} go?": tuple(f"On {part}." for part in WORN_ON),
    "Which part of the body is {} for?": tuple(f"{part[0].upper()}{part[1:]}." for part in WORN_ON),
    **{
        question: tuple("Yes." if part == "the feet" else "No." for part in WORN_ON)
        for question in ("Is {} worn on the feet?", "Does {} go on the feet?", "Do you walk in {}?")
    },
    **{
        question: tuple("Yes." if part == "the upper body" else "No." for part in WORN_ON)
        for question in ("Is {} worn on the upper body?", "Does {} cover the arms but not the legs?")
    },
    **{
        question: tuple("Yes." if thing == "a bag" else "No." for thing in THINGS)
        for question in ("Can you carry books in {}?", "Do you put things into {}?")
    },
}
# Fixed pairs, always in training.
TEXT_PAIRS = (
    ("Name something to carry things in.", "A bag."),
    ("What covers the legs?", "A pair of trousers."),
    ("What do you wear on the feet in summer?", "A sandal."),
    ("What do you wear on the feet in winter?", "An ankle boot."),
    ("What do you run in?", "A sneaker."),
    ("What do you wear over everything else?", "A coat."),
    ("What has buttons and a collar?", "A shirt."),
    ("Name something warm to pull over the head.", "A pullover."),
    ("What covers the whole body?", "A dress."),
    ("What has short sleeves and no buttons?", "A T-shirt."),
)
HELD_OUT_EVERY = 7
LONGEST_ANSWER = 12
"""Tokens to generate; the longest answers have half as many, with their end."""


@dataclass(frozen=True)
class Turn:
    """A question (strings and photograph numbers, in reading order) and its answer."""

    question: tuple[str | int, ...]
    answer: str


Dialogue = list[Turn]


def sentence(label: int) -> str:
    """`9` -> `"An ankle boot."`"""
    return THINGS[label][0].upper() + THINGS[label][1:] + "."


def to_prompt(dialogue: Dialogue, photographs=None, *, answered: bool = False) -> list:
    """The prompt that `IdeficsProcessor` takes, up to `Assistant:` or with the last answer and its end.

    Args:
        dialogue: turns; every answer but the last is part of the prompt.
        photographs: anything indexed by photograph number; None leaves the numbers in place.
        answered: append the last answer and `<end_of_utterance>`, as in training. Between two neighbouring
            strings the processor writes `<end_of_utterance>` itself, after the last one it does not.
    """
    prompt: list = []
    for position, turn in enumerate(dialogue):
        user = "User:" if position == 0 else "\nUser:"
        first, *rest = turn.question
        # A string joins the "User:" before it; as a string of its own it would look like a new turn.
        prompt += [f"{user} {first}"] if isinstance(first, str) else [user, first]
        prompt += rest
        is_last = position == len(dialogue) - 1
        if not is_last:
            prompt.append(f"\nAssistant: {turn.answer}")
        elif answered:
            prompt.append(f"\nAssistant: {turn.answer}<end_of_utterance>")
        else:
            prompt.append("\nAssistant:")
    if photographs is None:
        return prompt
    return [photographs[item] if isinstance(item, int) else item for item in prompt]


def naming(photo: int, label: int, question: str = NAMING[0]) -> Dialogue:
    return [Turn((photo, question), sentence(label))]


def yes_no(photo: int, label: int, asked: int, question: str = YES_NO[0]) -> Dialogue:
    """Is the photograph, whose class is `label`, of class `asked`?"""
    return [Turn((photo, question.format(THINGS[asked])), "Yes." if label == asked else "No.")]


def ordinal(photos: list[int], labels: list[int], which: int, question: str = ORDINAL[0]) -> Dialogue:
    """Several photographs side by side; what is number `which` (from 0)?"""
    return [Turn((*photos, question.format(ORDINALS[which])), sentence(labels[which]))]


@lru_cache
def text_questions() -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """All questions without a photograph: (those trained on, those held out)."""
    filled = [
        Turn((template.format(thing),), answer)
        for template, answers in TEXT_TEMPLATES.items()
        for thing, answer in zip(THINGS, answers, strict=True)
    ]
    held_out = tuple(filled[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    trained = tuple(turn for turn in filled if turn not in held_out)
    return trained + tuple(Turn((question,), answer) for question, answer in TEXT_PAIRS), held_out


class DialogueSampler:
    """Draws training dialogues about random photographs.

    Args:
        labels: integer array, the class of every photograph.
        rng: source of all randomness, so that a seed fixes the dialogues.
    """

    def __init__(self, labels: np.ndarray, rng: np.random.Generator):
        self.labels = labels
        self.rng = rng
        self.by_class = [np.flatnonzero(labels == label) for label in range(len(THINGS))]

    def about_one(self, photo: int) -> Dialogue:
        """Naming three times as often as yes/no; half of the yes/no questions have the answer yes."""
        label = int(self.labels[photo])
        if self.rng.random() < 3 / 4:
            return naming(photo, label, self._pick(NAMING))
        return yes_no(photo, label, self._asked_class(label), self._pick(YES_NO))

    def about_many_or_none(self, photos: list[int]) -> Dialogue:
        """Up to three photographs in one question, a conversation, or a question without a photograph."""
        kind = self.rng.choice(5, p=[0.4, 0.15, 0.1, 0.2, 0.15])
        makers = (self._ordinal, self._which, self._same, self._conversation, self._text)
        return makers[kind](photos)

    def _pick(self, options):
        return options[self.rng.integers(len(options))]

    def _asked_class(self, label: int) -> int:
        if self.rng.random() < 0.5:
            return label
        return int((label + self.rng.integers(1, len(THINGS))) % len(THINGS))

    def _labels_of(self, photos: list[int]) -> list[int]:
        return [int(self.labels[photo]) for photo in photos]

    def _ordinal(self, photos: list[int]) -> Dialogue:
        photos = photos[: self.rng.integers(2, 4)]
        order = self.rng.permutation(len(photos))[:2]
        first = ordinal(photos, self._labels_of(photos), order[0], self._pick(ORDINAL))
        second = ordinal(photos, self._labels_of(photos), order[1], self._pick(ORDINAL))
        return [*first, Turn(second[0].question[len(photos) :], second[0].answer)]

    def _which(self, photos: list[int]) -> Dialogue:
        photos = photos[:2]
        labels = self._labels_of(photos)
        which = int(self.rng.integers(2))
        if labels[0] == labels[1]:
            return self._same(photos)
        question = self._pick(WHICH).format(THINGS[labels[which]])
        return [Turn((*photos, question), f"The {ORDINALS[which]}.")]

    def _same(self, photos: list[int]) -> Dialogue:
        first, second = photos[:2]
        if self.rng.random() < 0.5:
            second = int(self._pick(self.by_class[self.labels[first]]))
        answer = "Yes." if self.labels[first] == self.labels[second] else "No."
        return [Turn((first, second, self._pick(SAME)), answer)]

    def _conversation(self, photos: list[int]) -> Dialogue:
        """Photographs one after the other, then, sometimes, a question back."""
        photos = photos[: self.rng.integers(2, 4)]
        labels = self._labels_of(photos)
        turns = naming(photos[0], labels[0], self._pick(NAMING))
        for photo, label in zip(photos[1:], labels[1:], strict=True):
            if self.rng.random() < 0.3:
                turns += yes_no(photo, label, self._asked_class(label), self._pick(YES_NO))
            else:
                turns += naming(photo, label, self._pick(NEXT))
        if self.rng.random() < 0.5:
            back = int(self.rng.integers(len(photos)))
            turns.append(Turn((self._pick(RECALL).format(ORDINALS[back]),), sentence(labels[back])))
        return turns

    def _text(self, photos: list[int]) -> Dialogue:
        trained, _ = text_questions()
        return [self._pick(trained), self._pick(trained)]
