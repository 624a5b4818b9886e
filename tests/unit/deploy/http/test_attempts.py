"""What was received of an answer, and what comes after it, make up the answer: each token and character once."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from actors.api import Piece, Resume
from actors.coordinator.sequence import LiveSequence, Voice
from actors.coordinator.text import TextWriter
from actors.guidance import Sampling
from cluster.errors import AnswerLost, Overloaded, ReplicaLost
from deploy.http.attempts import Attempts
from tests import tiny
from tests.unit.actors.coordinator.test_text import BYTES

END = 0
CHARACTERS = tiny.tokenizer().backend_tokenizer


def sequence(tokenizer: Tokenizer, stop: Sequence[str], *, max_tokens: int, end: int = END) -> LiveSequence:
    return LiveSequence(
        voices=[Voice("base", 1.0, None, [1, 2]), Voice("kind", 1.0, None, [3])],
        sampling=Sampling(seed=1),
        max_tokens=max_tokens,
        end_tokens={end},
        writer=TextWriter(tokenizer, [], stop),
    )


async def write(live: LiveSequence, tokens: Sequence[int]) -> list[Piece]:
    """What a reader gets while these tokens are drawn one by one."""
    pieces = []
    for token in tokens:
        if live.finish_reason is not None:
            break
        live.commit(token)
        live.write()
        if live._text or live.finish_reason is not None:
            pieces.append(await live.read())
    return pieces


async def check_every_cut(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str], end: int = END) -> None:
    whole = sequence(tokenizer, stop, max_tokens=len(tokens), end=end)
    pieces = await write(whole, tokens)
    for cut in range(len(pieces)):
        attempts = Attempts({"prompt": "x"})
        attempts.take(pieces[:cut])
        resume = attempts.resume()
        live = sequence(tokenizer, stop, max_tokens=len(tokens), end=end)
        had: Sequence[int] = ()
        if resume is not None:
            live.resume(resume)
            had = resume.token_ids
        assert live.is_live
        assert live.voices[1].tokens == [3, *had]
        assert live.voices[0].num_pending == 2 + len(had)
        rest = await write(live, tokens[len(had) :])
        texts = ["".join(piece["text"] for piece in part) for part in (pieces, pieces[:cut], rest)]
        assert texts[0] == texts[1] + texts[2]
        assert [*had, *(token for piece in rest for token in piece["token_ids"])] == whole.output
        assert rest[-1]["finish_reason"] == pieces[-1]["finish_reason"]
        assert rest[-1]["usage"] == pieces[-1]["usage"]


@given(st.text(min_size=1, max_size=20))
async def test_characters_of_several_bytes(text: str) -> None:
    await check_every_cut(BYTES, BYTES.encode(text).ids, [], end=-1)


@given(st.text("abcé", min_size=1, max_size=20), st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3))
async def test_stop_strings(text: str, stop: list[str]) -> None:
    await check_every_cut(BYTES, BYTES.encode(text).ids, stop, end=-1)


@given(st.text("abc", min_size=1, max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
async def test_end_tokens(text: str, stop: list[str]) -> None:
    await check_every_cut(CHARACTERS, [*CHARACTERS.encode(text).ids, END], stop)


async def test_an_answer_that_was_all_there_ends_again() -> None:
    tokens = CHARACTERS.encode("abc").ids
    live = sequence(CHARACTERS, [], max_tokens=3)
    live.resume(Resume(tokens, 3))
    piece = await live.read()
    assert (piece["text"], piece["token_ids"], piece["finish_reason"]) == ("", [], "length")
    assert piece["usage"]["completion_tokens"] == 3


async def test_text_that_these_tokens_do_not_give_is_refused() -> None:
    live = sequence(CHARACTERS, [], max_tokens=9)
    with pytest.raises(ReplicaLost, match="base was changed by an update while it was writing: send the request again"):
        live.resume(Resume(CHARACTERS.encode("abc").ids, 4))


def test_every_attempt_has_the_same_seed_and_says_what_time_is_left() -> None:
    attempts = Attempts({"prompt": "x", "timeout": 50.0}, deadline_s=600)
    first, second = attempts.fields(), attempts.fields()
    assert first["seed"] == second["seed"] is not None
    assert first["timeout"] == 50.0
    assert 0 < second["timeout"] < 50.0
    assert Attempts({"prompt": "x", "seed": 7}).fields()["seed"] == 7
    untimed = Attempts({"prompt": "x"})
    assert "timeout" not in untimed.fields()
    assert "timeout" not in untimed.fields()


def test_attempts_end_with_the_requests_time() -> None:
    lost = AnswerLost("gone")
    attempts = Attempts({"prompt": "x"}, deadline_s=600)
    pauses = [attempts.pause_s(lost) for _ in range(8)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0
    with pytest.raises(AnswerLost, match="gone"):
        Attempts({"prompt": "x", "timeout": 0.01}).pause_s(lost)


def test_only_what_was_let_in_before_waits_for_room() -> None:
    attempts = Attempts({"prompt": "x"})
    with pytest.raises(Overloaded):
        attempts.pause_s(Overloaded("full"))
    attempts.pause_s(AnswerLost("gone"))
    assert attempts.pause_s(Overloaded("full")) > 0
