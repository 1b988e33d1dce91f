"""Measure what quantisers of others do to the shipped checkpoint: its size, its logits, its answers.

400 prompts: each of the 200 shipped test photographs named, in four wordings by turns, and asked about in one yes/no
question, of its own class and of another by turns. Size is the bytes of all its numbers, as a share of float32's;
the error is the largest of a logit over all prompts, relative to the largest logit; an answer is kept if it is the one
that float32 gives. On the CPU, with the packages of the extra `integrations`.

    python -m benchmarks.quantizers                                print the table
    python -m benchmarks.quantizers --write docs/integrations.md   put it between the table's markers
"""

import argparse
import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from optimum import quanto
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig

from benchmarks.pages import between_marks, markdown
from idefics_common import IdeficsProcessor, sample_checkpoint
from idefics_pt import IdeficsForVisionText2Text
from idefics_pt.cpu.int8 import Int8Linear

FASHION = Path(__file__).parents[1] / "examples" / "fashion"
sys.path.insert(0, str(FASHION))

from data import load_shipped  # noqa: E402
from evaluate import naming_dialogues  # noqa: E402
from prompts import LONGEST_ANSWER, THINGS, YES_NO, to_prompt, yes_no  # noqa: E402

BEGIN = "<!-- quantisers: python -m benchmarks.quantizers --write docs/integrations.md -->"
END = "<!-- end of quantisers -->"


def load(**kwargs):
    return IdeficsForVisionText2Text.from_pretrained(sample_checkpoint(), **kwargs).eval()


def bitsandbytes(**kwargs):
    """A way to load in 4 bits with an ordinary compute dtype, or in 8."""
    return lambda: load(quantization_config=BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **kwargs))


def in_place(quantize):
    """A way to load, and to call a tool on the model then."""

    def quantized():
        model = load()
        quantize(model)
        return model

    return quantized


def quanto_weights(kind):
    def quantize(model):
        quanto.quantize(model, weights=kind)
        quanto.freeze(model)

    return quantize


def hqq(bits):
    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    return lambda model: AutoHQQHFModel.quantize_model(
        model, quant_config=config, compute_dtype=torch.float32, device="cpu"
    )


METHODS = {
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes nf4, double": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "torchao int8 weights": in_place(lambda model: quantize_(model, Int8WeightOnlyConfig())),
    "torchao int8 weights, activations": in_place(
        lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig())
    ),
    "quanto int8": in_place(quanto_weights(quanto.qint8)),
    "quanto int4": in_place(quanto_weights(quanto.qint4)),
    "HQQ 8 bits": in_place(hqq(8)),
    "HQQ 4 bits": in_place(hqq(4)),
    "torch `quantize_dynamic`": in_place(
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    ),
    "`quantize_int8()`": in_place(lambda model: model.quantize_int8()),
}


def prompts_of_photographs() -> list[list]:
    photographs = load_shipped("test")
    dialogues = naming_dialogues(photographs.labels)
    for photo, label in enumerate(photographs.labels.tolist()):
        asked = (label + photo % 2 * (1 + photo % 9)) % len(THINGS)
        dialogues.append(yes_no(photo, label, asked, YES_NO[photo % len(YES_NO)]))
    return [to_prompt(dialogue, photographs) for dialogue in dialogues]


@torch.no_grad()
def all_logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits[inputs["attention_mask"] == 1]


def answers(model, processor, inputs) -> list[str]:
    # not in inference mode, which quanto's 4 bits do not know
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    return processor.batch_decode(ids, skip_special_tokens=True)


def bytes_of(model) -> int:
    """Bytes of all numbers of a model, the scales and the packed weights among them."""
    packed = [vars(module) for module in model.modules() if isinstance(module, Int8Linear)]  # in no state
    return _bytes([model.state_dict(), packed])


def _bytes(value) -> int:
    if isinstance(value, dict):
        return _bytes(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return _bytes([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    return value.numel() * value.element_size()


def table() -> str:
    processor, plain = IdeficsProcessor.from_pretrained(sample_checkpoint()), load()
    inputs = processor(prompts_of_photographs(), return_tensors="pt")
    expected, given, size = all_logits(plain, inputs), answers(plain, processor, inputs), bytes_of(plain)
    rows = []
    for name, quantized in METHODS.items():
        model = quantized()
        error = (all_logits(model, inputs) - expected).abs().max() / expected.abs().max()
        kept = sum(ours == theirs for ours, theirs in zip(answers(model, processor, inputs), given, strict=True))
        rows.append((name, f"{bytes_of(model) / size:.0%}", f"{error:.1%}", f"{kept} of {len(given)}"))
        print(*rows[-1], sep="  ", flush=True)
    return markdown(("method", "size", "largest error of a logit", "answers kept"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = table()
    print(text)
    if arguments.write:
        page = arguments.write.read_text()
        arguments.write.write_text(between_marks(page, BEGIN, END, text))


if __name__ == "__main__":
    main()
