"""Trains the small IDEFICS of this folder from nothing, on the CPU, in about half an hour on two cores.

    python examples/fashion/train.py --data FOLDER --out examples/fashion/checkpoint --seed 0

What is unusual:
- Two kinds of step take turns: two with dialogues about one photograph (short rows, little padding), one with
  dialogues about several photographs or none.
- Matrices are trained with Muon, everything else with AdamW; on this task and at this length Muon needs about half
  the steps.
- Matrix products run in bfloat16 where the CPU multiplies it faster than float32; weights stay float32.
- Attention is `eager`: for sequences of 50 tokens two batched matrix products beat the fused CPU kernel.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from batches import BatchBuilder
from data import DEBIAN_FOLDER, Photographs, load_idx
from evaluate import naming_accuracy
from prompts import Dialogue, DialogueSampler
from tokenizer import IMAGE_TOKENS, train_tokenizer
from tqdm import tqdm

from idefics_common import IdeficsConfig, IdeficsImageProcessor, IdeficsProcessor
from idefics_common.prompts.prompt import IMAGE_TOKEN
from idefics_pt import IdeficsForVisionText2Text

IMAGE_SIZE = 28
# Of the training photographs' pixels, 0..1.
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353
VALIDATION_PHOTOGRAPHS = 1000


def build_config(tokenizer, **overrides) -> IdeficsConfig:
    """About two million parameters, with every part that the published checkpoints have."""
    settings = {
        "vocab_size": len(tokenizer) - len(IMAGE_TOKENS),
        "additional_vocab_size": len(IMAGE_TOKENS),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "alpha_initializer": "ones",
        "alpha_type": "vector",
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "use_resampler": True,
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
        "vision_config": {
            "embed_dim": 128,
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "intermediate_size": 256,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "initializer_range": 0.06,
        },
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    }
    return IdeficsConfig(**settings | overrides)


def build_processor(tokenizer) -> IdeficsProcessor:
    image_processor = IdeficsImageProcessor(
        image_size=IMAGE_SIZE, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3, image_num_channels=3
    )
    return IdeficsProcessor(image_processor, tokenizer, image_size=IMAGE_SIZE)


def build_optimizers(model: torch.nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden layers; AdamW for embeddings, heads, norms, biases and gates."""

    def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "latents"))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if is_hidden_matrix(name, parameter)]
    others = [parameter for name, parameter in named if not is_hidden_matrix(name, parameter)]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(done: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to zero; `done` is the part of the training that lies behind, 0..1."""
    return min(1.0, done / warmup) * 0.5 * (1.0 + math.cos(math.pi * done))


class Curriculum:
    """The dialogues of step after step: photographs in a new random order every epoch."""

    def __init__(self, labels: np.ndarray, rows_one: int, rows_many: int, rng: np.random.Generator):
        self.sampler = DialogueSampler(labels, rng)
        self.rng = rng
        self.count = len(labels)
        self.rows_one, self.rows_many = rows_one, rows_many
        self._queue: list[int] = []

    def dialogues(self, step: int) -> list[Dialogue]:
        if step % 3 < 2:
            return [self.sampler.about_one(photo) for photo in self._next(self.rows_one)]
        return [self.sampler.about_many_or_none(self._next(3)) for _ in range(self.rows_many)]

    def _next(self, count: int) -> list[int]:
        if len(self._queue) < count:
            self._queue = self.rng.permutation(self.count).tolist()
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken


def train(model, builder: BatchBuilder, curriculum: Curriculum, steps: int, arguments) -> list[float]:
    """Trains in place and returns the loss of every step."""
    optimizers = build_optimizers(model, arguments.muon_rate, arguments.adam_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: rate_factor((step + 1) / steps)) for each in optimizers
    ]
    losses: list[float] = []
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step", mininterval=2.0)
    for step in progress:
        batch = builder(curriculum.dialogues(step), curriculum.rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            loss = model(**batch, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return losses


def save(model, processor, folder: Path) -> None:
    """`config.json`, `generation_config.json`, `model.safetensors`, tokenizer and processor files."""
    processor.generation_config(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="one, as for the shipped checkpoint; more wait for each other on busy cores",
    )
    parser.add_argument("--rows-one", type=int, default=128, help="rows of a step about one photograph each")
    parser.add_argument("--rows-many", type=int, default=48, help="rows of a step about several photographs or none")
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="autocast, as for the shipped checkpoint; slow on a CPU without bfloat16 instructions",
    )
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    photographs = load_idx(arguments.data, "train")
    training = Photographs(photographs.pixels[:-VALIDATION_PHOTOGRAPHS], photographs.labels[:-VALIDATION_PHOTOGRAPHS])
    validation = Photographs(photographs.pixels[-VALIDATION_PHOTOGRAPHS:], photographs.labels[-VALIDATION_PHOTOGRAPHS:])

    processor = build_processor(train_tokenizer())
    model = IdeficsForVisionText2Text._from_config(build_config(processor.tokenizer), attn_implementation="eager")
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, bfloat16: {arguments.bfloat16}")
    builder = BatchBuilder(processor.tokenizer, training, PIXEL_MEAN, PIXEL_STD)
    curriculum = Curriculum(training.labels, arguments.rows_one, arguments.rows_many, rng)
    start = time.perf_counter()
    train(model, builder, curriculum, arguments.steps, arguments)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")
    model.eval()
    save(model, processor, arguments.out)
    accuracy = naming_accuracy(model, processor, validation)
    print(f"naming, {VALIDATION_PHOTOGRAPHS} training photographs held out: {accuracy:.1%}")


if __name__ == "__main__":
    main()
