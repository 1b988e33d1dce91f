"""Rows E8 and E10: prompts and images out of `datasets`, as columns, as rows, encoded and decoded."""

import io

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import Trainer, TrainingArguments

from idefics_common import sample_checkpoint, sample_photograph
from idefics_pt import IdeficsCollator, IdeficsForVisionText2Text, IdeficsProcessor

PHOTOGRAPH = Pillow.open(sample_photograph())
PICTURES = [PHOTOGRAPH.rotate(angle) for angle in (0, 90, 180)]
TEXTS = ["<image>What is this?", "Is this a bag? <image>", "And<image> this?"]


def encoded(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return IdeficsProcessor.from_pretrained(sample_checkpoint())


@pytest.mark.parametrize("decode", [True, False])
def test_columns_are_batches(processor, decode, tmp_path):
    """Of texts, and of images: decoded, and as they are stored, with the bytes or with the path of a file."""
    expected = processor(images=[[one] for one in PICTURES], text=TEXTS)
    paths = [str(tmp_path / f"{index}.png") for index in range(len(PICTURES))]
    for picture, path in zip(PICTURES, paths, strict=True):
        picture.save(path)
    for images in ([{"bytes": encoded(one), "path": None} for one in PICTURES], paths):
        features = Features({"text": Value("string"), "image": Image(decode=decode)})
        data = Dataset.from_dict({"text": TEXTS, "image": images}, features=features)
        batch = processor(images=data["image"], text=data["text"])
        for name in expected:
            assert torch.equal(batch[name], expected[name]), name
    plain = [text.replace("<image>", "") for text in TEXTS]
    column = Dataset.from_dict({"text": plain})["text"]
    assert torch.equal(processor(text=column)["input_ids"], processor([[text] for text in plain])["input_ids"])


@pytest.fixture(scope="module")
def chats():
    """Messages and their images, with a length for each row; as files hold them, every part has all keys."""
    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    features = Features({"messages": List(message), "images": List(Image()), "length": Value("int64")})

    def content(*parts):
        return [{"type": "image", "text": None} if one is None else {"type": "text", "text": one} for one in parts]

    rows = [
        (content(None, "What is this?"), "An ankle boot.", [PICTURES[0]]),
        (content("Is a coat a bag?"), "No.", []),
        (content(None, "or", None, "?"), "A bag and a boot.", PICTURES[1:]),
        (content("Is a bag a bag?"), "Yes.", []),
    ]
    messages = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": content(answer)}]
        for asked, answer, _ in rows
    ]
    images = [[{"bytes": encoded(one), "path": None} for one in pictures] for *_, pictures in rows]
    lengths = [len(asked) for asked, _, _ in rows]
    return Dataset.from_dict({"messages": messages, "images": images, "length": lengths}, features=features)


def arguments(folder, **settings):
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return TrainingArguments(str(folder), **defaults | settings)


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "group_by_length"}], ids=["random", "by length"])
def test_e7_trainer_takes_rows_of_messages(processor, chats, settings, tmp_path):
    """The loss is that of the prompts that the messages stand for, however rows are sampled."""
    model = IdeficsForVisionText2Text.from_pretrained(sample_checkpoint())
    first, second, third = PICTURES
    prompts = [
        ["User:", first, "What is this?", "\nAssistant: An ankle boot.<end_of_utterance>"],
        ["User: Is a coat a bag?", "\nAssistant: No.<end_of_utterance>"],
        ["User:", second, "or", third, "?", "\nAssistant: A bag and a boot.<end_of_utterance>"],
        ["User: Is a bag a bag?", "\nAssistant: Yes.<end_of_utterance>"],
    ]
    collate = IdeficsCollator(processor)
    with torch.no_grad():
        expected = model(**collate(prompts)).loss.item()
    trainer = Trainer(model, arguments(tmp_path, **settings), collate, chats)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_e10_the_argument_that_removes_columns_is_named(processor, chats, tmp_path):
    model = IdeficsForVisionText2Text.from_pretrained(sample_checkpoint())
    collate = IdeficsCollator(processor)
    with pytest.raises(ValueError, match=r"remove_unused_columns=False"):
        Trainer(model, arguments(tmp_path, remove_unused_columns=True), collate, chats).train()
    kept = chats.add_column("labels", [0] * len(chats))  # one that the model's forward names
    with pytest.raises(ValueError, match=r"its keys are \['labels'\]\. .*remove_unused_columns=False"):
        Trainer(model, arguments(tmp_path, remove_unused_columns=True), collate, kept).train()
