"""The typed settings of every application: what `args` and `user_config` in deploy.yaml may hold.

Unknown keys, wrong types and impossible values are errors that name the key. Nothing here loads a model.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)

from cluster.errors import InvalidConfiguration

CHECKOUT = Path(__file__).resolve().parent.parent
"""Where these sources lie: a checkout, or the folder that they are installed in."""


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the user's folder for what can be made again: `$XDG_CACHE_HOME/trimtab`, or `~/.cache/trimtab`."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


START = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else cache_folder(os.environ)
"""Where relative paths of models and keys start: at the checkout, and without one in the user's cache."""

NO_GUIDANCE = "base"
"""The profile that every service has: the base model alone. Also what the base is called beside guides, so that no
guide can have the name."""

DEFAULT_CACHE_TOKENS = 16_384
"""Of all sequences of a model together, where `max_context` is not more."""

MAX_WEIGHT = 1000.0
"""Largest weight of a guide, either way: far beyond any use, and far from float32's overflow."""

Weight = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
"""What a guide's logits are multiplied by before they are added to the base's."""


AUTO = "auto"
ProfileWeight = Annotated[
    Weight,
    WrapValidator(lambda weight, validate: AUTO if weight == AUTO else validate(weight)),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}, {"const": AUTO}]}),
]
"""Of a guide, or `auto` for what the guide's own calibration recommends."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Settings(BaseModel):
    """A frozen group of settings in which every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Resources(Settings):
    """What Ray sets aside for one replica, or for one rank of it."""

    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Custom Ray resources by name, for placing models on kinds of nodes."""

    accelerator_type: str | None = None
    """Only nodes whose GPUs Ray calls so: `H100`, `A100-80G`, `L4`, ..."""

    labels: dict[str, str] = {}
    """Only nodes with these labels of `ray start --labels`, in the words of Ray's label selectors: `{pool: guides}`,
    `{pool: "!base"}`, `{pool: "in(a, b)"}`."""

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        if not labels:
            return labels
        # Only here: what reads settings without labels need not import Ray.
        from ray.serve.schema import RayActorOptionsSchema

        try:
            RayActorOptionsSchema(label_selector=labels)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return labels

    @model_validator(mode="after")
    def _check_accelerator(self) -> "Resources":
        if self.accelerator_type is not None and not self.gpus:
            raise ValueError(
                f"accelerator_type {self.accelerator_type!r} places GPUs, of which it asks for none; set gpus"
            )
        return self


class Health(Settings):
    """How Serve finds replicas that hang: three checks in a row without an answer, and it starts another."""

    period_s: float = Field(default=2, gt=0)
    """From one check to the next."""

    timeout_s: float = Field(default=5, gt=0)
    """For an answer."""


DrainTime = Annotated[float, Field(ge=0)]
"""How long a replica that is to end (an update, fewer replicas, a shutdown) may go on with what it is doing."""


class BaseModelSettings(Settings):
    """`args` of the application `trimtab-base`."""

    model: str
    """A directory, relative to the checkout or absolute, or a model's hub id."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights and of the exchanged logits."""

    prompt_template: str | None = None
    """A Jinja chat template in place of the tokenizer's own; with it, a plain prompt is sent as one user message."""

    split_special_tokens: bool = True
    """Whether a special token that a message's text spells is read as the characters that it is, and not as the token.
    Those of the chat template, and of a plain prompt without a `prompt_template`, are tokens all the same."""

    max_sequences: int = Field(default=32, ge=1, le=4096)
    """Live sequences per replica; what comes beyond waits."""

    max_context: int = Field(default=2048, ge=2)
    """Tokens per sequence, prompt and output together."""

    cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the cache, which is allocated at start, holds of all sequences together; 16,384, or `max_context` if
    that is more. Where it runs short, the youngest wait and are computed again."""

    max_prompt_tokens_per_step: int = Field(default=256, ge=1)
    """Longer prompts are taken in chunks of this size beside the sequences that are decoding."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads for the model's operations. If absent, one for each core, and models on one node take turns on its
    cores; with a number, they compute at the same time."""

    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share a replica: processes that each hold a slice of the model. It must divide the model's attention
    heads and its key-value heads."""

    resources: Resources = Resources()
    """Of each rank: a replica with `tensor_parallel: n` takes n times as much."""

    health: Health = Health()

    step_timeout_s: float = Field(default=10, gt=0)
    """A replica whose forward pass takes longer is not healthy any more."""

    drain_s: DrainTime = 60
    """For the sequences on it; those that are left go on on another replica."""

    @field_validator("model")
    @classmethod
    def _locate(cls, model: str) -> str:
        return locate_model(model)

    @model_validator(mode="after")
    def _check_ranks(self) -> "BaseModelSettings":
        if self.tensor_parallel > 1:
            if self.resources.gpus not in (0, 1):
                raise ValueError(
                    f"resources.gpus: {self.resources.gpus:g}, but each of the {self.tensor_parallel} ranks takes one "
                    "GPU: set it to 1, or to 0 for processors"
                )
            if not any([self.resources.cpus, self.resources.gpus, *self.resources.custom.values()]):
                raise ValueError("resources: Ray cannot place ranks that take nothing; set cpus to 0.1 or more")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether it computes on cores that other models use too."""
        return self.threads is None and self.device == "cpu"

    @property
    def device(self) -> str:
        """Where the model runs."""
        return "cuda" if self.resources.gpus else "cpu"


class GuideSettings(BaseModelSettings):
    """`args` of an application `trimtab-guide-<name>`."""

    base: str
    """The base model that it steers, for the check of the vocabularies."""

    rows: Literal["logits", "hidden_states"] = "logits"
    """What it sends for each token: its logits, or its last hidden state, of which the coordinator makes the same
    logits. That is fewer bytes by vocabulary over hidden size, and the output layer's product runs in the coordinator,
    on the processor: for guides behind a slow network. Families that tests know only."""

    @field_validator("base")
    @classmethod
    def _locate_base(cls, model: str) -> str:
        return locate_model(model)


class ExchangeSettings(Settings):
    """How logits travel to the coordinator."""

    transport: Literal["auto", "shared_memory", "grpc"] = "auto"
    """auto takes shared memory wherever both ends prove that they see the same."""


class Limits(Settings):
    """How long things may take and how large they may be."""

    deadline_s: float = Field(default=600, gt=0)
    """From a request's arrival to its last token; a request's own `timeout` may be shorter."""

    step_timeout_s: float = Field(default=10, gt=0)
    """A replica that takes longer for one step is lost to its sequences; one that does not even answer a ping within
    that time is killed, so that Serve replaces it."""

    on_guide_loss: Literal["wait", "fail"] = "wait"
    """What a request does whose guide is lost or not there: wait for another replica, at most to its deadline, or fail
    at once. It never goes on without the guide."""

    drain_s: DrainTime = 60
    """For the answers that a coordinator or gateway is writing; those that are left go on at another one."""

    max_open_requests: int = Field(default=1000, ge=1)
    """Per coordinator and per gateway, those that wait for room included; what comes beyond is refused (HTTP 429)."""

    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Of a request over HTTP; what is longer is refused (413) before it is read to its end. With `max_open_requests` it
    bounds what requests take of a gateway's memory."""

    body_timeout_s: float = Field(default=30, gt=0)
    """Time that a client has to send a request's body (408)."""

    refusals_per_s: float = Field(default=25, ge=1)
    """How many a gateway gives, after a second's worth at once: others wait for their turn, up to a second. A refused
    request costs nearly as much processor time as a short answer; who sends them without end then takes less of it."""


class SecuritySettings(Settings):
    """Who may use the service over HTTP."""

    keys_file: str | None = None
    """The API keys, as `trimtab keys` keeps them: a path, relative to the checkout or absolute, that every
    gateway can read. In its place the variable TRIMTAB_KEYS may hold the file's text. With neither, nobody needs a key,
    and the service serves loopback addresses only."""

    allow_public_without_keys: bool = False
    """Serve addresses that others can reach though nobody needs a key."""


class HttpSettings(Settings):
    """What the HTTP API shows to browsers."""

    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = []
    """Origins whose pages may use the service from a browser, like `https://chat.example.org`; `*` for all. None unless
    they are named."""


class CoordinatorSettings(Settings):
    """`args` of the application `trimtab`."""

    exchange: ExchangeSettings = ExchangeSettings()
    limits: Limits = Limits()
    security: SecuritySettings = SecuritySettings()
    http: HttpSettings = HttpSettings()
    health: Health = Health()


class ProfileSampling(Settings):
    """What a profile's requests have where they do not say otherwise; absent fields keep their usual meaning."""

    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)

    def given(self) -> dict[str, float]:
        """Return the fields that are there."""
        return self.model_dump(exclude_none=True)


class Profile(Settings):
    """A named way of writing. Weights alone stand for a profile of nothing else."""

    weights: dict[str, ProfileWeight] = {}
    """By guide; `auto` is what the guide's own calibration recommends."""

    sampling: ProfileSampling = ProfileSampling()


def _whole_profile(profile: Any) -> Any:
    """Weights alone as a profile."""
    is_whole = isinstance(profile, dict) and any(isinstance(profile.get(name), dict) for name in Profile.model_fields)
    return profile if is_whole or not isinstance(profile, dict) else {"weights": profile}


class GuidanceSettings(Settings):
    """`user_config` of `Gateway` and `Coordinator`: what may change while they run."""

    guides: list[Name] = []
    profiles: dict[Name, Annotated[Profile, BeforeValidator(_whole_profile)]] = {}
    """Named weights by guide, or `{weights: ..., sampling: ...}`; a request picks one as its `model`."""

    @model_validator(mode="after")
    def _check_names(self) -> "GuidanceSettings":
        if NO_GUIDANCE in self.guides:
            raise ValueError(f"guides: {NO_GUIDANCE!r} always means the base model; give the guide another name")
        if NO_GUIDANCE in self.profiles:
            raise ValueError(f"profiles: {NO_GUIDANCE!r} always means no guidance; give the profile another name")
        for profile, settings in self.profiles.items():
            for guide in settings.weights:
                if guide not in self.guides:
                    raise ValueError(f"profiles.{profile}: there is no guide {guide!r}; guides are {self.guides}")
        return self


def locate_model(model: str) -> str:
    """Return the absolute path of a model directory, or the hub id as it is.

    A value counts as a path where it exists, or begins with /, ./, ../, ~ or models/; all else is a hub id.

    Raises:
        ValueError: a path where there is no directory with a config.json.
    """
    path = START / Path(model).expanduser()
    if path.exists() or model.startswith(("/", "./", "../", "~", "models/")):
        if not (path / "config.json").is_file():
            raise ValueError(f"no model at {path} (no config.json there); {_remedy(path)}")
        return str(path.resolve())
    return model


def _remedy(path: Path) -> str:
    """What to do about a directory that holds no model."""
    if (path / "adapter_config.json").is_file():
        return "it is an adapter: merge it into its base model with peft's merge_and_unload, and save the whole model"
    models = [config.parent.name for config in path.parent.glob("*/config.json")]
    if near := difflib.get_close_matches(path.name, models, n=1):
        return f"did you mean {path.with_name(near[0])}?"
    return "run `trimtab models`, or check the path" if path.parent == START / "models" else "check the path"


def parse_guidance(user_config: dict[str, Any]) -> GuidanceSettings:
    """Return the settings that Serve hands to a running replica.

    Raises:
        InvalidConfiguration: they cannot be used.
    """
    try:
        return GuidanceSettings.model_validate(user_config)
    except ValidationError as error:
        raise InvalidConfiguration(f"user_config: {error}") from error
