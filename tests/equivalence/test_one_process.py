"""Keras first, then PyTorch in the same process: torch, left for later, is all there, and the rooms agree."""

import subprocess
import sys

KERAS_FIRST = """
import importlib, pickle, sys, threading, types, warnings
from PIL import Image
from idefics_common import IdeficsConfig, sample_checkpoint, sample_photograph
from idefics_tf import IdeficsProcessor, TFIdeficsForVisionText2Text
import transformers
from transformers import modeling_rope_utils, processing_utils
from transformers.utils import type_validators

processor = IdeficsProcessor.from_pretrained(sample_checkpoint())
keras_model = TFIdeficsForVisionText2Text.from_pretrained(sample_checkpoint())
settings = IdeficsConfig.get_config_dict(sample_checkpoint())[0] | {"dtype": "bfloat16"}
early = IdeficsConfig.from_dict(settings)
prompt = ["User:", Image.open(sample_photograph()), "What is this?", "\\nAssistant:"]
answer = keras_model.generate(processor(prompt, return_tensors="tf"), max_new_tokens=8, disable_compile=True)
assert not [name for name in sys.modules if name.split(".")[0] == "torch"]
later = modeling_rope_utils.torch

# threads need it first, each in another way
def use(number):
    if number % 2:
        products.append(later.ones(2, 3) @ later.ones(3, 1))
    else:
        from torch import ones
        products.append(ones(2, 3) @ ones(3, 1))
products = []
threads = [threading.Thread(target=use, args=[number]) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(products) == 8

import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
assert torch is later is sys.modules["torch"] and type(torch) is types.ModuleType
for name, module in list(sys.modules.items()):
    if name.startswith("transformers.") and type(vars(module).get("torch")) is types.ModuleType:
        assert vars(module)["torch"] is torch, name
assert torch.nn is nn is sys.modules["torch.nn"] and nn.functional is F
assert torch.__spec__.loader is torch.__loader__ and torch.__spec__.origin == torch.__file__
assert importlib.util.find_spec("torch") is torch.__spec__
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("idefics_common")]

# what transformers' processors took of it
assert type_validators.ACT2FN["gelu"](torch.zeros(1)) == 0 and "nonsense" not in type_validators.ACT2FN
assert len(type_validators.ACT2FN) == len(list(type_validators.ACT2FN)) > 10
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
Tokenizer = type("Tokenizer", (PreTrainedAudioTokenizerBase,), {})
assert isinstance(Tokenizer.__new__(Tokenizer), processing_utils.PreTrainedAudioTokenizerBase)
assert issubclass(Tokenizer, processing_utils.PreTrainedAudioTokenizerBase)
assert not isinstance(processor, processing_utils.PreTrainedAudioTokenizerBase)

# the other room, all of it
from idefics_pt import IdeficsForVisionText2Text
model = IdeficsForVisionText2Text.from_pretrained(sample_checkpoint()).eval()
inputs = processor(prompt, return_tensors="pt")
assert model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == answer.numpy().tolist()
compiled = torch.compile(model, fullgraph=True, backend="eager")
with torch.no_grad():
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
model(**inputs, labels=inputs["input_ids"]).loss.backward()
state = pickle.loads(pickle.dumps(model.state_dict()))
assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
assert pickle.loads(pickle.dumps((torch.float16, nn.Linear(2, 2))))[0] is torch.float16
(row,) = DataLoader([torch.ones(2)], num_workers=1)
assert row.tolist() == [[1, 1]]

# a configuration from before torch is as good as a later one
assert early.dtype == "bfloat16"
late = IdeficsConfig.from_dict(settings)
assert late.dtype is torch.bfloat16 and late.to_dict() == early.to_dict()
for build in (IdeficsForVisionText2Text, IdeficsForVisionText2Text._from_config):
    assert {p.dtype for p in build(early).parameters()} == {p.dtype for p in build(late).parameters()}
loaded = IdeficsForVisionText2Text.from_pretrained(sample_checkpoint(), config=early)
assert loaded.dtype is IdeficsForVisionText2Text.from_pretrained(sample_checkpoint(), config=late).dtype
print("done")
"""


def test_torch_is_all_there_after_keras():
    finished = subprocess.run([sys.executable, "-c", KERAS_FIRST], capture_output=True, text=True, check=False)
    assert finished.stdout == "done\n", finished.stderr
