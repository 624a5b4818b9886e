"""The arithmetic of the benchmark: medians over rounds, ratios within rounds, and tables of both."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REFERENCE = "generate"
ABSENT = "-"


@dataclass(frozen=True, order=True)
class Cell:
    """One thing that is measured once a round."""

    concurrency: int
    num_guides: int
    system: str


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    cell: Cell
    round: int
    num_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / self.elapsed_s

    @property
    def ms_per_token(self) -> float:
        """Between two tokens of one sequence, the prompt's time shared out among them."""
        return 1e3 * self.cell.concurrency / self.tokens_per_s


class Samples:
    """All measurements of a run."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._by_cell: dict[Cell, dict[int, Sample]] = {}
        for sample in samples:
            self._by_cell.setdefault(sample.cell, {})[sample.round] = sample

    @property
    def cells(self) -> list[Cell]:
        """What was measured, in the order in which it first was."""
        return list(self._by_cell)

    def tokens_per_s(self, cell: Cell) -> float:
        """Return the median over the rounds."""
        return statistics.median(sample.tokens_per_s for sample in self._by_cell[cell].values())

    def ms_per_token(self, cell: Cell) -> float:
        """Return the median over the rounds."""
        return statistics.median(sample.ms_per_token for sample in self._by_cell[cell].values())

    def spread(self, cell: Cell) -> tuple[float, float]:
        """Return the lowest and the highest tokens a second of any round."""
        rates = [sample.tokens_per_s for sample in self._by_cell[cell].values()]
        return min(rates), max(rates)

    def ratio(self, cell: Cell, reference: Cell) -> float | None:
        """Return the median over the rounds of how many times faster one was than the other in the same round.

        None where they share no round.
        """
        ours, theirs = self._by_cell.get(cell, {}), self._by_cell.get(reference, {})
        ratios = [ours[number].tokens_per_s / theirs[number].tokens_per_s for number in ours if number in theirs]
        return statistics.median(ratios) if ratios else None

    def ratio_to_base_alone(self, cell: Cell) -> float | None:
        """Return the ratio to `generate` with the base alone, of as many sequences."""
        return self.ratio(cell, Cell(cell.concurrency, 0, REFERENCE))

    def ratio_to_same_guides(self, cell: Cell) -> float | None:
        """Return the ratio to `generate` with as many guides in its process, of as many sequences."""
        return self.ratio(cell, Cell(cell.concurrency, cell.num_guides, REFERENCE))

    def figures(self) -> list[dict[str, object]]:
        """Return every cell's figures, for JSON."""
        return [
            {
                "system": cell.system,
                "guides": cell.num_guides,
                "sequences": cell.concurrency,
                "tokens_per_s": self.tokens_per_s(cell),
                "ms_per_token": self.ms_per_token(cell),
                "ratio_to_generate_base_alone": self.ratio_to_base_alone(cell),
                "ratio_to_generate_same_guides": self.ratio_to_same_guides(cell),
                "rounds": [
                    {"round": sample.round, "num_tokens": sample.num_tokens, "elapsed_s": sample.elapsed_s}
                    for sample in self._by_cell[cell].values()
                ],
            }
            for cell in self.cells
        ]

    def table(self, names: Mapping[str, str]) -> str:
        """Return the figures as a table, systems by the names given."""
        header = ["sequences", "guides", "system", "tokens/s", "lowest to highest", "ms/token"]
        header += ["ratio to generate, base alone", "ratio to generate, same guides"]
        order = list(names)
        rows = []
        for cell in sorted(self.cells, key=lambda cell: (cell.concurrency, cell.num_guides, order.index(cell.system))):
            low, high = self.spread(cell)
            rows.append(
                [
                    str(cell.concurrency),
                    str(cell.num_guides),
                    names[cell.system],
                    f"{self.tokens_per_s(cell):.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{self.ms_per_token(cell):.1f}",
                    times(self.ratio_to_base_alone(cell)),
                    times(self.ratio_to_same_guides(cell)),
                ]
            )
        return markdown(header, rows)


def times(ratio: float | None) -> str:
    """Return a ratio as it stands in a table."""
    return ABSENT if ratio is None else f"{ratio:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose columns are aligned in plain text too; numbers stand on the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_number = [
        all(cell == ABSENT or cell[:1].isdigit() or cell[:2] == "-0" for cell in column[1:]) for column in columns
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in zip(widths, is_number, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
