"""An evaluation's report: report.md for people, results.json for programs, and the pictures beside them."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from deploy.jobs.evaluation.fronts import Standing
from deploy.jobs.evaluation.measures import NUM_RESAMPLES, TIE, Mean, Outcome
from deploy.jobs.evaluation.pictures import draw_alignment, draw_fronts
from deploy.jobs.evaluation.plan import Plan
from deploy.jobs.evaluation.tables import Alignment, AlignmentLine, FrontData, RecoveryData, Results, Sample

MILLION = 1e6
ALIGNMENT_PICTURE = "alignment.png"
FRONTS_PICTURE = "fronts.png"


def write_report(plan: Plan, num_prompts: int, results: Results, folder: Path) -> Path:
    """Write everything into the folder and return the path of report.md."""
    settings = plan.model_dump(mode="json", by_alias=True, exclude_none=True)
    content = {"plan": settings, "plan_digest": plan.digest, "num_prompts": num_prompts, **asdict(results)}
    (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if results.alignment is not None:
        draw_alignment(results.alignment, folder / ALIGNMENT_PICTURE)
    drawn = {name: front for name, front in results.fronts.items() if any(front.curves.values())}
    if drawn:
        draw_fronts(drawn, folder / FRONTS_PICTURE)
    path = folder / "report.md"
    path.write_text("\n".join(_report(plan, num_prompts, results, has_fronts=bool(drawn))) + "\n")
    return path


def _report(plan: Plan, num_prompts: int, results: Results, *, has_fronts: bool) -> Iterator[str]:
    yield "# Evaluation"
    yield ""
    yield (
        f"{num_prompts} held-out prompts (`{plan.prompts}`), written through the service by `{plan.base}` in "
        f"{plan.dtype}: at most {plan.max_tokens} tokens at temperature {plan.temperature:g} and top_p {plan.top_p:g}, "
        f"{plan.concurrency} "
        f"answers at a time. Plan `{plan.digest}`. Intervals are 95 %; answers to one prompt count as one observation, "
        "their mean."
    )
    if results.missing:
        yield ""
        yield f"**Not answered yet**, and left out of what follows: {', '.join(results.missing)}."
    if results.alignment is not None:
        yield from _alignment(plan, results.alignment)
    if results.recovery is not None:
        yield from _recovery(results.recovery)
    for name, front in results.fronts.items():
        yield from _front(name, front)
    if has_fronts:
        yield from ("", f"![Fronts]({FRONTS_PICTURE})")
    yield from _samples(results.samples)


def _samples(samples: Mapping[str, Sequence[Sample]]) -> Iterator[str]:
    """Whole answers, under each prompt those of all rows."""
    yield from ("", "## Answers to read", "", "The first answer of each row to the first prompts, whole.")
    for number, (first, *_) in enumerate(itertools.zip_longest(*samples.values())):
        yield from ("", f"### {first.prompt}")
        for row, of_row in samples.items():
            yield from ("", f"**{row}**", "")
            yield from (f"> {line}" for line in of_row[number].answer.strip().split("\n"))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    for line in (header, ["---"] * len(header), *lines):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
    yield ""


def _alignment(plan: Plan, table: Alignment) -> Iterator[str]:
    others = [name for name in plan.rewards if name != table.reward]
    header = [
        "way of writing",
        "answers",
        table.reward,
        *others,
        "KL / token",
        "log p / token",
        "ended, %",
        "tokens",
        "distinct-2 in an answer",
        "distinct-2 over the row",
        "longest repeat",
        "tokens/s",
        "million parameters / token",
        f"win / tie / lose against {table.against}, %",
    ]
    yield from ("", "## Alignment")
    yield from _table(header, [_alignment_cells(line, [table.reward, *others]) for line in table.lines])
    yield f"* **{', '.join([table.reward, *others])}**: mean reward; higher is better."
    yield (
        f"* **KL / token**: KL(this way of writing || base) at temperature 1, in nats, and **log p / token**: of the "
        f"answers' tokens under the base; the means over the tokens of the first {plan.num_measured} answers to each "
        "prompt."
    )
    yield (
        f"* **ended**: the share of answers that ended by themselves within {plan.max_tokens} tokens; **tokens**: the "
        "mean length of all."
    )
    yield (
        "* **longest repeat**: words in a row that say again what was said just before them; the 95th percentile of "
        "the answers' longest."
    )
    yield (
        "* **distinct-2**: different pairs of adjacent words over all such pairs. Over the row it is taken over the "
        f"first {table.num_samples_of_distinct_2} answers to each prompt in every row, since more text repeats more."
    )
    yield (
        f"* **tokens/s**: by the clock, {plan.concurrency} answers at a time; best-of-N counts the answers that it "
        "keeps and the time of all. **Million parameters** run for each token that is kept: base and guides, N times "
        "for best-of-N; the reward that picks is not counted."
    )
    yield (
        f"* **win / tie / lose**: each answer against each of {table.against}'s to the same prompt, by {table.reward}; "
        f"a difference of at most {TIE:g} is a tie."
    )
    yield from ("", f"![Reward against KL per token]({ALIGNMENT_PICTURE})")


def _alignment_cells(line: AlignmentLine, rewards: Sequence[str]) -> list[str]:
    return [
        line.row,
        str(line.num_answers),
        *(_mean(line.rewards[reward]) for reward in rewards),
        f"{line.divergence_per_token:.3f}",
        f"{line.log_prob_per_token:.3f}",
        f"{100 * line.ended.value:.0f} ± {100 * line.ended.interval:.0f}",
        f"{line.mean_length:.0f}",
        _number(line.distinct_2_in_answer, 3),
        _number(line.distinct_2_over_row, 3),
        f"{line.longest_repeat_95:.0f}",
        _number(line.tokens_per_s, 1),
        f"{line.num_parameters / MILLION:.1f}",
        _outcome(line.outcome),
    ]


def _recovery(table: RecoveryData) -> Iterator[str]:
    yield from ("", "## Weak to strong", "")
    yield (
        f"The share of the gap in {table.reward} from {table.source} ({_mean(table.source_reward)}) to {table.target} "
        f"({_mean(table.target_reward)}, {table.num_target_parameters / MILLION:.1f} million parameters run) that "
        "each way of writing closes."
    )
    lines = []
    for line in table.lines:
        found = line.recovery
        lines.append(
            [
                line.row,
                f"{line.num_guide_parameters / MILLION:.1f}",
                _mean(line.reward),
                "no gap" if found is None else f"{100 * found.share:.0f} %",
                "–" if found is None else f"{100 * found.low:.0f} to {100 * found.high:.0f} %",
            ]
        )
    yield from _table(
        ["way of writing", "million parameters of its guides", table.reward, "share of the gap", "95 % interval"], lines
    )
    yield f"The interval is a bootstrap's, {NUM_RESAMPLES:,} resamples of the prompts, the same for all three rows."


def _front(name: str, front: FrontData) -> Iterator[str]:
    yield from ("", f"## Front: {name}")
    lines = [
        [curve, point.row, _mean(point.x), _mean(point.y)] for curve, points in front.curves.items() for point in points
    ]
    yield from _table(["curve", "way of writing", front.x, front.y], lines)
    if front.compare is None or not front.standings:
        return
    first, second = front.compare
    yield f"Is a point of {first} on or above the front of {second}?"
    yield from _table(
        ["way of writing", "on or above", "lead", "lead with the intervals"], [_standing(s) for s in front.standings]
    )
    yield (
        f"The front joins the points of {second} that no other beats in both rewards by straight lines. The lead is "
        "the point's in the reward in which it does better, at the place of the front that is worst for it. A point is "
        "below if some place is better in both rewards by more than the half intervals, combined as sqrt(a² + b²)."
    )


def _standing(standing: Standing) -> list[str]:
    return [
        standing.row,
        "yes" if standing.is_on_or_above else "no",
        f"{standing.lead:+.3f}",
        f"{standing.margin:+.3f}",
    ]


def _mean(mean: Mean) -> str:
    return f"{mean.value:.3f} ± {mean.interval:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _outcome(outcome: Outcome | None) -> str:
    return "–" if outcome is None else f"{outcome.win:.0f} / {outcome.tie:.0f} / {outcome.lose:.0f}"
