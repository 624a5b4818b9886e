"""A base model whose steps take as long as one likes and hardly any processor time, as a Serve application."""

import time
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve import Application

from actors.names import BASE_MODEL
from actors.replica.base import BaseModel
from actors.settings import BaseModelSettings
from deploy.applications import model_options


class PacedSettings(BaseModelSettings):
    """`args` of the application."""

    step_ms: float = Field(ge=0)
    """What a forward pass waits before it begins."""


class PacedModel(BaseModel):
    """A base with a pause in every forward pass."""

    def __init__(self, settings: PacedSettings) -> None:
        super().__init__(settings)
        engine = self._server.engine
        step = engine.step

        def paced(*args: Any, **kwargs: Any) -> Any:
            time.sleep(settings.step_ms / 1e3)
            return step(*args, **kwargs)

        engine.step = paced  # type: ignore[method-assign]


def base(args: PacedSettings) -> Application:
    """`trimtab-base`, paced."""
    return serve.deployment(PacedModel, name=BASE_MODEL, **model_options(args)).bind(args)
