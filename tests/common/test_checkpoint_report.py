"""The report of missing, unexpected and mismatched tensors, and its text."""

import difflib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from idefics_common.checkpoint import CheckpointError, TensorInfo, compare_names_and_shapes

EXPECTED = {
    "model.embed_tokens.weight": (100, 32),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.gated_cross_attn_layers.0.alpha_dense": (1,),
    "lm_head.weight": (100, 32),
}
STALE = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq",
    "model.vision_model.embeddings.position_ids",
]


def info(name, shape, dtype=np.float32) -> TensorInfo:
    dtype = np.dtype(dtype)
    return TensorInfo(name, dtype, shape, int(np.prod(shape)) * dtype.itemsize, Path("model.safetensors"), 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_complete_checkpoint_with_stale_buffers_and_a_tied_head(dtype):
    found = {name: info(name, shape, dtype) for name, shape in EXPECTED.items() if name != "lm_head.weight"}
    found |= {name: info(name, (1, 5), np.int64) for name in STALE}
    report = compare_names_and_shapes(found, EXPECTED, ignorable=frozenset(STALE), optional={"lm_head.weight"})
    assert report.ok
    assert report.ignored == tuple(STALE)
    assert (report.missing, report.unexpected, report.mismatched) == ({}, {}, ())
    assert str(report) == "all names and shapes are as expected"
    report.raise_if_bad("model.safetensors")


def test_buffers_are_ignored_by_exact_name_only():
    found = dict(EXPECTED) | dict.fromkeys(STALE, (4,)) | {"model.layers.9.self_attn.rotary_emb.inv_freq": (4,)}
    report = compare_names_and_shapes(found, EXPECTED, ignorable=STALE)
    assert report.unexpected == {"model.layers.9.self_attn.rotary_emb.inv_freq": (4,)}
    assert report.ignored == tuple(STALE)


def test_a_name_both_expected_and_ignorable_is_expected():
    report = compare_names_and_shapes({"w": (3,)}, {"w": (2,)}, ignorable={"w"})
    assert [mismatch.name for mismatch in report.mismatched] == ["w"]


def test_the_text_names_every_tensor_with_its_shapes():
    found = {
        "model.embed_tokens.weight": info("model.embed_tokens.weight", (102, 32)),
        "model.layers.0.self_attn.q_porj.weight": info("model.layers.0.self_attn.q_porj.weight", (32, 32)),
        "lm_head.weight": info("lm_head.weight", (100, 32), np.int8),
        "\x1b[2J": info("\x1b[2J", (7,)),
    }
    report = compare_names_and_shapes(found, EXPECTED)
    with pytest.raises(CheckpointError) as caught:
        report.raise_if_bad(Path("some/model.safetensors"))
    assert str(caught.value).splitlines() == [
        "some/model.safetensors: tensors are not as expected: 2 missing, 2 unexpected, 2 mismatched",
        "  - model.layers.0.self_attn.q_proj.weight (32, 32)  (is it 'model.layers.0.self_attn.q_porj.weight'?)",
        "  - model.gated_cross_attn_layers.0.alpha_dense (1,)",
        "  + 'model.layers.0.self_attn.q_porj.weight' (32, 32)",
        r"  + '\x1b[2J' (7,)",
        "  ! model.embed_tokens.weight expected (100, 32), found (102, 32)",
        "  ! lm_head.weight expected (100, 32), found (100, 32) of int8, expected a floating-point dtype",
    ]


def test_hundreds_of_names_stay_compact_and_few_are_compared(monkeypatch):
    expected = {f"model.layers.{i}.self_attn.q_proj.weight": (32, 32) for i in range(900)}
    found = {f"module.model.layers.{i}.self_attn.q_proj.weight": (32, 32) for i in range(900)}
    # As a hostile file might: similar names without end, and long ones.
    found |= {f"model.layers.{i}.self_attn.q_proj.bias": (1,) for i in range(50_000)}
    found |= {"model.layers." + str(i) * 50_000: (1,) for i in range(20)}
    report = compare_names_and_shapes(found, expected)
    real, compared = difflib.get_close_matches, []

    def counted(name, candidates, **options):
        candidates = list(candidates)
        compared.extend(candidates)
        return real(name, candidates, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    lines = str(report).splitlines()
    assert 0 < len(compared) <= 20 * 1000
    assert lines[0] == "tensors are not as expected: 900 missing, 50920 unexpected"
    assert lines[1].endswith("(is it 'module.model.layers.0.self_attn.q_proj.weight'?)")
    assert lines[21] == "  - ... and 880 more"
    assert lines[42] == "  + ... and 50900 more"
    assert len(lines) == 43
    assert max(map(len, lines)) < 300
