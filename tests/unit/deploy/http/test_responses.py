"""Events of a stream: each of them is one line to every reader, and says exactly what was written."""

import io
import json
from collections.abc import AsyncGenerator

import pytest

from actors.api import Piece
from cluster.errors import ReplicaLost
from deploy.http.openai_answer import Answer
from deploy.http.openai_schema import ChatCompletionRequest, CompletionRequest, StreamOptions
from deploy.http.responses import stream_events
from deploy.http.several import Batch
from deploy.jobs.batch.lines import to_json

BREAKS = ["\x85", "\u2028", "\u2029", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
REQUESTS: list[CompletionRequest | ChatCompletionRequest] = [
    CompletionRequest.model_validate({"model": "m", "prompt": "hi"}),
    ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
]


def piece(text: str, *, is_last: bool) -> Piece:
    return {
        "text": text,
        "token_ids": [1],
        "finish_reason": "stop" if is_last else None,
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "seed": 0,
    }


async def events(request: CompletionRequest | ChatCompletionRequest, texts: list[str], error: str = "") -> str:
    async def rest() -> AsyncGenerator[Batch, None]:
        for text in texts[1:]:
            yield [(0, piece(text, is_last=text is texts[-1] and not error))]
        if error:
            raise ReplicaLost(error)

    first: Batch = [(0, piece(texts[0], is_last=False))]
    return "".join([part async for part in stream_events(Answer(request), first, rest())])


@pytest.mark.parametrize("request_", REQUESTS, ids=["completion", "chat"])
@pytest.mark.parametrize("character", BREAKS, ids=ascii)
async def test_no_character_of_an_answer_ends_an_events_line(
    request_: CompletionRequest | ChatCompletionRequest, character: str
) -> None:
    texts = [f"a{character}", character, f"é{character * 2}漢", "z"]
    sent = await events(request_, texts)
    lines = [line for line in sent.splitlines() if line]
    assert lines == [line for line in io.BytesIO(sent.encode()).read().decode().split("\n") if line]
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in choices) == "".join(
        texts
    )
    assert "é" in sent
    assert "漢" in sent


@pytest.mark.parametrize("character", BREAKS, ids=ascii)
async def test_nor_one_of_an_error(character: str) -> None:
    sent = await events(REQUESTS[0], ["a"], error=f"lost{character}it")
    *_, last = [line for line in sent.splitlines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == f"lost{character}it"


@pytest.mark.parametrize("character", BREAKS, ids=ascii)
def test_nor_one_of_a_line_of_results(character: str) -> None:
    value = {"text": f"a{character}b", character: 1}
    line = to_json(value).decode()
    assert line.splitlines() == [line]
    assert json.loads(line) == value


async def test_a_stream_that_waits_shows_that_it_is_alive() -> None:
    async def rest() -> AsyncGenerator[Batch, None]:
        yield []
        yield [(0, piece("a", is_last=True))]

    sent = [part async for part in stream_events(Answer(REQUESTS[0]), [], rest())]
    assert sent[:2] == [": waiting\n\n"] * 2
    assert sent[2].startswith("data: {")
    assert sent[2].endswith("data: [DONE]\n\n")


async def test_every_chunk_may_say_how_many_tokens_there_are() -> None:
    async def rest() -> AsyncGenerator[Batch, None]:
        yield [(0, piece("b", is_last=True))]

    options = StreamOptions(continuous_usage_stats=True, include_usage=True)
    events = stream_events(Answer(REQUESTS[0]), [(0, piece("a", is_last=False))], rest(), options=options)
    chunks = [json.loads(line[6:]) for part in [e async for e in events] for line in part.split("\n\n") if "{" in line]
    assert [chunk["usage"]["total_tokens"] for chunk in chunks] == [2, 2, 2]
    assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 0]
