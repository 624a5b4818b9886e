"""What a deploy.yaml asks of the machine that it is checked on, beside what this machine has.

Ray may find more on other nodes, so all of this is warnings. Models that are placed by custom resources, labels or an
accelerator's type are for nodes of which this one need not be one, and are left out.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import BaseModel
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from actors.settings import DEFAULT_CACHE_TOKENS, BaseModelSettings
from deploy.planning.models import read_shape

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is."""

    cpus: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int = 0
    """Of the largest GPU."""

    @classmethod
    def here(cls) -> Self:
        """Return what this machine has."""
        gpus = torch.cuda.device_count()
        return cls(
            cpus=os.cpu_count() or 1,
            gpus=gpus,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            gpu_memory_bytes=max((torch.cuda.get_device_properties(n).total_memory for n in range(gpus)), default=0),
        )


def shortages(schema: ServeDeploySchema, settings: Mapping[str, BaseModel], machine: Machine) -> Iterator[str]:
    """Yield what a checked deploy.yaml asks for and a machine does not have.

    Args:
        schema: the file as Serve reads it.
        settings: the args of its applications, by name.
        machine: on which it is to run.
    """
    totals = {"cpus": 0.0, "gpus": 0.0}
    there = {"cpus": machine.cpus, "gpus": machine.gpus}
    for application in schema.applications:
        args = settings[application.name]
        if not isinstance(args, BaseModelSettings) or _is_placed(args):
            continue
        number = _num_replicas(application) * args.tensor_parallel
        for key in totals:
            each = getattr(args.resources, key)
            totals[key] += each * number
            if each > there[key]:
                yield (
                    f"{application.name}.args.resources.{key}: {each:g}, but this machine has {there[key]}; Ray never "
                    "starts it here"
                )
        yield from _missing_memory(application.name, args, machine)
    for key, total in totals.items():
        if total > there[key]:
            yield (
                f"the models take {total:g} {key} together, and this machine has {there[key]}; without other nodes "
                f"some never start: set resources.{key} to less"
            )


def _missing_memory(name: str, args: BaseModelSettings, machine: Machine) -> Iterator[str]:
    has, kind = (machine.memory_bytes, "") if args.device == "cpu" else (machine.gpu_memory_bytes, " of a GPU")
    if not has:
        return
    tokens = args.cache_tokens or max(DEFAULT_CACHE_TOKENS, args.max_context)
    shape = read_shape(args.model, max_context=args.max_context)
    needed = tokens * shape.cache_per_token * getattr(torch, args.dtype).itemsize // args.tensor_parallel
    if needed > has:
        yield (
            f"{name}.args.cache_tokens: {tokens:,} tokens take {needed / GIB:,.1f} GiB, but this machine has "
            f"{has / GIB:,.1f} GiB of memory{kind}; at most {has * tokens // needed:,} would fit"
        )


def _is_placed(args: BaseModelSettings) -> bool:
    """Whether the file says on which nodes a model is to run."""
    resources = args.resources
    return bool(resources.custom or resources.labels or resources.accelerator_type)


def _num_replicas(application: ServeApplicationSchema) -> int:
    """How many replicas a model starts with."""
    for deployment in application.deployments:
        given = deployment.model_dump(exclude_unset=True)
        scaling = given.get("autoscaling_config")
        if isinstance(scaling, dict):
            return int(scaling.get("min_replicas", 1))
        if isinstance(given.get("num_replicas"), int):
            return int(given["num_replicas"])
    return 1
