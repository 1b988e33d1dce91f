"""What of a model trains, counted by part: a table to look at before a long run."""

from dataclasses import dataclass

from idefics_common.parameters.rows import Part


@dataclass(frozen=True)
class TrainableParameters:
    """Numbers of elements of parameters; `str` gives a table of them.

    Attributes:
        trainable: those that train, by part. total: all there are, by part; tied ones count where they are defined.
    """

    trainable: dict[Part, int]
    total: dict[Part, int]

    def __str__(self):
        rows = [(str(part), self.trainable[part], self.total[part]) for part in self.total]
        rows.append(("all", sum(self.trainable.values()), sum(self.total.values())))
        lines = [f"{'part':24}{'trainable':>16}{'of':>16}{'':>8}"]
        lines += [f"{part:24}{count:>16,}{of:>16,}{count / of if of else 0:>8.1%}" for part, count, of in rows]
        return "\n".join(lines)
