"""Plan a service before there is a machine for it: `trimtab plan deploy.yaml --accelerator h100`.

From the models' configurations alone, without their weights: memory of each model, bytes that travel, the time of a
step and its bottleneck for a number of sequences, what would help, and the same service with up to 4,096 base
replicas. An estimate for choosing machines; docs/operations.md says how far off it was where it could be checked.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from actors.names import GUIDE_PREFIX, guide_of
from actors.settings import BaseModelSettings
from cluster.errors import InvalidConfiguration
from deploy.cli.options.plan import COMMAND, Options
from deploy.cli.trimtab import old_way
from deploy.planning.advice import Size, advise, grow
from deploy.planning.estimate import Estimate, estimate
from deploy.planning.hardware import ACCELERATORS, THIS_MACHINE, Accelerator, find_accelerator, network
from deploy.planning.measure import this_machine
from deploy.planning.service import Choose, read_service
from deploy.service.check import parse


def plan(config: object, options: Options) -> dict[str, Any]:
    """Return the estimate, what would help, and the sizes that a service may grow to.

    Raises:
        InvalidConfiguration: the deploy.yaml, a model or an accelerator cannot be planned with.
    """
    schema, settings = parse(config)
    known = [guide_of(name) for name in settings if name.startswith(GUIDE_PREFIX)]
    guides = known if options.chosen_guides is None else options.chosen_guides
    if unknown := sorted(set(guides) - set(known)):
        raise InvalidConfiguration(f"--guides: there is no guide {unknown[0]!r}; guides are {known}")
    if unknown := sorted({name for name, _ in options.accelerators if name} - set(settings)):
        raise InvalidConfiguration(f"--accelerator: there is no application {unknown[0]!r}; there are {list(settings)}")
    service = read_service(
        schema,
        settings,
        choose=_chooser(dict(options.accelerators), options.sequences),
        guides=guides,
        far=network(options.network_gbit_s),
        is_apart=options.apart,
    )
    for model in service.models:
        if options.context > (limit := min(model.max_context, model.cache_tokens)):
            raise InvalidConfiguration(f"--context: a sequence of {model.name} has {limit} tokens at most")
    now = estimate(service, sequences=options.sequences, context=options.context)
    return {
        "estimate": now,
        "advice": list(advise(service, now)),
        "sizes": list(grow(service, now, network_gbit_s=options.network_gbit_s)),
        "accelerators": {model.accelerator.name: model.accelerator.source for model in service.models},
    }


def _chooser(given: dict[str, str], rows: int) -> Choose:
    """Return what gives an application its accelerator: the option for it, its own `accelerator_type`, the option for
    all, or this machine's processors where it asks for no GPU.
    """
    measured: dict[str, Accelerator] = {}

    def choose(application: str, args: BaseModelSettings) -> Accelerator:
        name = given.get(application) or args.resources.accelerator_type or given.get("")
        if name is None and args.resources.gpus == 0:
            name = THIS_MACHINE
        if name == THIS_MACHINE:
            if args.dtype not in measured:
                measured[args.dtype] = this_machine(dtype=args.dtype, rows=min(rows, args.max_sequences))
            return measured[args.dtype]
        found = find_accelerator(name) if name else None
        if found is None:
            raise InvalidConfiguration(
                f"{application}: no figures of {f'the accelerator {name!r}' if name else 'its GPUs'}; give "
                f"`--accelerator {application}=NAME`, one of {', '.join([*ACCELERATORS, THIS_MACHINE])}"
            )
        return found

    return choose


def describe(planned: dict[str, Any]) -> str:
    """Return a plan as text."""
    now: Estimate = planned["estimate"]
    sizes: list[Size] = planned["sizes"]
    sources = "\n".join(f"{name}: {source}" for name, source in planned["accelerators"].items())
    load = f"{now.coordinators} coordinator{'s' if now.coordinators > 1 else ''}, busy {now.coordinator_load:.0%}"
    return "\n\n".join(
        [
            f"{now.sequences} live sequences of {now.context} tokens on the average, {load}",
            _models(now),
            f"step {_ms(now.step_s)} ms = models {_ms(now.models_s)} + exchange {_ms(now.exchange_s)} + coordinator "
            f"{_ms(now.coordinator_s)}; {now.tokens_per_s:,.0f} tokens/s; bottleneck: {now.bottleneck}",
            "\n".join(f"* {sentence}" for sentence in planned["advice"]) or "* nothing to add",
            _sizes(sizes),
            sources,
        ]
    )


def _models(now: Estimate) -> str:
    header = (
        "model,on,replicas,parameters,weights GB,cache GB,rows,step ms,products,attention,small,ranks,link,MB/step,MB/s"
    )
    rows = [
        [
            model.name,
            f"{model.devices} x {model.accelerator}",
            f"{model.replicas}",
            f"{model.parameters:,}",
            f"{model.weight_bytes / 1e9:.2f}",
            f"{model.cache_bytes / 1e9:.2f}",
            f"{model.rows}",
            *map(_ms, (model.step_s, model.products_s, model.attention_s, model.small_s, model.ranks_s)),
            model.link,
            f"{model.bytes_per_step / 1e6:.2f}",
            f"{model.bytes_per_s / 1e6:,.1f}",
        ]
        for model in now.models
    ]
    return _table(header.split(","), rows)


def _sizes(sizes: Sequence[Size]) -> str:
    header = ["base", *sizes[0].guide_replicas, "coordinators", "GPUs", "sequences", "step ms", "tokens/s", "Gbit/s"]
    rows = [
        [
            f"{size.base_replicas:,}",
            *(f"{count:,}" for count in size.guide_replicas.values()),
            f"{size.coordinators:,}",
            f"{size.devices:,}",
            f"{size.sequences:,}",
            _ms(size.step_s),
            f"{size.tokens_per_s:,.0f}",
            f"{size.gbit_s:,.2f}",
            f"{size.gbit_s_per_coordinator:.2f}",
        ]
        for size in sizes
    ]
    return _table([*header, "by network to a coordinator"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one to the left."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (header, *rows))
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def run(options: Options) -> None:
    """Print the plan.

    Raises:
        InvalidConfiguration: the first thing that cannot be planned with.
        OSError: the file cannot be read.
    """
    try:
        planned = plan(yaml.safe_load(options.file.read_bytes()), options)
    except (yaml.YAMLError, InvalidConfiguration) as error:
        raise InvalidConfiguration(f"{options.file}: {error}") from error
    if options.json:
        now = planned["estimate"]
        print(
            json.dumps(
                {
                    **planned,
                    "estimate": {**asdict(now), "tokens_per_s": now.tokens_per_s},
                    "sizes": [asdict(size) for size in planned["sizes"]],
                },
                indent=2,
            )
        )
    else:
        print(describe(planned))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the process's exit status: 0, or 2 if there is something that cannot be planned with."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(old_way("plan"))
