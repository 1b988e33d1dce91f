"""Training batches: dialogues to token ids, masks, pixels and labels, without a Python loop over tokens.

`IdeficsProcessor` does the same work one image file at a time, with resizing and checks that photographs of the
right size do not need. What comes out is the same, which `tests/pt/test_fashion_example.py` asserts. Labels are
-100 except on the answers and the `<end_of_utterance>` after each.

Axes: `B` batch, `T` tokens, `I` images of the row with the most.
"""

import numpy as np
import torch
from data import Photographs
from prompts import Dialogue, to_prompt
from tokenizer import IMAGE_TOKENS

IGNORED = -100


class BatchBuilder:
    """Makes model inputs from dialogues about the photographs of one split.

    Args:
        tokenizer: the tokenizer of `tokenizer.py`.
        photographs: the split that the dialogues' photograph numbers refer to.
        mean, std: of the pixels, 0..1, the same in every channel; those of `preprocessor_config.json`.
    """

    def __init__(self, tokenizer, photographs: Photographs, mean: float, std: float):
        self.tokenizer = tokenizer
        self.photographs = photographs
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.fake, self.image, self.end_of_utterance = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
        self._segments: dict[str, list[int]] = {}

    def __call__(self, dialogues: list[Dialogue], rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` `(B, T)`, `image_attention_mask` `(B, T, I)`, all int64, padded on
        the left, and `pixel_values` float32 `(B, I, 3, 28, 28)`; with `rng`, photographs are shifted and mirrored.
        """
        rows = [self._encode(dialogue) for dialogue in dialogues]
        length = max(len(ids) for ids, _, _ in rows)
        num_images = max(1, *(len(photos) for _, _, photos in rows))
        ids_BT = np.full((len(rows), length), self.tokenizer.pad_token_id, np.int64)
        real_BT = np.zeros((len(rows), length), np.int64)
        labels_BT = np.full((len(rows), length), IGNORED, np.int64)
        pixels = np.zeros((len(rows), num_images, 3, *self.photographs.pixels.shape[1:]), np.float32)
        for row, (ids, is_answer, photos) in enumerate(rows):
            ids_BT[row, -len(ids) :] = ids
            real_BT[row, -len(ids) :] = 1
            labels_BT[row, -len(ids) :] = np.where(is_answer, ids, IGNORED)
            if photos:
                pixels[row, : len(photos)] = self._pixels(np.asarray(photos), rng)[:, None]
        seen_BT = np.cumsum(ids_BT == self.image, axis=1)
        images_BTI = seen_BT[:, :, None] == np.arange(1, num_images + 1)
        return {
            "input_ids": torch.from_numpy(ids_BT),
            "attention_mask": torch.from_numpy(real_BT),
            "image_attention_mask": torch.from_numpy(images_BTI.astype(np.int64)),
            "pixel_values": torch.from_numpy(pixels),
            "labels": torch.from_numpy(labels_BT),
        }

    def _encode(self, dialogue: Dialogue) -> tuple[list[int], list[bool], list[int]]:
        """Token ids of one answered dialogue, whether each is part of an answer, and its photograph numbers."""
        ids, is_answer, photos = [self.tokenizer.bos_token_id], [False], []
        previous: str | int | None = None
        for item in to_prompt(dialogue, answered=True):
            if isinstance(item, int):
                new = [self.image, self.fake] if isinstance(previous, int) else [self.fake, self.image, self.fake]
                photos.append(item)
                flags = [False] * len(new)
            else:
                new = [self.end_of_utterance] if isinstance(previous, str) else []
                # The separator that ends an answer is part of it; one that ends a question is not.
                flags = [isinstance(previous, str) and previous.startswith("\nAssistant:")] * len(new)
                segment = self._segment(item)
                prefix = len(self._segment("\nAssistant:")) if item.startswith("\nAssistant:") else len(segment)
                new = new + segment
                flags += [False] * prefix + [True] * (len(segment) - prefix)
            ids += new
            is_answer += flags
            previous = item
        return ids, is_answer, photos

    def _segment(self, text: str) -> list[int]:
        """Special tokens part segments from each other, so that a segment's ids do not depend on its neighbours."""
        if text not in self._segments:
            self._segments[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._segments[text]

    def _pixels(self, photos: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Normalised `(len(photos), 28, 28)`."""
        grey = self.photographs.pixels[photos]
        if rng is not None:
            grey = shift_and_mirror(grey, rng)
        return (grey.astype(np.float32) * np.float32(1 / 255) - self.mean) / self.std


def shift_and_mirror(grey: np.ndarray, rng: np.random.Generator, reach: int = 1) -> np.ndarray:
    """Every image moved by up to `reach` pixels (black comes in) and mirrored left to right half of the time."""
    count, height, width = grey.shape
    padded = np.pad(grey, ((0, 0), (reach, reach), (reach, reach)))
    down, right = rng.integers(0, 2 * reach + 1, (2, count, 1))
    moved = padded[
        np.arange(count)[:, None, None],
        (down + np.arange(height))[:, :, None],
        (right + np.arange(width))[:, None, :],
    ]
    return np.where(rng.random((count, 1, 1)) < 0.5, moved[:, :, ::-1], moved)
