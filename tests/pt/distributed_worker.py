"""What each process of a distributed test does; started by torchrun, as `test_distributed.py` shows.

Arguments: a folder with the saved models `untied` and `tied`, the inputs `batch.pt`, and room for the results, and the
names of the jobs to do. Each process leaves the result of a job in `<job>-<rank>.pt`.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from idefics_pt import IdeficsForVisionText2Text

TIMEOUT = timedelta(minutes=15)
LEARNING_RATE = 0.1
STEPS = 2


def whole(tensor):
    """A sharded tensor put together, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(model, batch, labels_per_step):
    """Plain gradient steps; returns the losses and the trained parameters."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, num_items_in_batch=labels_per_step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def evaluate(model, batch):
    """Logits, gradients of the loss, and generated ids."""
    labels = batch.pop("labels")
    model.eval()
    generate = {"max_new_tokens": 4, "do_sample": False}
    ids = {
        "greedy": model.generate(**batch, **generate),
        "beams": model.generate(**batch, **generate, num_beams=3),
        "static": model.generate(**batch, **generate, cache_implementation="static"),
    }
    with torch.no_grad():
        logits = model(**batch).logits
    model(**batch, labels=labels).loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "gradients": gradients, "ids": ids}


def rows_of_rank(batch):
    """This process's half of a batch."""
    return {name: tensor.chunk(dist.get_world_size())[dist.get_rank()] for name, tensor in batch.items()}


def labels_per_rank(batch):
    """What each rank divides its loss by, so that the mean over ranks is the mean over all labels."""
    return (batch["labels"][:, 1:] != -100).sum() / dist.get_world_size()


def tensor_parallel(folder, batch, name):
    model = IdeficsForVisionText2Text.from_pretrained(folder / name, tp_plan="auto")
    result = evaluate(model, batch)
    model.save_pretrained(folder / f"{name}-from-two")
    return result


def data_parallel(folder, batch, name):
    model = DistributedDataParallel(IdeficsForVisionText2Text.from_pretrained(folder / name))
    return train(model, rows_of_rank(batch), labels_per_rank(batch))


def fully_sharded(folder, batch, name, checkpointing=False):
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = IdeficsForVisionText2Text.from_pretrained(folder / name, distributed_config=config)
    if checkpointing:
        model.activation_checkpointing_enable()
    return train(model, rows_of_rank(batch), labels_per_rank(batch))


def reloaded(folder, source, target, **sizes):
    """The weights of a model that is loaded in this number of processes, which also save it, each its pieces."""
    config = DistributedConfig(**{name: dist.get_world_size() for name in sizes}) if sizes else None
    options = {} if config is None else {"distributed_config": config}
    model = IdeficsForVisionText2Text.from_pretrained(folder / source, **options)
    if target:
        model.save_pretrained(folder / target, distributed_checkpoint=True)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def fully_sharded_checkpoint(folder, batch, name, source=None):
    """Load on this number of processes, save in pieces, load these again."""
    saved = f"{name}-in-{dist.get_world_size()}-pieces"
    first = reloaded(folder, source or name, saved, fsdp_size=True)
    return first, reloaded(folder, saved, None, tp_size=True), reloaded(folder, saved, None)


JOBS = {
    "tp-untied": lambda folder, batch: tensor_parallel(folder, batch, "untied"),
    "tp-tied": lambda folder, batch: tensor_parallel(folder, batch, "tied"),
    "ddp-frozen": lambda folder, batch: data_parallel(folder, batch, "frozen"),
    "fsdp-untied": lambda folder, batch: fully_sharded(folder, batch, "untied"),
    "fsdp-tied": lambda folder, batch: fully_sharded(folder, batch, "tied"),
    "fsdp-frozen": lambda folder, batch: fully_sharded(folder, batch, "frozen", checkpointing=True),
}
PIECES = {
    "pieces-of-untied": lambda folder, batch: fully_sharded_checkpoint(folder, batch, "untied"),
    "pieces-of-tied": lambda folder, batch: fully_sharded_checkpoint(folder, batch, "tied"),
    "pieces-of-pieces": lambda folder, batch: fully_sharded_checkpoint(folder, batch, "untied", "untied-in-2-pieces"),
}


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    for job in sys.argv[2:]:
        batch = torch.load(folder / "batch.pt", weights_only=True)
        result = {**JOBS, **PIECES}[job](folder, batch)
        torch.save(result, folder / f"{job}-{dist.get_rank()}-of-{dist.get_world_size()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
