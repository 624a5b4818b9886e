"""Under steady load, processes are killed, stopped and drained: every answer stays that of an undisturbed run.

And clients that leave in mid-stream leave nothing behind. Few of each here; `make chaos` does more.
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.guidance import Sampling
from actors.guidance.reference import ReferenceText, Voice, generate
from bench.table import markdown
from tests import tiny
from tests.chaos.faults import Fault, Faults, make_plan
from tests.chaos.load import Answer, Ask, Load, at_once, leave, make_asks, send
from tests.chaos.traces import Trace, settled
from tests.cluster.conftest import Deploy, Service, StartDeploy, model_args, service_config
from tests.reference import Comparison

SEED = 20
NUM_CLIENTS = 8
NUM_LEAVERS = 16
VOCABULARY_SIZE = 80
STEP_MS = 60.0
RECOVERY_S = 10.0
"""A stream may stand still so much longer than the service needs to be whole again."""

MODELS = {
    name: tiny.talkative(tiny.llama(VOCABULARY_SIZE, seed=seed, max_position_embeddings=1024))
    for seed, name in enumerate(("base", "kind", "terse"))
}
NUM_REPLICAS = {"base": 2, "guide kind": 2, "guide terse": 2, "coordinator": 2, "gateway": 1}


def make_config(directories: dict[str, str], num_replicas: dict[str, int]) -> dict[str, Any]:
    """The service, with short deadlines, and a base that takes its time."""
    health = {"period_s": 1, "timeout_s": 2}
    small = {"max_sequences": 16, "max_context": 512, "drain_s": 2, "step_timeout_s": 4, "health": health}
    base = model_args(directories["base"], **small, step_ms=STEP_MS)
    guides = {name: model_args(directories[name], base=directories["base"], **small) for name in ("kind", "terse")}
    config = service_config(base, guides, limits={"step_timeout_s": 4, "drain_s": 2}, health=health)
    applications = {application["name"]: application for application in config["applications"]}
    applications["trimtab-base"]["import_path"] = "bench.paced:base"
    applications["trimtab-base"]["deployments"] = [{"name": "BaseModel", "num_replicas": num_replicas["base"]}]
    for name in guides:
        number = num_replicas[f"guide {name}"]
        applications[f"trimtab-guide-{name}"]["deployments"] = [{"name": "Guide", "num_replicas": number}]
    for deployment in applications["trimtab"]["deployments"]:
        deployment["num_replicas"] = num_replicas[deployment["name"].lower()]
    return config


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root: Path = tmp_path_factory.mktemp("models")
    return {name: tiny.save(model, root / name) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def service(deploy: Deploy, directories: dict[str, str]) -> Service:
    return deploy(make_config(directories, NUM_REPLICAS))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference leaves the cores to the service."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def reference(ask: Ask) -> ReferenceText:
    prompt = tiny.tokenizer(VOCABULARY_SIZE)(ask.prompt).input_ids
    voices = [Voice(model=MODELS[name], prompt=prompt, weight=weight) for name, weight in sorted(ask.weights.items())]
    return generate(
        Voice(model=MODELS["base"], prompt=prompt),
        voices,
        sampling=Sampling(seed=ask.seed),
        max_tokens=ask.max_tokens,
        end_tokens={0},
    )


def tokens_of(answer: Answer) -> list[int]:
    """An answer's tokens, of which each is one character, except the end token."""
    tokens: list[int] = tiny.tokenizer(VOCABULARY_SIZE)(answer.text).input_ids
    return [*tokens, 0] if answer.finish_reason == "stop" else tokens


def compare(answers: Sequence[Answer]) -> Comparison:
    """Check that every answer is the reference's, and that it counts its own tokens."""
    comparison = Comparison()
    references: dict[int, ReferenceText] = {}
    for answer in answers:
        number = answer.ask.number
        if number not in references:
            references[number] = reference(answer.ask)
        tokens = tokens_of(answer)
        comparison.add(f"request {number}", tokens, references[number])
        assert answer.num_tokens == len(tokens), answer
    comparison.finish()
    return comparison


def fault_table(faults: Sequence[Fault], answers: Sequence[Answer]) -> str:
    """By kind and role: how many, until the service was whole, and the longest time that a stream stood still."""
    rows = []
    pauses = [pause for answer in answers if answer.ask.streams for pause in answer.pauses]
    for kind, role in sorted({(fault.kind, fault.role) for fault in faults}):
        same = [fault for fault in faults if (fault.kind, fault.role) == (kind, role)]
        still = [end - start for start, end in pauses if any(start < fault.end and end > fault.start for fault in same)]
        whole = [f"{fault.end - fault.start:.1f}" for fault in same]
        rows.append([f"{role} {kind}", str(len(same)), ", ".join(whole), f"{max(still, default=0):.1f}"])
    return markdown(["fault", "times", "whole again after, s", "a stream stood still, at most, s"], rows)


def test_no_fault_costs_a_token(
    service: Service, start_deploy: StartDeploy, directories: dict[str, str], pytestconfig: pytest.Config
) -> None:
    num_faults = pytestconfig.getoption("--chaos")
    asks = make_asks(min(2 * NUM_CLIENTS * num_faults, 200), seed=SEED)
    faults = Faults(lambda numbers: start_deploy(make_config(directories, numbers)), NUM_REPLICAS, seed=SEED)
    start = time.monotonic()
    load = Load(service.url, asks, num_clients=NUM_CLIENTS)
    try:
        faults.run(make_plan(num_faults, seed=SEED))
    except BaseException:
        load.abandon()
        raise
    finally:
        answers = load.finish()
    wall_s = time.monotonic() - start

    gateway_kills = [fault.start for fault in faults.done if fault.role == "gateway"]
    cut = [answer for answer in answers if answer.error is not None and answer.had(gateway_kills)]
    failed = [answer for answer in answers if answer.error is not None and answer not in cut]
    print(f"\n{fault_table(faults.done, answers)}\n")
    print(f"{len(faults.done)} faults and {len(answers)} requests in {wall_s:.0f} s; {len(failed)} failed")
    print(f"{len(cut)} connections ended with the gateway: {[answer.error for answer in cut]}")
    for answer in failed:
        print(f"failed: {answer.error} {answer.ask} after {answer.end - answer.start:.1f} s")
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        again = list(clients.map(lambda answer: send(service.url, answer.ask), cut))
    assert [answer.error for answer in again] == [None] * len(cut)
    comparison = compare([*(answer for answer in answers if answer.error is None), *again])
    print(f"{comparison.num_tokens} tokens compared, {comparison.num_ties} ties")
    for first, second in zip(cut, again, strict=True):
        assert second.text.startswith(first.text)
    assert not failed
    longest_s = max(end - start for answer in answers for start, end in answer.pauses if answer.ask.streams)
    whole_s = max(fault.end - fault.start for fault in faults.done)
    assert longest_s <= whole_s + RECOVERY_S


def trace_table(before: dict[str, Trace], after: dict[str, Trace]) -> str:
    rows = []
    for name, late in after.items():
        early = before[name]
        more = 100 * (late.uss_bytes / early.uss_bytes - 1)
        rows.append(
            [
                name,
                f"{early.num_connections} → {late.num_connections}",
                f"{early.num_segments} → {late.num_segments}",
                f"{early.uss_bytes / 2**20:.1f} → {late.uss_bytes / 2**20:.1f}",
                f"{more:+.2f} %",
            ]
        )
    return markdown(["process", "connections", "segments", "memory, MiB", "more"], rows)


def test_clients_that_leave_leave_nothing_behind(service: Service, pytestconfig: pytest.Config) -> None:
    num_leavers = pytestconfig.getoption("--leavers")
    chance = random.Random(SEED)
    asks = [ask for ask in make_asks(2 * (num_leavers + 8 * NUM_LEAVERS), seed=SEED + 1) if ask.streams]
    calls = [partial(leave, service.url, ask, chance.randint(1, 12)) for ask in asks]
    at_once(NUM_LEAVERS, calls[num_leavers:])
    before = settled()
    start = time.monotonic()
    at_once(NUM_LEAVERS, calls[:num_leavers])
    left = time.monotonic()
    after = settled()
    print(f"\n{trace_table(before, after)}\n")
    print(f"{num_leavers} left within {left - start:.1f} s; nothing was live {time.monotonic() - left:.1f} s later")
    assert not list(Path("/dev/shm").glob("trimtab-*"))
    assert {name: trace.num_segments for name, trace in after.items()} == {
        name: trace.num_segments for name, trace in before.items()
    }
    for name, trace in after.items():
        assert trace.num_connections <= before[name].num_connections + 2, name
    total = [sum(trace.uss_bytes for trace in traces.values()) for traces in (before, after)]
    print(
        f"memory of all: {total[0] / 2**20:.1f} → {total[1] / 2**20:.1f} MiB ({100 * (total[1] / total[0] - 1):+.2f} %)"
    )
    assert send(service.url, asks[0]).error is None
