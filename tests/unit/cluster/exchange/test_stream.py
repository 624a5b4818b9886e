"""A replica and its coordinators in one process: what is sent arrives, whatever the way."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from cluster.errors import DeadlineExceeded, EngineError, InvalidConfiguration, ReplicaLost
from cluster.exchange import Failure, Step, StepRows, StepServer, StepStream, Transport, Work, step_pb2
from cluster.exchange.segment import PREFIX, SHARED_MEMORY

TIMEOUT_S = 20.0


class Replica:
    """Rows that can be told from their sequence, token and place; behaves as a sequence's name asks."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.steps: list[Step] = []
        self.left: list[tuple[str, str]] = []
        self.detached: list[str] = []
        self.detachment = asyncio.Event()
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, sequence: str) -> asyncio.Event:
        """Steps with this sequence wait for the event."""
        return self.gates.setdefault(sequence, asyncio.Event())

    async def step(self, coordinator: str, step: Step) -> StepRows:
        self.steps.append(step)
        failures, rows = [], []
        for item in step.work:
            if item.sequence in self.gates:
                await self.gates[item.sequence].wait()
            if item.sequence == "raises":
                raise RuntimeError("the model is on fire")
            if item.sequence == "fails":
                failures.append(Failure("fails", "EngineError", "no room in the cache"))
            else:
                rows += [row_of(item.tokens[index], self.width, self.dtype) for index in item.rows]
        return StepRows(torch.stack(rows) if rows else torch.empty(0, self.width, dtype=self.dtype), failures)

    def leave(self, coordinator: str, sequence: str) -> None:
        self.left.append((coordinator, sequence))

    async def detach(self, coordinator: str) -> None:
        self.detached.append(coordinator)
        self.detachment.set()


def row_of(token: int, width: int, dtype: torch.dtype) -> Tensor:
    """The row that a token brings."""
    return torch.randn(width, generator=torch.Generator().manual_seed(token)).to(dtype)


@asynccontextmanager
async def serving(width: int = 101, dtype: torch.dtype = torch.float32, **settings: Any) -> AsyncIterator[Any]:
    """A running server; its handler is its attribute `replica`."""
    replica = Replica(width, dtype)
    settings.setdefault("max_rows", 16)
    settings.setdefault("host", "127.0.0.1")
    server: Any = StepServer(replica, row_width=width, dtype=dtype, **settings)
    server.replica = replica
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: StepServer, name: str = "c", **settings: Any) -> AsyncIterator[StepStream]:
    settings.setdefault("token", server.token)
    stream = await StepStream.connect(server.address, coordinator=name, timeout_s=TIMEOUT_S, **settings)
    try:
        yield stream
    finally:
        await stream.close()


def one_row(sequence: str, token: int = 5) -> list[Work]:
    return [Work(sequence, 0, [token], [0])]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}{os.getpid()}-*"))
    assert PREFIX not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("transport", ["auto", "shared_memory", "grpc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 49_152), (16, 49_152), (3, 101), (1, 1), (0, 101)])
async def test_every_transport_brings_the_same_bytes(
    transport: Transport, dtype: torch.dtype, num_rows: int, width: int
) -> None:
    work = [Work(f"s{row}", 0, [3, row], [1]) for row in range(num_rows)] or [Work("s", 0, [3])]
    async with serving(width, dtype) as server, connected(server, transport=transport) as stream:
        with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
            assert rows.tensor.shape == (num_rows, width)
            assert rows.tensor.dtype == dtype
            for row in range(num_rows):
                assert torch.equal(rows.tensor[row], row_of(row, width, dtype))
        num_bytes = num_rows * width * dtype.itemsize
        in_slot = transport != "grpc" and num_rows > 0
        assert stream.transport == ("grpc" if transport == "grpc" else "shared_memory")
        assert stream.traffic == server.traffic
        assert stream.traffic.shared_memory_bytes == (num_bytes if in_slot else 0)
        assert stream.traffic.inline_bytes == (0 if in_slot else num_bytes)
        assert (stream.traffic.num_steps_shared_memory, stream.traffic.num_steps_inline) == (in_slot, not in_slot)


async def test_a_step_arrives_as_it_was_sent() -> None:
    work = (Work("a", 7, (1, 4_294_967_295, 3), (2, 0)), Work("b", 0, (9,)))
    async with serving() as server, connected(server) as stream:
        with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
            assert torch.equal(rows.tensor[0], row_of(3, 101, torch.float32))
            assert torch.equal(rows.tensor[1], row_of(1, 101, torch.float32))
            assert rows.spans() == {"a": slice(0, 2), "b": slice(2, 2)}
        assert server.replica.steps == [Step(work)]


async def test_a_failed_sequence_leaves_the_others_their_rows() -> None:
    work = [*one_row("a", 1), *one_row("fails"), *one_row("b", 2)]
    async with serving() as server, connected(server) as stream:
        with await stream.step(work, timeout_s=TIMEOUT_S) as rows:
            assert rows.failures == (Failure("fails", "EngineError", "no room in the cache"),)
            assert rows.spans() == {"a": slice(0, 1), "b": slice(1, 2)}
            assert torch.equal(rows.tensor[1], row_of(2, 101, torch.float32))


async def test_a_step_that_raises_fails_alone() -> None:
    async with serving(num_slots=1) as server, connected(server) as stream:
        with pytest.raises(EngineError, match="RuntimeError: the model is on fire"):
            await stream.step(one_row("raises"), timeout_s=TIMEOUT_S)
        (await stream.step(one_row("a"), timeout_s=TIMEOUT_S)).release()
        assert stream.traffic.num_steps_shared_memory == 1


async def test_rows_that_do_not_keep_the_format_fail_the_step() -> None:
    async with serving() as server, connected(server) as stream:
        server.replica.dtype = torch.float16
        with pytest.raises(EngineError, match=r"rows of shape \[1, 101\] and torch.float16"):
            await stream.step(one_row("a"), timeout_s=TIMEOUT_S)


async def test_impossible_work_is_refused_before_it_is_sent() -> None:
    async with serving() as server, connected(server) as stream:
        for work, message in (
            ([Work("a", 0, [])], "has no tokens"),
            ([Work("a", 0, [1], [1])], "between 0 and 0"),
            ([Work("a", 0, [1], [-1])], "between 0 and 0"),
            (one_row("a") * 2, "more than once"),
            ([Work("a", 0, [-1])], "range"),
        ):
            with pytest.raises(EngineError, match=message):
                await stream.step(work, timeout_s=TIMEOUT_S)
        (await stream.step(one_row("a"), timeout_s=TIMEOUT_S)).release()


async def test_answers_come_in_any_order_and_steps_in_theirs() -> None:
    async with serving() as server, connected(server) as stream:
        gate = server.replica.gate("slow")
        slow = asyncio.create_task(stream.step(one_row("slow", 1), timeout_s=TIMEOUT_S))
        quick = asyncio.create_task(stream.step(one_row("quick", 2), timeout_s=TIMEOUT_S))
        with await quick as rows:
            assert not slow.done()
            gate.set()
            with await slow as slow_rows:
                assert torch.equal(slow_rows.tensor[0], row_of(1, 101, torch.float32))
            assert torch.equal(rows.tensor[0], row_of(2, 101, torch.float32))
        assert [step.work[0].sequence for step in server.replica.steps] == ["slow", "quick"]


async def test_what_finds_no_slot_travels_inline() -> None:
    async with serving(max_rows=2, num_slots=1, width=4096) as server, connected(server) as stream:
        many = [Work("a", 0, [1, 2, 3], [0, 1, 2])]
        with await stream.step(many, timeout_s=TIMEOUT_S) as rows:
            assert torch.equal(rows.tensor[2], row_of(3, 4096, torch.float32))
        assert stream.traffic.num_steps_inline == 1
        with await stream.step(one_row("b", 8), timeout_s=TIMEOUT_S) as held:
            assert stream.traffic.num_steps_shared_memory == 1
            with await stream.step(one_row("c", 9), timeout_s=TIMEOUT_S) as rows:
                assert torch.equal(rows.tensor[0], row_of(9, 4096, torch.float32))
            assert stream.traffic.num_steps_inline == 2
            assert torch.equal(held.tensor[0], row_of(8, 4096, torch.float32))
        held.release()
        (await stream.step(one_row("d"), timeout_s=TIMEOUT_S)).release()
        assert stream.traffic.num_steps_shared_memory == 2


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_late_answer_keeps_its_slot_until_it_has_come(is_cancelled: bool) -> None:
    async with serving(num_slots=1) as server, connected(server) as stream:
        gate = server.replica.gate("late")
        step = asyncio.create_task(stream.step(one_row("late", 1), timeout_s=TIMEOUT_S if is_cancelled else 0.05))
        if is_cancelled:
            await until(lambda: bool(server.replica.steps))
            step.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else DeadlineExceeded):
            await step
        with await stream.step(one_row("next", 2), timeout_s=TIMEOUT_S) as rows:
            assert stream.traffic.num_steps_inline == 1
            gate.set()
            await until(lambda: server.traffic.num_steps_shared_memory == 1)
            assert torch.equal(rows.tensor[0], row_of(2, 101, torch.float32))
        (await stream.step(one_row("flush"), timeout_s=TIMEOUT_S)).release()
        before = stream.traffic.num_steps_shared_memory
        (await stream.step(one_row("again"), timeout_s=TIMEOUT_S)).release()
        assert stream.traffic.num_steps_shared_memory == before + 1


async def test_an_unseen_segment_means_inline(tmp_path: Path) -> None:
    async with serving(num_slots=1) as server:
        async with connected(server, shared_memory_directory=tmp_path) as stream:
            assert stream.transport == "grpc"
            with await stream.step(one_row("a", 4), timeout_s=TIMEOUT_S) as rows:
                assert torch.equal(rows.tensor[0], row_of(4, 101, torch.float32))
        with pytest.raises(InvalidConfiguration, match=r"exchange\.transport .* one node .* auto"):
            async with connected(server, transport="shared_memory", shared_memory_directory=tmp_path):
                pass


async def test_another_file_of_the_same_name_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.exchange.handshake.SightedSegment", _OtherMemory)
    async with serving() as server, connected(server) as stream:
        assert stream.transport == "grpc"
        (await stream.step(one_row("a"), timeout_s=TIMEOUT_S)).release()


class _OtherMemory:
    """A segment at the same path in a memory of its own."""

    nonce = bytes(32)

    def __init__(self, path: str, directory: Path) -> None:
        pass

    def close(self) -> None:
        pass


async def test_too_little_shared_memory_means_inline() -> None:
    # 16 TB: the tests' machine has less.
    async with serving(max_rows=2**35) as server:
        async with connected(server) as stream:
            assert stream.transport == "grpc"
            (await stream.step(one_row("a"), timeout_s=TIMEOUT_S)).release()
        with pytest.raises(InvalidConfiguration, match="cannot hold"):
            async with connected(server, transport="shared_memory"):
                pass


async def test_a_missing_directory_means_inline(tmp_path: Path) -> None:
    async with serving(shared_memory_directory=tmp_path / "none") as server:
        async with connected(server) as stream:
            assert stream.transport == "grpc"
        with pytest.raises(InvalidConfiguration, match="no file can be made"):
            async with connected(server, transport="shared_memory"):
                pass


async def test_a_wrong_token_is_refused_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        with pytest.raises(ReplicaLost, match="UNAUTHENTICATED"):
            async with connected(server, token="guessed-é"):
                pass
        assert not server.attached("c")
        assert server.replica.detached == []
        assert "token" in caplog.text
        assert server.token not in caplog.text
        assert "guessed" not in caplog.text


async def test_a_stream_that_says_nothing_is_ended() -> None:
    async with serving(handshake_s=0.05) as server, raw_stream(server) as call:
        assert await asyncio.wait_for(call.code(), TIMEOUT_S) == grpc.StatusCode.UNAUTHENTICATED


async def test_the_handler_is_told_of_sequences_that_have_ended_while_there_is_a_stream() -> None:
    async with serving() as server, connected(server) as stream:
        assert stream.leave("a")
        (await stream.step([Work("b", 0, [1], [0])], timeout_s=TIMEOUT_S)).release()
        assert server.replica.left == [("c", "a")]
        await stream.close()
        assert not stream.leave("b")


async def test_the_handler_is_told_once_that_a_stream_has_ended() -> None:
    async with serving() as server:
        async with connected(server):
            await server.wait_attached("c", TIMEOUT_S)
            assert server.attached("c")
            assert server.replica.detached == []
        await asyncio.wait_for(server.replica.detachment.wait(), TIMEOUT_S)
        assert not server.attached("c")
        assert server.replica.detached == ["c"]
        with pytest.raises(DeadlineExceeded, match="no stream"):
            await server.wait_attached("c", 0.01)
    assert server.replica.detached == ["c"]


async def test_a_newer_stream_replaces_the_older() -> None:
    async with serving() as server, connected(server) as older:
        server.replica.gate("hangs")
        hanging = asyncio.create_task(older.step(one_row("hangs"), timeout_s=TIMEOUT_S))
        await until(lambda: bool(server.replica.steps))
        async with connected(server) as newer:
            assert server.replica.detached == ["c"]
            with pytest.raises(ReplicaLost, match="newer stream"):
                await hanging
            (await newer.step(one_row("a"), timeout_s=TIMEOUT_S)).release()


async def test_a_replica_that_stops_ends_its_streams() -> None:
    async with serving() as server, connected(server, "one") as one, connected(server, "two") as two:
        server.replica.gate("hangs")
        steps = [asyncio.create_task(it.step(one_row("hangs"), timeout_s=TIMEOUT_S)) for it in (one, two, two)]
        await until(lambda: len(server.replica.steps) == 3)
        await server.stop()
        for step in steps:
            with pytest.raises(ReplicaLost, match=f"{server.address}.*the replica stops"):
                await step
        assert "the replica stops" in str(await asyncio.wait_for(one.lost, TIMEOUT_S))
        with pytest.raises(ReplicaLost):
            await two.step(one_row("a"), timeout_s=TIMEOUT_S)
        assert sorted(server.replica.detached) == ["one", "two"]
        with pytest.raises(ReplicaLost):
            async with connected(server):
                pass


async def test_closing_fails_what_is_under_way_and_leaves_rows_readable() -> None:
    async with serving() as server, connected(server) as stream:
        rows = await stream.step(one_row("a", 3), timeout_s=TIMEOUT_S)
        server.replica.gate("hangs")
        hanging = asyncio.create_task(stream.step(one_row("hangs"), timeout_s=TIMEOUT_S))
        await asyncio.sleep(0)
        await stream.close()
        with pytest.raises(ReplicaLost, match="closed"):
            await hanging
        assert torch.equal(rows.tensor[0], row_of(3, 101, torch.float32))


@asynccontextmanager
async def raw_stream(server: StepServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel.stream_stream("/trimtab.exchange.StepExchange/Steps")()


@pytest.mark.parametrize(
    "break_it", ["garbage", "empty", "hello", "no tokens", "no such slot", "old step", "busy slot"]
)
async def test_a_malformed_message_ends_its_stream_alone(break_it: str) -> None:
    hello = step_pb2.Hello(version=1, coordinator="bad")
    work = step_pb2.Work(sequence="hangs", tokens=[1], rows=[0])
    broken = {
        "garbage": [b"\xff\xff\xff"],
        "empty": [b""],
        "hello": [step_pb2.Request(hello=hello).SerializeToString()],
        "no tokens": [step_pb2.Request(step=step_pb2.Step(id=1, slot=-1, work=[step_pb2.Work()])).SerializeToString()],
        "no such slot": [step_pb2.Request(step=step_pb2.Step(id=1, slot=99, work=[work])).SerializeToString()],
        "old step": [step_pb2.Request(step=step_pb2.Step(id=0, slot=-1)).SerializeToString()],
        "busy slot": [
            step_pb2.Request(step=step_pb2.Step(id=number, slot=0, work=[work])).SerializeToString()
            for number in (1, 2)
        ],
    }[break_it]
    async with serving() as server, connected(server, "good") as good, connected(server, "bad") as bad:
        server.replica.gate("hangs")
        for request in broken:
            bad._requests.put_nowait(request)
        assert "INVALID_ARGUMENT" in str(await asyncio.wait_for(bad.lost, TIMEOUT_S))
        await until(lambda: server.replica.detached == ["bad"])
        (await good.step(one_row("a"), timeout_s=TIMEOUT_S)).release()


async def test_nobody_there() -> None:
    async with serving() as server:
        address = server.address
    with pytest.raises(ReplicaLost, match=address):
        await StepStream.connect(address, token="t", coordinator="c", timeout_s=TIMEOUT_S)


async def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="float64"):
        StepServer(Replica(1, torch.float64), row_width=1, dtype=torch.float64, max_rows=1, host="127.0.0.1")
    with pytest.raises(InvalidConfiguration, match="max_rows is 0"):
        StepServer(Replica(1, torch.float32), row_width=1, dtype=torch.float32, max_rows=0, host="127.0.0.1")
    with pytest.raises(InvalidConfiguration, match=r"192\.0\.2\.1"):
        async with serving(host="192.0.2.1"):
            pass
