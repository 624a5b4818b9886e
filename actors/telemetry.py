"""What operators see of a replica: figures that Ray exports for Prometheus, as `ray_trimtab_...`.

Everything is counted as plain numbers where it happens and brought to Ray when Serve asks a replica for its health, so
that no step waits for a metric. Ray adds tags with the application, deployment and replica.
"""

from collections.abc import Mapping, MutableSequence
from typing import Any, Literal

from ray.serve import metrics

SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]
"""Boundaries of histograms of durations."""

Kind = Literal["total", "level", "durations"]

METRICS: Mapping[str, tuple[Kind, str, tuple[str, ...]]] = {
    "requests": ("total", "Requests that ended, by outcome: ok, cancelled, or the name of their error.", ("outcome",)),
    "open_requests": ("level", "Requests that are open, those that wait for room included.", ()),
    "live_sequences": ("level", "Sequences that are being written.", ()),
    "waiting_requests": ("level", "Requests that wait for room on a model.", ()),
    "prompt_tokens": ("total", "Tokens of prompts, as the base has them.", ()),
    "output_tokens": ("total", "Tokens that were sent.", ()),
    "first_token_seconds": ("durations", "From a request's arrival to its first piece.", ()),
    "token_seconds": ("durations", "Mean time of a request's tokens after its first piece.", ()),
    "steps": ("total", "Steps of all lanes.", ()),
    "step_seconds": ("total", "Time of steps, by part: plan, models, merge_and_draw, commit.", ("part",)),
    "replays": ("total", "Times that a sequence went on elsewhere after a loss, by model.", ("model",)),
    "leases": ("level", "Sequences that hold room on a model.", ()),
    "passes": ("total", "Forward passes of a model.", ()),
    "pass_seconds": ("total", "Time of a model's forward passes, turns on shared cores included.", ()),
    "computed_tokens": ("total", "Tokens that went through a model.", ()),
    "reused_tokens": ("total", "Tokens that a model found in its cache.", ()),
    "preemptions": ("total", "Sequences that gave their room up and were computed again.", ()),
    "cache_use": ("level", "Share of a model's cache that live sequences hold.", ()),
}
"""Kind, description and tags, by name."""


class Telemetry:
    """One replica's figures."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._exported: dict[tuple[str, str], float] = {}

    def total(self, name: str, value: float, **tags: str) -> None:
        """Bring a number that only grows up to date."""
        key = name, repr(tags)
        growth = value - self._exported.get(key, 0.0)
        # A counter takes no zero, and a first one would say nothing.
        if growth > 0:
            self._metric(name).inc(growth, tags=tags)
            self._exported[key] = value

    def level(self, name: str, value: float) -> None:
        """Say how much there is now."""
        self._metric(name).set(value, tags={})

    def durations(self, name: str, seconds: MutableSequence[float]) -> None:
        """Add durations, and empty the sequence of them."""
        for duration in seconds:
            self._metric(name).observe(duration, tags={})
        seconds.clear()

    def _metric(self, name: str) -> Any:
        if name not in self._metrics:
            kind, description, tags = METRICS[name]
            options: dict[str, Any] = {"description": description, "tag_keys": tags or None}
            if kind == "durations":
                self._metrics[name] = metrics.Histogram(f"trimtab_{name}", boundaries=SECONDS, **options)
            else:
                make = metrics.Counter if kind == "total" else metrics.Gauge
                self._metrics[name] = make(f"trimtab_{name}", **options)
        return self._metrics[name]
