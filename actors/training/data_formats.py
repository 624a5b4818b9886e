"""The formats of a row: which columns make one, and what prompt and responses it holds.

A format is a line of a table. Knows rows as JSON objects; neither where they come from nor what is made of them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any, Literal

Messages = list[dict[str, str]]
"""A conversation: turns with `role` and `content`."""

Row = Mapping[str, Any]
RankedBy = Literal["helpful", "harmless"]

ROLES = ("system", "user", "assistant", "tool")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_IS_CUT = {"stop": False, "length": True}
_TYPE_NAMES = {str: "a text", list: "a list", dict: "an object", NoneType: "nothing"}


class UnusableRow(Exception):
    """What is wrong with one row. Whoever reads the file says where, or counts it."""

    def __init__(self, reason: str, detail: str, remedy: str = "mend it") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        """A few words, the same for all rows with this fault."""
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a model answered, or should have."""

    text: str
    is_cut: bool = False
    """Ended by a length limit, so that no end token follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a row holds."""

    prompt: str | Messages
    responses: list[Response]
    """Of a pair: the chosen one and then the rejected one, unless the format ranks them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Columns with their types, and how to read them."""

    description: str
    columns: Mapping[str, tuple[type, ...]]
    read: Callable[[Row], Answered]
    ranked_by: Mapping[RankedBy, str] = field(default_factory=dict)
    """By objective, the column that says which of two responses is the better one; none if their order does."""

    marked_by: re.Pattern[str] | None = None
    """What one or more of its texts hold; none if columns alone make the format."""

    def check(self, row: Row) -> None:
        """Raise UnusableRow if a column has a type that this format does not take."""
        for column, types in self.columns.items():
            value = row.get(column)
            if isinstance(value, types):
                continue
            wanted = f"it must be {' or '.join(_type_name(kind) for kind in types)}"
            if value is not None:
                raise UnusableRow(
                    f"{column} of a wrong type", f"it is {_type_name(type(value))}, {shorten(value)}; {wanted}"
                )
            if column == "prompt" and row.get("messages") is not None:
                raise UnusableRow("no prompt", "messages stand for a prompt only where the last is the user's")
            raise UnusableRow(f"no {column}", wanted)

    def num_mismatches(self, row: Row) -> int:
        """Return how many columns have a type that this format does not take."""
        return sum(not isinstance(row.get(column), types) for column, types in self.columns.items())

    def is_meant_by(self, row: Row) -> bool:
        """Whether all columns are there, and one or more of them hold what they should."""
        texts = [row[column] for column in self.columns if isinstance(row.get(column), str)]
        if self.marked_by is not None and not any(map(self.marked_by.search, texts)):
            return False
        names = {*row, "prompt"} if "messages" in row else row
        return all(column in names or NoneType in types for column, types in self.columns.items()) and any(
            row.get(column) is not None and isinstance(row[column], types) for column, types in self.columns.items()
        )


def with_prompt(row: Row) -> Row:
    """Return a row whose `messages`, where they are a question, are its prompt."""
    messages = row.get("messages")
    if row.get("prompt") is None and isinstance(messages, list) and messages:
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") == "user":
            return {**row, "prompt": messages}
    return row


def recognise(row: Row, formats: Sequence[Format]) -> Format:
    """Return the first format that a row fits.

    Raises:
        UnusableRow: there is none.
    """
    meant = [known for known in formats if known.is_meant_by(row)]
    if not meant:
        found = ", ".join(f"{column} ({_type_name(type(value))})" for column, value in row.items()) or "none"
        descriptions = "".join(f"\n  {known.description}" for known in formats)
        raise UnusableRow(
            "columns of no format", f"found {found}", f"name them as one of these formats does:{descriptions}"
        )
    nearest = min(meant, key=lambda known: known.num_mismatches(row))
    nearest.check(row)
    return nearest


def shorten(value: object) -> str:
    """Return a value as a message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _type_name(kind: type) -> str:
    return _TYPE_NAMES.get(kind, f"of type {kind.__name__}")


def _read_sides(row: Row) -> Answered:
    """`chosen` and `rejected` are replies to `prompt`, as texts or as one message each."""
    return _without_repetition(_prompt(row["prompt"]), [_reply(row, side) for side in ("chosen", "rejected")])


def _without_repetition(prompt: str | Messages, responses: list[Response]) -> Answered:
    """Responses that all begin with a text prompt are whole texts: what follows the prompt is the response."""
    for repeated in (prompt, prompt.strip()) if isinstance(prompt, str) else ():
        if all(response.text.startswith(repeated) for response in responses):
            rests = [response.text.removeprefix(repeated) for response in responses]
            if not all(map(str.strip, rests)):
                raise UnusableRow("empty response", f"a response is the prompt alone, {shorten(repeated)}")
            responses = [replace(response, text=rest) for response, rest in zip(responses, rests, strict=True)]
            return Answered(prompt=repeated, responses=responses)
    return Answered(prompt=prompt, responses=responses)


def _read_conversations(row: Row) -> Answered:
    """`chosen` and `rejected` are conversations that share all but their last message."""
    return _diverging(row, _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected"))


def _read_transcripts(row: Row) -> Answered:
    """`chosen` and `rejected` are conversations as texts in which Human: and Assistant: begin the turns."""
    return _diverging(row, _transcript(row["chosen"], "chosen"), _transcript(row["rejected"], "rejected"))


def _transcript(text: str, column: str) -> Messages:
    _check_text(text, column)
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise UnusableRow(
            "no prompt",
            f"{column} is {shorten(text)}; without a prompt it must be a conversation, its turns after blank lines and "
            "begun with 'Human:' or 'Assistant:'",
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]


def _diverging(row: Row, first: Messages, second: Messages) -> Answered:
    chosen, rejected = _split(first, "chosen"), _split(second, "rejected")
    if chosen[0] != rejected[0]:
        raise UnusableRow(
            "prompts that differ", f"chosen goes on from {shorten(chosen[0])}, rejected from {shorten(rejected[0])}"
        )
    responses = [_response(row, "chosen", chosen[1]), _response(row, "rejected", rejected[1])]
    return Answered(prompt=_prompt(chosen[0]), responses=responses)


def _read_two_responses(row: Row) -> Answered:
    responses = [_response(row, column, row[column]) for column in ("response_0", "response_1")]
    return _without_repetition(_prompt(row["prompt"]), responses)


def _read_response(row: Row) -> Answered:
    return Answered(prompt=_prompt(row["prompt"]), responses=[_response(row, "", row["response"])])


def _read_answers(row: Row) -> Answered:
    """`answers` are objects with `text` and perhaps `finish_reason`."""
    responses = []
    for number, answer in enumerate(row["answers"]):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise UnusableRow("answers without a text", f"answers[{number}] is {shorten(answer)}")
        responses.append(_response(answer, "", answer["text"]))
    if not responses:
        raise UnusableRow("empty response", "answers is an empty list")
    return Answered(prompt=_prompt(row["prompt"]), responses=responses)


def _read_conversation(row: Row) -> Answered:
    prompt, reply = _split(_messages(row["messages"], "messages"), "messages")
    return Answered(prompt=_prompt(prompt), responses=[_response(row, "", reply)])


def _prompt(value: Any) -> str | Messages:
    if isinstance(value, str):
        _check_text(value, "prompt")
        if not value.strip():
            raise UnusableRow("empty prompt", f"prompt is {shorten(value)}")
        return value
    messages = _messages(value, "prompt")
    if not any(message["content"].strip() for message in messages):
        raise UnusableRow("empty prompt", f"the messages before the response are {shorten(messages)}")
    if messages[-1]["role"] == "assistant":
        raise UnusableRow("prompt that ends with an assistant message", shorten(messages[-1]["content"]))
    return messages


def _messages(value: list[Any], column: str) -> Messages:
    """The messages with role and content alone."""
    messages = []
    for number, message in enumerate(value):
        where = f"{column}[{number}]"
        content = _content(message.get("content"), where) if isinstance(message, dict) else None
        if content is None:
            raise UnusableRow("messages without a text", f"{where} is {shorten(message)}; it needs role and content")
        if message.get("role") not in ROLES:
            raise UnusableRow(
                "unknown role", f"{where} has role {shorten(message.get('role'))}, not one of {', '.join(ROLES)}"
            )
        _check_text(content, where)
        messages.append({"role": message["role"], "content": content})
    return messages


def _content(value: Any, where: str) -> str | None:
    """A message's text, in one piece or in parts; none if there is none."""
    if not isinstance(value, list) or not value:
        return value if isinstance(value, str) else None
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnusableRow("messages with more than text", f"{where} has the part {shorten(part)}")
    return "".join(part["text"] for part in value)


def _split(messages: Messages, column: str) -> tuple[Messages, str]:
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableRow("no assistant message at the end", f"{column} is {shorten(messages)}")
    return messages[:-1], messages[-1]["content"]


def _reply(row: Row, column: str) -> Response:
    value = row[column]
    if isinstance(value, list):
        before, value = _split(_messages(value, column), column)
        if before:
            raise UnusableRow(
                "more than a reply",
                f"{column} has {len(before) + 1} messages; beside a prompt of messages it holds the reply alone",
            )
    return _response(row, column, value)


def _response(row: Row, column: str, text: str) -> Response:
    """A response whose end is told by `<column>_finish_reason`, or by `finish_reason` if the column is ''."""
    name = column or "response"
    _check_text(text, name)
    if not text.strip():
        raise UnusableRow("empty response", f"{name} is {shorten(text)}")
    ended_by = f"{column}_finish_reason" if column else "finish_reason"
    finish_reason = row.get(ended_by)
    if finish_reason is None:
        return Response(text=text)
    if not isinstance(finish_reason, str) or finish_reason not in _IS_CUT:
        raise UnusableRow("unknown finish reason", f"{ended_by} is {shorten(finish_reason)}, not 'stop' or 'length'")
    return Response(text=text, is_cut=_IS_CUT[finish_reason])


def _check_text(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("text that is not Unicode", f"{column} holds half of a surrogate pair") from error


PAIR_FORMATS = (
    Format(
        description="prompt, chosen, rejected: texts; both responses may repeat the prompt",
        columns={"prompt": (str,), "chosen": (str,), "rejected": (str,)},
        read=_read_sides,
    ),
    Format(
        description="chosen, rejected: whole conversations as message lists",
        columns={"prompt": (str, NoneType), "chosen": (list,), "rejected": (list,)},
        read=_read_conversations,
    ),
    Format(
        description="chosen, rejected: whole conversations as texts, with Human: and Assistant: after blank lines",
        columns={"prompt": (NoneType,), "chosen": (str,), "rejected": (str,)},
        read=_read_transcripts,
        marked_by=_SPEAKER,
    ),
    Format(
        description="prompt or messages: a message list that ends with the question; chosen, rejected: the replies",
        columns={"prompt": (list,), "chosen": (str, list), "rejected": (str, list)},
        read=_read_sides,
    ),
    Format(
        description="prompt, response_0, response_1: texts; better_response_id, safer_response_id: 0 or 1",
        columns={"prompt": (str,), "response_0": (str,), "response_1": (str,)},
        read=_read_two_responses,
        ranked_by={"helpful": "better_response_id", "harmless": "safer_response_id"},
    ),
)
"""Rows with two responses, one of them better."""

TEXT_FORMATS = (
    *PAIR_FORMATS,
    Format(
        description="prompt or messages, answers: a list of objects with text and finish_reason",
        columns={"prompt": (str, list), "answers": (list,)},
        read=_read_answers,
    ),
    Format(
        description="prompt or messages, response: a text",
        columns={"prompt": (str, list), "response": (str,)},
        read=_read_response,
    ),
    Format(
        description="messages: a conversation that ends with the assistant's message",
        columns={"messages": (list,), "response": (NoneType,), "answers": (NoneType,)},
        read=_read_conversation,
    ),
)
"""Rows with responses, whatever their number and worth."""
