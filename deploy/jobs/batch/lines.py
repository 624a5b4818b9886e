"""The input of a batch: lines of JSON, one in memory at a time, each a request or the reason why it is none."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from actors.coordinator.request import GenerationRequest, invalid_request
from cluster.errors import InvalidRequest
from deploy.http.openai_schema import Guidance
from deploy.json_lines import to_line


class BatchLine(GenerationRequest):
    """An object of the input: a request, what to call it, and HTTP's spelling of its weights."""

    id: str | int | None = None
    guidance: Guidance | None = None

    @model_validator(mode="after")
    def _give_weights_once(self) -> "BatchLine":
        if self.guidance is not None and self.weights is not None:
            raise ValueError("give weights or guidance, not both")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a line that leaves something out is given."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of any request, except those of `guidance`."""

    guidance: Mapping[str, Any] = field(default_factory=dict)
    """`model` or `weights`, for lines that name neither."""

    seed: int = 0

    def complete(self, given: Mapping[str, Any], line: int) -> dict[str, Any]:
        """Return a line's own fields and those it left out, with a seed that is the same in every run."""
        guidance = {} if {"model", "weights", "guidance"} & set(given) else self.guidance
        fields = {**self.fields, **guidance, **given}
        if fields.get("seed") is None:
            fields["seed"] = derive_seed(f"{self.seed}:{line}")
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the input that is not blank: a request, or the reason why it is none."""

    number: int
    """From 1."""

    id: str | int
    digest: str
    """64 bits in hex of the request with its defaults, or of the line if it is none: whether a result belongs to it."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """As the service takes them; none if there is an error."""

    error: InvalidRequest | None = None


def derive_seed(text: str) -> int:
    """Return a seed that the text decides: 53 bits, which JSON readers whose numbers are doubles read exactly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 11


def read_lines(path: Path, defaults: Defaults) -> Iterator[Line]:
    """Yield the lines that are not blank, one in memory at a time."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield parse_line(raw, number, defaults)


def parse_line(raw: bytes, number: int, defaults: Defaults) -> Line:
    """Return the request that a line holds, or a line with its error."""
    name: str | int = number
    try:
        given = _parse_object(raw)
        if isinstance(given.get("id"), str | int) and not isinstance(given["id"], bool):
            name = given["id"]
        fields = defaults.complete(given, number)
        request = BatchLine.model_validate(fields)
    except InvalidRequest as error:
        return Line(number=number, id=name, digest=_digest(raw), error=error)
    except ValidationError as error:
        return Line(number=number, id=name, digest=_digest(raw), error=invalid_request(error.errors()[0]))
    fields.pop("id", None)
    fields.pop("guidance", None)
    if request.guidance is not None and request.guidance.weights is not None:
        fields["weights"] = dict(request.guidance.weights)
    canonical = json.dumps([name, fields], sort_keys=True).encode()
    return Line(number=number, id=name, digest=_digest(canonical), fields=fields)


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        given = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
        to_json(given)
    except (ValueError, RecursionError) as error:
        # Also text that is not UTF-8, halves of surrogate pairs, and nesting without end.
        raise InvalidRequest(f"the line is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"the line is not a JSON object but {type(given).__name__}")
    return given


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def to_json(value: Any) -> bytes:
    """Return a value as one line of UTF-8 JSON, without the newline.

    Raises:
        ValueError: a number is not finite, or a text holds half of a surrogate pair.
    """
    return to_line(value).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Pending:
    """Which lines of the input want a result. Takes 8 bytes a line, whatever the lines hold."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._digests = array("Q")
        for line in lines:
            self._digests.extend([0] * (line.number - 1 - len(self._digests)))
            self._digests.append(int(line.digest, 16))

    def __len__(self) -> int:
        return len(self._digests) - self._digests.count(0)

    def __contains__(self, line: int) -> bool:
        return 0 < line <= len(self._digests) and self._digests[line - 1] != 0

    def settle(self, line: int, digest: str) -> bool:
        """Take a line off if the result with that digest is its own; return whether it was."""
        if line not in self or f"{self._digests[line - 1]:016x}" != digest:
            return False
        self._digests[line - 1] = 0
        return True
