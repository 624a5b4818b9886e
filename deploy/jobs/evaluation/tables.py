"""The plan's tables and fronts as data, filled from scored rows. Rows that are not complete yet are left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.jobs.evaluation import measures
from deploy.jobs.evaluation.fronts import Point, Standing, stand
from deploy.jobs.evaluation.measures import Mean, Outcome, Recovery
from deploy.jobs.evaluation.plan import AlignmentTable, Front, Plan, RecoveryTable
from deploy.jobs.evaluation.prompts import Prompt
from deploy.jobs.evaluation.scoring import ScoredRow

Scored = Mapping[str, ScoredRow]

NUM_SAMPLES = 3
"""Answers of each row that the report prints whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentLine:
    """What one way of writing gains and costs."""

    row: str
    num_answers: int
    rewards: dict[str, Mean]
    log_prob_per_token: float
    divergence_per_token: float
    """KL(this way of writing || base), in nats."""

    ended: Mean
    """The share of answers that ended by themselves."""

    mean_length: float
    """In tokens."""

    longest_repeat_95: float
    """The 95th percentile of the longest repeated run, in words."""

    distinct_2_in_answer: float | None
    distinct_2_over_row: float | None
    tokens_per_s: float | None
    num_parameters: int
    outcome: Outcome | None
    """Against the row that the table names; None for itself, or while that row is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """The table `alignment`."""

    reward: str
    against: str
    num_samples_of_distinct_2: int
    """Answers to each prompt that distinct-2 over the row is taken over, in every row."""

    lines: list[AlignmentLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLine:
    """How far one row goes."""

    row: str
    reward: Mean
    recovery: Recovery | None
    num_guide_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryData:
    """The table `recovery`."""

    reward: str
    source: str
    source_reward: Mean
    target: str
    target_reward: Mean
    num_target_parameters: int
    lines: list[RecoveryLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontData:
    """One of the plan's fronts."""

    x: str
    y: str
    curves: dict[str, list[Point]]
    compare: tuple[str, str] | None
    standings: list[Standing]
    """Of the first of `compare` to the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answer to read."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that the report says."""

    alignment: Alignment | None
    recovery: RecoveryData | None
    samples: dict[str, list[Sample]]
    """Answers to read, by row: the first ones to the first prompts."""

    fronts: dict[str, FrontData]
    missing: list[str] = field(default_factory=list)
    """Rows of the plan without all their answers."""


def build(plan: Plan, prompts: Sequence[Prompt], scored: Scored) -> Results:
    """Fill the plan's tables and fronts with what has been scored."""
    tables = plan.tables
    return Results(
        alignment=None if tables.alignment is None else _alignment(plan, tables.alignment, scored),
        recovery=None if tables.recovery is None else _recovery(tables.recovery, scored),
        samples={
            row: [
                Sample(prompt=prompt.last, answer=answers[0].text)
                for prompt, answers in list(zip(prompts, of_row.answers, strict=True))[:NUM_SAMPLES]
            ]
            for row, of_row in scored.items()
        },
        fronts={name: _front(front, scored) for name, front in plan.fronts.items()},
        missing=[row for row in plan.rows if row not in scored],
    )


def _alignment(plan: Plan, table: AlignmentTable, scored: Scored) -> Alignment | None:
    rows = _present(table.rows, scored)
    if not rows:
        return None
    num_samples = min(plan.num_samples_of(row) for row in rows)
    other = scored.get(table.against)
    lines = []
    for row in rows:
        answers = scored[row].answers
        is_compared = other is not None and row != table.against
        lines.append(
            AlignmentLine(
                row=row,
                num_answers=sum(map(len, answers)),
                rewards={name: measures.mean_reward(answers, name) for name in plan.rewards},
                log_prob_per_token=measures.per_token(answers, lambda law: law.log_prob),
                divergence_per_token=measures.per_token(answers, lambda law: law.divergence),
                ended=measures.share_ended(answers),
                mean_length=measures.mean_length(answers),
                longest_repeat_95=measures.longest_repeat_95(answers),
                distinct_2_in_answer=measures.distinct_2_in_answer(answers),
                distinct_2_over_row=measures.distinct_2_over_row(answers, num_samples),
                tokens_per_s=scored[row].tokens_per_s,
                num_parameters=scored[row].num_parameters,
                outcome=measures.compare(answers, other.answers, table.reward) if other and is_compared else None,
            )
        )
    return Alignment(reward=table.reward, against=table.against, num_samples_of_distinct_2=num_samples, lines=lines)


def _recovery(table: RecoveryTable, scored: Scored) -> RecoveryData | None:
    if table.source not in scored or table.target not in scored:
        return None
    source, target = scored[table.source], scored[table.target]
    return RecoveryData(
        reward=table.reward,
        source=table.source,
        source_reward=measures.mean_reward(source.answers, table.reward),
        target=table.target,
        target_reward=measures.mean_reward(target.answers, table.reward),
        num_target_parameters=target.num_parameters,
        lines=[
            RecoveryLine(
                row=row,
                reward=measures.mean_reward(scored[row].answers, table.reward),
                recovery=measures.recovery(scored[row].answers, source.answers, target.answers, table.reward),
                num_guide_parameters=scored[row].num_guide_parameters,
            )
            for row in _present(table.rows, scored)
        ],
    )


def _front(front: Front, scored: Scored) -> FrontData:
    curves = {
        name: [
            Point(
                row,
                measures.mean_reward(scored[row].answers, front.x),
                measures.mean_reward(scored[row].answers, front.y),
            )
            for row in _present(rows, scored)
        ]
        for name, rows in front.curves.items()
    }
    standings: list[Standing] = []
    compare = None
    if front.compare is not None:
        compare = (front.compare[0], front.compare[1])
        first, second = (curves[name] for name in compare)
        standings = [stand(point, second) for point in first if second]
    return FrontData(x=front.x, y=front.y, curves=curves, compare=compare, standings=standings)


def _present(rows: Sequence[str], scored: Scored) -> list[str]:
    return [row for row in rows if row in scored]
