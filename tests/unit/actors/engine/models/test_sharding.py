"""A model over two ranks: rank 0's engine gives the rows of an engine that holds the model whole.

The ranks are processes that this module starts once for all architectures, with gloo on loopback.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from actors.engine import Engine, RowKind, Work
from actors.engine.calls import CallRecord, repeat
from actors.engine.models.sharding import check_shardable, join_group
from actors.engine.passes.transformers import TransformersPass
from cluster.errors import EngineError, InvalidConfiguration
from cluster.ranks import Follower, Leader
from tests import tiny
from tests.unit.actors.engine.test_equivalence import MAX_CONTEXT, MAX_SEQUENCES, Caller

ARCHITECTURES = ["llama", "qwen3", "gemma2", "phi", "gpt_neox"]
VOCABULARY_SIZE = 101
"""No even number: one rank holds more rows of the embedding and of the output layer than the other."""

NUM_OPERATIONS = 75
TOLERANCE = 1e-5
"""Relative to the largest logit."""

TIMEOUT_S = 120.0

Figures = dict[str, dict[str, Any]]


def load(directory: Path, architecture: str, *, num_ranks: int, rows: RowKind = "logits") -> Engine:
    return Engine.load(
        str(directory / architecture),
        dtype=torch.float32,
        max_sequences=MAX_SEQUENCES,
        max_context=MAX_CONTEXT,
        cache_tokens=MAX_CONTEXT + 8,
        threads=1,
        rows=rows,
        num_ranks=num_ranks,
    )


def be_rank(rank: int, directory: Path) -> None:
    """What each of the two processes does."""
    store = distributed.FileStore(str(directory / "store"), 2)
    join_group(store, rank=rank, num_ranks=2, device="cpu")
    if rank == 1:
        address, token = json.loads(store.get("leader"))
        follower = Follower(tuple(address), bytes.fromhex(token), rank, timeout_s=TIMEOUT_S)
        for architecture in ARCHITECTURES:
            for rows in ("logits", "hidden_states"):
                engine = load(directory, architecture, num_ranks=2, rows=rows)
                while message := follower.receive():
                    repeat(engine, message)
    else:
        leader = Leader("127.0.0.1", 2)
        store.set("leader", json.dumps([leader.address, leader.token.hex()]))
        leader.accept(TIMEOUT_S)
        figures = {architecture: lead(leader, directory, architecture) for architecture in ARCHITECTURES}
        (directory / "figures.json").write_text(json.dumps(figures))
    distributed.destroy_process_group()


def lead(leader: Leader, directory: Path, architecture: str) -> dict[str, Any]:
    """Put one architecture's sharded engines beside whole ones; return what was found."""
    engine = load(directory, architecture, num_ranks=2)
    engine.on_call = CallRecord(leader.send).add
    unsharded = load(directory, architecture, num_ranks=1)
    figures: dict[str, Any] = {
        "same fingerprint": engine.fingerprint == unsharded.fingerprint,
        "logits": difference(work_through(engine), work_through(unsharded)),
    }
    model = AutoModelForCausalLM.from_pretrained(directory / architecture, attn_implementation="eager")
    assert isinstance(engine._forward_pass, TransformersPass)
    figures["share"] = num_elements(engine._forward_pass._model) / num_elements(model)
    caller = Caller(engine, model, random.Random(0))
    operations = [caller.step] * 10 + [caller.open, caller.reuse] * 3 + [caller.truncate, caller.close] * 2
    for _ in range(NUM_OPERATIONS):
        caller.random.choice(operations)()
    figures |= {"checked": caller.num_rows_checked, "refused": caller.num_refused}
    figures["reused"] = engine.counters.num_reused_tokens
    leader.send(b"")

    hidden = load(directory, architecture, num_ranks=2, rows="hidden_states")
    hidden.on_call = CallRecord(leader.send).add
    assert hidden.output is not None
    figures["from hidden states"] = difference(hidden.output(work_through(hidden)), work_through(unsharded))
    leader.send(b"")
    return figures


def num_elements(model: PreTrainedModel) -> int:
    """Elements of a model's weights that this process holds."""
    weights = model.parameters()
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)


def work_through(engine: Engine) -> Tensor:
    """Open, step, share, roll back and close; return all rows."""
    prompt = list(range(1, 21))
    engine.open("a")
    rows = [engine.step([Work("a", prompt, range(20))])]
    engine.open("b")
    assert engine.reuse("b", prompt[:18]) == 18
    rows.append(engine.step([Work("b", prompt[18:], [0, 1]), Work("a", [5], [0])]))
    engine.truncate("a", 7)
    with pytest.raises(EngineError):
        engine.step([Work("a", [VOCABULARY_SIZE], [0])])
    rows.append(engine.step([Work("a", [50, 60, 70], [2]), Work("b", [8], [0])]))
    engine.close("a")
    engine.open("c")
    rows.append(engine.step([Work("c", [99, 100], [0, 1]), Work("b", [9], [0])]))
    engine.close("b")
    engine.close("c")
    return torch.cat(rows)


def difference(rows: Tensor, expected: Tensor) -> float:
    assert rows.shape == expected.shape
    return float((rows - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    directory = tmp_path_factory.mktemp("sharded")
    for architecture in ARCHITECTURES:
        tiny.ARCHITECTURES[architecture](VOCABULARY_SIZE).save_pretrained(directory / architecture)
    multiprocessing.spawn(be_rank, (directory,), nprocs=2)  # type: ignore[no-untyped-call]
    found: Figures = json.loads((directory / "figures.json").read_text())
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_those_of_the_whole_model(figures: Figures, architecture: str) -> None:
    assert figures[architecture]["logits"] < TOLERANCE
    assert figures[architecture]["from hidden states"] < TOLERANCE
    # Against the model itself, in any order of work.
    assert figures[architecture]["checked"] > 30
    assert figures[architecture]["refused"] > 0
    assert figures[architecture]["reused"] > 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rank_holds_its_share_and_the_fingerprint_is_the_whole_models(figures: Figures, architecture: str) -> None:
    assert figures[architecture]["share"] < 0.6
    assert figures[architecture]["same fingerprint"]


def test_a_model_without_a_sharding_plan_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfiguration, match=r"my model: tensor_parallel is 2, but .* the family 'gpt2'"):
        check_shardable(tiny.gpt2().config, "my model", 2)


def test_heads_that_cannot_be_shared_are_refused_with_what_can() -> None:
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    check_shardable(config, "x", 3)
    with pytest.raises(InvalidConfiguration, match=r"9 attention heads and 3 key-value heads. Set it to one of 1, 3"):
        check_shardable(config, "x", 2)
