"""The replica's end: a gRPC server on one TCP port, with one attachment per coordinator."""

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any

import grpc
import torch

from cluster.errors import DeadlineExceeded, InvalidConfiguration
from cluster.exchange import step_pb2
from cluster.exchange.attachment import Attachment, Refused, Terms, receive
from cluster.exchange.channel import server_options
from cluster.exchange.messages import METHOD, SERVICE, VERSION, Malformed, StepHandler
from cluster.exchange.rows import DTYPE_NAMES, RowFormat, Traffic
from cluster.exchange.segment import SHARED_MEMORY, sweep
from cluster.tls import Tls

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.0  # for the streams' last words to be sent; all of them are over by then


class StepServer:
    """Hands the steps of any number of coordinators to one handler. Lives on one event loop."""

    def __init__(
        self,
        handler: StepHandler,
        *,
        row_width: int,
        dtype: torch.dtype,
        max_rows: int,
        host: str,
        num_slots: int = 4,
        keepalive_s: float = 5.0,
        handshake_s: float = 10.0,
        shared_memory_directory: Path = SHARED_MEMORY,
        tls: Tls | None = None,
    ) -> None:
        """Describe the server; `start` makes it.

        row_width: elements of a row. max_rows: rows that fit into a slot; a step may want more, which travel inline.
        host: name or address to listen on, that of the node. num_slots: slots per coordinator, each of
        `max_rows * row_width * dtype.itemsize` bytes of shared memory. keepalive_s: time within which a dead
        coordinator is found. handshake_s: time that a coordinator has for its Hello and for its MemoryProof.
        tls: what the server shows, and asks of coordinators.

        Raises InvalidConfiguration: rows of that dtype are not carried, or a size is not positive.
        """
        if dtype not in DTYPE_NAMES:
            raise InvalidConfiguration(
                f"rows of {dtype} cannot be exchanged; use one of {', '.join(DTYPE_NAMES.values())}"
            )
        for name, value in {"row_width": row_width, "max_rows": max_rows, "num_slots": num_slots}.items():
            if value < 1:
                raise InvalidConfiguration(f"{name} is {value}; it must be at least 1")
        self.token = secrets.token_urlsafe(32)
        self.traffic = Traffic()
        self._handler = handler
        self._terms = Terms(RowFormat(dtype, row_width), max_rows, num_slots, shared_memory_directory, handshake_s)
        self._host = host
        self._keepalive_s = keepalive_s
        self._tls = tls
        self._attachments: dict[str, Attachment] = {}
        self._detaching: set[asyncio.Task[None]] = set()
        self._attaching = asyncio.Condition()
        self._is_stopping = False
        self._server: Any = None
        self._port = 0

    @property
    def address(self) -> str:
        """Where coordinators connect, `host:port`; known from `start` on."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    async def start(self) -> None:
        """Listen on a free port, after removing segments that dead replicas left.

        Raises InvalidConfiguration: the host is not an address of this machine, or a file of `tls` cannot be read.
        """
        credentials = None if self._tls is None else self._tls.server_credentials()
        for path in sweep(self._terms.directory):
            logger.info("removed %s, which a dead replica left", path)
        # Messages stay bytes here, so that one which cannot be parsed ends its stream with a status that says so.
        handler: Any = grpc.stream_stream_rpc_method_handler(self._serve)
        server = grpc.aio.server(options=server_options(self._keepalive_s))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            if credentials is None:
                self._port = server.add_insecure_port(self.address)
            else:
                self._port = server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            await server.stop(None)
            raise InvalidConfiguration(f"cannot listen on {self._host}: {error}") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """End every stream, wait until all are detached, and close the port."""
        self._is_stopping = True
        for attachment in self._attachments.values():
            attachment.end(grpc.StatusCode.UNAVAILABLE, "the replica stops")
        while self._attachments:
            await next(iter(self._attachments.values())).detached.wait()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            self._server = None

    def attached(self, coordinator: str) -> bool:
        """Whether the coordinator has a stream here."""
        return coordinator in self._attachments

    async def wait_attached(self, coordinator: str, timeout_s: float) -> None:
        """Wait until the coordinator has a stream here.

        Raises DeadlineExceeded: it has none after that time.
        """
        if self.attached(coordinator):
            return
        try:
            async with asyncio.timeout(timeout_s), self._attaching:
                await self._attaching.wait_for(lambda: self.attached(coordinator))
        except TimeoutError as error:
            raise DeadlineExceeded(f"coordinator {coordinator} opened no stream within {timeout_s:g} s") from error

    async def _serve(self, _requests: object, context: Any) -> None:
        try:
            hello = await self._hello(context)
            attachment = await self._replace(hello.coordinator, context)
            try:
                async with self._attaching:
                    self._attaching.notify_all()
                await attachment.serve(offers_shared_memory=hello.offers_shared_memory)
            finally:
                # The stream's own task may be cancelled more than once; freeing what it held must not be.
                detaching = asyncio.create_task(self._detach(attachment))
                self._detaching.add(detaching)
                detaching.add_done_callback(self._detaching.discard)
                await asyncio.shield(detaching)
        except Refused as refusal:
            logger.info("ended a stream from %s: %s", context.peer(), refusal.message)
            await context.abort(refusal.code, refusal.message)

    async def _hello(self, context: Any) -> step_pb2.Hello:
        """The first message of a stream, checked."""
        try:
            async with asyncio.timeout(self._terms.handshake_s):
                request = await receive(context)
        except TimeoutError as error:
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "no Hello in time") from error
        except Malformed as error:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        if request is None or request.WhichOneof("body") != "hello":
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "a stream begins with a Hello")
        hello = request.hello
        if not secrets.compare_digest(hello.token.encode(), self.token.encode()):
            logger.warning("refused a stream from %s: its token is not this replica's", context.peer())
            raise Refused(grpc.StatusCode.UNAUTHENTICATED, "the token is not this replica's")
        if hello.version != VERSION:
            message = f"the coordinator speaks version {hello.version} of the step protocol, the replica {VERSION}"
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, message)
        if not hello.coordinator:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a Hello without a coordinator")
        return hello

    async def _replace(self, coordinator: str, context: Any) -> Attachment:
        """The coordinator's attachment for a new stream, after the one it may have is detached."""
        while (older := self._attachments.get(coordinator)) is not None:
            older.end(grpc.StatusCode.ABORTED, "a newer stream of the same coordinator has replaced this one")
            await older.detached.wait()
        if self._is_stopping:
            raise Refused(grpc.StatusCode.UNAVAILABLE, "the replica stops")
        attachment = Attachment(coordinator, context, self._handler, self._terms, self.traffic)
        self._attachments[coordinator] = attachment
        return attachment

    async def _detach(self, attachment: Attachment) -> None:
        try:
            await attachment.detach()
        finally:
            del self._attachments[attachment.coordinator]
            attachment.detached.set()
