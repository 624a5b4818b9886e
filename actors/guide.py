"""A guide's actor: one autoregressive reward model per replica."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from actors.guidance import check_vocabulary
from actors.leases import Lease, LeaseRequest, Refusal
from actors.model_server import ModelServer
from actors.settings import GuideSettings
from actors.vocabularies import load_tokenizer, read_vocabulary


class Guide:
    """A Serve deployment that leases room on a guide.

    Raises:
        InvalidConfiguration: at start, before any weight is loaded, when its vocabulary does not fit the base's; after
            that, when its model cannot be run, or not with such rows.
    """

    def __init__(self, settings: GuideSettings) -> None:
        tokenizer = load_tokenizer(settings.model)
        base_vocabulary = read_vocabulary(settings.base, load_tokenizer(settings.base))
        check_vocabulary(
            base_vocabulary,
            read_vocabulary(settings.model, tokenizer),
            guide_name=serve.get_replica_context().app_name.removeprefix("trimtab-guide-"),
        )
        self._server = ModelServer.load(settings, tokenizer, base_vocabulary=base_vocabulary.digest, rows=settings.rows)

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[Lease | Refusal, None]:
        """Hold room for a sequence; see `ModelServer.lease`."""
        async with aclosing(self._server.lease(request)) as items:
            async for item in items:
                yield item

    async def check_health(self) -> None:
        """Raise if steps are no longer run, so that Serve replaces the replica."""
        self._server.report()
        self._server.check_health()

    async def __del__(self) -> None:
        await self._server.stop()
