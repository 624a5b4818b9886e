"""A guide's actor: one autoregressive reward model per replica."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from ray import serve

from actors.calibration import FILE, read_calibration
from actors.guidance import check_vocabulary
from actors.leases import Lease, LeaseRequest, Refusal
from actors.names import guide_of
from actors.replica.server import ModelServer
from actors.settings import GuideSettings
from actors.vocabularies import load_tokenizer, read_vocabulary
from cluster.errors import InvalidConfiguration


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
            guide_name=guide_of(serve.get_replica_context().app_name),
        )
        self._server = ModelServer.load(settings, tokenizer, base_vocabulary=base_vocabulary.digest, rows=settings.rows)
        self._server.recommended_weight = _recommended_weight(settings.model)

    async def recommended_weight(self) -> float | None:
        """Return the weight that the guide's calibration recommends; none if it was never calibrated."""
        return self._server.recommended_weight

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


def _recommended_weight(model: str) -> float | None:
    try:
        calibration = read_calibration(Path(model))
    except ValueError as error:
        raise InvalidConfiguration(
            f"{Path(model) / FILE} cannot be read: {error}; make it anew with `trimtab calibrate`"
        ) from error
    return None if calibration is None else calibration.weight
