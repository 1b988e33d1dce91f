"""Labels and the collator: what is learned, read back as text."""

import numpy as np
import pytest

from idefics_common.prompts.collator import IdeficsCollator
from idefics_common.prompts.labels import IGNORE_INDEX, LABEL_TURNS, assistant_spans, make_labels
from idefics_common.prompts.prompt import build_prompt, split_prompts
from tests.common.processors import letters_processor, load_processor, picture

E = "<end_of_utterance>"
INSTRUCT = [
    f"User: What is in this image?{E}",
    f"\nAssistant: A cat. Said the User: no.{E}",
    "\nUser:",
    picture("grey"),
    f"And here? The Assistant: knows.{E}",
    f"\nAssistant: A dog.{E}",
]
BASE = [
    "User:",
    picture("rgb"),
    "Describe.\nAssistant: A cat.\n",
    "User:",
    picture("grey"),
    "Again.\n Assistant: A dog.",
]


def learned(processor, batch, row: int = 0) -> str:
    """The learned tokens of a row as text; what lies between learned stretches becomes |."""
    labels = batch["labels"][row]
    stretches = np.split(labels, np.flatnonzero(np.diff(labels != IGNORE_INDEX)) + 1)
    texts = [processor.tokenizer.convert_ids_to_tokens(stretch) for stretch in stretches if stretch[0] != IGNORE_INDEX]
    return "|".join("".join(tokens) for tokens in texts)


@pytest.mark.parametrize(
    ("prompt", "arguments", "turns", "expected"),
    [
        (INSTRUCT, {}, "assistant", f" A cat. Said the User: no.{E}| A dog.{E}"),
        (INSTRUCT, {}, "last_assistant", f" A dog.{E}"),
        (INSTRUCT, {"add_eos_token": True}, "last_assistant", f" A dog.{E}"),
        (BASE, {}, "assistant", " A cat.\n| A dog."),
        (BASE, {"add_eos_token": True}, "last_assistant", " A dog.</s>"),
        (["User: hi", "Assistant: a", "User: ok", "Assistant: b"], {}, "assistant", f" a{E}| b"),
        (["User: hi?", "Assistant: a"], {"add_end_of_utterance_token": True}, "assistant", " a"),
        (["Assistant: a"], {"strip": False}, "all", "Assistant: a"),
        (["ab", picture(), "c"], {"add_eos_token": True}, "all", "ab|c</s>"),
    ],
)
def test_turns(prompt, arguments, turns, expected):
    processor = letters_processor()
    arguments = {"add_end_of_utterance_token": prompt not in (INSTRUCT, BASE)} | arguments
    batch = processor(prompt, return_labels=True, label_turns=turns, return_tensors="np", **arguments)
    assert learned(processor, batch) == expected
    assert batch["labels"].dtype == np.int64


def test_d11_pads_image_tokens_and_the_first_token_are_never_learned():
    prompts = [["a", picture(), "bcd"], ["e"]]
    for side in ("left", "right"):
        processor = letters_processor(padding_side=side)
        batch = processor(prompts, return_labels=True, return_tensors="np")
        assert [learned(processor, batch, row) for row in (0, 1)] == ["a|bcd", "e"]
        has_loss = batch["labels"] != IGNORE_INDEX
        assert (batch["labels"] == np.where(has_loss, batch["input_ids"], IGNORE_INDEX)).all()
        assert not (has_loss & (batch["attention_mask"] == 0)).any()


def test_pads_are_masked_by_the_attention_mask_and_not_by_their_id():
    labels = make_labels(np.array([[0, 0, 5, 0, 7]]), np.array([[0, 1, 1, 1, 1]]), [7])
    assert labels.tolist() == [[-100, -100, 5, 0, -100]]


def test_labels_survive_truncation_from_either_side():
    for side, expected in (("right", " A c"), ("left", f"og.{E}")):
        processor = letters_processor(truncation_side=side)
        whole = processor(INSTRUCT, add_end_of_utterance_token=False, return_tensors="np")["input_ids"].shape[1]
        max_length = 45 if side == "right" else 5
        assert max_length < whole
        batch = processor(
            INSTRUCT,
            add_end_of_utterance_token=False,
            return_labels=True,
            label_turns="assistant",
            truncation=True,
            max_length=max_length,
            return_tensors="np",
        )
        assert learned(processor, batch) == expected


@pytest.mark.parametrize(
    ("label_turns", "prompt", "max_length", "part"),
    [
        ("assistant", INSTRUCT, 20, "of what the assistant says"),
        ("last_assistant", INSTRUCT, 70, "of what the assistant says"),
        ("all", [picture(), "a"], 2, "of its text"),
    ],
)
def test_prompts_with_nothing_left_to_learn_are_named(label_turns, prompt, max_length, part):
    arguments = {"label_turns": label_turns, "return_tensors": "np", "add_end_of_utterance_token": False}
    collator = IdeficsCollator(letters_processor(), max_length=max_length, **arguments)
    with pytest.raises(ValueError, match=f"prompt 1: nothing {part} is left .* truncation to {max_length} tokens"):
        collator(["Assistant: a", prompt])
    assert collator(["Assistant: a"])["labels"].max() > 0
    assert IdeficsCollator(letters_processor(), **arguments)([prompt])["labels"].max() > 0


def test_subword_tokens_that_reach_into_a_turn_count_as_its_own():
    processor = load_processor()
    batch = processor(
        ["User: What is in this image?", picture(), "Assistant: A cat."],
        add_eos_token=True,
        return_labels=True,
        label_turns="assistant",
        return_tensors="np",
    )
    text = processor.decode(batch["labels"][0][batch["labels"][0] != IGNORE_INDEX])
    assert text.endswith("A cat.</s>")
    assert "image" not in text


def test_spans_of_the_assistant():
    (segments,) = split_prompts(["User: a", "Assistant:", " ASSISTANT: x", "\n\n Assistant: b\nassistant: c\nUser:"])
    prompt = build_prompt(segments)
    assert [prompt.text[start:end] for start, end in assistant_spans(prompt)] == [
        "ASSISTANT: x\n\n ",
        " b\nassistant: c\n",
    ]
    assert assistant_spans(build_prompt(split_prompts("The Assistant: a")[0])) == []


def test_bad_choices_are_named():
    processor = letters_processor()
    with pytest.raises(ValueError, match="prompt 1 has no turn that begins with 'Assistant:'"):
        processor([["Assistant: a"], ["b"]], return_labels=True, label_turns="assistant", return_tensors="np")
    with pytest.raises(ValueError, match="label_turns must be one of all, assistant, last_assistant; got 'answer'"):
        IdeficsCollator(processor, label_turns="answer")
    with pytest.raises(ValueError, match=r"example 1 has neither the key \"prompt\" nor \"messages\"; .* \['text'\]"):
        IdeficsCollator(processor)([{"prompt": "Assistant: a"}, {"text": "b"}])


@pytest.mark.parametrize("label_turns", LABEL_TURNS)
def test_collator_equals_a_processor_call(label_turns):
    processor = letters_processor()
    collator = IdeficsCollator(
        processor, label_turns=label_turns, return_tensors="np", max_length=125, add_end_of_utterance_token=False
    )
    batch = collator([{"prompt": BASE, "source": "ignored"}, INSTRUCT, {"prompt": "Assistant: yes"}])
    assert type(batch) is dict
    expected = processor(
        [BASE, INSTRUCT, ["Assistant: yes"]],
        add_eos_token=True,
        add_end_of_utterance_token=False,
        return_labels=True,
        label_turns=label_turns,
        truncation=True,
        max_length=125,
        return_tensors="np",
    )
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        np.testing.assert_array_equal(value, expected[name])
    assert batch["input_ids"].shape == (3, 125)


@pytest.mark.parametrize(("ending", "learned_end"), [("", "</s>"), (E, E)])
def test_collator_learns_one_end_of_the_last_turn(ending, learned_end):
    processor = letters_processor()
    batch = IdeficsCollator(processor, return_tensors="np")([f"User: a\nAssistant: b{ending}"])
    assert learned(processor, batch) == f" b{learned_end}"
    assert processor.decode(batch["input_ids"][0]).endswith("</s>")


def test_collator_learns_the_assistant_and_the_end_by_default():
    processor = letters_processor()
    batch = IdeficsCollator(processor, return_tensors="np", transform=lambda image: np.ones((3, 2, 2)))(
        [{"prompt": BASE}]
    )
    assert learned(processor, batch) == f" A cat.\n{E}| A dog.</s>"
    assert batch["pixel_values"].shape == (1, 2, 3, 2, 2)
