"""The Keras room needs no torch, changes no environment variable, and says which Keras backend it wants."""

import os
import subprocess
import sys

import pytest

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


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_loading_and_saving_without_torch(tmp_path):
    tf_model(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    finished = run(WITHOUT_TORCH, tmp_path / "model", tmp_path / "again")
    # the last line of the program imports torch: everything before it has worked, and the block is real
    assert finished.stderr.rstrip().endswith("import of torch halted; None in sys.modules"), finished.stderr
    assert 'File "<string>", line 15' in finished.stderr


def test_another_keras_backend_is_refused():
    finished = run("import keras; keras.backend.backend = lambda: 'jax'; import idefics_tf")
    assert "idefics_tf needs Keras on the TensorFlow backend, but Keras runs on 'jax'" in finished.stderr
    assert "KERAS_BACKEND=tensorflow" in finished.stderr


def test_the_torch_backend_is_refused():
    pytest.importorskip("torch", reason="torch is not installed")
    finished = run("import idefics_tf", KERAS_BACKEND="torch")
    assert "but Keras runs on 'torch'" in finished.stderr
