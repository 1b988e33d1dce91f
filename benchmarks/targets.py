"""What the figures are to reach, and how each is read off the files of results. `python -m benchmarks` prints them."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.conversation_turns import IMAGE_WORK


@dataclass(frozen=True)
class Target:
    """One figure and its bar.

    Attributes:
        what: for people.
        bar: the bound. at_most: whether the figure must not be above it, or not below.
        figure: the figure, from the rows of all results by name; raises `KeyError` where one was not measured.
    """

    what: str
    bar: float
    figure: Callable[[dict], float]
    at_most: bool = True

    def is_reached(self, figure: float) -> bool:
        return figure <= self.bar if self.at_most else figure >= self.bar


def value(results: dict[str, list[dict]], name: str, column: str, **where):
    """A column of the one row of a result in which other columns have these values.

    Raises:
        KeyError: if the result, the row or the value is not there.
    """
    for row in results[name]:
        if all(row.get(key) == wanted for key, wanted in where.items()) and row[column] is not None:
            return row[column]
    raise KeyError(f"{name}: no {column} where {where}")


def _ratio(name: str, column: str, backend: str, against: str = "transformers", **where):
    """Of one backend's column to another's."""
    return lambda results: (
        value(results, name, column, backend=backend, **where) / value(results, name, column, backend=against, **where)
    )


def _worst(*figures: Callable[[dict], float]):
    return lambda results: max(figure(results) for figure in figures)


def _flatness(results) -> float:
    few, many = (value(results, "generation", "ms per token", backend="pt", images=images) for images in ("1", "16"))
    return many / few


def _share(results) -> float:
    return min(value(results, "generation", "share of limit", backend="pt", images=images) for images in _IMAGES)


def _throughput_of_8(results) -> float:
    one, eight = (
        value(results, "generation-batch8", "ms per token", backend="tf", images="/".join("1" * rows))
        for rows in (1, 8)
    )
    return 8 * one / eight


def _image_work(results) -> float:
    return max(
        value(results, "conversation", work, backend=backend, turn="warm") for backend in _OURS for work in IMAGE_WORK
    )


def _bytes_of_beams(backend: str):
    def figure(results):
        several, one = (
            value(results, "beams", f"image bytes, {count}", backend=backend) for count in ("4 beams", "1 beam")
        )
        return several / one

    return figure


def _warm(backend: str):
    return lambda results: value(results, "conversation", "of cold", backend=backend, turn="warm")


_IMAGES, _OURS = ("1", "4", "16"), ("pt", "tf")

TARGETS = (
    Target("PyTorch decode, share of the bandwidth limit, least of 1, 4, 16 images", 0.80, _share, at_most=False),
    Target("PyTorch decode, 16 images against 1", 1.05, _flatness),
    Target(
        "PyTorch decode against transformers, 4 images", 0.70, _ratio("generation", "ms per token", "pt", images="4")
    ),
    Target(
        "PyTorch decode against transformers, 16 images", 0.50, _ratio("generation", "ms per token", "pt", images="16")
    ),
    Target(
        "PyTorch first token against transformers, 16 images",
        0.80,
        _ratio("generation", "first token s", "pt", images="16"),
    ),
    Target(
        "PyTorch first token against transformers, 8/1/1/1 images",
        0.50,
        _ratio("generation-batch4", "first token s", "pt"),
    ),
    Target("PyTorch decode, int8, against transformers float32", 0.40, _ratio("generation-int8", "ms per token", "pt")),
    Target(
        "PyTorch first token, bfloat16 against float32, 16 images",
        0.45,
        _ratio("generation-bfloat16", "first token s", "pt", "pt float32", images="16"),
    ),
    Target(
        "TF decode against PyTorch, most of 1, 4, 16 images",
        1.25,
        _worst(*(_ratio("generation", "ms per token", "tf", "pt", images=images) for images in _IMAGES)),
    ),
    Target(
        "TF first token against PyTorch, most of 1, 4, 16 images",
        1.35,
        _worst(*(_ratio("generation", "first token s", "tf", "pt", images=images) for images in _IMAGES)),
    ),
    Target(
        "TF decode by XLA against TF without, most of 1 and 16 images",
        1.0,
        _worst(*(_ratio("generation-xla", "ms per token", "tf xla", "tf", images=images) for images in ("1", "16"))),
    ),
    Target("TF decode, tokens per second, batch 8 against 1", 4.0, _throughput_of_8, at_most=False),
    Target("conversation, runs of image modules in the second turn, PyTorch and TF", 0, _image_work),
    Target("conversation, first token of the second turn, warm against cold, PyTorch", 0.25, _warm("pt")),
    Target("conversation, first token of the second turn, warm against cold, TF", 0.25, _warm("tf")),
    Target("beams, bytes of images with 4 beams against 1, PyTorch", 1.0, _bytes_of_beams("pt")),
    Target("beams, bytes of images with 4 beams against 1, TF", 1.0, _bytes_of_beams("tf")),
    Target("training against transformers, images 4/1/1/1", 0.80, _ratio("training", "s", "pt", images="4/1/1/1")),
    Target("training against transformers, images 4/4/4/4", 1.0, _ratio("training", "s", "pt", images="4/4/4/4")),
    Target(
        "training, peak memory against transformers",
        1.0,
        _worst(*(_ratio("training", "peak GB", "pt", images=images) for images in ("4/1/1/1", "4/4/4/4"))),
    ),
    Target("loading against transformers, PyTorch", 1.0, _ratio("loading", "s", "pt")),
    Target("loading against transformers, TF", 3.0, _ratio("loading", "s", "tf")),
    Target(
        "loading, peak above the imports in models, PyTorch",
        1.15,
        lambda results: value(results, "loading", "peak of model", backend="pt"),
    ),
    Target(
        "loading, peak above the imports in models, TF",
        1.15,
        lambda results: value(results, "loading", "peak of model", backend="tf"),
    ),
    Target("image processing against transformers", 1.0, _ratio("image-processing", "s", "ours")),
    Target("masks against transformers", 0.05, _ratio("masks", "s", "ours")),
)
