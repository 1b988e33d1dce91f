"""The table of what trains: right by part, frozen or not, wrapped or not."""

import pytest
import torch
from peft import get_peft_model

from idefics_common.parameters import Part, count_parameters, expand
from idefics_pt.lora import lora_config
from idefics_pt.trainable import trainable_parameters
from tests.models import MATRIX
from tests.pt.pairs import our_model


@pytest.mark.parametrize("variant", MATRIX)
def test_every_parameter_counts_once_for_its_part(variant):
    model = our_model(**MATRIX[variant])
    counts = trainable_parameters(model)
    assert counts.total == counts.trainable == count_parameters(expand(model.config))
    assert sum(counts.total.values()) == sum(parameter.numel() for parameter in model.parameters())
    without_head = {**counts.total, Part.HEAD: 0}
    assert trainable_parameters(model.model).total == without_head


def test_frozen_parts_and_the_printed_table():
    model = our_model(freeze_text_layers=True, freeze_vision_layers=True, freeze_lm_head=True)
    model.apply_freezing()
    counts = trainable_parameters(torch.nn.ModuleList([model]))
    added = 3 * 24
    assert counts.trainable == {
        **counts.total, Part.VISION: 0, Part.DECODER: 0, Part.EMBEDDING: added, Part.HEAD: added
    }  # fmt: skip
    lines = str(counts).splitlines()
    assert lines[0].split() == ["part", "trainable", "of"]
    assert lines[1].split() == ["text", "embedding", "72", "2,400", "3.0%"]
    everything, trained = sum(counts.total.values()), sum(counts.trainable.values())
    assert lines[-1].split() == ["all", f"{trained:,}", f"{everything:,}", f"{trained / everything:.1%}"]


def test_adapters_count_for_the_part_they_are_in():
    model = get_peft_model(
        our_model(), lora_config(our_model(), "cross_attention", r=4, modules_to_save=["embed_tokens"])
    )
    counts = trainable_parameters(model)
    assert sum(counts.trainable.values()) == model.get_nb_trainable_parameters()[0]
    assert {part for part, count in counts.trainable.items() if count} == {Part.CROSS_ATTENTION, Part.EMBEDDING}
    assert counts.trainable[Part.EMBEDDING] == 100 * 24


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="expected an IDEFICS model or a wrapper around one, got Linear"):
        trainable_parameters(torch.nn.Linear(2, 2))
