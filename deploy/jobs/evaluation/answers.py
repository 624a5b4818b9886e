"""A row's answers: written through the service, kept in files, and taken up again by the next run.

Beside `<row>.jsonl`, a result file of the batch job, lies `<row>.meta.json`: what the answers were made with, how long
that took, and what models say of them once that is measured.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.settings import Settings
from cluster.errors import TrimtabError
from deploy.jobs.batch.lines import Defaults, Line, Pending, parse_line, to_json
from deploy.jobs.batch.results import ResultFile
from deploy.jobs.evaluation.plan import Plan, slug
from deploy.jobs.evaluation.prompts import Prompt
from deploy.jobs.progress import Progress
from deploy.jobs.requests import Generate, answer_all


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt, as the service gave it."""

    text: str
    token_ids: Sequence[int]
    has_ended: bool
    """By itself, and not at a length limit."""


class Measured(Settings):
    """What models say of a row's first answers, in the order of its lines."""

    base: str
    """Digest of the files of the base."""

    answers: str
    """Digest of the answers."""

    log_probs: list[float]
    """Of the answers under the base at temperature 1, in nats."""

    divergences: list[float]
    """KL(the row's law || base) at temperature 1, in nats, summed over the answer's tokens."""


class Meta(Settings):
    """What is known of a row's answers beside their text."""

    made_with: dict[str, Any]
    """Settings and model files; answers made with others are made again."""

    num_timed_tokens: int = 0
    elapsed_s: float = 0.0
    """Of the runs that wrote those tokens; a run that was killed counts for neither."""

    measured: Measured | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that the row wrote per second, over all its answers at a time; None if no run was timed."""
        return self.num_timed_tokens / self.elapsed_s if self.elapsed_s else None


def files_digest(directory: Path) -> str:
    """Return a digest of the names, sizes and times of a model's files."""
    files = sorted((file.name, file.stat()) for file in directory.iterdir() if file.is_file())
    return _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def row_lines(plan: Plan, row: str, prompts: Sequence[Prompt]) -> list[Line]:
    """Return a row's requests: the first answer to every prompt, then the second, and so on.

    In that order more samples are more lines at the end.
    """
    weights = plan.rows[row].weights or {}
    shared = {
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "top_p": plan.top_p,
        "weights": weights,
    }
    lines: list[Line] = []
    for sample in range(1, plan.num_samples_of(row) + 1):
        for prompt in prompts:
            request = {**prompt.fields, **shared, "id": f"{prompt.id}#{sample}", "seed": prompt.seed(sample)}
            lines.append(parse_line(to_json(request), len(lines) + 1, Defaults()))
    return lines


def made_with(plan: Plan, row: str) -> dict[str, Any]:
    """Return all that a row's answers and their speed depend on, beside prompts and seeds, as JSON has it."""
    return {
        "weights": dict(sorted((plan.rows[row].weights or {}).items())),
        "max_tokens": plan.max_tokens,
        "temperature": plan.temperature,
        "top_p": plan.top_p,
        "dtype": plan.dtype,
        "max_context": plan.max_context,
        "concurrency": plan.concurrency,
        "model": [[files_digest(path), weight] for path, weight in plan.parts_of(row).items()],
        "guides": {guide: files_digest(plan.guide_path(guide)) for guide in sorted(plan.guides_of(row))},
    }


class KeptAnswers:
    """The answers of one row that is written, in files of its own."""

    def __init__(self, folder: Path, plan: Plan, row: str, prompts: Sequence[Prompt]) -> None:
        self._row = row
        self._results = folder / f"{slug(row)}.jsonl"
        self._meta = folder / f"{slug(row)}.meta.json"
        self._lines = row_lines(plan, row, prompts)
        self._made_with = made_with(plan, row)
        self._num_prompts = len(prompts)
        self._concurrency = plan.concurrency

    @property
    def meta(self) -> Meta:
        """What is known of the answers that are kept; nothing, if they were made with other settings."""
        return self._current_meta() or Meta(made_with=self._made_with)

    def _current_meta(self) -> Meta | None:
        try:
            meta = Meta.model_validate_json(self._meta.read_text())
        except (FileNotFoundError, ValidationError):
            return None
        return meta if meta.made_with == self._made_with else None

    def read(self) -> list[Answer] | None:
        """Return the row's answers in the order of its lines, or None if any is missing."""
        if self._current_meta() is None or not self._results.exists():
            return None
        digests = {line.number: line.digest for line in self._lines}
        found: dict[int, Answer] = {}
        for raw in self._results.read_bytes().splitlines():
            try:
                result = json.loads(raw)
            except ValueError:
                continue  # a last line that was half written
            if "error" not in result and digests.get(result["line"]) == result["digest"]:
                has_ended = result["finish_reason"] == "stop"
                found[result["line"]] = Answer(result["text"], result["token_ids"], has_ended)
        return [found[line.number] for line in self._lines] if len(found) == len(self._lines) else None

    def write(self, generate: Generate) -> None:
        """Have the answers that are missing written.

        Raises:
            TrimtabError: some could not be; those that could are kept.
            OSError: a file cannot be read or written.
        """
        if self._current_meta() is None:
            self._results.unlink(missing_ok=True)
            self._save(Meta(made_with=self._made_with))
        results = ResultFile(self._results)
        try:
            pending = Pending(self._lines)
            num_done = results.resume(pending, redo_changed=True)
            progress = Progress(total=len(self._lines), num_done=num_done, file=sys.stderr)
            progress.note(f"{self._row}: {len(self._lines)} answers, {num_done} of them written before")
            lines = [line for line in self._lines if line.number in pending]
            self._write(lines, generate, results, progress)
        finally:
            results.close()
        if progress.num_failed:
            raise TrimtabError(
                f"rows.{self._row}: {progress.num_failed} of {len(self._lines)} answers failed, for the reasons above; "
                "the same command tries them again"
            )

    def _write(self, lines: Sequence[Line], generate: Generate, results: ResultFile, progress: Progress) -> None:
        num_tokens, started_at = 0, time.monotonic()

        def record(line: Line, outcome: Mapping[str, Any]) -> None:
            nonlocal num_tokens
            num_tokens += len(outcome.get("token_ids", ()))
            results.append(line, outcome)

        try:
            asyncio.run(answer_all(lines, generate, record, progress, concurrency=self._concurrency))
        finally:
            elapsed_s = time.monotonic() - started_at
            progress.close()
            meta = self.meta
            times = {
                "num_timed_tokens": meta.num_timed_tokens + num_tokens,
                "elapsed_s": meta.elapsed_s + elapsed_s,
            }
            self._save(meta.model_copy(update=times))
            progress.note(
                f"{self._row}: {num_tokens} tokens in {elapsed_s:.1f} s, {num_tokens / elapsed_s:.1f} tokens/s"
            )

    def _save(self, meta: Meta) -> None:
        draft = self._meta.with_suffix(".partial")
        draft.write_text(meta.model_dump_json(indent=1))
        draft.replace(self._meta)

    def by_prompt(self, values: Sequence[Any]) -> list[list[Any]]:
        """Arrange what there is of each line by prompt, and under it by sample."""
        return [list(values[start :: self._num_prompts]) for start in range(self._num_prompts)]

    def measured(self, answers: Sequence[Answer], base: str) -> Measured | None:
        """Return what was measured of these answers under the base of that digest, if it is kept."""
        kept = self.meta.measured
        return kept if kept is not None and (kept.base, kept.answers) == (base, _answers_digest(answers)) else None

    def keep_measured(
        self, answers: Sequence[Answer], base: str, log_probs: Sequence[float], divergences: Sequence[float]
    ) -> Measured:
        """Keep it for the next report, and return it."""
        kept = Measured(
            base=base,
            answers=_answers_digest(answers),
            log_probs=list(log_probs),
            divergences=list(divergences),
        )
        self._save(self.meta.model_copy(update={"measured": kept}))
        return kept


def _answers_digest(answers: Sequence[Answer]) -> str:
    return _digest([list(answer.token_ids) for answer in answers])
