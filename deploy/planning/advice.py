"""What would help a service, and how it grows: the same arithmetic on changed services."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deploy.planning.estimate import (
    MEMORY_SHARE,
    Estimate,
    cache_bytes,
    capacity,
    estimate,
    is_fitting,
    model_step_s,
    weight_bytes,
    with_guide,
)
from deploy.planning.hardware import LOOPBACK, SHARED_MEMORY, network
from deploy.planning.service import Model, Service

WORTH = 1.05
"""What pays makes a service at least so many times as fast."""

MAX_BASE_REPLICAS = 4096

FASTEST_GBIT_S = 1000.0
"""Of networks that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A service grown to so many base replicas."""

    base_replicas: int
    guide_replicas: dict[str, int]
    coordinators: int
    devices: int
    sequences: int
    step_s: float
    tokens_per_s: float
    gbit_s: float
    """That all replicas send together."""

    gbit_s_per_coordinator: float
    """Of those that travel over the network."""


def advise(service: Service, now: Estimate) -> Iterator[str]:
    """Yield what does not fit, what limits and what would help, in sentences."""
    for model in service.models:
        if not is_fitting(model):
            yield _does_not_fit(model)
    if now.waiting:
        limit = min(service.models, key=lambda model: capacity(model, now.context) * model.replicas)
        yield (
            f"{now.waiting} sequences wait: {limit.name} holds {capacity(limit, now.context)} of {now.context} tokens "
            f"on each of {limit.replicas} replicas (max_sequences {limit.max_sequences}, cache_tokens "
            f"{limit.cache_tokens:,})"
        )
    yield _more_coordinators(service, now)
    for guide in service.guides:
        yield _more_replicas(service, now, [guide])
    if len(service.guides) > 1:
        yield _more_replicas(service, now, service.guides)
    for guide in service.guides:
        if guide.rows == "logits":
            yield _hidden_states(service, now, guide)


def _does_not_fit(model: Model) -> str:
    needed = model.tensor_parallel * (weight_bytes(model) + cache_bytes(model))
    ranks = math.ceil(needed / (MEMORY_SHARE * model.accelerator.memory_gb * 1e9))
    remedy = "use fewer cache_tokens or a larger machine"
    if not model.accelerator.is_processor:
        remedy = f"set tensor_parallel to {2 ** math.ceil(math.log2(ranks))}, or use fewer cache_tokens"
    return (
        f"{model.name} does not fit: weights and cache are {needed / 1e9:.1f} GB, {MEMORY_SHARE:.0%} of "
        f"{model.tensor_parallel} x {model.accelerator.name} are "
        f"{MEMORY_SHARE * model.tensor_parallel * model.accelerator.memory_gb:.1f} GB; {remedy}"
    )


def _more_coordinators(service: Service, now: Estimate) -> str:
    doubled = replace(service, coordinators=2 * service.coordinators)
    gain = estimate(doubled, sequences=now.sequences, context=now.context).tokens_per_s / now.tokens_per_s
    load = " (they are full)" if now.is_coordinator_full else ""
    return f"twice the coordinators ({doubled.coordinators}): {gain:.2f} times the tokens, {_verdict(gain)}{load}"


def _more_replicas(service: Service, now: Estimate, guides: Sequence[Model]) -> str:
    doubled = service
    for guide in guides:
        doubled = with_guide(doubled, replace(guide, replicas=2 * guide.replicas))
    gain = estimate(doubled, sequences=now.sequences + now.waiting, context=now.context).tokens_per_s / now.tokens_per_s
    names = " and ".join(f"{guide.name} ({2 * guide.replicas})" for guide in guides)
    return f"twice the replicas of {names}: {gain:.2f} times the tokens, {_verdict(gain)}"


def _verdict(gain: float) -> str:
    return "pays" if gain >= WORTH else "does not pay"


def _hidden_states(service: Service, now: Estimate, guide: Model) -> str:
    gain = _gain_of_hidden_states(service, now, guide)
    limit = _break_even_gbit_s(service, now, guide)
    where = "on no network faster" if limit is None else f"faster on networks below {limit:.2g} Gbit/s"
    if limit == FASTEST_GBIT_S:
        where = "faster on every network"
    way = f"`rows: hidden_states` of {guide.name} over {guide.link.name}"
    return f"{way}: {gain:.2f} times the tokens, {_verdict(gain)}; {where}"


def _gain_of_hidden_states(service: Service, now: Estimate, guide: Model) -> float:
    changed = with_guide(service, replace(guide, rows="hidden_states"))
    before, after = (
        estimate(each, sequences=now.sequences, context=now.context) for each in (with_guide(service, guide), changed)
    )
    return after.tokens_per_s / before.tokens_per_s


def _break_even_gbit_s(service: Service, now: Estimate, guide: Model) -> float | None:
    """The rate of a network below which hidden states are faster; none where they never are."""
    rates = [FASTEST_GBIT_S * 10 ** (-exponent / 20) for exponent in range(100)]
    gains = (_gain_of_hidden_states(service, now, replace(guide, link=network(rate))) for rate in rates)
    return next((rate for rate, gain in zip(rates, gains, strict=False) if gain > 1), None)


def grow(service: Service, now: Estimate, *, network_gbit_s: float) -> Iterator[Size]:
    """Yield the service at 1, 2, 4, ... base replicas, with as many rows on each as now.

    Guides get the fewest replicas that keep up with the base, coordinators the fewest that are not busy all the time
    and whose rows fit their network.
    """
    rows = math.ceil(now.sequences / service.base.replicas)
    replicas = 1
    while replicas <= MAX_BASE_REPLICAS:
        guides = tuple(_keep_up(service.base, guide, rows, replicas, now.context) for guide in service.guides)
        base = replace(service.base, replicas=replicas)
        # A coordinator for each base replica, to begin with: none of them is ever held up by another lane.
        grown = replace(service, base=base, guides=guides, coordinators=replicas)
        yield _size(grown, rows * replicas, now.context, network_gbit_s)
        replicas *= 2


def _keep_up(base: Model, guide: Model, rows: int, base_replicas: int, context: int) -> Model:
    """The guide with the fewest replicas whose steps take no longer than the base's."""
    if guide.accelerator.is_processor and guide.node == base.node:
        return replace(guide, replicas=base_replicas)
    limit_s = model_step_s(base, rows, context)
    room = range(1, capacity(guide, context) + 1)
    most = max((count for count in room if model_step_s(guide, count, context) <= limit_s), default=room[-1])
    return replace(guide, replicas=math.ceil(rows * base_replicas / most))


def _size(service: Service, sequences: int, context: int, network_gbit_s: float) -> Size:
    alone = estimate(service, sequences=sequences, context=context)
    far_bytes_per_s = sum(
        model.bytes_per_s for model in alone.models if model.link not in (SHARED_MEMORY.name, LOOPBACK.name)
    )
    busy = service.coordinators * alone.coordinator_load / service.costs.full_share
    coordinators = math.ceil(max(1.0, busy, 8e-9 * far_bytes_per_s / network_gbit_s))
    reached = estimate(replace(service, coordinators=coordinators), sequences=sequences, context=context)
    share = reached.tokens_per_s / alone.tokens_per_s
    return Size(
        base_replicas=service.base.replicas,
        guide_replicas={guide.name: guide.replicas for guide in service.guides},
        coordinators=coordinators,
        devices=sum(
            model.replicas * model.tensor_parallel for model in service.models if not model.accelerator.is_processor
        ),
        sequences=reached.sequences,
        step_s=reached.step_s,
        tokens_per_s=reached.tokens_per_s,
        gbit_s=8e-9 * sum(model.bytes_per_s for model in reached.models),
        gbit_s_per_coordinator=8e-9 * far_bytes_per_s * share / coordinators,
    )
