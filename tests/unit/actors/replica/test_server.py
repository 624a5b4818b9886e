"""A replica without Serve: leases, the data plane, and what is left when either ends."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import torch

from actors.engine import Engine
from actors.leases import BaseDescription, Lease, LeaseRequest, Refusal
from actors.prompts import Prompt, PromptEncoder
from actors.replica import server as model_server
from actors.replica.ranks import Ranks
from actors.replica.server import ModelServer
from cluster.errors import ReplicaLost, TrimtabError
from cluster.exchange import Step, StepStream, Work
from tests import tiny

TIMEOUT_S = 60.0
MODEL = tiny.llama(80, head_dim=16)


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    engine = Engine(tiny.llama(80, head_dim=16), max_sequences=4, max_context=32)
    server = ModelServer(engine, PromptEncoder(tiny.tokenizer(80)), replica="replica", host="127.0.0.1", max_rows=4)
    server.description = BaseDescription(tokenizer="{}", end_tokens=frozenset({0}))
    yield server
    await server.stop()


def request(coordinator: str, sequence: str, text: str = "hello", *known: str) -> LeaseRequest:
    return LeaseRequest(
        coordinator=coordinator, sequence=sequence, prompt=Prompt(text=text), known_bases=frozenset(known)
    )


@asynccontextmanager
async def leased(server: ModelServer, *args: str) -> AsyncIterator[Lease]:
    async with aclosing(server.lease(request(*args))) as items:
        lease = await anext(items)
        assert isinstance(lease, Lease)
        # Serve's caller goes on reading; the lease lasts while it does.
        holder = asyncio.create_task(anext(items, None))
        await asyncio.sleep(0)
        try:
            yield lease
        finally:
            holder.cancel()
            await asyncio.gather(holder, return_exceptions=True)


@asynccontextmanager
async def attached(lease: Lease, coordinator: str) -> AsyncIterator[StepStream]:
    stream = await StepStream.connect(lease.address, token=lease.token, coordinator=coordinator, timeout_s=TIMEOUT_S)
    try:
        yield stream
    finally:
        await stream.close()


def logits(tokens: Any) -> torch.Tensor:
    with torch.inference_mode():
        row: torch.Tensor = MODEL(torch.tensor([list(tokens)])).logits[0, -1]
    return row


async def last_row(stream: StepStream, sequence: str, tokens: Any, length: int = 0) -> torch.Tensor:
    work = [Work(sequence, length, tokens, (len(tokens) - 1,))]
    with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
        if rows.failures:
            raise LookupError(f"{rows.failures[0].kind}: {rows.failures[0].message}")
        return rows.tensor[0].clone()


async def test_a_coordinator_that_leaves_a_sequence_ends_its_lease(server: ModelServer) -> None:
    async with aclosing(server.lease(request("c", "s"))) as items:
        lease = await anext(items)
        assert isinstance(lease, Lease)
        async with attached(lease, "c") as stream:
            holder = asyncio.create_task(anext(items, None))
            await last_row(stream, "s", lease.prompt_tokens)
            assert not holder.done()
            assert stream.leave("s")
            assert await asyncio.wait_for(holder, TIMEOUT_S) is None
            with pytest.raises(LookupError, match="has no lease"):
                await last_row(stream, "s", lease.prompt_tokens)


async def test_a_lease_brings_the_prompt_and_the_data_plane(server: ModelServer) -> None:
    async with leased(server, "c", "s") as lease, attached(lease, "c") as stream:
        assert list(lease.prompt_tokens) == tiny.tokenizer(80)("hello").input_ids
        assert lease.description == server.description
        row = await last_row(stream, "s", lease.prompt_tokens)
        assert torch.allclose(row, logits(lease.prompt_tokens), atol=1e-4)
        again = await last_row(stream, "s", [9], len(lease.prompt_tokens))
        assert torch.allclose(again, logits([*lease.prompt_tokens, 9]), atol=1e-4)


async def test_a_base_that_is_known_is_not_described_again(server: ModelServer) -> None:
    async with leased(server, "c", "s", "hello", server.engine.fingerprint) as lease:
        assert lease.description is None


@pytest.mark.parametrize(("text", "says"), [("", "empty"), ("x" * 32, "32 tokens, but the context limit is 32")])
async def test_a_prompt_that_cannot_be_taken_is_refused(server: ModelServer, text: str, says: str) -> None:
    items = [item async for item in server.lease(request("c", "s", text))]
    assert len(items) == 1
    assert isinstance(items[0], Refusal)
    assert says in str(items[0].error)
    assert items[0].error.field == "prompt"


@pytest.mark.parametrize("text", ["hello<added>", "<added>", "a<added><added>b", "<other>"])
@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}<added>"])
async def test_a_token_that_the_model_has_no_embedding_for_is_refused(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, template: str | None, text: str
) -> None:
    fast = tiny.tokenizer(80)
    fast.add_tokens(["<added>"])
    fast.add_special_tokens({"additional_special_tokens": ["<other>"]})
    monkeypatch.setattr(server, "_encoder", PromptEncoder(fast, template, split_special_tokens=False))
    [item] = [item async for item in server.lease(request("c", "s", text))]
    assert isinstance(item, Refusal)
    assert item.error.field == "prompt"
    assert "id 8" in str(item.error)
    assert "80 tokens" in str(item.error)
    if template is None:
        # What is spelled by tokens that the model has is taken.
        async with leased(server, "c", "s", "hello added"):
            pass


FAILING_TEMPLATE = (
    "{% set s = none %}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% endif %}"
    "{{ 'sys ' + s }}{{ messages[-1]['content'] }}"
)


@pytest.mark.parametrize(
    ("template", "text"), [(FAILING_TEMPLATE, "hi"), ("{{ messages[9].content.x }}", "hi"), (None, "\ud800")]
)
async def test_a_prompt_that_fails_is_refused_at_once_and_holds_nothing(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, template: str | None, text: str
) -> None:
    monkeypatch.setattr(server, "_encoder", PromptEncoder(tiny.tokenizer(80), template))
    items = [item async for item in server.lease(request("c", "s", text))]
    assert len(items) == 1
    assert isinstance(items[0], Refusal)
    assert items[0].error.field == "prompt"
    assert "Traceback" not in str(items[0].error)
    assert server._leases == {}


async def test_work_without_a_lease_is_refused_and_its_neighbours_done(server: ModelServer) -> None:
    async with leased(server, "c", "s") as lease, attached(lease, "c") as stream:
        work = [Work("stranger", 0, (1,), (0,)), Work("s", 0, tuple(lease.prompt_tokens), (4,))]
        with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
            assert [(failure.sequence, failure.kind) for failure in rows.failures] == [("stranger", "ReplicaLost")]
            assert torch.allclose(rows.tensor[0], logits(lease.prompt_tokens), atol=1e-4)


async def test_work_that_the_engine_refuses_spoils_no_other(server: ModelServer) -> None:
    async with leased(server, "c", "a") as lease, leased(server, "c", "b"), attached(lease, "c") as stream:
        work = [Work("a", 0, (79, 80), (1,)), Work("b", 0, (3,), (0,))]
        with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
            assert "token id 80 is outside the vocabulary" in rows.failures[0].message
            assert torch.allclose(rows.tensor[0], logits([3]), atol=1e-4)


async def test_rows_are_computed_where_they_will_be_read(server: ModelServer) -> None:
    room = torch.empty(2, 80)
    async with leased(server, "c", "a"), leased(server, "c", "b"):
        step = Step((Work("a", 0, (3, 4), (1,)), Work("b", 0, (5,), (0,))), room)
        rows = await server.step("c", step)
    assert rows.tensor.data_ptr() == room.data_ptr()
    torch.testing.assert_close(room, torch.stack([logits([3, 4]), logits([5])]), atol=1e-4, rtol=0)


async def test_what_does_not_fill_the_room_has_memory_of_its_own(server: ModelServer) -> None:
    room = torch.zeros(2, 80)
    async with leased(server, "c", "a"):
        step = Step((Work("a", 0, (3, 4), (1,)), Work("stranger", 0, (5,), (0,))), room)
        rows = await server.step("c", step)
    assert [failure.sequence for failure in rows.failures] == ["stranger"]
    torch.testing.assert_close(rows.tensor, logits([3, 4])[None], atol=1e-4, rtol=0)
    assert not room.any()


async def test_coordinators_that_share_a_pass_do_not_share_memory(server: ModelServer) -> None:
    rooms = torch.empty(1, 80), torch.empty(1, 80)
    async with leased(server, "c", "s"), leased(server, "d", "s"):
        steps = [Step((Work("s", 0, (token,), (0,)),), room) for token, room in zip((3, 5), rooms, strict=True)]
        rows = await asyncio.gather(*map(server.step, ("c", "d"), steps))
    torch.testing.assert_close(rows[0].tensor[0], logits([3]), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows[1].tensor[0], logits([5]), atol=1e-4, rtol=0)


async def test_two_coordinators_may_use_the_same_names(server: ModelServer) -> None:
    async with (
        leased(server, "c", "s", "hello") as lease,
        leased(server, "d", "s", "world") as other,
        attached(lease, "c") as c,
        attached(other, "d") as d,
    ):
        rows = await asyncio.gather(last_row(c, "s", lease.prompt_tokens), last_row(d, "s", other.prompt_tokens))
        assert torch.allclose(rows[0], logits(lease.prompt_tokens), atol=1e-4)
        assert torch.allclose(rows[1], logits(other.prompt_tokens), atol=1e-4)


async def test_a_guide_may_send_hidden_states() -> None:
    engine = Engine(tiny.llama(80, head_dim=16), max_sequences=4, max_context=32, rows="hidden_states")
    assert engine.output is not None
    hidden = ModelServer(engine, PromptEncoder(tiny.tokenizer(80)), replica="replica", host="127.0.0.1", max_rows=4)
    try:
        async with leased(hidden, "c", "s") as lease, attached(lease, "c") as stream:
            row = await last_row(stream, "s", lease.prompt_tokens)
            assert row.shape == (32,)
            assert torch.allclose(engine.output(row[None])[0], logits(lease.prompt_tokens), atol=1e-4)
    finally:
        await hidden.stop()


async def test_the_end_of_a_lease_frees_its_place(server: ModelServer) -> None:
    for round_ in range(3):
        sequences = [f"{round_}-{i}" for i in range(4)]
        async with leased(server, "c", "keep") as lease, attached(lease, "c") as stream:
            for sequence in sequences:
                async with leased(server, "c", sequence):
                    await last_row(stream, sequence, [5])
                with pytest.raises(LookupError, match=r"ReplicaLost: .* has no lease"):
                    await last_row(stream, sequence, [5])


async def test_the_end_of_a_stream_ends_its_leases_and_frees_all(server: ModelServer) -> None:
    async def hold(items: AsyncGenerator[Lease | Refusal, None]) -> None:
        async for _ in items:
            pass

    calls = [server.lease(request("c", str(i))) for i in range(4)]
    leases = [await anext(call) for call in calls]
    assert isinstance(leases[0], Lease)
    holders = [asyncio.create_task(hold(call)) for call in calls]
    async with attached(leases[0], "c") as stream:
        for i in range(4):
            await last_row(stream, str(i), [5])
    await asyncio.wait_for(asyncio.gather(*holders), TIMEOUT_S)
    async with leased(server, "d", "s") as lease, attached(lease, "d") as stream:
        for _ in range(4):
            assert torch.allclose(await last_row(stream, "s", [5]), logits([5]), atol=1e-4)


async def test_a_lease_whose_stream_never_comes_ends(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "ATTACH_TIMEOUT_S", 0.1)
    items = [item async for item in server.lease(request("nobody", "s"))]
    assert len(items) == 1


async def test_a_step_that_fails_on_one_rank_ends_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherRanks(Ranks):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def fail(self, error: Exception) -> None:
            self.heard.append(str(error))

        def stop(self) -> None:
            self.heard.append("stop")

    ranks = OtherRanks()
    engine = Engine(tiny.llama(80), max_sequences=4, max_context=32)
    encoder = PromptEncoder(tiny.tokenizer(80))
    server = ModelServer(engine, encoder, replica="replica", host="127.0.0.1", max_rows=4, ranks=ranks)

    def step(*_: object) -> torch.Tensor:
        raise RuntimeError("no memory here")

    async with leased(server, "c", "s") as lease, attached(lease, "c") as stream:
        await last_row(stream, "s", [5])
        assert ranks.heard == []
        monkeypatch.setattr(engine, "step", step)
        with pytest.raises(TrimtabError, match="no memory here"):
            await last_row(stream, "s", [5], 1)
        assert ranks.heard == ["no memory here"]
    await server.stop()
    assert ranks.heard == ["no memory here", "stop"]


async def test_a_step_that_hangs_makes_the_replica_unhealthy(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.check_health()
    async with leased(server, "c", "s") as lease, attached(lease, "c") as stream:
        await last_row(stream, "s", [5])
        server.check_health()
        monkeypatch.setattr(server, "_hang_s", -1.0)
        running = asyncio.create_task(last_row(stream, "s", [5] * 20, 1))
        complaints = []
        while not running.done():
            await asyncio.wait({running}, timeout=0)
            try:
                server.check_health()
            except ReplicaLost as error:
                complaints.append(str(error))
        await running
        assert "has not ended" in complaints[0]
