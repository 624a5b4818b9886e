"""The model card of a trained directory: what it was made of, how, and what its last figures were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "arm": "an autoregressive reward model (GenARM, arXiv 2410.08193)",
    "guided": "an autoregressive reward model, trained under its base (DPO's loss on the guided law; see GenARM, "
    "arXiv 2410.08193, and DPO, arXiv 2305.18290)",
    "dpo": "a model aligned by DPO (arXiv 2305.18290)",
    "distillation": "a cut of a larger model, distilled from it",
}

LAST = 20
"""Steps whose figures are averaged."""


def write_card(
    path: Path,
    *,
    settings: Mapping[str, Any],
    data: Sequence[str],
    log: Sequence[Mapping[str, Any]],
    validation: Mapping[str, float],
) -> None:
    """Write README.md.

    Args:
        path: The file.
        settings: Of the run, as JSON has them.
        data: What the examples were, one fact an item.
        log: The run's log, one mapping a step.
        validation: Figures on pairs that were not trained on; may be empty.
    """
    steps = [line for line in log if "loss" in line]
    last = steps[-LAST:]
    figures = {
        f"{name}, mean of the last {len(last)} steps": sum(line[name] for line in last) / len(last)
        for name in ("loss", "accuracy", "margin", "divergence")
        if last and name in last[0]
    }
    figures |= {f"{name} on validation pairs": value for name, value in validation.items()}
    text = f"""---
base_model: {Path(str(settings["model"])).name}
tags: [trimtab, {settings["objective"]}]
---

# {path.parent.resolve().name}

This is {TITLES[settings["objective"]]}. In Trimtab's deploy.yaml it is named by its directory.

## Data

{_list(data)}

## Figures

| figure | value |
|---|---|
{_rows({"steps": len(steps), **{name: f"{value:.4f}" for name, value in figures.items()}})}

## Settings

| setting | value |
|---|---|
{_rows(settings)}
"""
    path.write_text(text)


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"* {item}" for item in items)


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


def replace_section(card: str, heading: str, section: str) -> str:
    """Return the card with a section in place of the one under the same heading, or at the end if there is none."""
    before, found, after = card.partition(f"\n{heading}\n")
    if not found:
        return f"{card.rstrip()}\n\n{section}\n"
    rest = after.find("\n## ")
    return f"{before.rstrip()}\n\n{section}\n" + (after[rest:] if rest >= 0 else "")
