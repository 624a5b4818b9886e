"""What a coordinator and a model replica say to each other when a sequence starts, through Ray Serve."""

from collections.abc import Sequence
from dataclasses import dataclass

from ray.types import ObjectRef

from actors.guidance.lm_head import OutputFunction
from actors.prompts import Prompt
from cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDescription:
    """What a coordinator must know of the base to write text with it."""

    tokenizer: str
    """The fast tokenizer, as its own JSON."""

    end_tokens: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """A coordinator asks a replica to take a sequence."""

    coordinator: str
    """The id that the coordinator's stream will carry."""

    sequence: str
    """The sequence's name in step messages."""

    prompt: Prompt
    known_bases: frozenset[str]
    """Fingerprints of the bases whose description the coordinator has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The replica holds room for the sequence until the coordinator gives it back or its stream breaks."""

    replica: str
    """The replica's id within its deployment."""

    address: str
    """Of its data plane, host:port."""

    token: str
    """What the coordinator's stream must show."""

    fingerprint: str
    """Of the model; equal fingerprints compute the same."""

    prompt_tokens: Sequence[int]
    max_context: int
    base_vocabulary: str
    """Digest of the base's tokens; a guide's must be that of the base that it steers."""

    description: BaseDescription | None = None
    """From a base that the coordinator does not know yet."""

    recommended_weight: float | None = None
    """What a guide's calibration says; none if it has none."""

    output: "ObjectRef[OutputFunction] | None" = None
    """Where rows are hidden states: what turns them into logits, in Ray's object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The replica cannot take this prompt."""

    error: InvalidRequest
