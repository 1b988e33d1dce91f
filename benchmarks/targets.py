"""What the figures are to reach, and how each is read off the files of results. `python -m benchmarks` prints them."""

from collections.abc import Callable
from dataclasses import dataclass

Figure = Callable[[dict[str, list[dict]]], float]
"""A number from the rows of all results by name; raises `KeyError` where it was not measured."""


@dataclass(frozen=True)
class Target:
    """One figure and its bar.

    Attributes:
        what: for people.
        bar: the bound. at_most: whether the figure must not be above it, or not below.
    """

    what: str
    bar: float
    figure: Figure
    at_most: bool = True

    def is_reached(self, figure: float) -> bool:
        return figure <= self.bar if self.at_most else figure >= self.bar


def _value(name: str, column: str, **where) -> Figure:
    """A column of the one row of a result in which other columns have these values."""

    def figure(results):
        for row in results[name]:
            if all(row.get(key) == wanted for key, wanted in where.items()) and row[column] is not None:
                return row[column]
        raise KeyError(f"{name}: no {column} where {where}")

    return figure


def _over(figure: Figure, other: Figure) -> Figure:
    return lambda results: figure(results) / other(results)


def _most(figure: Callable[..., Figure], images: tuple[str, ...], *args) -> Figure:
    """The largest of a figure over several numbers of images."""
    return lambda results: max(figure(*args, images=number)(results) for number in images)


def _ratio(name: str, column: str, backend: str, against: str = "transformers", **where) -> Figure:
    """Of one backend's column to another's."""
    return _over(_value(name, column, backend=backend, **where), _value(name, column, backend=against, **where))


def _decode(backend: str, against: str = "transformers", run: str = "generation", **where) -> Figure:
    return _ratio(run, "ms per token", backend, against, **where)


def _first(backend: str, against: str = "transformers", run: str = "generation", **where) -> Figure:
    return _ratio(run, "first token s", backend, against, **where)


def _xla(images: str) -> Figure:
    return _decode("tf xla", "tf", "generation-xla", images=images)


def _peak(backend: str, images: str) -> Figure:
    return _ratio("training", "peak GB", backend, images=images)


def _flatness(run: str, backend: str, many: str, few: str = "1") -> Figure:
    """How much longer a token takes with many images, row by row, than with few."""
    return _over(*(_value(run, "ms per token", backend=backend, images=images) for images in (many, few)))


def _share(results) -> float:
    return min(_value("generation", "share of limit", backend="pt", images=images)(results) for images in _IMAGES)


def _throughput(results) -> float:
    return 8 / _flatness("generation-batch8", "tf", "/".join("1" * 8))(results)


def _warm(backend: str) -> Figure:
    return _value("conversation", "of cold", backend=backend, turn="warm")


_IMAGES, _BATCHES, _HALF = ("1", "4", "16"), ("4/1/1/1", "4/4/4/4"), "generation-bfloat16"

TARGETS = (
    Target("PyTorch decode, share of the bandwidth limit, least of 1, 4, 16 images", 0.80, _share, at_most=False),
    Target("PyTorch decode, 16 images against 1", 1.05, _flatness("generation", "pt", "16")),
    Target("PyTorch decode against transformers, 4 images", 0.70, _decode("pt", images="4")),
    Target("PyTorch decode against transformers, 16 images", 0.50, _decode("pt", images="16")),
    Target("PyTorch first token against transformers, 16 images", 0.80, _first("pt", images="16")),
    Target("PyTorch first token against transformers, 8/1/1/1 images", 0.50, _first("pt", run="generation-batch4")),
    Target("PyTorch decode, int8, against transformers float32", 0.40, _decode("pt", run="generation-int8")),
    Target(
        "PyTorch first token, bfloat16 against float32, 16 images",
        0.45,
        _first("pt", "pt float32", _HALF),
    ),
    Target("TF decode against PyTorch, most of 1, 4, 16 images", 1.25, _most(_decode, _IMAGES, "tf", "pt")),
    Target("TF first token against PyTorch, most of 1, 4, 16 images", 1.35, _most(_first, _IMAGES, "tf", "pt")),
    Target("TF decode by XLA against TF without, most of 1 and 16 images", 1.0, _most(_xla, ("1", "16"))),
    Target("TF decode, tokens per second, batch 8 against 1", 4.0, _throughput, at_most=False),
    Target("conversation, first token of the second turn, warm against cold, PyTorch", 0.25, _warm("pt")),
    Target("conversation, first token of the second turn, warm against cold, TF", 0.25, _warm("tf")),
    Target("beam search against transformers, 16 images, PyTorch", 0.50, _ratio("beams", "s", "pt")),
    Target("beam search against transformers, 16 images, TF", 0.50, _ratio("beams", "s", "tf")),
    Target("training against transformers, images 4/1/1/1", 0.80, _ratio("training", "s", "pt", images="4/1/1/1")),
    Target("training against transformers, images 4/4/4/4", 1.0, _ratio("training", "s", "pt", images="4/4/4/4")),
    Target("training, peak memory against transformers", 1.0, _most(_peak, _BATCHES, "pt")),
    Target("loading against transformers, PyTorch", 1.0, _ratio("loading", "s", "pt")),
    Target("loading against transformers, TF", 3.0, _ratio("loading", "s", "tf")),
    Target(
        "loading, peak above the imports in models, PyTorch", 1.15, _value("loading", "peak of model", backend="pt")
    ),
    Target("loading, peak above the imports in models, TF", 1.15, _value("loading", "peak of model", backend="tf")),
    Target("image processing against transformers", 1.0, _ratio("image-processing", "s", "ours")),
    Target("masks against transformers", 0.05, _ratio("masks", "s", "ours")),
)
