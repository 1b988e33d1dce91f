"""The tables of `docs/planning.md`: the memory that the published sizes need, and plans for several devices.

python -m benchmarks.planning                              print the tables
python -m benchmarks.planning --write docs/planning.md     put them between the page's marks
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.pages import between_marks, markdown
from benchmarks.planning.devices import pipeline_plan, tensor_parallel_bytes
from benchmarks.planning.memory import image_bytes, inference_memory, text_cache_bytes_per_token, weight_bytes
from benchmarks.planning.sizes import PRECISIONS, Workload
from benchmarks.planning.training import training_memory
from idefics_common.configuration.fields import read_config
from idefics_common.parameters import Part, count_parameters, expand

CONFIGS = Path(__file__).parents[2] / "tests" / "fixtures" / "configs"
MODELS = {name: read_config(CONFIGS / f"config-{name.lower()}.json") for name in ("9B", "80B")}
RESERVED_BYTES = 10**9
"""Held back on each device for the driver's context, scratch memory of kernels and fragments: an assumption."""

FLOAT32, BFLOAT16, INT8 = (PRECISIONS[name] for name in ("float32", "bfloat16", "int8"))
TYPICAL = Workload(batch=1, images=4, text_tokens=1024, new_tokens=128)


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def weights() -> str:
    rows = []
    for name, config in MODELS.items():
        counts = count_parameters(expand(config))
        for precision in (FLOAT32, BFLOAT16, INT8):
            by_part = weight_bytes(config, precision)
            cells = [gigabytes(by_part[part]) for part in Part]
            rows.append([f"{name} {precision.name}", *cells, gigabytes(sum(by_part.values()))])
        rows.append([f"{name} parameters", *(f"{counts[part]:,}" for part in Part), f"{sum(counts.values()):,}"])
    return markdown(["GB", *Part, "all"], rows)


def caches() -> str:
    rows = []
    for name, config in MODELS.items():
        for precision in (FLOAT32, BFLOAT16):
            image, text = image_bytes(config, precision), text_cache_bytes_per_token(config, precision)
            cells = [text, image.key_values, image.features]
            rows.append([f"{name} {precision.name}", *(f"{cell:,}" for cell in cells)])
    return markdown(["bytes", "text, per token", "image keys and values", "image features"], rows)


def fits() -> str:
    rows = []
    for name, config in MODELS.items():
        for precision in (FLOAT32, BFLOAT16, INT8):
            memory = inference_memory(config, precision, TYPICAL)
            share = tensor_parallel_bytes(config, precision, 4).peak_bytes(memory, TYPICAL)
            one = [gigabytes(memory.peak), _fit(memory.peak, 24), _fit(memory.peak, 80)]
            rows.append([f"{name} {precision.name}", *one, gigabytes(share), _fit(share, 80)])
    return markdown(["", "peak, GB", "one 24 GB", "one 80 GB", "each of 4, GB", "4 x 80 GB"], rows)


def _fit(nbytes: int, device_gigabytes: int) -> str:
    return "yes" if nbytes + RESERVED_BYTES <= device_gigabytes * 10**9 else "no"


def tensor_parallel() -> str:
    rows = []
    for name, config in MODELS.items():
        for devices in (2, 4, 8):
            plan = tensor_parallel_bytes(config, BFLOAT16, devices)
            cells = [gigabytes(plan.device_bytes), f"{plan.replicated_bytes / 1e6:.1f}"]
            cells += [f"{nbytes:,}" for nbytes in (plan.device_text_cache_bytes, plan.device_image_bytes)]
            cells += [plan.all_reduces, f"{plan.all_reduce_bytes:,}"]
            rows.append([f"{name}, {devices} devices", *cells])
    columns = ["weights, GB", "replicated, MB", "cache per token", "per image", "all-reduces", "their bytes"]
    return markdown(["bfloat16, each device", *columns], rows)


def pipeline() -> str:
    rows = []
    for name, config in MODELS.items():
        for i, stage in enumerate(pipeline_plan(config, BFLOAT16, TYPICAL, 4)):
            cells = [f"{stage.layers.start} to {stage.layers.stop - 1}", len(stage.blocks)]
            cells += [gigabytes(stage.weight_bytes), gigabytes(stage.cache_bytes), f"{stage.sent_bytes:,}"]
            rows.append([f"{name}, device {i}", *cells])
    columns = ["layers", "gated blocks", "weights, GB", "caches, GB", "sent per position, bytes"]
    return markdown(["bfloat16", *columns], rows)


def training() -> str:
    rows = []
    for freeze in (False, True):
        flags = dict.fromkeys(("freeze_text_layers", "freeze_vision_layers", "freeze_lm_head"), freeze)
        for name, config in MODELS.items():
            for precision in (FLOAT32, BFLOAT16):
                memory = training_memory(replace(config, **flags), precision)
                cells = map(gigabytes, (memory.weights, memory.gradients, memory.optimizer, memory.total))
                what = "gated blocks and resampler" if freeze else "everything"
                rows.append([f"{name}, {what}, {precision.name}", *cells])
    return markdown(["GB; what trains", "weights", "gradients", "Adam", "all"], rows)


TABLES = (weights, caches, fits, tensor_parallel, pipeline, training)


def with_tables(page: str) -> str:
    """A page with all tables between their marks brought up to date; ValueError if a table's marks are missing."""
    for make in TABLES:
        begin = f"<!-- {make.__name__}: python -m benchmarks.planning --write docs/planning.md -->"
        page = between_marks(page, begin, "<!-- end -->", make())
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the marks")
    options = parser.parse_args()
    print("\n\n".join(f"{make.__name__}\n\n{make()}" for make in TABLES))
    if options.write:
        options.write.write_text(with_tables(options.write.read_text(encoding="utf-8")), encoding="utf-8")
    print(json.dumps({name: sum(count_parameters(expand(config)).values()) for name, config in MODELS.items()}))


if __name__ == "__main__":
    main()
