"""Two processes compute what one computes: tensor parallelism, DDP and FSDP2, on the CPU with gloo.

Starting processes takes longer than what they do, so one pair does all jobs. In the batch the second process gets only
rows without images: it has to take part in the work on images all the same, or the first would wait for it forever.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from idefics_common.checkpoint import CheckpointError, open_checkpoint
from idefics_common.parameters import Kind, expand
from idefics_pt import IdeficsForVisionText2Text, IdeficsModel
from idefics_pt.attention import split_heads
from tests.models import MATRIX, SMALL
from tests.pt.distributed_worker import JOBS, evaluate, train
from tests.pt.pairs import our_model, torch_batch
from tests.tolerances import FLOAT32_ACTIVATIONS, FLOAT32_GRADIENTS, relative_error

PROCESSES = 2
SECONDS = 1000
EVEN_HEADS = {"num_attention_heads": 4, "perceiver_config": {**SMALL["perceiver_config"], "resampler_n_heads": 2}}
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "frozen": {"freeze_text_layers": True, "freeze_vision_layers": True},
}


def cannot_start() -> str | None:
    """Why there can be no process group here, or None."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "PyTorch was built without gloo"
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return None
    except OSError as error:
        return f"no local port can be opened: {error}"


def small_model(name):
    model = our_model(**EVEN_HEADS, **MODELS[name])
    model.apply_freezing()
    return model


def make_batch(config):
    """Rows 0 and 3 have images; row 1, which has none, comes twice, the second time with other text."""
    rows = torch.tensor([0, 3, 1, 1])
    batch = {name: tensor[rows] for name, tensor in torch_batch(config, with_labels=True).items()}
    batch["input_ids"][3] = batch["input_ids"][3].flip(0)
    assert not batch["image_attention_mask"][2:].any()
    return batch


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each job the results of both processes; the folder they worked in is under "folder"."""
    if reason := cannot_start():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("distributed")
    for name in MODELS:
        small_model(name).save_pretrained(folder / name)
    torch.save(make_batch(small_model("untied").config), folder / "batch.pt")
    done = run_jobs(folder, PROCESSES, [*JOBS, "pieces-of-untied", "pieces-of-tied"])
    return {**done, "folder": folder}


def run_jobs(folder, processes: int, jobs) -> dict[str, list]:
    """The results of every process, by job."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(Path(__file__).with_name("distributed_worker.py")), str(folder), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    process = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert process.returncode == 0, process.stderr[-6000:]
    files = {job: [folder / f"{job}-{rank}-of-{processes}.pt" for rank in range(processes)] for job in jobs}
    return {job: [torch.load(file, weights_only=True) for file in of_ranks] for job, of_ranks in files.items()}


def assert_same(actual: dict, expected: dict, tolerance):
    assert actual.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    errors = {name: relative_error(actual[name], expected[name], 1e-2 * largest) for name in expected}
    assert max(errors.values()) < tolerance, max(errors, key=errors.get)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_tensor_parallel_logits_gradients_and_ids(results, name):
    model = small_model(name)
    expected = evaluate(model, make_batch(model.config))
    expected["gradients"] = {key: gradient.detach() for key, gradient in expected["gradients"].items()}
    for actual in results[f"tp-{name}"]:
        assert relative_error(actual["logits"], expected["logits"]) < FLOAT32_ACTIVATIONS
        assert_same(actual["gradients"], expected["gradients"], FLOAT32_GRADIENTS)
        for kind, ids in expected["ids"].items():
            assert torch.equal(actual["ids"][kind], ids), kind
    saved = IdeficsForVisionText2Text.from_pretrained(results["folder"] / f"{name}-from-two")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), small_model(name).parameters(), strict=True))


@pytest.mark.parametrize("job", [job for job in JOBS if not job.startswith("tp")])
def test_data_parallel_losses_and_weights(results, job):
    model = small_model(job.partition("-")[2])
    batch = make_batch(model.config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, weights = train(model, batch, labels_per_step=(batch["labels"][:, 1:] != -100).sum())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    change = {name: weights[name] - start[name] for name in trainable}
    assert change["model.perceiver_resampler.latents"].abs().max() > 1e-3
    of_ranks = torch.stack([torch.stack(result[0]) for result in results[job]])
    assert relative_error(of_ranks.mean(0), torch.stack(losses)) < FLOAT32_ACTIVATIONS
    for _, trained in results[job]:
        assert_same({name: trained[name] - start[name] for name in trainable}, change, FLOAT32_GRADIENTS)
        assert all(torch.equal(trained[name], start[name]) for name in start.keys() - trainable)


@pytest.fixture(scope="module")
def checkpoints(results):
    """Weights by how many processes loaded the two pieces that two saved: 1, 2 and 4; the folder of the checkpoints."""
    folder, job = results["folder"], "pieces-of-pieces"
    return {**{n: run_jobs(folder, n, [job])[job] for n in (1, 4)}, 2: results["pieces-of-untied"], "folder": folder}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_e15_a_distributed_checkpoint_is_loaded_on_any_number_of_processes(checkpoints, processes):
    expected = small_model("untied").state_dict()
    for of_rank in checkpoints[processes]:
        for weights in of_rank:  # FSDP; then its own pieces again, split otherwise, and whole in each process
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_e15_tied_weights_stay_tied(results):
    expected = small_model("tied").state_dict()
    for of_rank in results["pieces-of-tied"]:
        assert all(torch.equal(weights[name], expected[name]) for weights in of_rank for name in expected)
    loaded = IdeficsForVisionText2Text.from_pretrained(results["folder"] / "tied-in-2-pieces")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_e15_one_process_loads_and_saves_it_whole(checkpoints, tmp_path):
    folder = checkpoints["folder"]
    model = IdeficsForVisionText2Text.from_pretrained(folder / "untied-in-4-pieces")
    model.save_pretrained(tmp_path)
    for source in (tmp_path, folder / "untied-in-1-pieces"):  # what one process has is no piece
        assert (source / "model.safetensors").exists()
        with open_checkpoint(source) as checkpoint:
            for name, expected in small_model("untied").state_dict().items():
                assert np.array_equal(checkpoint.read(name), expected)


SPOILS = {
    "a file is missing": (lambda folder, first: first.unlink(), "its pieces hold .*: files are missing, or left"),
    "a file is cut short": (lambda folder, first: os.truncate(first, 5000), "truncated|not whole"),
    "no places": (
        lambda folder, first: save_file({"x": torch.ones(2)}, first),
        "metadata do not say where in its tensor each piece begins",
    ),
    "another checkpoint": (
        lambda folder, first: small_model("untied").save_pretrained(folder),
        "holds two checkpoints, model.safetensors and shard-00001.*: which is meant",
    ),
    "another configuration": (
        lambda folder, first: (
            small_model("untied").config.__class__.from_pretrained(folder, vocab_size=98).save_pretrained(folder)
        ),
        r"lm_head.weight",
    ),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_e15_loading_in_pieces_is_strict(checkpoints, spoil, tmp_path):
    folder = shutil.copytree(checkpoints["folder"] / "untied-in-4-pieces", tmp_path / "copy")
    change, message = SPOILS[spoil]
    change(folder, min(folder.glob("shard-*")))
    with pytest.raises(CheckpointError, match=message):
        IdeficsForVisionText2Text.from_pretrained(folder)


def test_e15_other_readers_name_what_it_is(checkpoints):
    folder = checkpoints["folder"] / "untied-in-4-pieces"
    with pytest.raises(CheckpointError, match=r"is a distributed checkpoint: 4 files .* load it by `idefics_pt"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="a distributed checkpoint of the model with its head"):
        IdeficsModel.from_pretrained(folder)


@pytest.mark.parametrize("variant", MATRIX)
def test_the_plan_splits_the_embedding_and_every_linear_layer_and_names_nothing_else(variant):
    model = our_model(**MATRIX[variant])
    numbers = range(model.config.num_hidden_layers)
    modules = dict(model.named_modules())
    split = set()
    for key, style in model.tp_plan.items():
        found = {key.replace("*", str(i)) for i in numbers} & modules.keys()
        assert found, key
        split |= found if style != "replicated_with_grad_allreduce" else set()
    linear = {p.name.removesuffix(".weight") for p in expand(model.config) if p.kind is Kind.LINEAR}
    assert split == {"model.embed_tokens"} | linear - {"lm_head.additional_fc"}


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="12 features are no whole number of heads of width 8; with tensor parallel"):
        split_heads(torch.zeros(1, 2, 12), head_width=8)


def test_only_the_last_norm_of_the_vision_tower_is_unused():
    """What docs/finetuning.md says about `find_unused_parameters`, for a batch whose images nobody sees."""
    model = our_model().train()
    batch = {name: tensor[1:2] for name, tensor in torch_batch(model.config, with_labels=True).items()}
    assert not batch["image_attention_mask"].any()
    model(**batch).loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {"model.vision_model.post_layernorm.weight", "model.vision_model.post_layernorm.bias"}
    frozen = our_model(freeze_vision_layers=True).train()
    frozen.apply_freezing()
    frozen(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in frozen.parameters() if parameter.requires_grad)
