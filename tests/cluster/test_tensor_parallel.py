"""Models over two ranks: the reference's tokens, and ranks that live and die together."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.common import ActorState
from transformers import PreTrainedModel

from actors.guidance import Sampling
from actors.guidance.reference import Voice, generate
from cluster.errors import ReplicaLost
from deploy.client import AsyncClient, Client
from tests import tiny
from tests.cluster.conftest import Deploy, model_args, service_config
from tests.reference import Comparison

MAX_TOKENS = 24
LONG = 400
END_WITHIN_S = 10
BASE = tiny.talkative(tiny.llama(80, max_position_embeddings=100_000))
GUIDES = {"kind": tiny.qwen3(80, seed=1), "wide": tiny.gemma2(97, seed=3)}


@pytest.fixture(scope="module", autouse=True)
def service(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A base and a guide of two ranks each, the guide twice, and a guide of one process."""
    root: Path = tmp_path_factory.mktemp("models")
    base = tiny.save(BASE, root / "base")
    # Prompts in chunks, and room for few sequences at once: ranks preempt alike.
    limits = {"max_context": 10_000, "cache_tokens": 10_000, "max_prompt_tokens_per_step": 16}
    wide = {"tensor_parallel": 2, "max_prompt_tokens_per_step": 16, "cache_tokens": 128, "rows": "hidden_states"}
    guides = {
        "kind": model_args(tiny.save(GUIDES["kind"], root / "kind"), base=base),
        "wide": model_args(tiny.save(GUIDES["wide"], root / "wide"), base=base, **wide),
    }
    config = service_config(model_args(base, tensor_parallel=2, **limits), guides)
    (wide_application,) = (item for item in config["applications"] if item["name"] == "trimtab-guide-wide")
    wide_application["deployments"] = [{"name": "Guide", "num_replicas": 2}]
    deploy(config)


def alive(class_name: str) -> list[ActorState]:
    filters = [("state", "=", "ALIVE"), ("class_name", "=", class_name)]
    return list_actors(ray.get_runtime_context().gcs_address, filters=filters, detail=True)


def base_ranks() -> tuple[ActorState, ActorState]:
    """The base's rank 0, which is its Serve replica, and its rank 1."""
    (replica,) = alive("ServeReplica:trimtab-base:BaseModel")
    (other,) = (rank for rank in alive("Rank") if rank.placement_group_id == replica.placement_group_id)
    return replica, other


def process_of(actor: ActorState) -> int:
    assert actor.pid is not None
    return int(actor.pid)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def eventually(is_true: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def group_states() -> dict[str, str]:
    return {group.placement_group_id: group.state for group in list_placement_groups()}


def tokens_of(model: PreTrainedModel, prompt: str) -> list[int]:
    return list(tiny.tokenizer(model.config.vocab_size)(prompt).input_ids)


def answers() -> bool:
    try:
        return len(Client().generate(prompt="hello", max_tokens=3, temperature=0.0)["token_ids"]) == 3
    except ReplicaLost:
        return False


async def test_tokens_are_the_references() -> None:
    guidance: list[dict[str, float]] = [{}, {"wide": 0.9}, {"kind": 1.0, "wide": -0.4}, {"kind": 0.7}]
    requests: list[dict[str, Any]] = [
        {
            "prompt": "the same beginning, then " + "more of it " * (i % 5) + str(i),
            "weights": guidance[i % 4],
            "temperature": 0.0 if i % 2 else 0.8,
            "seed": i,
        }
        for i in range(16)
    ]
    client = AsyncClient()
    found = await asyncio.gather(*(client.generate(max_tokens=MAX_TOKENS, **request) for request in requests))
    comparison = Comparison()
    for request, answer in zip(requests, found, strict=True):
        prompt = request["prompt"]
        expected = generate(
            Voice(model=BASE, prompt=tokens_of(BASE, prompt)),
            [
                Voice(model=GUIDES[name], prompt=tokens_of(GUIDES[name], prompt), weight=weight)
                for name, weight in sorted(request["weights"].items())
            ],
            sampling=Sampling(temperature=request["temperature"], seed=request["seed"]),
            max_tokens=MAX_TOKENS,
            end_tokens={0},
        )
        comparison.add(request, answer["token_ids"], expected)
    comparison.finish()


@pytest.mark.parametrize("killed", [1, 0])
def test_ranks_end_together_and_serve_replaces_them_all(killed: int) -> None:
    ranks = base_ranks()
    processes = [process_of(rank) for rank in ranks]
    stream = Client().stream(prompt="hello", max_tokens=LONG, seed=killed)
    tokens = list(next(stream)["token_ids"])
    os.kill(processes[killed], signal.SIGKILL)
    eventually(lambda: not any(map(is_running, processes)), END_WITHIN_S)

    # On the ranks that follow, the stream goes on with its text.
    for piece in stream:
        tokens += piece["token_ids"]
    prompt = Voice(model=BASE, prompt=tokens_of(BASE, "hello"))
    comparison = Comparison()
    expected = generate(prompt, [], sampling=Sampling(seed=killed), max_tokens=LONG, end_tokens={0})
    comparison.add("the stream", tokens, expected)
    comparison.finish()
    assert not {process_of(rank) for rank in base_ranks()} & set(processes)
    assert group_states()[str(ranks[0].placement_group_id)] == "REMOVED"


def test_ranks_have_their_replicas_environment() -> None:
    for rank in base_ranks():
        variables = Path(f"/proc/{process_of(rank)}/environ").read_bytes().split(b"\0")
        assert {b"GOMP_SPINCOUNT=20000", b"CUDA_VISIBLE_DEVICES="} <= set(variables)


def test_replicas_that_are_taken_away_leave_no_rank_behind() -> None:
    others = [rank for rank in alive("Rank") if rank.placement_group_id != base_ranks()[0].placement_group_id]
    assert len({rank.placement_group_id for rank in others}) == len(others) == 2
    serve.delete("trimtab-guide-wide")
    eventually(lambda: not any(is_running(process_of(rank)) for rank in others))
    eventually(lambda: {group_states()[str(rank.placement_group_id)] for rank in others} == {"REMOVED"})
    assert answers()
