"""The shipped IDEFICS answers about photographs it has never seen, and what trains and measures it is right.

Bounds lie below the values in examples/fashion/README.md, which are measured on all 10,000 test photographs; here
the 200 shipped ones must do.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "fashion")]

import evaluate  # noqa: E402
import train  # noqa: E402
from batches import BatchBuilder, shift_and_mirror  # noqa: E402
from data import Photographs, load_shipped  # noqa: E402
from drawing import beside, half_blocks  # noqa: E402
from prompts import (  # noqa: E402
    DialogueSampler,
    Turn,
    naming,
    sentence,
    text_questions,
    to_prompt,
)

from idefics_common import IdeficsProcessor  # noqa: E402
from idefics_pt import IdeficsForVisionText2Text  # noqa: E402

CHECKPOINT = EXAMPLES / "fashion" / "checkpoint"


@pytest.fixture(scope="module")
def processor():
    return IdeficsProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return IdeficsForVisionText2Text.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def photographs():
    return load_shipped("test")


def test_checkpoint_has_every_part_and_fits_ten_megabytes(model):
    config = model.config
    assert config.use_resampler
    assert config.qk_layer_norms
    assert config.perceiver_config.qk_layer_norms_perceiver
    assert config.cross_layer_interval >= 2
    assert len(model.model.gated_cross_attn_layers) >= 2
    assert config.additional_vocab_size == 3
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 10_000_000


def test_names_shipped_photographs_but_not_shuffled_ones(model, processor, photographs):
    assert evaluate.naming_accuracy(model, processor, photographs) >= 0.86
    assert evaluate.shuffled_accuracy(model, processor, photographs, np.random.default_rng(0)) <= 0.2


def test_answers_yes_no_and_text_questions(model, processor, photographs):
    few = Photographs(photographs.pixels[:60], photographs.labels[:60])
    assert evaluate.yes_no_accuracy(model, processor, few, np.random.default_rng(0)) >= 0.9
    assert evaluate.text_accuracy(model, processor)[0] >= 0.95


def test_two_photographs_are_told_apart_by_their_order(model, processor, photographs):
    """A sneaker and a bag, which the model never mixes up: exchanging them must exchange the answers."""
    sneaker, bag = (int(np.flatnonzero(photographs.labels == label)[0]) for label in (7, 8))
    prompts = [
        to_prompt([Turn((*pair, f"What is the {word} picture?"), "")], photographs)
        for pair in ((sneaker, bag), (bag, sneaker))
        for word in ("first", "second")
    ]
    given = evaluate.answers(model, processor, prompts)
    assert given == ["A sneaker.", "A bag.", "A bag.", "A sneaker."]


def test_conversation_remembers_the_first_photograph(model, processor, photographs):
    bag, boot = (int(np.flatnonzero(photographs.labels == label)[0]) for label in (8, 9))
    turns = [*naming(bag, 8), *naming(boot, 9, "And this?"), Turn(("What was the first picture?",), sentence(8))]
    given = evaluate.answers(model, processor, [to_prompt(turns[: n + 1], photographs) for n in range(3)])
    assert given == ["A bag.", "An ankle boot.", "A bag."]


def test_prompts_are_in_the_instruct_format(processor):
    """Spaces are the tokenizer's: LLaMA's writes one after every special token."""
    dialogue = [*naming(0, 8), Turn(("Is it a coat?",), "No."), *naming(1, 9, "And this?")]
    ids = processor(to_prompt(dialogue, load_shipped("test"), answered=True), return_tensors="pt")["input_ids"][0]
    photo = "<fake_token_around_image><image><fake_token_around_image>"
    assert processor.tokenizer.decode(ids) == (
        f"<s> User:{photo} What is this?<end_of_utterance> \nAssistant: A bag.<end_of_utterance> "
        "\nUser: Is it a coat?<end_of_utterance> \nAssistant: No.<end_of_utterance> "
        f"\nUser:{photo} And this?<end_of_utterance> \nAssistant: An ankle boot.<end_of_utterance>"
    )


def test_batches_are_what_the_processor_makes(processor):
    """Token ids, masks, pixels and labels, for every kind of dialogue; the labels spell the answers."""
    photographs = load_shipped("train")
    sampler = DialogueSampler(photographs.labels, np.random.default_rng(0))
    dialogues = [sampler.about_one(photo) for photo in range(8)]
    dialogues += [sampler.about_many_or_none([3 * n, 3 * n + 1, 3 * n + 2]) for n in range(40)]
    builder = BatchBuilder(processor.tokenizer, photographs, train.PIXEL_MEAN, train.PIXEL_STD)
    batch = builder(dialogues)
    prompts = [to_prompt(dialogue, photographs, answered=True) for dialogue in dialogues]
    expected = processor(prompts, return_tensors="pt", return_labels=True, label_turns="assistant")
    assert set(batch) == set(expected)
    for name in ("input_ids", "attention_mask", "image_attention_mask", "labels"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=1e-6, atol=1e-6)

    for row, dialogue in enumerate(dialogues):
        labels = batch["labels"][row]
        texts = processor.tokenizer.decode(labels[labels != -100]).split("<end_of_utterance>")
        assert [text.strip() for text in texts] == [turn.answer for turn in dialogue] + [""]


def test_held_out_questions_are_never_drawn():
    trained, held_out = text_questions()
    sampler = DialogueSampler(np.arange(30) % 10, np.random.default_rng(0))
    drawn = {turn.question for _ in range(3000) for turn in sampler.about_many_or_none([0, 1, 2])}
    assert {turn.question for turn in trained} <= drawn
    assert not {turn.question for turn in held_out} & drawn


def test_shift_and_mirror_moves_whole_photographs():
    grey = np.zeros((64, 28, 28), np.uint8)
    grey[:, 5, 9] = 200
    moved = shift_and_mirror(grey, np.random.default_rng(0))
    found = np.argwhere(moved == 200)
    assert len(found) == len(grey)
    assert set(found[:, 1]) == {4, 5, 6}
    assert set(found[:, 2]) == {8, 9, 10, 27 - 8, 27 - 9, 27 - 10}


def test_a_few_training_steps_lower_the_loss(processor):
    torch.manual_seed(0)
    photographs = load_shipped("train")
    tiny = train.build_config(
        processor.tokenizer,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        cross_layer_interval=1,
        vision_config={
            "embed_dim": 32, "image_size": 28, "patch_size": 7, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )  # fmt: skip
    model = IdeficsForVisionText2Text._from_config(tiny, attn_implementation="eager")
    builder = BatchBuilder(processor.tokenizer, photographs, train.PIXEL_MEAN, train.PIXEL_STD)
    curriculum = train.Curriculum(photographs.labels, 8, 4, np.random.default_rng(0))
    arguments = argparse.Namespace(muon_rate=0.02, adam_rate=5e-3, bfloat16=False)
    losses = train.train(model, builder, curriculum, 40, arguments)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_half_blocks_show_every_pixel():
    grey = np.array([[0, 255], [255, 0], [0, 0], [255, 255]], np.uint8)
    assert half_blocks(grey, "none") == ["==", "=="]
    top, bottom = half_blocks(grey, "true")
    black_over_white = "\x1b[38;2;0;0;0;48;2;255;255;255m▀"
    white_over_black = "\x1b[38;2;255;255;255;48;2;0;0;0m▀"
    assert top == black_over_white + white_over_black + "\x1b[0m"
    assert bottom == black_over_white * 2 + "\x1b[0m"
    assert half_blocks(grey, "256")[0].startswith("\x1b[38;5;232;48;5;255m▀")
    assert beside(["ab", "cd"], ["x"], widths=[2, 1]) == ["ab   x", "cd"]
