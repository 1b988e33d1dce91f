"""Model and processor together: `Auto...` classes, the pipeline, generation settings, the command line."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image

import idefics_pt
from idefics_common.fetching.fetcher import ImageFetchError
from idefics_common.prompts.generation_defaults import fill_generation_config
from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor, register, unregister
from idefics_pt.__main__ import main
from tests.models import random_weights, small_config

GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    """A small random checkpoint with a real tokenizer and processor: base ids to 450, then the three image tokens."""
    directory = tmp_path_factory.mktemp("checkpoint")
    fixture = request.config.rootpath / "tests" / "fixtures" / "processor_v4"
    processor = IdeficsProcessor.from_pretrained(fixture / "processor")
    config = IdeficsConfig(**small_config(vocab_size=451, additional_vocab_size=3))
    model = IdeficsForVisionText2Text(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in random_weights(config).items()})
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    Image.open(fixture / "rgb.png").save(directory / "photograph.png")
    return directory


@pytest.fixture
def _registered():
    register()
    yield
    unregister()


def found_in_transformers(name):
    return getattr(sys.modules["transformers"], name)


@pytest.mark.usefixtures("_registered")
def test_auto_classes_return_ours(checkpoint):
    assert type(transformers.AutoConfig.from_pretrained(checkpoint)) is IdeficsConfig
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)) is IdeficsForVisionText2Text
    assert type(transformers.AutoModel.from_pretrained(checkpoint)) is idefics_pt.IdeficsModel
    assert type(transformers.AutoProcessor.from_pretrained(checkpoint)) is IdeficsProcessor
    assert type(transformers.AutoImageProcessor.from_pretrained(checkpoint)) is idefics_pt.IdeficsImageProcessor
    assert found_in_transformers("IdeficsForVisionText2Text") is IdeficsForVisionText2Text
    assert found_in_transformers("IdeficsModel") is idefics_pt.IdeficsModel


def test_registration_is_never_done_unasked_and_can_be_undone(checkpoint):
    code = (
        "import idefics_pt, transformers; "
        f"assert transformers.AutoConfig.from_pretrained({str(checkpoint)!r}).__module__.startswith('transformers')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    register()
    unregister()
    unregister()
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    assert type(config) is transformers.IdeficsConfig
    own = "transformers.models.idefics.modeling_idefics"
    assert found_in_transformers("IdeficsForVisionText2Text").__module__ == own
    assert type(transformers.AutoProcessor.from_pretrained(checkpoint)) is transformers.IdeficsProcessor
    assert transformers.AutoModelForImageTextToText.from_config(config).__module__.startswith("transformers")


@pytest.mark.usefixtures("_registered")
def test_p3_pipeline_with_chat_messages(checkpoint):
    """In transformers 5.23 the pipeline's prompt holds a second placeholder, and the answer sees no image."""
    image = Image.open(checkpoint / "photograph.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
    ]
    pipe = transformers.pipeline("image-text-to-text", model=str(checkpoint))
    answer = pipe(text=messages, **GREEDY)[0]["generated_text"]
    processor, model = pipe.processor, pipe.model
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"].eq(processor.image_token_id).sum() == 1
    assert inputs["image_attention_mask"][0, -1].tolist() == [1]
    tokens = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    written = processor.decode(tokens, skip_special_tokens=True)
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"].strip() == written.strip()


def test_generation_config_from_the_tokenizer(checkpoint):
    processor = IdeficsProcessor.from_pretrained(checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint)
    assert model.generation_config.bad_words_ids is None
    fake, image, end = (
        processor.tokenizer.convert_tokens_to_ids(token)
        for token in ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    )
    filled = processor.generation_config(model)
    assert filled is model.generation_config
    assert filled.bad_words_ids == [[fake], [image]]
    assert filled.eos_token_id == [2, end]
    again = processor.generation_config(model)
    assert (again.bad_words_ids, again.eos_token_id) == ([[fake], [image]], [2, end])


def test_image_tokens_are_not_written_and_the_end_of_a_turn_stops(checkpoint):
    processor = IdeficsProcessor.from_pretrained(checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint)
    inputs = processor("Tell me", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    image, end = processor.image_token_id, processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")

    def prefer(token):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.additional_fc.weight.zero_()
        model.lm_head.register_forward_hook(
            lambda module, args, out: out + 9.0 * torch.nn.functional.one_hot(torch.tensor(token), out.shape[-1])
        )

    prefer(image)
    assert (model.generate(**inputs, **GREEDY)[0, length:] == image).all()
    settings = processor.generation_config(model)
    assert not (model.generate(**inputs, **GREEDY)[0, length:] == image).any()
    overridden = model.generate(**inputs, **GREEDY, bad_words_ids=None)
    assert (overridden[0, length:] == image).all()
    prefer(end)
    model.generation_config = settings
    assert model.generate(**inputs, **GREEDY)[0, length:].tolist() == [end]


def test_command_line_writes_what_generate_does(checkpoint, capsys):
    arguments = ["generate", "--model", str(checkpoint), "--image", str(checkpoint / "photograph.png")]
    assert main([*arguments, "--prompt", "What is this?", "--max-new-tokens", "4"]) == 0
    written = capsys.readouterr().out
    processor = IdeficsProcessor.from_pretrained(checkpoint)
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint).eval()
    inputs = processor(images=[Image.open(checkpoint / "photograph.png")], text="What is this?", return_tensors="pt")
    processor.generation_config(model)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written.strip() == expected.strip()
    assert (
        main([*arguments, "--prompt", "What is this?", "--chat", "--dtype", "bfloat16", "--max-new-tokens", "2"]) == 0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"--image": "/nowhere/photograph.png"}, "/nowhere/photograph.png"),
        ({"--prompt": "<image> and <image>"}, "2 tokens and 1 images"),
        ({"--image": ""}, "'' is no URL, no existing file and no base64 of an image"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0"),
        ({"--device": "toaster"}, "--device toaster cannot be used"),
        ({"--device": "meta"}, "--device meta cannot be used"),
        pytest.param(
            {"--device": "cuda"},
            "--device cuda cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can be used here"),
        ),
    ],
)
def test_command_line_errors_are_one_message(change, message, checkpoint, capsys):
    options = {
        "--model": str(checkpoint),
        "--image": str(checkpoint / "photograph.png"),
        "--prompt": "What?",
        "--max-new-tokens": "1",
        **change,
    }
    assert main(["generate", *(part for option in options.items() for part in option)]) == 1
    assert_is_one_error(capsys.readouterr().err, message)


def assert_is_one_error(written, message):
    (line,) = (line for line in written.splitlines() if "error" in line.lower())
    assert line.startswith("error: ")
    assert message in line
    assert written.endswith(f"{line}\n")


def with_entries(**entries):
    return lambda text: json.dumps(json.loads(text) | entries)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", with_entries(hidden_size="wide"), "config.json cannot be loaded: .*'hidden_size' expected int"),
        ("config.json", with_entries(model_type="llama"), "config.json has model_type 'llama', expected 'idefics'"),
        ("config.json", lambda text: "{", "config.json.* is not a valid JSON file"),
        ("tokenizer.json", lambda text: "{}", r"tokenizer\.json .*cannot be loaded: "),
        ("tokenizer.json", lambda text: "{", r"tokenizer\.json .*cannot be loaded: "),
        ("model.safetensors", lambda text: text[:2000], r"model\.safetensors: .*truncated"),
    ],
)
def test_command_line_names_what_is_wrong_with_a_checkpoint(file, change, message, checkpoint, tmp_path, capsys):
    directory = shutil.copytree(checkpoint, tmp_path / "broken")
    text = (directory / file).read_bytes().decode("latin-1")
    (directory / file).write_bytes(change(text).encode("latin-1"))
    assert main(["generate", "--model", str(directory), "--prompt", "What?", "--max-new-tokens", "1"]) == 1
    written = capsys.readouterr().err
    (line,) = (line for line in written.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {directory}: ")
    assert re.search(message, line)
    assert "Traceback" not in written


@pytest.mark.parametrize("dtype", ["int8", "nn", "tensor", "float64", "float8_e4m3fn"])
def test_command_line_offers_the_dtypes_there_are(dtype, checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--model", str(checkpoint), "--prompt", "What?", "--dtype", dtype])
    assert stopped.value.code == 2
    assert f"invalid choice: '{dtype}' (choose from" in capsys.readouterr().err


def test_p10_the_pipeline_takes_urls_in_chat_messages_within_limits(checkpoint, monkeypatch):
    """`images=URL` never reaches the processor: transformers' pipeline opens it itself (docs/generation.md)."""
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: pytest.fail(f"connected to {address}"))
    pipe = transformers.pipeline(
        "image-text-to-text",
        model=IdeficsForVisionText2Text.from_pretrained(checkpoint),
        processor=IdeficsProcessor.from_pretrained(checkpoint),
    )
    parts = [{"type": "image", "url": "http://127.0.0.1/a.png"}, {"type": "text", "text": "What?"}]
    with pytest.raises(ImageFetchError, match=r"127\.0\.0\.1 is loopback"):
        pipe(text=[{"role": "user", "content": parts}], **GREEDY)


def test_a_tokenizer_without_an_end_of_text_gives_no_stop():
    class Tokenizer:
        eos_token_id = bos_token_id = pad_token_id = None
        unk_token, unk_token_id = "<unk>", 0

        def __init__(self, **known):
            self.known = known

        def convert_tokens_to_ids(self, token):
            return self.known.get(token.strip("<>"), self.unk_token_id)

    assert fill_generation_config(transformers.GenerationConfig(), Tokenizer(end_of_utterance=9)).eos_token_id == 9
    assert fill_generation_config(transformers.GenerationConfig(), Tokenizer()).eos_token_id is None
