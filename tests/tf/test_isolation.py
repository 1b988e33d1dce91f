"""The Keras room needs no torch, changes no environment variable, and says which Keras backend it wants."""

import os
import subprocess
import sys

import pytest

from tests.requirements import needs_torch
from tests.tf.random_models import tf_model

WITHOUT_TORCH = """
import os, sys
sys.modules["torch"] = None
before = dict(os.environ)
import numpy as np
from idefics_tf import TFIdeficsForVisionText2Text
assert dict(os.environ) == before, "the environment was changed"
model = TFIdeficsForVisionText2Text.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
again = TFIdeficsForVisionText2Text.from_pretrained(sys.argv[2])
ids = np.array([[1, 5, 99]])
assert np.array_equal(model(ids).logits, again(ids).logits)
assert model.generate(ids, max_new_tokens=2, disable_compile=True).shape[1] > 3
assert sys.modules["torch"] is None
import torch
"""

BESIDE_TORCH = """
import sys
import keras, tensorflow as tf
from PIL import Image
from idefics_common import IdeficsCollator, IdeficsProcessor, sample_checkpoint, sample_photograph

def torch_is_imported():
    return [name for name in sys.modules if name.split(".")[0] == "torch"]

processor = IdeficsProcessor.from_pretrained(sample_checkpoint())
assert not torch_is_imported(), "the processor did it"
from idefics_tf import TFIdeficsForVisionText2Text
model = TFIdeficsForVisionText2Text.from_pretrained(sample_checkpoint())
assert not torch_is_imported(), "loading did it"
image = {"type": "image", "image": Image.open(sample_photograph())}
message = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "tf"}
inputs = processor.apply_chat_template([message], **settings)
processor.generation_config(model)
tokens = model.generate(inputs, max_new_tokens=20, disable_compile=True)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
assert not torch_is_imported(), "generate did it"
prompt = ["User:", image["image"], "What is this?", "\\nAssistant: An ankle boot.<end_of_utterance>"]
batch = IdeficsCollator(processor, return_tensors="tf")([prompt])
model.compile(optimizer=keras.optimizers.SGD(1e-4), run_eagerly=True)
model.fit(tf.data.Dataset.from_tensors(dict(batch)), verbose=0)
assert not torch_is_imported(), "fit did it"
model.save(f"{sys.argv[1]}/x.keras")
keras.saving.load_model(f"{sys.argv[1]}/x.keras")
model.save_pretrained(f"{sys.argv[1]}/home")
processor.save_pretrained(f"{sys.argv[1]}/home")
assert not torch_is_imported(), "saving did it"
import torch
torch.Tensor
assert torch_is_imported()
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_loading_and_saving_without_torch(tmp_path):
    tf_model(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    finished = run(WITHOUT_TORCH, tmp_path / "model", tmp_path / "again")
    # the last line of the program imports torch: everything before it has worked, and the block is real
    assert finished.stderr.rstrip().endswith("import of torch halted; None in sys.modules"), finished.stderr
    assert 'File "<string>", line 15' in finished.stderr


@needs_torch
def test_nothing_here_imports_torch_where_it_is_installed(tmp_path):
    """Neither its time nor its memory is paid, and who wants it has it."""
    finished = run(BESIDE_TORCH, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "Assistant: An ankle boot."


def test_another_keras_backend_is_refused():
    finished = run("import keras; keras.backend.backend = lambda: 'jax'; import idefics_tf")
    assert "idefics_tf needs Keras on the TensorFlow backend, but Keras runs on 'jax'" in finished.stderr
    assert "KERAS_BACKEND=tensorflow" in finished.stderr


def test_the_torch_backend_is_refused():
    pytest.importorskip("torch", reason="torch is not installed")
    finished = run("import idefics_tf", KERAS_BACKEND="torch")
    assert "but Keras runs on 'torch'" in finished.stderr
