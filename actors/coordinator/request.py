"""A request for text: the fields that HTTP and Python callers share, and what they may hold."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from actors.api import Format, Sampling, Scoring, Shaping
from actors.coordinator.fields import Fields, Integer, impossible, without_nulls
from actors.coordinator.formats import ResponseFormat, StructuredOutputs
from actors.prompts import Message, Prompt
from actors.settings import AUTO, NO_GUIDANCE, GuidanceSettings, ProfileWeight
from cluster.errors import InvalidRequest, UnknownModel

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 1024
MAX_BIASES = 4096
MAX_LOGPROBS = 20
MAX_ANSWERS = 128
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


Weights = Annotated[dict[str, ProfileWeight], BeforeValidator(without_nulls)]
"""By guide."""


def _by_token(biases: Any) -> Any:
    """Biases by token, whose keys in JSON are texts."""
    if not isinstance(biases, dict):
        return biases
    return {
        int(token) if isinstance(token, str) and TOKEN_ID.fullmatch(token) else token: bias
        for token, bias in without_nulls(biases).items()
    }


LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_by_token),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]
"""What is added to a token's logit, by its id."""

Nothing = Annotated[
    None, BeforeValidator(lambda value: None if value in ([], {}, "") else value), WithJsonSchema({"enum": [None, []]})
]
"""A part of a message that may be there, but only empty."""

Text = Annotated[str, Field(max_length=4_000_000)]
"""More than any context holds. Half a surrogate pair, which has no tokens, is no text either."""

TEXT: TypeAdapter[str] = TypeAdapter(Text)
TOKENS: TypeAdapter[list[int]] = TypeAdapter(list[Annotated[Integer, Field(ge=0)]])


def _text_or_tokens(prompt: Any, _: Any) -> Any:
    kind: TypeAdapter[Any] = TOKENS if isinstance(prompt, list) else TEXT
    return kind.validate_python(prompt, strict=True)


TextOrTokens = Annotated[
    str | list[int],
    WrapValidator(_text_or_tokens),
    WithJsonSchema({"anyOf": [TEXT.json_schema(), TOKENS.json_schema()]}),
]
"""A prompt: a text, or its ids in the base's tokens."""

StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]
"""One text or several."""


class TextPart(Fields):
    """A part of a message's content; only text is taken."""

    type: Literal["text"]
    text: Text


class ChatMessage(Fields):
    """One turn of a conversation, as OpenAI's API has it."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[
        list[TextPart],
        BeforeValidator(lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text),
    ]
    """A text, or parts of one."""

    name: Annotated[str, Field(max_length=1000)] | None = None
    """Of who speaks; what becomes of it is the chat template's affair."""

    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None

    def plain(self) -> Message:
        """Return the turn with its text in one piece."""
        message = Message(role=self.role, content="".join(part.text for part in self.content))
        return message if self.name is None else {**message, "name": self.name}


class TextOptions(Fields):
    """How an answer is written: the fields that HTTP and Python callers share."""

    max_tokens: Integer | None = Field(default=None, ge=0)
    """At most so many tokens; up to the context limit if absent. 0 only goes with `echo`."""

    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: Integer = Field(default=0, ge=-1)
    """0 and -1 keep all tokens."""

    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: Integer | None = None
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from a token's merged logit for each time that the output holds it."""

    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken once from those that the output holds."""

    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """For tokens that prompt or output hold: divides the base's logit if that is positive, and else multiplies it."""

    logit_bias: LogitBias = Field(default={})
    """Added to the merged logits, by token id of the base."""

    stop: StopStrings = Field(default=[])
    """Texts that end the answer; they are not part of it."""

    stop_token_ids: list[Annotated[Integer, Field(ge=0)]] = Field(default=[], max_length=MAX_STOP_TOKENS)
    """Tokens that end the answer, as those do that the base ends with."""

    include_stop_str_in_output: bool = False
    """Whether the text or token that ends the answer is part of its text."""

    min_tokens: Integer = Field(default=0, ge=0)
    """Length of the answer before which nothing ends it."""

    ignore_eos: bool = False
    """Whether the tokens that the base ends with are tokens like any other."""

    skip_special_tokens: bool = True
    """Whether special tokens are no text."""

    response_format: ResponseFormat | None = None
    """OpenAI's way to ask for JSON."""

    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to ask for JSON, or for what a pattern, a list or a grammar allows."""

    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds from the request's arrival to its last token, at most `limits.deadline_s`, which holds if absent."""


class GenerationRequest(TextOptions):
    """What a caller may ask for. Fields that are absent take the field's usual meaning."""

    prompt: TextOrTokens | None = None
    messages: list[ChatMessage] | None = None
    model: str = NO_GUIDANCE
    """A profile: a named set of weights."""

    weights: Weights | None = None
    """Weights by guide, in place of the profile's; `auto` is what the guide's own calibration recommends."""

    logprobs: Integer | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Tells each token's log probability under the guided distribution, and those of so many most probable tokens."""

    details: bool = False
    """Whether `logprobs` tells each model's own too."""

    echo: bool = False
    """Whether the answer begins with the prompt, and with `logprobs` tells those of its tokens."""

    sample: int = Field(default=0, ge=0, lt=MAX_ANSWERS)
    """Which of several answers to the same request this is: each draws with noise of its own."""

    @model_validator(mode="after")
    def _need_one_prompt(self) -> "GenerationRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationRequest":
        if self.details and self.logprobs is None:
            raise impossible("guidance.details only goes with logprobs", "details")
        if self.max_tokens == 0 and not self.echo:
            raise impossible("max_tokens: 0 tokens are no answer; ask for at least 1, or for echo", "max_tokens")
        if self.echo and self.prompt is None:
            raise impossible("echo goes with a prompt, not with messages; leave it out", "echo")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise impossible(f"min_tokens: {self.min_tokens} is more than max_tokens, {self.max_tokens}", "min_tokens")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A request with every choice made."""

    prompt: Prompt
    weights: Mapping[str, float | None]
    """Of the guides in use, none of them 0, in the order in which they are summed; None is what the guide itself
    recommends."""

    sampling: Sampling
    shaping: Shaping
    scoring: Scoring | None
    form: Format | None
    sample: int
    echoes: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    includes_stop: bool
    ignores_eos: bool
    shows_special: bool
    timeout_s: float


def choose_seed() -> int:
    """Return a seed for a request without one."""
    # 53 bits: readers of JSON with double-precision numbers keep them all.
    return secrets.randbits(53)


def parse_request(guidance: GuidanceSettings, fields: Mapping[str, Any], deadline_s: float) -> Generation:
    """Return what is to be generated, within `deadline_s` at most. A field that is None counts as absent.

    What is absent is the profile's, if its `sampling` has it.

    Raises:
        UnknownModel: no such profile.
        InvalidRequest: a field is unknown, of the wrong type or impossible; `field` names it.
    """
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        request = GenerationRequest.model_validate({**_defaults(guidance, given.get("model")), **given})
    except ValidationError as error:
        raise invalid_request(error.errors()[0]) from error
    if request.timeout is not None and request.timeout > deadline_s:
        raise InvalidRequest(f"timeout: {request.timeout:g} s is more than the limit, {deadline_s:g} s", "timeout")
    messages = None if request.messages is None else [message.plain() for message in request.messages]
    return Generation(
        prompt=Prompt(
            text=request.prompt if isinstance(request.prompt, str) else None,
            tokens=request.prompt if isinstance(request.prompt, list) else None,
            messages=messages,
        ),
        weights=_choose_weights(guidance, request),
        sampling=Sampling(
            temperature=request.temperature,
            top_k=max(0, request.top_k),
            top_p=request.top_p,
            min_p=request.min_p,
            seed=choose_seed() if request.seed is None else request.seed,
        ),
        shaping=Shaping(
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=request.logit_bias,
            min_tokens=request.min_tokens,
        ),
        scoring=None if request.logprobs is None else Scoring(num_top=request.logprobs, has_details=request.details),
        form=_form(request),
        sample=request.sample,
        echoes=request.echo,
        max_tokens=request.max_tokens,
        stop=tuple(request.stop),
        stop_tokens=frozenset(request.stop_token_ids),
        includes_stop=request.include_stop_str_in_output,
        ignores_eos=request.ignore_eos,
        shows_special=not request.skip_special_tokens,
        timeout_s=deadline_s if request.timeout is None else request.timeout,
    )


def _form(request: GenerationRequest) -> Format | None:
    """The form that the answer must have, if any."""
    form = None if request.response_format is None else request.response_format.format()
    if request.structured_outputs is not None:
        if form is not None:
            raise InvalidRequest("give response_format or structured_outputs, not both", "structured_outputs")
        form = request.structured_outputs.format()
    for field, is_given in {"min_tokens": request.min_tokens > 0, "ignore_eos": request.ignore_eos}.items():
        if form is not None and is_given:
            raise InvalidRequest(
                f"{field} does not go with a form of the answer, which says where it ends; leave it out", field
            )
    return form


def _defaults(guidance: GuidanceSettings, model: Any) -> Mapping[str, float]:
    """What the profile says of sampling; nothing where the model is no profile, which is refused later."""
    profile = guidance.profiles.get(model) if isinstance(model, str) else None
    return {} if profile is None else profile.sampling.given()


def check_model(guidance: GuidanceSettings, model: str) -> None:
    """Raise `UnknownModel` if a name is neither a profile's nor the base's."""
    if model != NO_GUIDANCE and model not in guidance.profiles:
        known = ", ".join([NO_GUIDANCE, *sorted(guidance.profiles)])
        raise UnknownModel(f"there is no model {model!r}; models are: {known}", "model")


def _choose_weights(guidance: GuidanceSettings, request: GenerationRequest) -> dict[str, float | None]:
    check_model(guidance, request.model)
    weights: Mapping[str, Any] = {}
    if request.weights is not None:
        weights = request.weights
    elif request.model in guidance.profiles:
        weights = guidance.profiles[request.model].weights
    unknown = sorted(set(weights) - set(guidance.guides))
    if unknown:
        known = ", ".join(sorted(guidance.guides)) or "none"
        raise InvalidRequest(f"there is no guide {unknown[0]!r}; guides are: {known}", "weights")
    return {
        name: None if weights[name] == AUTO else float(weights[name]) for name in sorted(weights) if weights[name] != 0
    }


def invalid_request(complaint: Mapping[str, Any]) -> InvalidRequest:
    """Return one of pydantic's complaints as an error that names the field and its value."""
    # A key may be the empty text.
    field = ".".join(str(part) for part in complaint["loc"]) or ('""' if complaint["loc"] else None)
    if complaint["type"] in ("extra_forbidden", "none_required"):
        return InvalidRequest(f"{field} is not supported; leave it out", field)
    if complaint["type"] == "impossible":
        return InvalidRequest(complaint["msg"], complaint["ctx"]["field"])
    if complaint["type"] == "missing":
        return InvalidRequest(f"{field or 'the body'} is missing", field)
    if complaint["type"] == "value_error":
        message = str(complaint["ctx"]["error"])
        return InvalidRequest(f"{field}: {message}" if field else message, field)
    value = repr(complaint["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return InvalidRequest(f"{field or 'the body'}: {complaint['msg']}, not {shown}", field)
