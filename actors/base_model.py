"""The base model's actor: one frozen base per replica."""

from collections.abc import AsyncGenerator

from actors.leases import BaseDescription, Lease, LeaseRequest, Refusal
from actors.model_server import ModelServer
from actors.settings import BaseModelSettings
from actors.vocabularies import end_tokens, load_tokenizer


class BaseModel:
    """A Serve deployment that leases room on a frozen base model."""

    def __init__(self, settings: BaseModelSettings) -> None:
        tokenizer = load_tokenizer(settings.model)
        self._server = ModelServer.load(settings, tokenizer)
        self._server.description = BaseDescription(
            tokenizer=tokenizer.backend_tokenizer.to_str(),
            end_tokens=end_tokens(settings.model, tokenizer),
        )

    async def lease(self, request: LeaseRequest) -> AsyncGenerator[Lease | Refusal, None]:
        """Hold room for a sequence; see `ModelServer.lease`."""
        async for item in self._server.lease(request):
            yield item

    async def check_health(self) -> None:
        """Raise if steps are no longer run, so that Serve replaces the replica."""
        self._server.check_health()

    async def __del__(self) -> None:
        await self._server.stop()
