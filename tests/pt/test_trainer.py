"""Row E7: what `TrainingArguments` can set that reaches the model is right, by plain forwards and plain arithmetic."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from idefics_common import sample_checkpoint, sample_photograph
from idefics_pt import IdeficsCollator, IdeficsForVisionText2Text, IdeficsProcessor
from idefics_pt.lora import lora_config

CHECKPOINT = sample_checkpoint()
PHOTOGRAPH = Image.open(sample_photograph())
TURNED = PHOTOGRAPH.transpose(Image.Transpose.ROTATE_180)
EXAMPLES = [
    {"prompt": ["User:", PHOTOGRAPH, "What is this?", "\nAssistant: An ankle boot.<end_of_utterance>"]},
    {"prompt": ["User: Is this a bag?", "\nAssistant: No.<end_of_utterance>"]},
    {
        "prompt": ["User:", TURNED, "and", PHOTOGRAPH, "?", "\nAssistant: A bag and an ankle boot.<end_of_utterance>"],
    },
    {"prompt": ["User:", TURNED, "Is this a coat?", "\nAssistant: No.<end_of_utterance>"]},
]


class OwnIdefics(IdeficsForVisionText2Text):
    """A class of a user's own."""


@pytest.fixture(scope="module")
def collate():
    return IdeficsCollator(IdeficsProcessor.from_pretrained(CHECKPOINT), return_tensors="pt")


def load(kind="plain"):
    model = (OwnIdefics if kind == "subclass" else IdeficsForVisionText2Text).from_pretrained(CHECKPOINT)
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, ("text",), r=2))
    if kind == "prefix":
        from peft import PrefixTuningConfig, get_peft_model

        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    return model


def trainer(model, collate, folder, examples=EXAMPLES, **arguments):
    """One step of gradient descent over all examples, unless `arguments` say otherwise."""
    compute_metrics = arguments.pop("compute_metrics", None)
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings | arguments),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=collate,
        compute_metrics=compute_metrics,
    )


def label_losses(model, batch, smoothing=0.0):
    """For each label: its loss by the definition, over the whole vocabulary; from one plain forward."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits_BTV = model(**inputs).logits[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    losses_BTV = -(logits_BTV - logits_BTV.logsumexp(dim=-1, keepdim=True))
    own_BT = losses_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    losses_BT = (1 - smoothing) * own_BT + smoothing * losses_BTV.mean(dim=-1)
    return losses_BT[labels_BT != -100]


def batches(collate, size=2):
    return [collate(EXAMPLES[start : start + size]) for start in range(0, len(EXAMPLES), size)]


@pytest.mark.parametrize("kind", ["plain", "subclass", "lora", "prefix"])
def test_e7_smoothed_labels_are_those_of_the_next_token(kind, collate, tmp_path):
    """Over the whole vocabulary; in place it is 17.6 for 4.5."""
    model = load(kind).eval()
    assert model.config.vocab_size < 586
    training = trainer(model, collate, tmp_path, label_smoothing_factor=0.2)
    with torch.no_grad():
        expected = torch.stack([label_losses(model, batch, 0.2).mean() for batch in batches(collate)]).mean()
        assert training.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        batch = collate(EXAMPLES)
        losses = label_losses(model, batch, 0.2)
        assert losses.mean() > 1.1 * label_losses(model, batch).mean()
        given = training.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
        torch.testing.assert_close(given, losses.sum() / 7)


STEPS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "not averaged": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "average_tokens_across_devices": False,
    },
    "smoothed and accumulated": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "label_smoothing_factor": 0.2,
    },
    "found batch size": {"auto_find_batch_size": True},
    "counted": {"include_num_input_tokens_seen": "all", "torch_empty_cache_steps": 1},
    "recomputed": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "cached": {"use_cache": True},
}


@pytest.mark.parametrize("arguments", STEPS.values(), ids=STEPS)
def test_e7_a_step_is_that_of_a_plain_loop(arguments, collate, tmp_path):
    torch._dynamo.reset()
    plain, model = load(), load()
    names = [
        "lm_head.additional_fc.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.vision_model.pre_layrnorm.weight",
    ]
    label_losses(plain, collate(EXAMPLES), arguments.get("label_smoothing_factor", 0.0)).mean().backward()
    expected = {name: plain.get_parameter(name) - 0.1 * plain.get_parameter(name).grad for name in names}
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    training = trainer(model, collate, tmp_path, **arguments)
    training.train()
    for name in names:
        got = model.get_parameter(name)
        moved = (before[name] - expected[name]).abs().max()
        assert (got - expected[name]).abs().max() < 1e-3 * moved, name


def test_bfloat16_steps_as_autocast_does(collate, tmp_path):
    plain, model = load(), load()
    with torch.autocast("cpu", torch.bfloat16):
        label_losses(plain, collate(EXAMPLES)).mean().backward()
    name = "model.layers.1.mlp.up_proj.weight"
    moved = 0.1 * plain.get_parameter(name).grad
    before = model.get_parameter(name).detach().clone()
    trainer(model, collate, tmp_path, bf16=True).train()
    assert model.get_parameter(name).dtype == torch.float32
    assert (before - model.get_parameter(name) - moved).norm() < 0.05 * moved.norm()


def test_e7_noise_of_neftune_reaches_both_vocabularies(collate, tmp_path):
    model = load().train()
    ids = torch.tensor([[5, 583, 9, 585, 300, 584]])
    clean = model.get_input_embeddings()(ids)
    handle = activate_neftune(model, 5.0)
    noise = model.get_input_embeddings()(ids) - clean
    bound = 5.0 / np.sqrt(ids.shape[1] * clean.shape[-1])
    assert (noise.abs().amax(dim=-1) > bound / 2).all()
    assert noise.abs().max() <= bound * 1.0001
    deactivate_neftune(model, handle)
    assert torch.equal(model.get_input_embeddings()(ids), clean)
    trainer(model, collate, tmp_path, neftune_noise_alpha=5.0).train()


@pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str)
def test_e7_evaluation_gathers_logits_alone(options, collate, tmp_path):
    """Images of batches differ in number, and their states are large: they are not gathered for a whole set."""
    model = load().eval()
    seen = []

    def metrics(prediction, compute_result=True):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    training = trainer(
        model, collate, tmp_path, compute_metrics=metrics, include_for_metrics=["inputs", "loss"], **options
    )
    training.evaluate()
    with torch.no_grad():
        logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches(collate)]
    if options == {}:
        got = [seen[0].predictions[:2], seen[0].predictions[2:]]
        assert isinstance(seen[0].predictions, np.ndarray)
        assert len(seen[0].losses) == 4
        ids = [seen[0].inputs[:2], seen[0].inputs[2:]]
    elif "batch_eval_metrics" in options:
        got, ids = [one.predictions for one in seen], [batch["input_ids"] for batch in batches(collate)]
    else:
        got, ids = seen[0].predictions, seen[0].inputs
    for got_BTV, ids_BT, logits_BTV, batch in zip(got, ids, logits, batches(collate), strict=True):
        length = logits_BTV.shape[1]
        np.testing.assert_allclose(got_BTV[:, :length], logits_BTV, atol=1e-4)
        assert np.array_equal(np.asarray(ids_BT)[:, :length], batch["input_ids"])
    if options == {}:
        assert np.array_equal(training.predict(EXAMPLES).predictions, seen[0].predictions)


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_e10_columns_that_were_removed_are_named_with_the_argument(key, collate, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    examples = [{key: EXAMPLES[1]["prompt"] if key == "prompt" else chat}] * 2
    with pytest.raises(ValueError, match=r"example 0 .*its keys are \[\]\. .*remove_unused_columns=False"):
        trainer(load(), collate, tmp_path, examples, remove_unused_columns=True).train()
    trainer(load(), collate, tmp_path, examples).train()


def test_e7_what_was_interrupted_goes_on_as_if_it_had_not_been(collate, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    whole, resumed = load(), load()
    trainer(whole, collate, tmp_path, **settings).train()
    trainer(resumed, collate, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    before = load().state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], msg=name)
    assert not torch.equal(before["lm_head.weight"], whole.state_dict()["lm_head.weight"])


# about the optimizer's numbers, logging, saving, the Hub, seeds and loading data
OTHERS = re.findall(
    r"\w+",
    """
output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps adam_beta1
adam_beta2 adam_epsilon max_grad_norm torch_empty_cache_steps logging_strategy logging_steps logging_first_step
log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision metric_for_best_model
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics do_train do_eval do_predict
local_rank
""",
)


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the table is that of transformers 5.23")
def test_e7_every_option_of_trainer_is_in_the_table_or_none_of_the_models():
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = page.partition("## Trainer and TRL")[2].partition("\n### ")[0]
    table = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(table))
    assert sorted(named + OTHERS) == sorted(field.name for field in dataclasses.fields(TrainingArguments))
