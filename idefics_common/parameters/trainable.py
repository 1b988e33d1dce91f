"""How many parameters of a model train, by part: a table to print before a long run."""

from collections.abc import Iterable
from dataclasses import dataclass

from idefics_common.parameters.rows import Part


@dataclass(frozen=True)
class TrainableParameters:
    """Numbers of elements of parameters, by part; `str` gives a table of them.

    Attributes:
        trainable: those that train.
        total: all of them; tied parameters count once, where they are defined.
    """

    trainable: dict[Part, int]
    total: dict[Part, int]

    @classmethod
    def count(cls, parameters: Iterable[tuple[Part, int, bool]]) -> "TrainableParameters":
        """Add up parameters, each given by its part, its number of elements, and whether it trains."""
        counts = cls(dict.fromkeys(Part, 0), dict.fromkeys(Part, 0))
        for part, size, trains in parameters:
            counts.total[part] += size
            counts.trainable[part] += size if trains else 0
        return counts

    def __str__(self):
        rows = [(str(part), self.trainable[part], self.total[part]) for part in self.total]
        rows.append(("all", sum(self.trainable.values()), sum(self.total.values())))
        lines = [f"{'part':24}{'trainable':>16}{'of':>16}{'':>8}"]
        lines += [f"{part:24}{count:>16,}{of:>16,}{count / of if of else 0:>8.1%}" for part, count, of in rows]
        return "\n".join(lines)
