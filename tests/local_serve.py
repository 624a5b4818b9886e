"""Model servers in this process, behind handles such as Serve's: real leases and real streams, without Ray."""

import asyncio
import copy
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from actors.coordinator import hangs, replicas
from actors.coordinator.coordinator import Coordinator
from actors.coordinator.presence import Presence
from actors.engine import Engine
from actors.leases import BaseDescription, LeaseRequest
from actors.prompts import PromptEncoder
from actors.replica.server import ModelServer
from actors.settings import CoordinatorSettings, Limits
from tests import tiny

VOCABULARY_SIZE = 80
MAX_CONTEXT = 120


class LocalServe:
    """Replicas by model. A request goes to the first of them that has room, and waits while there is none."""

    def __init__(self) -> None:
        self.replicas: dict[str, list[ModelServer]] = {}
        self.num_leases: Counter[str] = Counter()
        self.num_waiting: Counter[str] = Counter()
        """Calls that have no replica yet."""
        self.killed: list[str] = []
        """Replicas that a coordinator had killed."""
        self._load: Counter[ModelServer] = Counter()
        self._room: dict[ModelServer, int] = {}
        self._names: dict[str, ModelServer] = {}
        self._started: list[ModelServer] = []
        self._frozen: list[threading.Event] = []
        self._change = asyncio.Condition()

    async def start(self, name: str, model: Any, *, room: int = 4) -> ModelServer:
        """Start a replica of a model."""
        engine = Engine(copy.deepcopy(model), max_sequences=room, max_context=MAX_CONTEXT)
        fast = tiny.tokenizer(VOCABULARY_SIZE)
        replica = f"{name} {len(self._started)}"
        server = ModelServer(engine, PromptEncoder(fast), replica=replica, host="127.0.0.1", max_rows=room)
        server.base_vocabulary = "the base's"
        server.description = BaseDescription(tokenizer=fast.backend_tokenizer.to_str(), end_tokens=frozenset({0}))
        self.replicas.setdefault(name, []).append(server)
        self._room[server] = room
        self._names[replica] = server
        self._started.append(server)
        await self.notify()
        return server

    async def notify(self) -> None:
        """Let those that wait for room look again."""
        async with self._change:
            self._change.notify_all()

    async def kill(self, server: ModelServer) -> None:
        """End a replica: its streams break and its leases end."""
        for servers in self.replicas.values():
            if server in servers:
                servers.remove(server)
        await server.stop()

    def freeze(self, server: ModelServer) -> threading.Event:
        """Stop a replica's engine until the event is set; its streams live on."""
        thaw = threading.Event()
        server._thread.submit(thaw.wait)
        self._frozen.append(thaw)
        return thaw

    async def stop(self) -> None:
        """End everything."""
        for thaw in self._frozen:
            thaw.set()
        for server in self._started:
            await server.stop()

    async def is_there(self, name: str) -> bool:
        """Whether a replica of a model runs."""
        return bool(self.replicas.get(name))

    async def kill_hanging(self, replica: str) -> None:
        """What a coordinator does to a replica that hangs."""
        self.killed.append(replica)
        await self.kill(self._names[replica])

    def handle(self, name: str) -> "_Handle":
        """The handle of a model's deployment."""
        return _Handle(self, name)

    @asynccontextmanager
    async def place(self, name: str) -> AsyncIterator[ModelServer]:
        """A replica with room, part of which is taken."""
        self.num_waiting[name] += 1
        try:
            async with self._change:
                await self._change.wait_for(lambda: self._free(name) is not None)
                server = self._free(name)
                assert server is not None
                self._load[server] += 1
        finally:
            self.num_waiting[name] -= 1
        try:
            yield server
        finally:
            self._load[server] -= 1
            await self.notify()

    def _free(self, name: str) -> ModelServer | None:
        servers = self.replicas.get(name, [])
        return next((server for server in servers if self._load[server] < self._room[server]), None)

    def load(self, server: ModelServer) -> int:
        """Leases that a replica holds."""
        return self._load[server]


class _Handle:
    def __init__(self, serve: LocalServe, name: str) -> None:
        self.serve = serve
        self.name = name
        self.lease = self

    def options(self, *, stream: bool) -> "_Handle":
        assert stream
        return self

    def remote(self, request: LeaseRequest) -> "_Call":
        return _Call(self, request)


class _Call:
    """A streaming call: it runs on the replica whether or not its caller reads."""

    def __init__(self, handle: _Handle, request: LeaseRequest) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._running = asyncio.create_task(self._run(handle, request))

    async def _run(self, handle: _Handle, request: LeaseRequest) -> None:
        try:
            async with handle.serve.place(handle.name) as server, aclosing(server.lease(request)) as items:
                async for item in items:
                    handle.serve.num_leases[handle.name] += 1
                    self._items.put_nowait(item)
        finally:
            self._items.put_nowait(StopAsyncIteration())

    async def __anext__(self) -> Any:
        item = await self._items.get()
        if isinstance(item, StopAsyncIteration):
            raise item
        return item

    def cancel(self) -> None:
        self._running.cancel()


class _LocalCoordinator(Coordinator):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the deployment's own; here `close` is called."""


@asynccontextmanager
async def local_coordinator(
    monkeypatch: pytest.MonkeyPatch, serve: LocalServe, guides: list[str], **limits: Any
) -> AsyncIterator[Coordinator]:
    """A coordinator that leases what `serve` has."""

    async def is_there(_: Presence, name: str) -> bool:
        return await serve.is_there(name)

    async def is_frozen(replica: str, timeout_s: float) -> bool:
        return False

    monkeypatch.setattr(replicas, "model_handle", serve.handle)
    monkeypatch.setattr(Presence, "is_there", is_there)
    monkeypatch.setattr(hangs, "_is_frozen", is_frozen)
    monkeypatch.setattr(hangs, "_kill", serve.kill_hanging)
    coordinator = _LocalCoordinator(CoordinatorSettings(limits=Limits(**limits)))
    coordinator.reconfigure({"guides": guides})
    try:
        yield coordinator
    finally:
        await coordinator.close()
