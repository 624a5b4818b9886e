"""Examples to train on, from files and from the Hugging Face hub: pairs of responses, and single texts.

Owns what examples are made of rows and what becomes of rows that cannot be used; `data_sources` knows where rows come
from, and `data_formats` what they hold. Knows no tokenizer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from actors.training.data_formats import (
    PAIR_FORMATS,
    TEXT_FORMATS,
    Format,
    Messages,
    RankedBy,
    Response,
    Row,
    UnusableRow,
    recognise,
    shorten,
    with_prompt,
)
from actors.training.data_sources import Opened, open_source
from cluster.errors import InvalidConfiguration

__all__ = ["Messages", "Pair", "Pairs", "RankedBy", "Response", "Text", "Texts", "read_pairs", "read_texts"]

Example = TypeVar("Example")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to a prompt, one of them preferred."""

    prompt: str | Messages
    chosen: Response
    rejected: Response
    row: int
    """Where it stands in the source, from 1: the line in JSON Lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A response to a prompt."""

    prompt: str | Messages
    response: Response
    row: int
    """Where it stands in the source, from 1: the line in JSON Lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What a source holds."""

    pairs: list[Pair]
    num_rows: int
    """Those that were skipped as well."""

    skipped: dict[str, int]
    """Rows left out, by reason."""

    source: str
    digest: str
    """SHA-256 in hex of the file's bytes; of a data set of the hub, of its rows as JSON lines with sorted keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What a source holds, as single responses; a row may hold several."""

    texts: list[Text]
    num_rows: int
    """Those that were skipped as well."""

    skipped: dict[str, int]
    """Rows left out, by reason."""

    source: str
    digest: str
    """SHA-256 in hex of the file's bytes; of a data set of the hub, of its rows as JSON lines with sorted keys."""


def read_pairs(
    source: str, *, objective: RankedBy | None = None, skip_bad_rows: bool = False, split: str = "train"
) -> Pairs:
    """Read pairs of responses, in any of `PAIR_FORMATS`.

    Args:
        source: A path to a .jsonl, .json or .parquet file, or the id of a data set on the hub.
        objective: Which of its two rankings to take, where rows have `better_response_id` and `safer_response_id`.
        skip_bad_rows: Count rows that cannot be used, instead of refusing the source.
        split: Of a data set on the hub.

    Raises:
        InvalidConfiguration: the source cannot be read, its columns are those of no format, the objective does not fit
            them, a row cannot be used, or none can.
    """

    def make(found: Format, row: Row, number: int) -> list[Pair]:
        _check_objective(source, found, objective)
        return [_pair(found, row, number, objective)]

    collected = _collect(open_source(source, split), PAIR_FORMATS, skip_bad_rows, make)
    return Pairs(
        pairs=collected.examples,
        num_rows=collected.num_rows,
        skipped=collected.skipped,
        source=source,
        digest=collected.digest,
    )


def read_texts(source: str, *, skip_bad_rows: bool = False, split: str = "train") -> Texts:
    """Read single responses, in any of `TEXT_FORMATS`; of a pair, both.

    Args:
        source: A path to a .jsonl, .json or .parquet file, or the id of a data set on the hub.
        skip_bad_rows: Count rows that cannot be used, instead of refusing the source.
        split: Of a data set on the hub.

    Raises:
        InvalidConfiguration: the source cannot be read, its columns are those of no format, a row cannot be used, or
            none can.
    """
    collected = _collect(open_source(source, split), TEXT_FORMATS, skip_bad_rows, _texts)
    return Texts(
        texts=collected.examples,
        num_rows=collected.num_rows,
        skipped=collected.skipped,
        source=source,
        digest=collected.digest,
    )


def _check_objective(source: str, found: Format, objective: RankedBy | None) -> None:
    if objective is None and found.ranked_by:
        raise InvalidConfiguration(
            f"{source} ranks its responses by more than one objective; say which: --objective helpful|harmless"
        )
    if objective is not None and not found.ranked_by:
        raise InvalidConfiguration(
            f"--objective: {objective!r} is for rows with better_response_id and safer_response_id, and {source} has "
            "chosen and rejected responses; leave it out"
        )
    if objective is not None and objective not in found.ranked_by:
        raise InvalidConfiguration(f"--objective: {objective!r} is neither of {', '.join(found.ranked_by)}")


def _pair(found: Format, row: Row, number: int, objective: RankedBy | None) -> Pair:
    answered = found.read(row)
    better = 0
    if objective is not None:
        column = found.ranked_by[objective]
        better = row.get(column, -1)
        if isinstance(better, bool) or not isinstance(better, int) or better not in (0, 1):
            raise UnusableRow(f"unknown {column}", f"{column} is {shorten(row.get(column))}, not 0 or 1")
    chosen, rejected = answered.responses[better], answered.responses[1 - better]
    if chosen.text == rejected.text:
        raise UnusableRow("both responses the same", f"both are {shorten(chosen.text)}")
    return Pair(prompt=answered.prompt, chosen=chosen, rejected=rejected, row=number)


def _texts(found: Format, row: Row, number: int) -> list[Text]:
    answered = found.read(row)
    return [Text(prompt=answered.prompt, response=response, row=number) for response in answered.responses]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collected(Generic[Example]):
    examples: list[Example]
    num_rows: int
    skipped: dict[str, int]
    digest: str


def _collect(
    opened: Opened,
    formats: Sequence[Format],
    skip_bad_rows: bool,
    make: Callable[[Format, Row, int], list[Example]],
) -> _Collected[Example]:
    """Make examples of all rows, in the format of the first that can be used."""
    known: Format | None = None
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first = ""
    num_rows = 0
    for number, given in opened.rows:
        num_rows += 1
        try:
            row = with_prompt(_object(given))
            found = known or recognise(row, formats)
            found.check(row)
            examples += make(found, row, number)
            known = found
        except UnusableRow as error:
            where = f"{opened.unit} {number}"
            if not skip_bad_rows:
                raise InvalidConfiguration(
                    f"{opened.name}, {where}: {error}; leave such rows out with --skip-bad-rows, or {error.remedy}"
                ) from error
            first = first or f"{where}: {error}; {error.remedy}"
            skipped[error.reason] += 1
    if not examples:
        raise _nothing_usable(opened.name, skipped, first)
    return _Collected(examples=examples, num_rows=num_rows, skipped=dict(skipped), digest=opened.digest.hexdigest())


def _object(given: Any) -> Row:
    if isinstance(given, UnusableRow):
        raise given
    if not isinstance(given, dict):
        raise UnusableRow("not a JSON object", f"it is {shorten(given)}")
    return given


def _nothing_usable(name: str, skipped: Counter[str], first: str) -> InvalidConfiguration:
    if not skipped:
        return InvalidConfiguration(f"{name} holds no row; give a file with examples")
    counts = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return InvalidConfiguration(f"{name}: none of {skipped.total()} rows can be used ({counts}). The first, {first}")
