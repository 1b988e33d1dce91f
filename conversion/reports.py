"""What a conversion and a comparison report: typed, as JSON, and as a table for the terminal."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from idefics_common.parameters import Part

_MOST_LINES = 12


@dataclass
class TensorReport:
    """One tensor of an output.

    Attributes:
        name: canonical name. shape: in PyTorch's layout.
        part: part of the model.
        source_dtype, dtype: as stored in the source and in the output.
        nbytes: bytes in the output.
        sha256: of the written values in PyTorch's layout, little-endian, and so the same in every format; None if the
            output was not verified.
        cast_error_max, cast_error_mean: absolute differences to the source; None where the dtype is kept or is one that
            holds every value.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    source_dtype: str
    dtype: str
    nbytes: int
    sha256: str | None = None
    cast_error_max: float | None = None
    cast_error_mean: float | None = None


@dataclass
class ForwardReport:
    """Two models on the same prompt with images.

    Attributes:
        rooms: which implementation ran each of the two.
        answer: what is compared: "logits", or "last hidden states" of models without a language head.
        error: their largest difference, relative to their scale. tolerance: the largest that passes.
        same_tokens: whether greedy generation gave the same tokens; None without a language head.
        first_difference: the first part of the model whose output differs by more than the tolerance, or None.
    """

    rooms: tuple[str, str]
    answer: str
    error: float
    tolerance: float
    same_tokens: bool | None
    first_difference: str | None = None

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance and self.same_tokens is not False

    def __str__(self) -> str:
        text = f"{self.rooms[0]} and {self.rooms[1]}: {self.answer} differ by {self.error:.1e}"
        text += f" (at most {self.tolerance:.0e} of their scale)"
        if self.same_tokens is not None:
            text += f", greedy tokens are {'the same' if self.same_tokens else 'DIFFERENT'}"
        return text if self.first_difference is None else f"{text}; first to differ: {self.first_difference}"


class _Report:
    """What the dataclasses below share."""

    def to_json(self) -> str:
        """The whole report as a JSON object, with its properties beside its fields."""
        properties = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        return json.dumps(asdict(self) | {name: getattr(self, name) for name in properties}, indent=2) + "\n"


@dataclass
class ConversionReport(_Report):
    """A conversion, planned or done.

    Attributes:
        source_files, files: names of the files that hold tensors.
        tensors: in the order of the model.
        ignored: tensors of the source that are no parameters. notes: what is odd, or good to know, a sentence each.
        verify: what was asked for: "tensors", "forward" or "none".
        problems: what verification has found wrong, a sentence each.
        seconds: of each step. peak_memory_bytes: maximum resident set of the process.
        resumed: how many tensors an earlier, interrupted run had written.
        written: whether there is an output; not after a dry run, nor after a verification that failed.
    """

    source: str
    source_format: str
    source_files: tuple[str, ...]
    destination: str
    format: str
    files: tuple[str, ...]
    tensors: list[TensorReport]
    verify: str
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    forward: ForwardReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    resumed: int = 0
    written: bool = False
    dry_run: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def ok(self) -> bool:
        """Whether all that was asked to be verified holds."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line: "verified ...", "not verified", or "FAILED ..."."""
        if self.problems:
            return f"FAILED, nothing was written: {self.problems[0]}"
        if self.dry_run:
            return "planned; nothing was written"
        if self.verify == "none":
            return "not verified"
        what = f"{len(self.tensors)} tensors read back and compared with the source"
        return f"verified: {what}" + ("" if self.forward is None else ", and the same answers")

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.source_format}, {_count(self.source_files, 'file')})",
            f"-> {self.destination} ({self.format}, {_count(self.files, 'file')})",
            "",
            *_table(self.tensors),
            *self._cast_lines(),
        ]
        if self.resumed:
            lines.append(f"resumed: {self.resumed} tensors were there already")
        lines += _remarks(self)
        lines += [f"forward: {self.forward}"] if self.forward else []
        lines += [f"problem: {problem}" for problem in self.problems[:_MOST_LINES]]
        if not self.dry_run:
            steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
            lines.append(f"{steps}; peak memory {self.peak_memory_bytes / 1e6:.0f} MB")
        return "\n".join([*lines, self.verdict])

    def _cast_lines(self) -> list[str]:
        lossy = [tensor for tensor in self.tensors if tensor.cast_error_max is not None]
        if not lossy:
            return []
        lossy.sort(key=lambda tensor: -tensor.cast_error_max)
        lines = [f"lossy cast of {len(lossy)} tensors; largest errors (all are in conversion-report.json):"]
        for tensor in lossy[:_MOST_LINES]:
            lines.append(
                f"  {tensor.name}: {tensor.source_dtype} to {tensor.dtype}, "
                f"max {tensor.cast_error_max:.2e}, mean {tensor.cast_error_mean:.2e}"
            )
        return lines


@dataclass
class VerificationReport(_Report):
    """Two checkpoints compared.

    Attributes:
        compared: number of tensors whose values were compared.
        differences: a sentence for each tensor or field of the configuration that differs.
        forward: comparison of their answers, if asked for.
    """

    a: str
    b: str
    compared: int
    differences: list[str]
    forward: ForwardReport | None = None

    @property
    def same(self) -> bool:
        """Whether both are the same model, bit by bit, and give the same answers if that was asked for."""
        return not self.differences and (self.forward is None or self.forward.holds)

    @property
    def verdict(self) -> str:
        return "the same model" if self.same else "NOT the same model"

    def __str__(self) -> str:
        lines = [f"{self.a} and {self.b}: {self.compared} tensors compared"]
        lines += [f"  ! {difference}" for difference in self.differences[:_MOST_LINES]]
        if len(self.differences) > _MOST_LINES:
            lines.append(f"  ! ... and {len(self.differences) - _MOST_LINES} more")
        lines += [f"forward: {self.forward}"] if self.forward else []
        return "\n".join([*lines, self.verdict])


@dataclass
class InspectionReport(_Report):
    """What a checkpoint is.

    Attributes:
        format: its name. files: bytes of each file that holds tensors, by name.
        tensors, parameters: how many tensors are stored, and how many values the model has, ties counted once.
        parameters_by_part: the latter by part of the model. dtypes: number of tensors of each.
        config: what matters most of it.
        problems: anything wrong. With problems, what could not be found out is empty.
    """

    source: str
    format: str = ""
    files: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    nbytes: int = 0
    parameters: int = 0
    parameters_by_part: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [self.source]
        if self.format:
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            lines += [
                f"format      {self.format}, {_count(self.files, 'file')}, {self.nbytes:,} bytes of tensors",
                f"tensors     {self.tensors} ({dtypes})",
                f"parameters  {self.parameters:,}",
                *(f"  {part:22} {count:>16,}" for part, count in self.parameters_by_part.items() if count),
                "config      " + ", ".join(f"{name}={value}" for name, value in self.config.items()),
            ]
        lines += [*_remarks(self), *(f"problem: {problem}" for problem in self.problems)]
        return "\n".join([*lines, "nothing is wrong" if self.ok else "NOT usable as it is"])


def _table(tensors: list[TensorReport]) -> list[str]:
    """Tensors, values, bytes and dtypes of each part of the model."""
    lines = [f"{'part':22} {'tensors':>7} {'bytes':>16}  dtypes"]
    for part in Part:
        members = [tensor for tensor in tensors if tensor.part == part]
        if members:
            casts = Counter(
                tensor.dtype if tensor.dtype == tensor.source_dtype else f"{tensor.source_dtype} to {tensor.dtype}"
                for tensor in members
            )
            nbytes = sum(tensor.nbytes for tensor in members)
            lines.append(f"{part:22} {len(members):>7} {nbytes:>16,}  {', '.join(casts)}")
    total = sum(tensor.nbytes for tensor in tensors)
    return [*lines, f"{'all':22} {len(tensors):>7} {total:>16,}"]


def _count(items, noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def _remarks(report: ConversionReport | InspectionReport) -> list[str]:
    """What is left out of a checkpoint, and the notes on it."""
    notes = [f"note: {note}" for note in report.notes]
    if not report.ignored:
        return notes
    more = f" and {len(report.ignored) - 3} more" if len(report.ignored) > 3 else ""
    return [f"left out, no parameters: {', '.join(report.ignored[:3])}{more}", *notes]
