"""Both rooms' command lines write the same words."""

import pytest

import idefics_pt.__main__
import idefics_tf.__main__
from idefics_common import sample_checkpoint

PHOTOGRAPHS = "examples/fashion/photos/test"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "What is this?", "--chat", "--image", f"{PHOTOGRAPHS}/00061.png"],
        ["--prompt", "User:<image>Is this a bag?<end_of_utterance>\nAssistant:", "--image", f"{PHOTOGRAPHS}/00002.png"],
        [
            *("--prompt", "What is the second picture?", "--chat", "--max-new-tokens", "7"),
            *("--image", f"{PHOTOGRAPHS}/00018.png", "--image", f"{PHOTOGRAPHS}/00044.png"),
        ],
        ["--prompt", "What do you run in?", "--chat", "--dtype", "bfloat16"],
    ],
    ids=["chat", "marked", "two images", "text"],
)
def test_the_same_words(request, monkeypatch, capsys, arguments):
    monkeypatch.chdir(request.config.rootpath)
    written = []
    for room in (idefics_pt, idefics_tf):
        assert room.__main__.main(["generate", "--model", str(sample_checkpoint()), *arguments]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert written[0].strip()
