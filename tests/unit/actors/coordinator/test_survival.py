"""Replicas die, hang and change: an answer's tokens stay those of an undisturbed run, or it fails by name."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from actors.api import Piece, Resume
from actors.coordinator import tenancy
from actors.coordinator.coordinator import Coordinator
from actors.guidance import Sampling
from actors.guidance import reference as oracle
from actors.replica.server import ModelServer
from cluster.errors import DeadlineExceeded, InvalidConfiguration, InvalidRequest, ReplicaLost
from tests import tiny
from tests.local_serve import LocalServe, local_coordinator
from tests.reference import Comparison

TIMEOUT_S = 60.0
NUM_TOKENS = 80
BASE, KIND, TERSE = (tiny.talkative(tiny.llama(80, seed=seed)) for seed in range(3))
GUIDED: dict[str, Any] = {"prompt": "hello", "weights": {"kind": 1.0}, "max_tokens": NUM_TOKENS}


@pytest.fixture
async def serve() -> AsyncIterator[LocalServe]:
    serve = LocalServe()
    await serve.start("base", BASE)
    await serve.start("kind", KIND)
    yield serve
    await serve.stop()


@pytest.fixture
async def coordinator(serve: LocalServe, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Coordinator]:
    async with local_coordinator(monkeypatch, serve, ["kind", "terse"]) as coordinator:
        yield coordinator


def expected(seed: int, weights: dict[str, float], num_tokens: int = NUM_TOKENS) -> oracle.ReferenceText:
    prompt = tiny.tokenizer(80)("hello").input_ids
    models = {"kind": KIND, "terse": TERSE}
    return oracle.generate(
        oracle.Voice(model=BASE, prompt=prompt),
        [oracle.Voice(model=models[name], prompt=prompt, weight=weight) for name, weight in weights.items()],
        sampling=Sampling(seed=seed),
        max_tokens=num_tokens,
        end_tokens={0},
    )


def check(tokens: list[int], seed: int, weights: dict[str, float] | None = None) -> None:
    comparison = Comparison()
    comparison.add(f"seed {seed}", tokens, expected(seed, {"kind": 1.0} if weights is None else weights))
    comparison.finish()


class Reader:
    """Reads an answer in a task of its own."""

    def __init__(self, coordinator: Coordinator, resume: Resume | None = None, **fields: Any) -> None:
        self.pieces: list[Piece] = []
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read(coordinator, resume, fields))

    async def _read(self, coordinator: Coordinator, resume: Resume | None, fields: dict[str, Any]) -> None:
        try:
            async with aclosing(coordinator.stream(resume, **fields)) as pieces:
                async for piece in pieces:
                    self.pieces.append(piece)
                    self._news.set()
        finally:
            self._news.set()

    async def begun(self) -> None:
        await asyncio.wait_for(self._news.wait(), TIMEOUT_S)
        assert not self._reading.done()

    async def tokens(self) -> list[int]:
        await asyncio.wait_for(self._reading, TIMEOUT_S)
        return [token for piece in self.pieces for token in piece["token_ids"]]

    async def leave(self, num_cancels: int = 1) -> None:
        for _ in range(num_cancels):
            self._reading.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(self._reading, return_exceptions=True)


async def until(is_true: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            if is_true():
                return
            await asyncio.sleep(0.005)


def only(serve: LocalServe, name: str) -> ModelServer:
    (server,) = serve.replicas[name]
    return server


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("width", [80, 100])
async def test_models_with_more_columns_than_tokens_write_what_the_oracle_writes(
    monkeypatch: pytest.MonkeyPatch, weight: float, width: int
) -> None:
    serve = LocalServe()
    base, kind = tiny.talkative(tiny.llama(100)), tiny.llama(width, seed=1)
    await serve.start("base", base)
    await serve.start("kind", kind)
    prompt = tiny.tokenizer(80)("hello").input_ids
    comparison = Comparison()
    num_columns = 0
    async with local_coordinator(monkeypatch, serve, ["kind"]) as coordinator:
        for seed in range(4):
            sampling = Sampling(seed=seed, temperature=1.5)
            fields: dict[str, Any] = {"prompt": "hello", "weights": {"kind": weight}, "seed": seed, "temperature": 1.5}
            answer = await coordinator.generate(**fields, max_tokens=40)
            voices = oracle.Voice(model=base, prompt=prompt), [oracle.Voice(model=kind, prompt=prompt, weight=weight)]
            limits: dict[str, Any] = {"sampling": sampling, "max_tokens": 40, "end_tokens": {0}}
            comparison.add(seed, answer["token_ids"], oracle.generate(*voices, spelled=range(80), **limits))
            num_columns += sum(token >= 80 for token in oracle.generate(*voices, **limits).tokens)
    comparison.finish()
    await serve.stop()
    assert num_columns or (weight and width == 80)


@pytest.mark.parametrize("name", ["base", "kind"])
@pytest.mark.parametrize("restart_s", [0.0, 0.5])
async def test_a_replica_that_dies_while_it_writes_changes_no_token(
    serve: LocalServe, coordinator: Coordinator, name: str, restart_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shorter than one of the restarts: then everything is given back.
    monkeypatch.setattr(tenancy, "HOLD_S", 0.2)
    monkeypatch.setattr(tenancy, "LOOK_S", 0.1)
    readers = [Reader(coordinator, seed=seed, **GUIDED) for seed in range(3)]
    for reader in readers:
        await reader.begun()
    await serve.kill(only(serve, name))
    await asyncio.sleep(restart_s)
    await serve.start(name, {"base": BASE, "kind": KIND}[name])
    for seed, reader in enumerate(readers):
        check(await reader.tokens(), seed)
    assert serve.num_leases[name] == 6
    usage = readers[0].pieces[-1]["usage"]
    assert usage == {"prompt_tokens": 5, "completion_tokens": NUM_TOKENS, "total_tokens": NUM_TOKENS + 5}


async def test_a_replica_that_dies_in_a_prompt_changes_no_token(serve: LocalServe, coordinator: Coordinator) -> None:
    old = only(serve, "kind")
    serve.freeze(old)
    reader = Reader(coordinator, seed=1, **GUIDED)
    await until(lambda: serve.num_leases["base"])
    await asyncio.sleep(0.1)
    await serve.start("kind", KIND)
    await serve.kill(old)
    check(await reader.tokens(), 1)


async def test_others_do_not_wait_for_a_guide_that_is_gone(serve: LocalServe, coordinator: Coordinator) -> None:
    guided = Reader(coordinator, seed=1, **GUIDED)
    await guided.begun()
    await serve.kill(only(serve, "kind"))
    free = Reader(coordinator, prompt="hello", max_tokens=NUM_TOKENS, seed=2)
    check(await free.tokens(), 2, {})
    num_tokens = sum(len(piece["token_ids"]) for piece in guided.pieces)
    assert num_tokens < NUM_TOKENS
    await serve.start("kind", KIND)
    check(await guided.tokens(), 1)


async def test_what_waits_for_a_guide_that_is_gone_holds_no_other_place(
    serve: LocalServe, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenancy, "HOLD_S", 0.2)
    monkeypatch.setattr(tenancy, "LOOK_S", 0.1)
    both: dict[str, Any] = {**GUIDED, "weights": {"kind": 1.0, "terse": 0.5}}
    terse = await serve.start("terse", TERSE)
    readers = [Reader(coordinator, seed=seed, **both) for seed in range(4)]
    for reader in readers:
        await reader.begun()
    await serve.kill(terse)
    await until(lambda: serve.load(only(serve, "base")) == serve.load(only(serve, "kind")) == 0)
    # Nor does one that comes now, once it has found out.
    readers.append(Reader(coordinator, seed=4, **both))
    await until(lambda: serve.load(only(serve, "kind")) == 1)
    await until(lambda: serve.load(only(serve, "kind")) == 0)
    free = [Reader(coordinator, seed=seed, **GUIDED) for seed in range(4)]
    for seed, reader in enumerate(free):
        check(await reader.tokens(), seed)
    await serve.start("terse", TERSE)
    for seed, reader in enumerate(readers):
        check(await reader.tokens(), seed, both["weights"])


@pytest.mark.parametrize("asleep", [["base"], ["kind"], ["terse"], ["kind", "base"], ["terse", "kind", "base"]])
@pytest.mark.parametrize("is_begun", [False, True])
async def test_models_without_a_replica_are_asked_for_until_they_have_one(
    serve: LocalServe, coordinator: Coordinator, asleep: list[str], is_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenancy, "HOLD_S", 0.1)
    monkeypatch.setattr(tenancy, "LOOK_S", 0.05)
    both: dict[str, Any] = {**GUIDED, "weights": {"kind": 1.0, "terse": 0.5}}
    await serve.start("terse", TERSE)
    readers: list[Reader] = []
    if is_begun:
        readers = [Reader(coordinator, seed=seed, **both) for seed in range(2)]
        for reader in readers:
            await reader.begun()
    for name in asleep:
        await serve.kill(only(serve, name))
    readers += [Reader(coordinator, seed=seed, **both) for seed in range(len(readers), 3)]
    waking = asyncio.create_task(wake(serve, dict.fromkeys(asleep)))
    for seed, reader in enumerate(readers):
        check(await reader.tokens(), seed, both["weights"])
    await waking
    await until(lambda: not any(serve.load(only(serve, name)) for name in ("base", "kind", "terse")))


async def wake(serve: LocalServe, asleep: dict[str, None]) -> None:
    """Start models for which somebody has waited for a while, as Serve's autoscaling does."""
    loop = asyncio.get_running_loop()
    since = dict.fromkeys(asleep, loop.time())
    while asleep:
        await asyncio.sleep(0.02)
        for name in list(asleep):
            if not serve.num_waiting[name]:
                since[name] = loop.time()
            elif loop.time() - since[name] > 0.4:
                del asleep[name]
                await serve.start(name, {"base": BASE, "kind": KIND, "terse": TERSE}[name])


async def test_a_replica_that_hangs_is_killed_and_replaced(serve: LocalServe, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_coordinator(monkeypatch, serve, ["kind"], step_timeout_s=3.0) as coordinator:
        guided = [Reader(coordinator, seed=seed, **GUIDED) for seed in range(2)]
        for reader in guided:
            await reader.begun()
        old = only(serve, "kind")
        serve.freeze(old)
        free = Reader(coordinator, prompt="hello", max_tokens=NUM_TOKENS, seed=2)
        check(await free.tokens(), 2, {})
        assert serve.killed == []
        # One that is only in its prompt waits no longer.
        guided.append(Reader(coordinator, seed=2, **GUIDED))
        await serve.start("kind", KIND)
        for seed, reader in enumerate(guided):
            check(await reader.tokens(), seed)
        assert serve.killed == ["kind 1"]


async def test_a_replica_that_is_only_idle_or_busy_is_not_killed(
    serve: LocalServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_coordinator(monkeypatch, serve, ["kind"], step_timeout_s=3.0) as coordinator:
        check(await Reader(coordinator, seed=1, **GUIDED).tokens(), 1)
        await asyncio.sleep(3.5)
        check(await Reader(coordinator, seed=2, **GUIDED).tokens(), 2)
        assert serve.killed == []
        assert serve.num_leases["kind"] == 2


async def test_a_model_that_was_changed_meanwhile_fails_its_sequences_by_name(
    serve: LocalServe, coordinator: Coordinator
) -> None:
    reader = Reader(coordinator, seed=1, **GUIDED)
    await reader.begun()
    await serve.kill(only(serve, "kind"))
    await serve.start("kind", TERSE)
    with pytest.raises(ReplicaLost, match="guide 'kind' was changed by an update while the request ran: send the"):
        await reader.tokens()
    tokens = [token for piece in reader.pieces for token in piece["token_ids"]]
    assert tokens == expected(1, {"kind": 1.0}).tokens[: len(tokens)]
    await until(lambda: serve.load(only(serve, "base")) == 0)


async def test_a_model_that_does_not_come_back_in_time_is_named(serve: LocalServe, coordinator: Coordinator) -> None:
    begun = Reader(coordinator, seed=1, timeout=3, **GUIDED)
    await begun.begun()
    await serve.kill(only(serve, "kind"))
    new = Reader(coordinator, seed=1, timeout=0.5, **GUIDED)
    with pytest.raises(ReplicaLost, match=r"no place on guide 'kind' was to be had within 0\.5 s: all its replicas"):
        await new.tokens()
    with pytest.raises(ReplicaLost, match=r"no place on guide 'kind' was to be had within 3 s: .*stream .* is over"):
        await begun.tokens()
    tokens = [token for piece in begun.pieces for token in piece["token_ids"]]
    assert tokens == expected(1, {"kind": 1.0}).tokens[: len(tokens)]


async def test_an_answer_that_takes_too_long_by_itself_is_late(serve: LocalServe, coordinator: Coordinator) -> None:
    serve.freeze(only(serve, "base"))
    with pytest.raises(DeadlineExceeded, match=r"not finished within 0\.5 s"):
        await Reader(coordinator, prompt="hello", timeout=0.5).tokens()


async def test_a_request_may_fail_at_once_instead_of_waiting_for_a_guide(
    serve: LocalServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_coordinator(monkeypatch, serve, ["kind"], on_guide_loss="fail") as coordinator:
        guided = Reader(coordinator, seed=1, **GUIDED)
        base_only = Reader(coordinator, prompt="hello", max_tokens=NUM_TOKENS, seed=2)
        for reader in (guided, base_only):
            await reader.begun()
        await serve.kill(only(serve, "kind"))
        with pytest.raises(ReplicaLost, match=r"guide 'kind' was lost, and limits\.on_guide_loss is fail"):
            await guided.tokens()
        with pytest.raises(ReplicaLost, match=r"guide 'kind' is not there, and limits\.on_guide_loss is fail"):
            await Reader(coordinator, seed=1, **GUIDED).tokens()
        check(await base_only.tokens(), 2, {})


async def test_readers_that_leave_while_a_model_is_gone_leave_nothing(
    serve: LocalServe, coordinator: Coordinator
) -> None:
    begun = Reader(coordinator, seed=1, **GUIDED)
    await begun.begun()
    await serve.kill(only(serve, "kind"))
    new = Reader(coordinator, seed=2, **GUIDED)
    await asyncio.sleep(0.1)
    await begun.leave()
    await new.leave()
    kind = await serve.start("kind", KIND)
    await until(lambda: serve.load(only(serve, "base")) == serve.load(kind) == 0)
    check(await Reader(coordinator, seed=3, **GUIDED).tokens(), 3)


async def test_a_reader_that_is_cancelled_again_while_it_leaves_keeps_no_place(
    serve: LocalServe, coordinator: Coordinator
) -> None:
    for num_cancels in range(1, 6):
        reader = Reader(coordinator, seed=1, **GUIDED)
        await reader.begun()
        await serve.kill(only(serve, "kind"))
        # It waits for the guide while it holds the base.
        await asyncio.sleep(0.2)
        await reader.leave(num_cancels)
        await serve.start("kind", KIND)
        await until(lambda: serve.load(only(serve, "base")) == 0)


async def test_a_guide_cannot_be_called_base(serve: LocalServe, coordinator: Coordinator) -> None:
    with pytest.raises(InvalidConfiguration, match="guides: 'base' always means the base model; give the guide an"):
        coordinator.reconfigure({"guides": ["kind", "base"]})
    with pytest.raises(InvalidRequest, match="there is no guide 'base'; guides are: kind"):
        await coordinator.generate(prompt="hello", weights={"base": 0.5})
    assert serve.num_leases["base"] == 0


@pytest.mark.parametrize("stop", [[], ["e"], ["xx", "a b"]])
async def test_an_answer_goes_on_at_another_coordinator(
    serve: LocalServe, coordinator: Coordinator, stop: list[str]
) -> None:
    fields: dict[str, Any] = {**GUIDED, "seed": 1, "stop": stop, "max_tokens": 25}
    whole = await coordinator.generate(**fields)
    reader = Reader(coordinator, **fields)
    await reader.tokens()
    for num_pieces in range(1, len(reader.pieces)):
        had = reader.pieces[:num_pieces]
        text = "".join(piece["text"] for piece in had)
        tokens = [token for piece in had for token in piece["token_ids"]]
        rest = Reader(coordinator, Resume(tokens, len(text)), **fields)
        assert tokens + await rest.tokens() == whole["token_ids"]
        assert text + "".join(piece["text"] for piece in rest.pieces) == whole["text"]
        last = rest.pieces[-1]
        assert (last["finish_reason"], last["usage"]) == (whole["finish_reason"], whole["usage"])
