"""The tables of `docs/scaling.md`: what the published sizes cost on paper, and how far paper is from this machine.

python -m benchmarks.scaling                             print the tables
python -m benchmarks.scaling --write docs/scaling.md     put them between the page's marks
python -m benchmarks.scaling --measure                   measure, and keep it for the last table (minutes)
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.pages import between_marks
from benchmarks.report import RESULTS
from idefics_common.configuration.fields import read_config
from idefics_common.parameters import Part, count_parameters
from idefics_common.scaling import (
    PRECISIONS,
    Hardware,
    Workload,
    decode_seconds,
    first_token_seconds,
    image_bytes,
    inference_memory,
    pipeline_plan,
    tensor_parallel_bytes,
    text_cache_bytes_per_token,
    training_memory,
    weight_bytes,
)

ROOT = Path(__file__).parents[1]
MODELS = {name: ROOT / "tests" / "fixtures" / "configs" / f"config-{name.lower()}.json" for name in ("9B", "80B")}
RESERVED_BYTES = 10**9
"""Held back on each device for the driver's context, scratch memory of kernels and fragments: an assumption."""

CARD_24 = Hardware("24 GB", 1.008e12, 165.2e12 / 2, memory_bytes=24 * 10**9)  # GeForce RTX 4090
CARD_80 = Hardware("80 GB", 2.039e12, 312e12 / 2, memory_bytes=80 * 10**9)  # A100 80GB SXM
LINK_BYTES_PER_SECOND = 300e9  # NVLink of an A100, one direction
TYPICAL = Workload(batch=1, images=4, text_tokens=1024, new_tokens=128)


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def models():
    """Name and configuration of each published size."""
    return [(name, read_config(path)) for name, path in MODELS.items()]


def _different():
    """The precisions that differ in cost; float16 is as bfloat16."""
    return (PRECISIONS[name] for name in ("float32", "bfloat16", "int8"))


def weights() -> str:
    rows = []
    for name, config in models():
        counts = count_parameters(config)
        for precision in _different():
            by_part = weight_bytes(config, precision)
            cells = [gigabytes(by_part[part]) for part in Part]
            rows.append([f"{name} {precision.name}", *cells, gigabytes(sum(by_part.values()))])
        rows.append([f"{name} parameters", *(f"{counts[part]:,}" for part in Part), f"{sum(counts.values()):,}"])
    return table(["GB", *Part, "all"], rows)


def caches() -> str:
    rows = []
    for name, config in models():
        for precision in (PRECISIONS["float32"], PRECISIONS["bfloat16"]):
            image = image_bytes(config, precision)
            text = text_cache_bytes_per_token(config, precision)
            cells = [text, image.key_values, image.features, image.pixels]
            rows.append([f"{name} {precision.name}", *(f"{cell:,}" for cell in cells)])
    return table(["bytes", "text, per token", "image keys and values", "image features", "pixels"], rows)


def fits() -> str:
    rows = []
    for name, config in models():
        for precision in _different():
            memory = inference_memory(config, precision, TYPICAL)
            share = tensor_parallel_bytes(config, precision, 4).peak_bytes(memory, TYPICAL)
            cells = [_fit(memory.peak, CARD_24), _fit(memory.peak, CARD_80), _fit(share, CARD_80)]
            rows.append([f"{name} {precision.name}", gigabytes(memory.peak), *cells[:2], gigabytes(share), cells[2]])
    return table(["", "peak, GB", "one 24 GB", "one 80 GB", "each of 4, GB", "4 x 80 GB"], rows)


def _fit(nbytes: int, hardware: Hardware) -> str:
    return "yes" if nbytes + RESERVED_BYTES <= hardware.memory_bytes else "no"


def times() -> str:
    rows = []
    for name, config in models():
        for precision in (PRECISIONS["bfloat16"], PRECISIONS["int8"]):
            memory = inference_memory(config, precision, TYPICAL)
            plan = tensor_parallel_bytes(config, precision, 4)
            cells = []
            for card in (CARD_24, CARD_80):
                fit = _fit(memory.peak, card) == "yes"
                cells += _times(config, precision, card) if fit else ["-", "-"]
            fit = _fit(plan.peak_bytes(memory, TYPICAL), CARD_80) == "yes"
            cells += _times(config, precision, CARD_80, plan) if fit else ["-", "-"]
            rows.append([f"{name} {precision.name}", *cells])
    devices = ("24 GB", "80 GB", "4 x 80 GB")
    return table(
        ["", *(f"{what}, {device}" for device in devices for what in ("first token, ms", "ms per token"))], rows
    )


def _times(config, precision, hardware, plan=None) -> list[str]:
    """First token and each token after it, in milliseconds; with a plan, on all its devices."""
    travel = [0.0, 0.0]
    if plan is not None:
        rates = (plan.devices * hardware.bytes_per_second, plan.devices * hardware.multiply_adds_per_second)
        hardware = replace(hardware, bytes_per_second=rates[0], multiply_adds_per_second=rates[1])
        per_position = plan.traffic_bytes / LINK_BYTES_PER_SECOND
        travel = [TYPICAL.positions * per_position, TYPICAL.batch * per_position]
    first = first_token_seconds(config, precision, TYPICAL, hardware).total + travel[0]
    each = decode_seconds(config, precision, TYPICAL, hardware) + travel[1]
    return [f"{1000 * first:.1f}", f"{1000 * each:.2f}"]


def tensor_parallel() -> str:
    rows, precision = [], PRECISIONS["bfloat16"]
    for name, config in models():
        for devices in (2, 4, 8):
            plan = tensor_parallel_bytes(config, precision, devices)
            rows.append(
                [
                    f"{name}, {devices} devices",
                    gigabytes(plan.device_bytes),
                    f"{plan.replicated_bytes / 1e6:.1f}",
                    f"{plan.device_text_cache_bytes:,}",
                    f"{plan.device_image_bytes:,}",
                    plan.all_reduces,
                    f"{plan.all_reduce_bytes:,}",
                    f"{plan.traffic_bytes:,}",
                ]
            )
    columns = ["weights, GB", "replicated, MB", "cache per token", "per image", "all-reduces", "their bytes", "sent"]
    return table(["bfloat16, each device", *columns], rows)


def pipeline() -> str:
    rows = []
    for name, config in models():
        for i, stage in enumerate(pipeline_plan(config, PRECISIONS["bfloat16"], TYPICAL, 4)):
            cells = [
                f"{stage.layers.start} to {stage.layers.stop - 1}",
                len(stage.blocks),
                gigabytes(stage.weight_bytes),
                gigabytes(stage.cache_bytes),
                f"{stage.sent_bytes:,}",
            ]
            rows.append([f"{name}, device {i}", *cells])
    return table(["bfloat16", "layers", "gated blocks", "weights, GB", "caches, GB", "sent per position, bytes"], rows)


def growth() -> str:
    config, precision = read_config(MODELS["9B"]), PRECISIONS["bfloat16"]
    rows = []
    for workload in (
        *(replace(TYPICAL, images=images) for images in (0, 1, 4, 16, 64)),
        *(replace(TYPICAL, text_tokens=text) for text in (128, 512, 1920)),
        *(replace(TYPICAL, batch=batch) for batch in (4, 16, 64)),
    ):
        memory = inference_memory(config, precision, workload)
        first = first_token_seconds(config, precision, workload, CARD_80)
        each = decode_seconds(config, precision, workload, CARD_80)
        cells = [workload.images, workload.text_tokens, gigabytes(memory.full_cache), gigabytes(memory.images)]
        cells += [gigabytes(memory.peak), f"{1000 * first.vision:.1f}", f"{1000 * first.total:.1f}"]
        rows.append([workload.batch, *cells, f"{1000 * each:.2f}", f"{workload.batch / each:.0f}"])
    columns = [
        "text cache, GB",
        "images, GB",
        "peak, GB",
        "vision, ms",
        "first token, ms",
        "ms per step",
        "tokens per s",
    ]
    return table(["rows", "images each", "text tokens", *columns], rows)


def training() -> str:
    config, workload = read_config(MODELS["9B"]), Workload(batch=4, images=2, text_tokens=512)
    rows = []
    for freeze in (False, True):
        config = replace(config, freeze_text_layers=freeze, freeze_vision_layers=freeze, freeze_lm_head=freeze)
        for name in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                memory = training_memory(config, PRECISIONS[name], workload, checkpointing)
                parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
                parts += (memory.recomputed, memory.loss)
                what = f"{'gated blocks and resampler' if freeze else 'everything'}, {name}"
                what += ", checkpointing" if checkpointing else ""
                rows.append([what, *map(gigabytes, (*parts, memory.peak))])
    return table(
        ["9B, GB; what trains", "weights", "gradients", "Adam", "activations", "recomputed", "loss", "peak"], rows
    )


def measured() -> str:
    file = RESULTS / "scaling.json"
    if not file.exists():
        return "Not measured on this commit: `python -m benchmarks.scaling --measure`."
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        [row["what"], f"{row['predicted']:.4g}", f"{row['measured']:.4g}", f"{row['measured'] / row['predicted']:.2f}"]
        for row in result["rows"]
    ]
    machine = result["machine"]
    note = f"{machine['processor']}, {result['options']['threads']} threads, torch {machine['packages']['torch']}"
    return f"{table(['', 'predicted', 'measured', 'ratio'], rows)}\n\n{note}, {machine['date']}."


TABLES = (weights, caches, fits, times, tensor_parallel, pipeline, growth, training, measured)


def put_between_marks(page: str) -> str:
    """A page with all tables between their marks brought up to date.

    Raises:
        ValueError: if a table's marks are not on the page.
    """
    for make in TABLES:
        begin, end = f"<!-- {make.__name__}: python -m benchmarks.scaling --write docs/scaling.md -->", "<!-- end -->"
        page = between_marks(page, begin, end, make())
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="a page with the marks; by default, print the tables"
    )
    parser.add_argument("--measure", action="store_true", help="measure first, and keep the result")
    parser.add_argument("--threads", type=int, default=2, help="threads to measure with (2)")
    parser.add_argument("--repeats", type=int, default=5, help="measures of each time, of which the median counts (5)")
    options = parser.parse_args()
    if options.measure:
        from benchmarks.scaling_measures import measure

        measure(options.threads, options.repeats)
    if options.write:
        options.write.write_text(put_between_marks(options.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{make.__name__}\n\n{make()}" for make in TABLES))


if __name__ == "__main__":
    main()
