"""One model replica: an engine, its leases, and the data plane on which coordinators send it steps.

`BaseModel` and `Guide` are the Serve deployments around it.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from actors.engine import Engine, Work
from actors.leases import BaseDescription, Lease, LeaseRequest, Refusal
from actors.prompts import PromptEncoder
from actors.settings import BaseModelSettings
from cluster import exchange
from cluster.errors import DeadlineExceeded, EngineError, InvalidRequest, ReplicaLost, TrimtabError
from cluster.exchange import Failure, Step, StepRows, StepServer

ATTACH_TIMEOUT_S = 15.0
"""A lease whose coordinator has not opened its stream by then ends; longer than a coordinator tries."""

HANG_S = 120.0
"""A step that takes longer will never end."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    """A step message that waits for the engine."""

    coordinator: str
    step: Step
    rows: "asyncio.Future[StepRows]"


class ModelServer:
    """Serves one engine to any number of coordinators.

    All step messages that wait when the engine is free share its next forward pass. The engine runs in a thread of its
    own; everything else belongs to the event loop of the caller.
    """

    def __init__(self, engine: Engine, encoder: PromptEncoder, *, replica: str, host: str, max_rows: int) -> None:
        self.engine = engine
        self.description: BaseDescription | None = None
        """Of a base, for coordinators."""
        self.base_vocabulary = ""
        """Digest of the base's tokens: its own, or those that a guide was checked against."""
        self._encoder = encoder
        self._replica = replica
        self._server = StepServer(
            self, row_width=engine.vocabulary_size, dtype=engine.dtype, max_rows=max_rows, host=host
        )
        self._starting = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._prompts: dict[str, Sequence[int]] = {}
        self._open: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._busy_since: float | None = None

    @classmethod
    def load(cls, settings: BaseModelSettings, tokenizer: Any, *, base_vocabulary: str) -> "ModelServer":
        """Load the model that the settings name, to be served by this Serve replica."""
        engine = Engine.load(
            settings.model,
            dtype=settings.torch_dtype,
            max_sequences=settings.max_sequences,
            max_context=settings.max_context,
            threads=settings.threads or len(os.sched_getaffinity(0)),
            device=settings.device,
        )
        replica = serve.get_replica_context().replica_id.to_full_id_str()
        encoder = PromptEncoder(tokenizer, settings.prompt_template)
        server = cls(
            engine, encoder, replica=replica, host=ray.util.get_node_ip_address(), max_rows=settings.max_sequences
        )
        server.base_vocabulary = base_vocabulary
        return server

    async def start(self) -> None:
        """Open the data plane, unless it is open."""
        async with self._starting:
            if self._loop is None:
                await self._server.start()
                self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End every stream and the data plane."""
        async with self._starting:
            if self._loop is not None:
                self._loop.cancel()
                await self._server.stop()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def check_health(self) -> None:
        """Raise `ReplicaLost` if steps are no longer run, or one hangs."""
        if self._loop is not None and self._loop.done():
            raise ReplicaLost(f"the loop of {self._replica} has ended")
        if self._busy_since is not None and time.monotonic() - self._busy_since > HANG_S:
            raise ReplicaLost(f"a step of {self._replica} has not ended within {HANG_S:g} s")

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[Lease | Refusal, None]:
        """Hold room for a sequence until the caller ends the call or its stream breaks.

        Yields one item: the lease, or why the prompt cannot be taken.
        """
        await self.start()
        try:
            tokens = self._encoder.encode(request.prompt)
            self._check_context(tokens, request.prompt.field)
        except InvalidRequest as error:
            yield Refusal(message=error.message, field=error.field)
            return
        key = _key(request.coordinator, request.sequence)
        self._prompts[key] = tokens
        try:
            yield Lease(
                replica=self._replica,
                address=self._server.address,
                token=self._server.token,
                fingerprint=self.engine.fingerprint,
                prompt_tokens=tokens,
                max_context=self.engine.max_context,
                base_vocabulary=self.base_vocabulary,
                description=None if self.engine.fingerprint in request.known_bases else self.description,
            )
            await self._server.wait_attached(request.coordinator, ATTACH_TIMEOUT_S)
            await self._server.wait_detached(request.coordinator)
        except DeadlineExceeded as error:
            logger.warning("the lease of %s ends: %s", key, error)
        finally:
            self._release(key)

    def _check_context(self, tokens: Sequence[int], field: str) -> None:
        if len(tokens) >= self.engine.max_context:
            raise InvalidRequest(
                f"{field} has {len(tokens)} tokens, but the context limit is {self.engine.max_context} tokens, "
                "prompt and output together; shorten it",
                field,
            )

    async def step(self, coordinator: str, step: Step) -> StepRows:
        """Run a coordinator's step beside whatever else waits (`StepHandler`)."""
        waiting = _Waiting(coordinator, step, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._wake.set()
        return await waiting.rows

    async def detach(self, coordinator: str) -> None:
        """Free all that a coordinator held (`StepHandler`)."""
        for key in [key for key in self._prompts if key.startswith(_key(coordinator, ""))]:
            self._release(key)

    def _release(self, key: str) -> None:
        if self._prompts.pop(key, None) is not None:
            self._thread.submit(self._close, key)

    def _close(self, key: str) -> None:
        """Close a sequence if it is open (in the engine's thread, like all that touches `_open`)."""
        if key in self._open:
            self._open.remove(key)
            self.engine.close(key)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            self._busy_since = time.monotonic()
            try:
                results = await loop.run_in_executor(self._thread, self._compute, batch)
            except Exception as error:
                logger.exception("a step failed")
                for waiting in batch:
                    if not waiting.rows.done():
                        waiting.rows.set_exception(TrimtabError(f"the model's step failed: {error!r}"))
                continue
            finally:
                self._busy_since = None
            for waiting, rows in zip(batch, results, strict=True):
                if not waiting.rows.done():
                    waiting.rows.set_result(rows)

    def _compute(self, batch: Sequence[_Waiting]) -> list[StepRows]:
        """Run the work of several step messages in one forward pass (in the engine's thread)."""
        failures: list[list[Failure]] = []
        work: list[list[Work]] = []
        taken: set[str] = set()
        for waiting in batch:
            failures.append([])
            work.append([])
            for item in waiting.step.work:
                try:
                    work[-1].append(self._prepare(_key(waiting.coordinator, item.sequence), item, taken))
                except (EngineError, ReplicaLost) as error:
                    failures[-1].append(Failure(item.sequence, type(error).__name__, str(error)))
        rows = self.engine.step([item for items in work for item in items])
        results = []
        for items, failed in zip(work, failures, strict=True):
            num_rows = sum(len(item.rows) for item in items)
            results.append(StepRows(rows[:num_rows], failed))
            rows = rows[num_rows:]
        return results

    def _prepare(self, key: str, item: exchange.Work, taken: set[str]) -> Work:
        """Bring a sequence to the length that the coordinator believes it has, opening it if need be.

        Raises:
            EngineError: the engine would refuse the item, and with it everybody else's.
            ReplicaLost: the sequence's lease has ended.
        """
        prompt = self._prompts.get(key)
        if prompt is None:
            raise ReplicaLost(f"sequence {item.sequence!r} has no lease on {self._replica}")
        if key not in self._open:
            self.engine.open(key, prompt)
            self._open.add(key)
        if key in taken:
            raise EngineError(f"sequence {item.sequence!r} has a step under way; wait for its rows first")
        self.engine.truncate(key, item.length)
        work = Work(key, item.tokens, item.rows)
        self.engine.check(work)
        taken.add(key)
        return work


def _key(coordinator: str, sequence: str) -> str:
    return f"{coordinator}/{sequence}"
