"""The command: arguments, exit codes, what it prints, and what it does not import."""

import json

import pytest

import conversion.cli
from conversion.cli import main
from tests.common.test_isolation import imported
from tests.conversion.checkpoints import FORMATS, LEGACY, read_all, write_checkpoint
from tests.requirements import needs_torch


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_conversion_and_its_report(tmp_path, capsys, checkpoint):
    code, out, err = run(capsys, checkpoint, tmp_path / "out", "--to", "keras")
    assert (code, err) == (0, "")
    assert "(safetensors, 1 file)" in out
    assert "gated cross-attention" in out
    assert out.splitlines()[-1] == "verified: 141 tensors read back and compared with the source"
    report = json.loads((tmp_path / "out" / "conversion-report.json").read_text())
    assert report["verdict"] == out.splitlines()[-1]
    assert len(report["tensors"]) == 141
    assert all(len(tensor["sha256"]) == 64 for tensor in report["tensors"])
    assert report["seconds"].keys() >= {"check", "write", "verify"}
    assert report["peak_memory_bytes"] > 10**7


@pytest.mark.parametrize("target", FORMATS)
def test_digests_are_the_same_in_every_format(tmp_path, checkpoint, target):
    """SHA-256 of the values in PyTorch's layout, whatever the layout on disk."""
    import hashlib

    expected = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in read_all(checkpoint).items()}
    assert main([str(checkpoint), str(tmp_path / target), "--to", target, "--quiet"]) == 0
    report = json.loads((tmp_path / target / "conversion-report.json").read_text())
    assert {tensor["name"]: tensor["sha256"] for tensor in report["tensors"]} == expected


def test_lossy_casts_are_named(tmp_path, capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, tmp_path / "out", "--to", "keras", "--dtype", "bfloat16", "--json")
    assert code == 0
    report = json.loads(out)
    tensors = read_all(checkpoint)
    for tensor in report["tensors"]:
        largest = abs(tensors[tensor["name"]]).max()
        assert 0 < tensor["cast_error_mean"] <= tensor["cast_error_max"] <= largest * 2**-8
        assert (tensor["source_dtype"], tensor["dtype"]) == ("float32", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    code, out, _ = run(capsys, tmp_path / "out", tmp_path / "wide", "--to", "safetensors", "--dtype", "float32")
    assert code == 0
    assert "lossy cast" not in out


def test_companions_come_along(tmp_path, checkpoint):
    """Byte by byte where nothing is cast; files of other kinds do not."""
    write_checkpoint(tmp_path / "source")
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "notes.txt"):
        (tmp_path / "source" / name).write_text(f'{{"name":   "{name}"}}')
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--to", "tf-h5", "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "conversion-report.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tf_model.h5",
        "tokenizer.json",
    }
    for name in names - {"conversion-report.json", "tf_model.h5"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_dry_run_writes_nothing(tmp_path, capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, tmp_path / "deep" / "out", "--to", "tf-h5", "--dry-run")
    assert code == 0
    assert out.endswith("planned; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_not_verified_is_said(tmp_path, capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, tmp_path / "out", "--to", "tf-h5", "--verify", "none")
    assert code == 0
    assert out.splitlines()[-1] == "not verified"


def test_what_is_there_is_replaced_only_when_asked(tmp_path, capsys, checkpoint):
    (tmp_path / "empty").mkdir()
    assert run(capsys, checkpoint, tmp_path / "empty", "--to", "tf-h5", "--quiet") == (0, "", "")
    code, _, err = run(capsys, checkpoint, tmp_path / "empty", "--to", "keras")
    assert (code, err) == (1, f"convert-weights: {tmp_path / 'empty'}: exists; --overwrite replaces it\n")
    assert run(capsys, checkpoint, tmp_path / "empty", "--to", "keras", "--overwrite", "--quiet")[0] == 0
    assert not (tmp_path / "empty" / "tf_model.h5").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("source", "is the source itself"),
        (".", "holds the source"),
        ("file", "is in the way"),
        ("photos", "holds no checkpoint (no config.json) and is not replaced"),
        ("link", "is in the way"),
    ],
)
def test_destinations_that_are_never_replaced(tmp_path, capsys, destination, message):
    write_checkpoint(tmp_path / "source")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, tmp_path / "source", tmp_path / destination, "--to", "bin", "--overwrite")
    assert code == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect(capsys, tmp_path, checkpoint):
    code, out, _ = run(capsys, "inspect", LEGACY / "tf_model.h5")
    assert code == 0
    assert "format      tf-h5, 1 file" in out
    assert "parameters  92,548" in out
    assert out.endswith("nothing is wrong\n")
    code, out, _ = run(capsys, "inspect", checkpoint, "--json")
    assert json.loads(out)["dtypes"] == {"float32": 141}
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 1
    assert "problem: " in out


def test_verify(capsys, tmp_path, checkpoint):
    code, out, _ = run(capsys, "verify", LEGACY, LEGACY / "tf_model.h5")
    assert code == 0
    assert out.endswith("141 tensors compared\nthe same model\n")
    code, out, _ = run(capsys, "verify", LEGACY, checkpoint, "--json")
    assert code == 1
    assert json.loads(out)["same"] is False


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "b", "--to", "gguf"], ["a", "b", "--to", "bin", "--workers", "0"], ["verify", "a"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: convert-weights" in capsys.readouterr().err


def test_a_size_without_a_unit_is_bytes(tmp_path, capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, tmp_path / "out", "--to", "tf-h5", "--max-shard-size", "250000", "--json")
    assert code == 0
    assert json.loads(out)["files"] == ["tf_model-00001-of-00002.h5", "tf_model-00002-of-00002.h5"]


@pytest.mark.parametrize("size", ["0", "5 parsecs", "-1GB", "GB"])
def test_sizes_that_are_none(tmp_path, capsys, checkpoint, size):
    code, _, err = run(capsys, checkpoint, tmp_path / "out", "--to", "bin", f"--max-shard-size={size}")
    assert code == 1
    assert "max_shard_size must be a positive number of bytes" in err


def test_ctrl_c(tmp_path, capsys, monkeypatch, checkpoint):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.cli, "convert", interrupt)
    code, _, err = run(capsys, checkpoint, tmp_path / "out", "--to", "bin")
    assert (code, err) == (130, "convert-weights: interrupted; --resume goes on from here\n")


def test_help_inspecting_and_conversions_import_no_framework(tmp_path, checkpoint):
    """They would take seconds of every run."""
    calls = [
        ["inspect", checkpoint],
        [checkpoint, tmp_path / "a", "--to", "keras"],
        [tmp_path / "a", tmp_path / "b", "--to", "tf-h5"],
    ]
    lines = [f"assert main({list(map(str, arguments))!r}) == 0" for arguments in calls]
    assert imported("\n".join(["from conversion.cli import main", *lines])) == set()
    assert imported("from conversion.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass") == set()


@needs_torch
def test_bin_files_import_torch_alone(tmp_path, checkpoint):
    arguments = [str(checkpoint), str(tmp_path / "out"), "--to", "bin"]
    assert imported(f"from conversion.cli import main; assert main({arguments!r}) == 0") == {"torch"}
