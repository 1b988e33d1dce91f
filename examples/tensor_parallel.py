"""One model split over several processes, with every layer of its decoder, gated blocks, vision tower and resampler.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [--model FOLDER]

Without accelerators the processes run on the CPU. Each holds its part of every weight, and all give the same answer.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers.distributed import DistributedConfig

from idefics_pt import IdeficsForVisionText2Text, IdeficsProcessor

FASHION = Path(__file__).parent / "fashion"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=FASHION / "checkpoint")
    options = parser.parse_args()

    processor = IdeficsProcessor.from_pretrained(options.model)
    model = IdeficsForVisionText2Text.from_pretrained(
        options.model, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    photograph = Image.open(FASHION / "photos" / "test" / "00000.png")
    inputs = processor(["User:", photograph, "What is this?", "\nAssistant:"], return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    (answer,) = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    here = sum(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
               for parameter in model.parameters())  # fmt: skip
    everywhere = sum(parameter.numel() for parameter in model.parameters())
    rank = torch.distributed.get_rank()
    print(f"process {rank} holds {here:,} of {everywhere:,} parameters and answers:{answer}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
