"""Figures are counted once, and the board shows those that there are."""

import json
import re
from typing import Any

import pytest
from ray.serve import metrics

from actors.settings import CHECKOUT
from actors.telemetry import METRICS, Telemetry

BOARD = CHECKOUT / "deploy" / "files" / "grafana.json"
SUFFIXES = {"total": ["_total"], "level": [""], "durations": ["_bucket", "_sum", "_count"]}


class Recorder:
    """Takes what would go to Ray."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...] | None, **_: Any) -> None:
        assert description
        self.name = name
        self.tag_keys = tag_keys or ()
        self.calls: list[tuple[float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray's counters refuse anything else"
        assert set(tags) == set(self.tag_keys)
        self.calls.append((value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append((value, tags))

    observe = set


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    recorders: dict[str, Recorder] = {}

    def make(name: str, **options: Any) -> Recorder:
        recorders[name] = Recorder(name, **options)
        return recorders[name]

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, make)
    return recorders


def test_a_total_is_exported_as_growth_for_each_set_of_tags(made: dict[str, Recorder]) -> None:
    figures = Telemetry()
    for value, outcome in [(3, "ok"), (3, "ok"), (1, "cancelled"), (5, "ok")]:
        figures.total("requests", value, outcome=outcome)
    assert made["trimtab_requests"].calls == [
        (3, {"outcome": "ok"}),
        (1, {"outcome": "cancelled"}),
        (2, {"outcome": "ok"}),
    ]


def test_a_total_that_is_nothing_is_not_exported(made: dict[str, Recorder]) -> None:
    Telemetry().total("steps", 0)
    assert not made


def test_durations_are_exported_once(made: dict[str, Recorder]) -> None:
    figures, seconds = Telemetry(), [0.5, 0.25]
    figures.durations("first_token_seconds", seconds)
    figures.durations("first_token_seconds", seconds)
    assert made["trimtab_first_token_seconds"].calls == [(0.5, {}), (0.25, {})]


def test_the_board_shows_every_metric_and_no_other() -> None:
    board = json.loads(BOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = {name for expression in expressions for name in re.findall(r"ray_trimtab_(\w+)", expression)}
    names = {f"{name}{suffix}": name for name, (kind, _, _) in METRICS.items() for suffix in SUFFIXES[kind]}
    assert shown <= set(names)
    assert {names[name] for name in shown} == set(METRICS)
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
