"""Which tokens of processed prompts a model is trained on: labels, -100 where there is no loss.

Never trained on are pads, the tokens that stand for images, and the first token of a row: nothing comes before it but,
with left padding, a pad, and the loss must not depend on the side of the padding. Beyond that `label_turns` chooses:

* "all": everything else.
* "assistant": what the assistant says, in every turn.
* "last_assistant": what the assistant says in the last of its turns, the answer.

Turns are read off the prompt's text. A turn begins with ``User:`` or ``Assistant:``, white space before it aside, at
the start of a text segment, of a line, or right after ``<end_of_utterance>``; elsewhere these words are ordinary text.
What the assistant says begins after the colon and ends with the first ``<end_of_utterance>``, that token included,
because the model has to learn to stop; without one it ends where the next turn begins, or with the prompt (an end of
text included). A token that lies partly inside counts as inside.
"""

import re
from collections.abc import Sequence

import numpy as np

from idefics_common.prompts.prompt import END_OF_UTTERANCE_TOKEN, Prompt

IGNORE_INDEX = -100
LABEL_TURNS = ("all", "assistant", "last_assistant")

_TURN = re.compile(r"\s*(User|Assistant):")
_BOUNDARY = re.compile(f"\n|{END_OF_UTTERANCE_TOKEN}")


def check_label_turns(label_turns: str) -> None:
    """Raise `ValueError` for a choice that is none."""
    if label_turns not in LABEL_TURNS:
        raise ValueError(f"label_turns must be one of {', '.join(LABEL_TURNS)}; got {label_turns!r}.")


def make_labels(input_ids: np.ndarray, attention_mask: np.ndarray, ignored_token_ids: Sequence[int]) -> np.ndarray:
    """Labels for "all" turns.

    Args:
        input_ids: integers (B, T).
        attention_mask: (B, T), 0 on pads.
        ignored_token_ids: tokens without loss, the image tokens.

    Returns:
        int64 (B, T): a copy of `input_ids` with -100 on pads, on ignored tokens and on the first token of each row.

    Raises:
        ValueError: naming the prompt of which nothing is left.
    """
    is_text_BT = attention_mask.astype(bool)
    is_first_BT = is_text_BT & (np.cumsum(is_text_BT, axis=1) == 1)
    has_loss_BT = is_text_BT & ~is_first_BT & ~np.isin(input_ids, list(ignored_token_ids))
    labels = np.where(has_loss_BT, input_ids, IGNORE_INDEX).astype(np.int64)
    _check_something_to_learn(labels, "of its text")
    return labels


def keep_assistant_turns(
    labels: np.ndarray, prompts: Sequence[Prompt], offsets: np.ndarray, label_turns: str
) -> np.ndarray:
    """Put -100 on what the assistant does not say.

    Args:
        labels: int64 (B, T), from `make_labels`.
        prompts: the B prompts behind them.
        offsets: (B, T, 2), the first character of each token in its prompt's text and the one after its last.
        label_turns: "assistant" or "last_assistant".

    Returns:
        New labels of the same shape.

    Raises:
        ValueError: naming the prompt that has no turn of the assistant, or of whose turn no token is left.
    """
    start_BT, end_BT = offsets[..., 0], offsets[..., 1]
    said_BT = np.zeros(labels.shape, dtype=bool)
    for row, prompt in enumerate(prompts):
        spans = assistant_spans(prompt)
        if not spans:
            raise ValueError(
                f"prompt {row} has no turn that begins with 'Assistant:' at the start of a text segment or of a line, "
                f"so label_turns={label_turns!r} would leave nothing to learn; label_turns='all' takes any text."
            )
        for start, end in spans[-1:] if label_turns == "last_assistant" else spans:
            said_BT[row] |= (start_BT[row] < end) & (end_BT[row] > start)
    labels = np.where(said_BT, labels, IGNORE_INDEX)
    _check_something_to_learn(labels, "of what the assistant says")
    return labels


def _check_something_to_learn(labels: np.ndarray, part: str) -> None:
    """A mean over no labels is NaN, and a training step with it ruins every weight, so a row must have one."""
    empty_rows = np.flatnonzero((labels == IGNORE_INDEX).all(axis=1))
    if empty_rows.size:
        raise ValueError(
            f"prompt {empty_rows[0]}: nothing {part} is left to learn; truncation to {labels.shape[1]} tokens cut it "
            "off, or there was none."
        )


def assistant_spans(prompt: Prompt) -> list[tuple[int, int]]:
    """Where in `prompt.text` the assistant speaks: (first character, one after the last) for each of its turns."""
    text = prompt.text
    boundaries = {*prompt.segment_starts, *(match.end() for match in _BOUNDARY.finditer(text))}
    turns = {}  # by the place of the speaker's name: several boundaries may lead to the same one
    for boundary in boundaries:
        if turn := _TURN.match(text, boundary):
            turns[turn.start(1)] = turn
    ordered = [turns[start] for start in sorted(turns)]
    spans = []
    for index, turn in enumerate(ordered):
        if turn[1] == "Assistant":
            limit = ordered[index + 1].start(1) if index + 1 < len(ordered) else len(text)
            stop = text.find(END_OF_UTTERANCE_TOKEN, turn.end(), limit)
            spans.append((turn.end(), limit if stop < 0 else stop + len(END_OF_UTTERANCE_TOKEN)))
    return spans
