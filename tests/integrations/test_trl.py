"""Rows E6, E7 and E10: one step of TRL's trainers on the shipped checkpoint, with losses that a plain forward of each
conversation alone gives."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_stop_token_trained

from idefics_common import sample_checkpoint, sample_photograph
from idefics_pt import IdeficsForVisionText2Text, IdeficsProcessor, register, unregister
from idefics_pt.lora import lora_config

CHECKPOINT = sample_checkpoint()
PHOTOGRAPH = Image.open(sample_photograph()).convert("RGB")
TURNED = PHOTOGRAPH.transpose(Image.Transpose.ROTATE_180)


def user(*parts) -> dict:
    """A message of texts and places of images."""
    return {
        "role": "user",
        "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
    }


def assistant(text) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


IMAGE = {"type": "image"}
# prompts and answers of different lengths, and rows with two, one and no images
ROWS = [
    {
        "images": [TURNED, PHOTOGRAPH],
        "prompt": [user(IMAGE, "and", IMAGE, "?")],
        "answer": [assistant("A bag and a boot.")],
    },
    {"images": [PHOTOGRAPH], "prompt": [user(IMAGE, "What is this?")], "answer": [assistant("An ankle boot.")]},
    {"images": [], "prompt": [user("Is a very long dress a coat, or a shirt?")], "answer": [assistant("No.")]},
]
ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": len(ROWS),
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def processor():
    return IdeficsProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(params=["shipped", "published"])
def model(request):
    """With the id of the image token in the configuration, and, as in published configurations, without."""
    model = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    if request.param == "published":
        model.config.image_token_id = None
    return model


def log_probabilities(model, processor, images, prompt, answer):
    """Of each token of the answer and of the whole row, from a forward of this row alone."""
    before = processor.apply_chat_template(prompt, add_generation_prompt=True)
    whole = processor.apply_chat_template(prompt + answer)
    assert whole.startswith(before)
    lengths = [processor(images=[images], text=[text])["input_ids"].shape[1] for text in (before, whole)]
    row = processor(images=[images], text=[whole])
    logits_TV = model(**row).logits[0, :-1]
    log_probabilities_TV = logits_TV - logits_TV.logsumexp(dim=-1, keepdim=True)
    every = log_probabilities_TV.gather(-1, row["input_ids"][0, 1:, None])[:, 0]
    return every[lengths[0] - 1 :], every


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


DATA = {
    "messages": (lambda row: {"messages": row["prompt"] + row["answer"]}, {}, 1),
    "assistant alone": (lambda row: {"messages": row["prompt"] + row["answer"]}, {"assistant_only_loss": True}, 0),
    "prompt and completion": (lambda row: {"prompt": row["prompt"], "completion": row["answer"]}, {}, 0),
    "both learned": (
        lambda row: {"prompt": row["prompt"], "completion": row["answer"]},
        {"completion_only_loss": False},
        1,
    ),
}


@pytest.mark.parametrize(("columns", "arguments", "which"), DATA.values(), ids=DATA)
def test_e6_sft_learns_what_a_plain_forward_says(columns, arguments, which, model, processor, tmp_path):
    with torch.no_grad():
        parts = [
            log_probabilities(model, processor, row["images"], row["prompt"], row["answer"])[which] for row in ROWS
        ]
    expected = -torch.cat(parts).mean().item()
    data = Dataset.from_list([{"images": row["images"], **columns(row)} for row in ROWS])
    trainer = SFTTrainer(
        model, SFTConfig(str(tmp_path), **ARGUMENTS, **arguments), train_dataset=data, processing_class=processor
    )
    before = model.lm_head.additional_fc.weight.detach().clone()
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-5)]
    assert not torch.equal(model.lm_head.additional_fc.weight, before)


@pytest.mark.parametrize("saved", [None, ["lm_head"], "all-linear"])
def test_e5_sft_with_adapters_learns_what_a_plain_forward_says(saved, processor, tmp_path):
    base = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        parts = [log_probabilities(base, processor, row["images"], row["prompt"], row["answer"])[0] for row in ROWS]
    data = [{"images": row["images"], "prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    trainer = SFTTrainer(
        base,
        SFTConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
        peft_config=(
            LoraConfig(r=2, target_modules=saved, exclude_modules=["additional_fc"])
            if saved == "all-linear"
            else lora_config(base, ("text",), r=2, modules_to_save=saved)
        ),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert any("lora_" in name for name in before)
    assert any("lm_head" in name for name in before) == (saved == ["lm_head"])
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(-torch.cat(parts).mean().item(), rel=1e-5)]
    moved = [name for name, value in before.items() if not torch.equal(value, trainer.model.get_parameter(name))]
    assert sorted(moved) == sorted(name for name in before if "lora_A" not in name)  # lora_B is zero at first


@pytest.mark.parametrize("modules", [["lm_head"], ["additional_fc"], "all-linear"])
def test_e5_adapters_that_trl_would_leave_out_are_refused(modules, processor, tmp_path):
    model = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    data = [{"images": row["images"], "prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    with pytest.raises(ValueError, match=r"adapter to `lm_head` is not supported|for TRL, leave it out.*additional_fc"):
        SFTTrainer(
            model,
            SFTConfig(str(tmp_path), **ARGUMENTS),
            train_dataset=Dataset.from_list(data),
            processing_class=processor,
            peft_config=LoraConfig(r=2, target_modules=modules),
        )


def test_e6_dpo_prefers_as_the_formula_says(model, processor, tmp_path):
    reference = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    reference.config.image_token_id = model.config.image_token_id
    with torch.no_grad():  # otherwise all margins are zero
        model.lm_head.additional_fc.weight.mul_(0.3)
        model.lm_head.weight.mul_(0.9)
    rejected = [assistant("No, a very long dress."), assistant("A bag."), assistant("Yes.")]

    @torch.no_grad()
    def margin(of, row, wrong):
        scores = [
            log_probabilities(of, processor, row["images"], row["prompt"], a)[0].sum() for a in (row["answer"], wrong)
        ]
        return scores[0] - scores[1]

    pairs = list(zip(ROWS, ([one] for one in rejected), strict=True))
    margins = torch.stack([margin(model, *pair) - margin(reference, *pair) for pair in pairs])
    assert margins.abs().min() > 0.1
    expected = torch.log1p(torch.exp(-margins)).mean().item()
    data = [
        {"images": row["images"], "prompt": row["prompt"], "chosen": row["answer"], "rejected": wrong}
        for row, wrong in pairs
    ]
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(str(tmp_path), beta=1.0, **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
    )
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(expected, rel=1e-5)]


def test_e6_what_trl_loads_by_its_path_is_ours_once_registered(processor, tmp_path):
    """The reference model of DPO is the policy at first, so that the loss is log 2; transformers' own class, which TRL
    would load, is wrong about the additional vocabulary: 0.6827."""
    data = [
        {"images": row["images"], "prompt": row["prompt"], "chosen": row["answer"], "rejected": [assistant("Yes.")]}
        for row in ROWS
    ]
    register()
    try:
        trainer = DPOTrainer(
            str(CHECKPOINT),
            None,
            DPOConfig(str(tmp_path), **ARGUMENTS),
            train_dataset=Dataset.from_list(data),
            processing_class=processor,
        )
    finally:
        unregister()
    assert type(trainer.model) is type(trainer.ref_model) is IdeficsForVisionText2Text
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(0.693147, rel=1e-5)]


def test_e10_trl_finds_the_end_of_a_turn_learned(processor):
    """Otherwise it warns that the model may not learn to stop."""
    assert is_chat_template_stop_token_trained(processor)
    assert not is_chat_template_stop_token_trained(processor, processor.chat_template.replace("<end_of_utterance>", ""))


def grpo(model, processor, folder, rewards, **arguments):
    """A trainer of two prompts of different lengths, with two completions each."""
    data = Dataset.from_list([{"images": row["images"], "prompt": row["prompt"]} for row in ROWS[:2]])
    arguments = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6} | arguments
    return GRPOTrainer(
        model,
        rewards,
        GRPOConfig(str(folder), **{**ARGUMENTS, **arguments}),
        train_dataset=data,
        processing_class=processor,
    )


def test_e6_grpo_moves_weights_as_rewards_say(model, processor, tmp_path):
    """By the gradient of advantages times log-probabilities, from a forward of each row alone."""
    model.config.image_token_id = processor.image_token_id
    processor.return_image_attention_mask = False
    plain, temperature = copy.deepcopy(model), 3.0
    seen = {}

    def rewards(prompts, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completion_ids)
        return [float(index % 2) for index in range(len(prompts))]

    trainer = grpo(
        model, processor, tmp_path, rewards, temperature=temperature, learning_rate=0.1, gradient_checkpointing=False
    )
    trainer.train()
    assert len({tuple(one) for one in seen["completions"]}) > 2

    processor.return_image_attention_mask = True
    objective, tokens = 0.0, 0
    for index, (prompt, completion) in enumerate(zip(seen["prompts"], seen["completions"], strict=True)):
        images = [part["image"] for part in prompt[0]["content"] if part["type"] == "image"]
        row = processor(images=[images], text=[processor.apply_chat_template(prompt, add_generation_prompt=True)])
        ids = torch.cat((row["input_ids"], torch.tensor([completion])), dim=1)
        seen_last = row["image_attention_mask"][:, -1:].expand(-1, len(completion), -1)
        mask = torch.cat((row["image_attention_mask"], seen_last), dim=1)
        logits = plain(ids, pixel_values=row["pixel_values"], image_attention_mask=mask).logits / temperature
        picked = logits.log_softmax(dim=-1)[0, -len(completion) - 1 : -1].gather(-1, torch.tensor(completion)[:, None])
        advantage = (index % 2 - 0.5) / (0.5**0.5 + 1e-4)
        objective, tokens = objective + advantage * picked.sum(), tokens + len(completion)
    (objective / tokens).backward()
    trained = model.state_dict()  # where base and additional vocabulary are apart
    for name in ("lm_head.additional_fc.weight", "lm_head.weight", "model.gated_cross_attn_layers.1.alpha_cross_attn"):
        moved = 0.1 * plain.get_parameter(name).grad
        assert moved.abs().max() > 1e-5
        difference = trained[name] - plain.get_parameter(name) - moved
        assert difference.abs().max() < 1e-2 * moved.abs().max(), name


def test_e6_grpo_names_the_image_token_that_the_configuration_lacks(processor, tmp_path):
    model = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    model.config.image_token_id = None
    trainer = grpo(model, processor, tmp_path, lambda prompts, **kwargs: [0.0] * len(prompts))
    with pytest.raises(ValueError, match=r"config\.image_token_id = processor\.image_token_id"):
        trainer.train()


def test_e6_reference_models_of_grpo_need_the_image_token_too(processor, tmp_path):
    """Without it they would show all images to all tokens: a divergence of 0.01 between equal models."""
    checkpoint = tmp_path / "published"
    shutil.copytree(CHECKPOINT, checkpoint)
    settings = json.loads((checkpoint / "config.json").read_text())
    del settings["image_token_id"]
    (checkpoint / "config.json").write_text(json.dumps(settings))
    processor.return_image_attention_mask = False
    model = IdeficsForVisionText2Text.from_pretrained(checkpoint)
    model.config.image_token_id = processor.image_token_id
    register()
    try:
        trainer = grpo(model, processor, tmp_path, lambda prompts, **kwargs: [0.0] * len(prompts), beta=0.1)
    finally:
        unregister()
    with pytest.raises(ValueError, match=r"that of the trainer's `ref_model` too"):
        trainer.train()
    trainer.ref_model.config.image_token_id = processor.image_token_id
    trainer.train()
    assert [entry["kl"] for entry in trainer.state.log_history if "kl" in entry] == [0.0]


def test_e4_a_head_in_float32_keeps_the_additional_vocabulary(processor, tmp_path):
    model = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT)
    row = processor(images=[[PHOTOGRAPH]], text=["User:<image>What is this?<end_of_utterance>\nAssistant:"])
    with torch.no_grad():
        expected = model(**row).logits
        grpo(model, processor, tmp_path, lambda prompts, **kwargs: [0.0] * len(prompts), cast_lm_head_to_fp32=True)
        torch.testing.assert_close(model(**row).logits, expected)
