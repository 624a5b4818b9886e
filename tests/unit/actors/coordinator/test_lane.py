"""The loop: everyone who can run does, a late or lost replica holds up only its own, and the tokens are right."""

import asyncio
import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from actors.api import Piece, Resume, Scores, Scoring, Shaping
from actors.coordinator.echo import Echo
from actors.coordinator.lane import Lane, merge_and_draw
from actors.coordinator.plan import plan_step
from actors.coordinator.sequence import LiveSequence, Seat, Voice
from actors.coordinator.spelling import Spelling
from actors.coordinator.text import TextWriter
from actors.engine import Engine, RowKind
from actors.engine import Work as EngineWork
from actors.guidance import Guidance, Sampling, Spelled
from actors.guidance import reference as oracle
from actors.guidance.shaping import Shaper
from actors.settings import Limits
from cluster.errors import EngineError, ReplicaLost, TrimtabError
from cluster.exchange import Failure, Rows, Work
from tests import tiny
from tests.reference import Comparison

LIMITS = Limits()
BASE, KIND, TERSE = (tiny.talkative(tiny.llama(80, seed=seed)) for seed in range(3))


class LocalReplica:
    """A model in this process. Its rows live in one buffer that the next step overwrites, as slots are."""

    def __init__(self, model: Any, rows: RowKind = "logits") -> None:
        self.model = model
        self.engine = Engine(copy.deepcopy(model), max_sequences=16, max_context=120, rows=rows)
        self.buffer = torch.zeros(16, self.engine.row_width)
        self.is_buffer_taken = False
        self.called = asyncio.Event()
        self.gate, self.prompt_gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.prompt_gate.set()
        self.is_lost = False
        self.open: set[str] = set()
        self.to_preempt: set[str] = set()

    async def step(self, work: Sequence[Work], *, timeout_s: float, inline: bool = False) -> Rows:
        await asyncio.sleep(0)
        self.called.set()
        await self.gate.wait()
        if inline:
            await self.prompt_gate.wait()
        if self.is_lost:
            raise ReplicaLost("it is gone")
        failures = [Failure(item.sequence, "EngineError", "no") for item in work if item.sequence == "refused"]
        preempted = {item.sequence for item in work} & self.to_preempt
        self.to_preempt -= preempted
        failures += [Failure(key, "Preempted", "no room") for key in preempted]
        done = [item for item in work if item.sequence not in {"refused", *preempted}]
        for key in preempted:
            self.engine.truncate(key, 0)
        for item in done:
            if item.sequence not in self.open:
                self.engine.open(item.sequence)
                self.open.add(item.sequence)
            assert self.engine.length(item.sequence) == item.length
        rows = self.engine.step([EngineWork(item.sequence, item.tokens, item.rows) for item in done])
        if inline:
            return Rows(rows, tuple(work), tuple(failures), None)
        assert not self.is_buffer_taken
        self.is_buffer_taken = bool(len(rows))
        self.buffer[: len(rows)] = rows
        return Rows(self.buffer[: len(rows)], tuple(work), tuple(failures), self._release)

    def _release(self) -> None:
        self.buffer.fill_(torch.nan)
        self.is_buffer_taken = False


@pytest.fixture
def base() -> LocalReplica:
    return LocalReplica(BASE)


@pytest.fixture
def kind() -> LocalReplica:
    return LocalReplica(KIND)


def sequence(
    key: str,
    base: LocalReplica,
    guides: Sequence[tuple[LocalReplica, float]] = (),
    *,
    prompt: str = "hello",
    max_tokens: int = 12,
    shaping: Shaping | None = None,
    scoring: Scoring | None = None,
    echoes: bool = False,
    sample: int = 0,
    **sampling: Any,
) -> LiveSequence:
    fast = tiny.tokenizer(80)
    tokens = fast(prompt).input_ids
    voices = [Voice("base", 1.0, Seat(base, key), list(tokens))]
    voices += [
        Voice(f"guide {i}", weight, Seat(guide, key, guide.engine.output), list(tokens))
        for i, (guide, weight) in enumerate(guides)
    ]
    return LiveSequence(
        voices=voices,
        sampling=Sampling(**sampling),
        max_tokens=max_tokens,
        end_tokens={0},
        writer=TextWriter(fast.backend_tokenizer, tokens),
        shaper=None if shaping is None else Shaper(shaping, prompt=tokens, end_tokens={0}),
        scoring=scoring,
        sample=sample,
        echo=Echo(text=prompt, tokens=tokens, is_scored=scoring is not None) if echoes else None,
        spelling=Spelling(fast.backend_tokenizer),
    )


def key_of(live: LiveSequence) -> str:
    assert live.voices[0].seat is not None
    return live.voices[0].seat.key


async def read_all(live: LiveSequence) -> list[int]:
    tokens: list[int] = []
    while True:
        piece: Piece = await asyncio.wait_for(live.read(), 60)
        tokens += piece["token_ids"]
        if piece["finish_reason"] is not None:
            return tokens


def expected(live: LiveSequence, shaping: Shaping | None = None) -> oracle.ReferenceText:
    prompts = [voice.tokens[: len(voice.tokens) - len(live.output)] for voice in live.voices]
    voices = [
        oracle.Voice(model=voice.seat.replica.model, prompt=prompt, weight=voice.weight)  # type: ignore[union-attr]
        for voice, prompt in zip(live.voices, prompts, strict=True)
    ]
    return oracle.generate(
        voices[0],
        voices[1:],
        sampling=live.sampling,
        shaping=shaping,
        keeps_laws=live.scoring is not None,
        max_tokens=live.max_tokens,
        end_tokens=live.end_tokens,
        sample=live.sample,
    )


async def test_tokens_are_the_references_whatever_shares_the_lane(base: LocalReplica, kind: LocalReplica) -> None:
    terse = LocalReplica(TERSE)
    lane = Lane(LIMITS)
    sequences = [
        sequence("a", base, seed=1),
        sequence("b", base, [(kind, 1.0)], prompt="a prompt of several chunks", seed=2),
        sequence("c", base, [(kind, -0.5), (terse, 2.0)], temperature=0, max_tokens=20),
        sequence("d", base, [(terse, 0.3)], prompt="x", top_k=5, seed=4, max_tokens=1),
    ]
    for live in sequences:
        lane.add(live)
    comparison = Comparison()
    for live in sequences:
        comparison.add(key_of(live), await read_all(live), expected(live))
    comparison.finish()
    assert lane.num_sequences == 0


SHAPING = Shaping(
    repetition_penalty=1.2, frequency_penalty=0.6, presence_penalty=0.3, logit_bias={5: 2.0, 0: 9.0}, min_tokens=10
)


async def test_shaped_sequences_draw_the_references_tokens_beside_plain_ones(
    base: LocalReplica, kind: LocalReplica
) -> None:
    lane = Lane(LIMITS)
    sequences = [
        sequence("a", base, [(kind, 1.0)], seed=1, max_tokens=30, shaping=SHAPING),
        sequence("b", base, [(kind, 1.0)], seed=1, max_tokens=30),
        sequence("c", base, temperature=0, max_tokens=30, shaping=SHAPING),
    ]
    for live in sequences:
        lane.add(live)
    comparison = Comparison()
    for live, shaping in zip(sequences, (SHAPING, None, SHAPING), strict=True):
        comparison.add(key_of(live), await read_all(live), expected(live, shaping))
    comparison.finish()
    assert sequences[0].output != sequences[1].output
    assert len(sequences[2].output) > 10


async def test_a_shaped_sequence_goes_on_from_its_tokens_as_if_undisturbed(
    base: LocalReplica, kind: LocalReplica
) -> None:
    whole = sequence("whole", base, [(kind, 1.0)], seed=5, max_tokens=30, shaping=SHAPING)
    undisturbed = expected(whole, SHAPING).tokens
    for cut in (1, 9, 20):
        lane = Lane(LIMITS)
        live = sequence(f"from {cut}", base, [(kind, 1.0)], seed=5, max_tokens=30, shaping=SHAPING)
        live.resume(Resume(undisturbed[:cut], 0))
        lane.add(live)
        await read_all(live)
        assert live.output == undisturbed


async def read_scores(live: LiveSequence) -> list[Scores]:
    scores: list[Scores] = []
    while True:
        piece: Piece = await asyncio.wait_for(live.read(), 60)
        assert len(piece["scores"]) == len(piece["token_ids"])
        scores += piece["scores"]
        if piece["finish_reason"] is not None:
            return scores


def check_scores(live: LiveSequence, scores: Sequence[Scores], text: oracle.ReferenceText, first: int = 0) -> None:
    """Check that an answer, from its token `first` on, has the oracle's log probabilities."""
    assert live.output == text.tokens
    weights = [1.0, *(voice.weight for voice in live.voices[1:])]
    for token, place, (merged_V, *own) in zip(text.tokens[first:], scores, text.laws[first:], strict=True):
        assert place["drawn"]["token"] == token
        assert place["drawn"]["text"] == tiny.tokenizer(80).convert_ids_to_tokens(token)
        assert [score["token"] for score in place["top"]] == merged_V.topk(4).indices.tolist()
        for score in (place["drawn"], *place["top"]):
            assert score["logprob"] == pytest.approx(float(merged_V[score["token"]]), abs=1e-4)
            values = [score["voices"][voice.name] for voice in live.voices]
            assert values == pytest.approx([float(law[score["token"]]) for law in own], abs=1e-4)
            guided = sum(weight * value for weight, value in zip(weights, values, strict=True))
            assert guided - place["log_z"] == pytest.approx(score["logprob"], abs=1e-4)


SCORING = Scoring(num_top=4, has_details=True)


async def test_log_probabilities_are_the_references_before_any_shaping(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    sequences = [
        sequence("a", base, [(kind, 0.7)], seed=1, scoring=SCORING, temperature=2.0, top_k=9),
        sequence("b", base, [(kind, -0.7)], seed=1, scoring=SCORING, shaping=SHAPING, max_tokens=20),
        sequence("c", base, seed=2, scoring=SCORING),
    ]
    plain = sequence("d", base, [(kind, 0.7)], seed=1)
    for live in (*sequences, plain):
        lane.add(live)
    for live, shaping in zip(sequences, (None, SHAPING, None), strict=True):
        check_scores(live, await read_scores(live), expected(live, shaping))
    assert "scores" not in await plain.read()


async def test_log_probabilities_of_an_answer_that_goes_on_elsewhere(base: LocalReplica, kind: LocalReplica) -> None:
    whole = sequence("whole", base, [(kind, 1.0)], seed=5, scoring=SCORING)
    undisturbed = expected(whole)
    live = sequence("resumed", base, [(kind, 1.0)], seed=5, scoring=SCORING)
    live.resume(Resume(undisturbed.tokens[:5], 5))
    Lane(LIMITS).add(live)
    check_scores(live, await read_scores(live), undisturbed, first=5)


async def test_each_sample_has_noise_of_its_own(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    sequences = [sequence(f"sample {i}", base, [(kind, 1.0)], seed=3, sample=i) for i in range(4)]
    for live in sequences:
        lane.add(live)
    for live in sequences:
        assert await read_all(live) == expected(live).tokens
    assert len({tuple(live.output) for live in sequences}) == 4


@torch.inference_mode()
def check_prompt(live: LiveSequence, places: Sequence[Scores], prompt: Sequence[int]) -> None:
    """Check a prompt's log probabilities against all of its rows, from one pass of each model."""
    rows = [voice.seat.replica.model(torch.tensor([prompt])).logits[0] for voice in live.voices]  # type: ignore[union-attr]
    assert [place["drawn"]["token"] for place in places] == list(prompt)
    assert places[0]["drawn"]["logprob"] is None
    for i, place in enumerate(places[1:]):
        guidance = [Guidance(voice.weight, row[i]) for voice, row in zip(live.voices[1:], rows[1:], strict=True)]
        merged_V, *own = oracle.laws([row[i] for row in rows], guidance)
        token = prompt[i + 1]
        assert place["drawn"]["logprob"] == pytest.approx(float(merged_V[token]), abs=1e-4)
        assert list(place["drawn"]["voices"].values()) == pytest.approx([float(law[token]) for law in own], abs=1e-4)
        assert [score["token"] for score in place["top"]] == merged_V.topk(4).indices.tolist()


@pytest.mark.parametrize("prompt", ["a", "ab", "x" * 32, "it was a dark and stormy night, and the rain", "y" * 65])
@pytest.mark.parametrize("max_tokens", [0, 1, 9])
async def test_a_prompt_is_told_of_token_by_token(kind: LocalReplica, prompt: str, max_tokens: int) -> None:
    base, hidden, lane = LocalReplica(BASE), LocalReplica(TERSE, "hidden_states"), Lane(LIMITS)
    live = sequence(
        "told", base, [(kind, 0.7), (hidden, -0.4)], prompt=prompt, max_tokens=max_tokens, scoring=SCORING, echoes=True
    )
    other = sequence("other", base, [(kind, 1.0)], seed=2, max_tokens=20)
    lane.add(live)
    lane.add(other)
    first = await asyncio.wait_for(live.read(), 60)
    assert first["prompt_echo"]["text"] == prompt
    check_prompt(live, first["prompt_echo"]["scores"], tiny.tokenizer(80)(prompt).input_ids)
    while live.finish_reason is None:
        assert "prompt_echo" not in await asyncio.wait_for(live.read(), 60)
    assert live.finish_reason == "length"
    if max_tokens:
        assert live.output == expected(live).tokens
    assert await read_all(other) == expected(other).tokens


async def test_a_prompt_that_its_replica_gave_up_is_told_of_all_the_same(
    base: LocalReplica, kind: LocalReplica
) -> None:
    lane = Lane(LIMITS)
    prompt = "z" * 40 + "abcdefgh" * 5
    live = sequence("told", base, [(kind, 1.0)], prompt=prompt, max_tokens=3, scoring=SCORING, echoes=True)
    lane.add(live)
    await asyncio.wait_for(kind.called.wait(), 60)
    kind.to_preempt.add("told")
    first = await asyncio.wait_for(live.read(), 60)
    assert not kind.to_preempt
    check_prompt(live, first["prompt_echo"]["scores"], tiny.tokenizer(80)(prompt).input_ids)


async def test_an_echo_without_log_probabilities_costs_no_pass(base: LocalReplica) -> None:
    live = sequence("echo", base, prompt="hello", max_tokens=0, echoes=True)
    piece = await asyncio.wait_for(live.read(), 60)
    assert piece["prompt_echo"]["text"] == "hello"
    assert piece["prompt_echo"]["scores"] == []
    assert (piece["text"], piece["finish_reason"], piece["usage"]["prompt_tokens"]) == ("", "length", 5)
    assert not base.called.is_set()


async def test_guides_that_send_hidden_states_guide_as_others_do(base: LocalReplica, kind: LocalReplica) -> None:
    narrow = tiny.talkative(tiny.gemma2(60, seed=5, final_logit_softcapping=1.5))
    hidden, capped = LocalReplica(TERSE, "hidden_states"), LocalReplica(narrow, "hidden_states")
    lane = Lane(LIMITS)
    sequences = [
        sequence("a", base, [(hidden, 1.0)], seed=1),
        sequence("b", base, [(hidden, -0.5), (kind, 0.7), (capped, 1.3)], prompt="another", seed=2),
        sequence("c", base, [(capped, 2.0), (hidden, 0.4)], temperature=0, max_tokens=20),
        sequence("d", base, seed=4),
    ]
    # Rows of some come while others of the same sequences do not: they wait as hidden states.
    kind.gate.clear()
    for live in sequences:
        lane.add(live)
    comparison = Comparison()
    for live in (sequences[0], sequences[2], sequences[3]):
        comparison.add(key_of(live), await read_all(live), expected(live))
    assert sequences[1].output == []
    kind.gate.set()
    comparison.add("b", await read_all(sequences[1]), expected(sequences[1]))
    comparison.finish()


async def test_a_lane_that_was_idle_runs_again(base: LocalReplica) -> None:
    lane = Lane(LIMITS)
    for key in ("one", "two"):
        live = sequence(key, base, seed=7)
        lane.add(live)
        assert await read_all(live) == expected(live).tokens


async def test_a_prompt_that_takes_long_holds_up_nobody(base: LocalReplica) -> None:
    lane = Lane(LIMITS)
    running = sequence("running", base, max_tokens=60, seed=1)
    lane.add(running)
    await asyncio.wait_for(running.read(), 60)
    base.prompt_gate.clear()
    long = sequence("long", base, prompt="y" * 80, max_tokens=9, seed=2)
    lane.add(long)
    await read_all(running)
    assert running.output == expected(running).tokens
    assert long.output == []
    base.prompt_gate.set()
    assert await read_all(long) == expected(long).tokens


async def test_a_sequence_that_its_replica_gave_up_is_sent_again_and_goes_on(
    base: LocalReplica, kind: LocalReplica
) -> None:
    lane = Lane(LIMITS)
    live = sequence("given up", base, [(kind, 1.0)], max_tokens=40, seed=1)
    other = sequence("other", base, [(kind, 1.0)], max_tokens=40, seed=2)
    lane.add(live)
    lane.add(other)
    first = await asyncio.wait_for(live.read(), 60)
    kind.to_preempt.add("given up")
    assert first["token_ids"] + await read_all(live) == expected(live).tokens
    assert await read_all(other) == expected(other).tokens
    assert not kind.to_preempt


async def test_a_guide_that_hangs_holds_up_only_its_own(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    kind.gate.clear()
    guided = sequence("guided", base, [(kind, 1.0)], seed=1)
    free = sequence("free", base, max_tokens=40, seed=2)
    lane.add(guided)
    lane.add(free)
    assert await read_all(free) == expected(free).tokens
    assert guided.output == []
    kind.gate.set()
    assert await read_all(guided) == expected(guided).tokens


async def test_a_newcomer_runs_while_all_others_wait_for_a_hanging_guide(
    base: LocalReplica, kind: LocalReplica
) -> None:
    lane = Lane(LIMITS)
    kind.gate.clear()
    guided = sequence("guided", base, [(kind, 1.0)], seed=1)
    lane.add(guided)
    await asyncio.wait_for(kind.called.wait(), 60)
    free = sequence("free", base, seed=2)
    lane.add(free)
    assert await read_all(free) == expected(free).tokens
    kind.gate.set()
    await read_all(guided)


async def test_a_lost_guide_fails_its_own_after_what_was_written(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    guided = sequence("guided", base, [(kind, 1.0)], max_tokens=100, seed=1)
    free = sequence("free", base, max_tokens=40, seed=2)
    lane.add(guided)
    lane.add(free)
    first = await asyncio.wait_for(guided.read(), 60)
    undisturbed = expected(guided).tokens
    kind.is_lost = True
    with pytest.raises(ReplicaLost, match="guide 0 was lost while it was writing: it is gone"):
        await read_all(guided)
    assert first["token_ids"] == undisturbed[: len(first["token_ids"])]
    assert await read_all(free) == expected(free).tokens


async def test_what_comes_late_for_a_seat_that_was_left_is_dropped(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    # Were its rows taken, the tokens would be others.
    old = LocalReplica(TERSE)
    old.gate.clear()
    live, other = sequence("moves", base, [(old, 1.0)], seed=1), sequence("stays", base, [(old, 1.0)], seed=2)
    for waiting in (live, other):
        lane.add(waiting)
    await asyncio.wait_for(old.called.wait(), 60)
    voice = live.voices[1]
    voice.leave()
    kind.gate.clear()
    voice.seat = Seat(kind, "moved")
    lane.wake()
    await asyncio.wait_for(kind.called.wait(), 60)
    old.gate.set()
    assert await read_all(other) == expected(other).tokens
    assert voice.in_flight
    assert live.output == []
    kind.gate.set()
    assert await read_all(live) == expected(live).tokens


async def test_a_lane_that_its_sequences_have_left_holds_no_rows(base: LocalReplica, kind: LocalReplica) -> None:
    lane = Lane(LIMITS)
    live = sequence("leaves", base, [(kind, 1.0)], max_tokens=100, seed=1)
    lane.add(live)
    await asyncio.wait_for(live.read(), 60)
    kind.gate.clear()
    kind.called.clear()
    await asyncio.wait_for(kind.called.wait(), 60)
    for voice in live.voices:
        voice.leave()
    lane.release(live)
    kind.gate.set()
    other = sequence("other", base, [(kind, 1.0)], seed=2)
    lane.add(other)
    assert await read_all(other) == expected(other).tokens
    assert not base.is_buffer_taken
    assert not kind.is_buffer_taken


async def test_a_refused_sequence_fails_alone(base: LocalReplica) -> None:
    lane = Lane(LIMITS)
    refused, fine = sequence("refused", base), sequence("fine", base, seed=3)
    lane.add(refused)
    lane.add(fine)
    with pytest.raises(EngineError, match="base could not take a step: no"):
        await read_all(refused)
    assert await read_all(fine) == expected(fine).tokens


async def test_a_sequence_that_is_removed_is_written_no_further(base: LocalReplica) -> None:
    lane = Lane(LIMITS)
    live = sequence("gone", base, max_tokens=100)
    lane.add(live)
    await asyncio.wait_for(live.read(), 60)
    lane.remove(live)
    num_tokens = len(live.output)
    other = sequence("other", base, max_tokens=20, seed=2)
    lane.add(other)
    assert await read_all(other) == expected(other).tokens
    assert len(live.output) <= num_tokens + 1


async def test_a_defect_in_the_loop_fails_every_sequence(base: LocalReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("actors.coordinator.lane.merge_and_draw", fail)
    lane = Lane(LIMITS)
    sequences = [sequence(key, base) for key in "ab"]
    for live in sequences:
        lane.add(live)
    for live in sequences:
        with pytest.raises(Exception, match="a defect"):
            await read_all(live)


async def test_a_sequence_that_arrives_while_a_step_is_planned_is_not_forgotten(
    base: LocalReplica, kind: LocalReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(LIMITS)
    kind.gate.clear()
    guided = sequence("guided", base, [(kind, 1.0)], seed=1)
    free = sequence("free", base, seed=2)

    def plan_and_add(*args: Any) -> Any:
        messages = plan_step(*args)
        if not messages:
            asyncio.get_running_loop().call_soon(lane.add, free)
        return messages

    with monkeypatch.context() as patch:
        patch.setattr("actors.coordinator.lane.plan_step", plan_and_add)
        lane.add(guided)
        await asyncio.wait_for(free.read(), 60)
    assert await read_all(free)
    kind.gate.set()
    await read_all(guided)


async def test_logits_that_are_not_finite_fail_their_sequence_alone(
    base: LocalReplica, kind: LocalReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = kind.engine.step
    monkeypatch.setattr(kind.engine, "step", lambda work: step(work).index_fill(1, torch.tensor(7), torch.nan))
    lane = Lane(LIMITS)
    broken, fine = sequence("broken", base, [(kind, 1.0)]), sequence("fine", base, seed=3)
    lane.add(broken)
    lane.add(fine)
    with pytest.raises(EngineError, match="the merged logits of base, guide 0 are not finite"):
        await read_all(broken)
    assert broken.output == []
    assert await read_all(fine) == expected(fine).tokens


async def test_text_that_cannot_be_made_fails_its_sequence_alone(
    base: LocalReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane(LIMITS)
    broken, fine = sequence("broken", base), sequence("fine", base, seed=3)

    def fail(_: int) -> str:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(broken.writer, "append", fail)
    lane.add(broken)
    lane.add(fine)
    with pytest.raises(TrimtabError, match="a defect"):
        await read_all(broken)
    assert await read_all(fine) == expected(fine).tokens


async def test_tokens_past_a_stop_string_are_dropped(base: LocalReplica) -> None:
    live = sequence("a", base, max_tokens=100)
    live.writer = TextWriter(tiny.tokenizer(80).backend_tokenizer, [], ["b"])
    for token in tiny.tokenizer(80)("abc").input_ids:
        live.commit(token)
    live.write()
    piece = await live.read()
    assert (piece["text"], piece["finish_reason"], len(piece["token_ids"])) == ("a", "stop", 2)
    assert piece["usage"]["completion_tokens"] == 2


def test_a_voice_in_flight_or_with_nothing_to_send_is_not_planned() -> None:
    base, kind = LocalReplica(BASE), LocalReplica(KIND)
    live = sequence("a", base, [(kind, 1.0)], prompt="abc")
    live.voices[0].in_flight = True
    assert [message.replica for message in plan_step([live])] == [kind]
    live.voices[1].num_sent = 3
    assert plan_step([live]) == []


def test_decoding_sequences_share_a_message_and_prompts_have_their_own() -> None:
    base = LocalReplica(BASE)
    one, two, *decoding = (sequence(key, base, prompt="z" * 30) for key in "1234")
    for live in decoding:
        live.voices[0].num_sent = 30
        live.commit(5)
    messages = plan_step([one, decoding[0], two, decoding[1]])
    assert [([part.seat.key for part in message.parts], message.is_prompt) for message in messages] == [
        (["3", "4"], False),
        (["1"], True),
        (["2"], True),
    ]
    assert messages[0].parts[0].work() == Work("3", 30, [5], (0,))


@pytest.mark.parametrize("tokens", [range(50), [*range(0, 20), *range(25, 50)], [*range(3, 50)], [*range(0, 80, 7)]])
@pytest.mark.parametrize("weights", [(), (-0.7,), (1.0, -2.0), (0.5,)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"temperature": 4.0, "top_p": 0.99}, {"top_k": 70}])
def test_a_column_without_a_token_is_never_drawn(
    tokens: Sequence[int], weights: Sequence[float], sampling: dict[str, float]
) -> None:
    """Models have more columns than tokens, and what they say of the others was never trained."""
    generator = torch.Generator().manual_seed(len(tokens))
    live = []
    seat = Seat(LocalReplica(BASE), "a")
    for seed in range(60):
        voices = [Voice(str(i), weight, seat, [1]) for i, weight in enumerate((1.0, *weights))]
        for i, voice in enumerate(voices):
            # A guide may be narrower than the base, and likes as little as the base what no token stands for.
            voice.row = torch.randn(80 - 10 * i, generator=generator)
            untrained = torch.ones(len(voice.row), dtype=torch.bool)
            untrained[[token for token in tokens if token < len(untrained)]] = False
            voice.row[untrained] += 3.0 if voice.weight > 0 else -8.0
        live.append(
            LiveSequence(
                voices=voices,
                sampling=Sampling(seed=seed, **sampling),  # type: ignore[arg-type]
                max_tokens=1,
                end_tokens={0},
                writer=TextWriter(tiny.tokenizer(80).backend_tokenizer, []),
                spelled=Spelled(tokens),
            )
        )
    assert {drawn.token for drawn in merge_and_draw(live)} <= set(tokens)
    for sequence in live:
        sequence.spelled = None
    assert not {drawn.token for drawn in merge_and_draw(live)} <= set(tokens)


def test_tokens_draw_the_same_noise_beside_columns_without_one() -> None:
    """A padded model draws what the same model without padding draws."""
    rows = torch.randn(40, 80, generator=torch.Generator().manual_seed(0))
    seat = Seat(LocalReplica(BASE), "a")
    drawn = []
    for width, spelled in ((50, None), (80, Spelled(range(50)))):
        live = [
            LiveSequence(
                voices=[Voice("base", 1.0, seat, [1], row=row[:width])],
                sampling=Sampling(seed=seed, top_p=0.9),
                max_tokens=1,
                end_tokens={0},
                writer=TextWriter(tiny.tokenizer(80).backend_tokenizer, []),
                spelled=spelled,
            )
            for seed, row in enumerate(rows)
        ]
        drawn.append(merge_and_draw(live))
    assert drawn[0] == drawn[1]
