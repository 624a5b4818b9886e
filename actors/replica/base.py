"""The base model's actor: one frozen base per replica."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from actors.leases import BaseDescription, Lease, LeaseRequest, Refusal
from actors.replica.server import ModelServer
from actors.settings import BaseModelSettings
from actors.vocabularies import load_tokenizer, read_vocabulary


class BaseModel:
    """A Serve deployment that leases room on a frozen base model."""

    def __init__(self, settings: BaseModelSettings) -> None:
        tokenizer = load_tokenizer(settings.model)
        vocabulary = read_vocabulary(settings.model, tokenizer)
        self._server = ModelServer.load(settings, tokenizer, base_vocabulary=vocabulary.digest)
        self._server.description = BaseDescription(
            tokenizer=tokenizer.backend_tokenizer.to_str(), end_tokens=vocabulary.end_tokens
        )

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[Lease | Refusal, None]:
        """Hold room for a sequence; see `ModelServer.lease`."""
        async with aclosing(self._server.lease(request)) as items:
            async for item in items:
                yield item

    async def max_context(self) -> int:
        """Return how many tokens a sequence may have, prompt and answer together."""
        return self._server.engine.max_context

    async def check_health(self) -> None:
        """Raise if steps are no longer run, so that Serve replaces the replica."""
        self._server.report()
        self._server.check_health()

    async def __del__(self) -> None:
        await self._server.stop()
