"""Times the parts of the lane's steps from outside, and says what a step consists of."""

import functools
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.coordinator import lane
from actors.coordinator.sequence import LiveSequence
from actors.guidance import drawing
from bench.replica import Forward
from cluster.exchange import Rows, StepStream, Work

PLAN = "plan"
MERGE_AND_DRAW = "merge and draw"
TIMED: Sequence[tuple[Any, str, str]] = (
    (lane, "plan_step", PLAN),
    (lane, "merge_and_draw", MERGE_AND_DRAW),
    (lane, "logits_by_voice", "output"),
    (drawing, "_merged", "merge"),
    (drawing, "_draw", "draw"),
    (LiveSequence, "commit", "commit"),
    (LiveSequence, "write", "text"),
)
"""What is wrapped, and the part of a step that it is. A step begins with its plan."""


@dataclass(slots=True)
class StepRecord:
    """What was seen of one step."""

    begin_s: float
    parts_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    first_send_s: float = float("inf")
    last_landing_s: float = 0.0
    num_items: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Medians over the full decoding steps of one run, in milliseconds; None for what there is not."""

    sequences: int
    guides: int
    step: float
    plan: float
    base: float
    guide: float | None
    models: float
    """Time in which some model computes."""

    exchange: float
    output: float | None
    merge: float | None
    draw: float | None
    commit: float | None
    rest: float
    text: float | None
    bytes_moved: float
    """Of rows, per step."""


class Recorder:
    """Times what it wraps, step by step."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    @contextmanager
    def wrapping(self) -> Iterator[None]:
        """Wrap the lane's parts while the context lasts; one that is not there is left out."""
        with ExitStack() as stack:
            for owner, name, part in TIMED:
                if (function := getattr(owner, name, None)) is not None:
                    stack.callback(setattr, owner, name, function)
                    setattr(owner, name, self._timed(part, function))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            if part == PLAN:
                self.steps.append(StepRecord(start))
            record = self.steps[-1]
            result = function(*args, **kwargs)
            record.parts_s[part] += time.perf_counter() - start
            return result

        return timed


class TimedStream(StepStream):
    """A stream that notes when its steps go out and when their rows are there."""

    recorder: Recorder

    async def step(self, work: Sequence[Work], *, timeout_s: float, **options: Any) -> Rows:
        """Run the step and note it."""
        record = self.recorder.steps[-1]
        before = self.traffic.shared_memory_bytes + self.traffic.inline_bytes
        record.first_send_s = min(record.first_send_s, time.perf_counter())
        rows = await super().step(work, timeout_s=timeout_s, **options)
        record.last_landing_s = max(record.last_landing_s, time.perf_counter())
        record.num_items += len(work)
        record.num_tokens += sum(len(item.tokens) for item in work)
        record.num_bytes += self.traffic.shared_memory_bytes + self.traffic.inline_bytes - before
        return rows


def summarise(
    steps: Sequence[StepRecord], forwards: Sequence[Sequence[Forward]], *, num_sequences: int, takes_turns: bool
) -> Breakdown:
    """Return the medians over full decoding steps; the last step of a run, which nothing follows, does not count.

    Args:
        steps: in order.
        forwards: the forward passes of the base, then of each guide.
        num_sequences: in a full step.
        takes_turns: whether the models computed one after the other.

    Raises:
        RuntimeError: there was no full step.
    """
    num_items = num_sequences * len(forwards)
    full = [
        (step, after.begin_s - step.begin_s)
        for step, after in itertools.pairwise(steps)
        if step.num_items == step.num_tokens == num_items
    ]
    if not full:
        raise RuntimeError("no step decoded all sequences; ask for more tokens")

    def part(name: str) -> float | None:
        if not any(name in step.parts_s for step, _ in full):
            return None
        return 1e3 * statistics.median(step.parts_s[name] for step, _ in full)

    models = [
        1e3 * statistics.median(f.elapsed_s for f in passes if f.num_sequences == f.num_tokens == num_sequences)
        for passes in forwards
    ]
    computing = sum(models) if takes_turns else max(models)
    gather = 1e3 * statistics.median(step.last_landing_s - step.first_send_s for step, _ in full)
    period = 1e3 * statistics.median(elapsed_s for _, elapsed_s in full)
    in_turn = {name: part(name) for name in (PLAN, MERGE_AND_DRAW, "commit")}
    return Breakdown(
        sequences=num_sequences,
        guides=len(forwards) - 1,
        step=period,
        plan=in_turn[PLAN] or 0.0,
        base=models[0],
        guide=max(models[1:], default=None),
        models=computing,
        exchange=gather - computing,
        output=part("output"),
        merge=part("merge"),
        draw=part("draw"),
        commit=in_turn["commit"],
        rest=period - gather - sum(elapsed or 0.0 for elapsed in in_turn.values()),
        text=part("text"),
        bytes_moved=statistics.median(step.num_bytes for step, _ in full),
    )
