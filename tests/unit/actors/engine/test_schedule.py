"""Whatever does not fit into one pass is done in several, with the same rows, and nothing fails for lack of room."""

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from actors.engine import Engine, Schedule, Task, gather_rows
from cluster.errors import EngineError, Preempted
from tests import tiny

MODEL = tiny.llama()
MAX_CONTEXT = 96


def schedule(*, max_prompt_tokens: int = 16, cache_tokens: int | None = None, max_sequences: int = 16) -> Schedule:
    engine = Engine(
        copy.deepcopy(MODEL), max_sequences=max_sequences, max_context=MAX_CONTEXT, cache_tokens=cache_tokens
    )
    return Schedule(engine, max_prompt_tokens=max_prompt_tokens)


def prompt(sequence: str, tokens: Sequence[int]) -> Task:
    return Task(sequence, 0, tokens, [len(tokens) - 1])


def expected(tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        row: Tensor = MODEL(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    return row


def assert_row(some: Schedule, task: Task, tokens: Sequence[int]) -> None:
    torch.testing.assert_close(gather_rows([task], some._engine)[0], expected(tokens), atol=1e-4, rtol=0)


def random_tokens(num_tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(tiny.VOCABULARY_SIZE) for _ in range(num_tokens)]


def run_all(some: Schedule) -> list[Task]:
    done = []
    while some.has_tasks:
        done += some.run()
    return done


def test_a_long_prompt_takes_several_passes_and_decoding_goes_on_in_each() -> None:
    some = schedule()
    engine = some._engine
    text = random_tokens(5, seed=1)
    some.open("decoding")
    some.add(prompt("decoding", text))
    some.run()
    some.open("long")
    long = prompt("long", random_tokens(60, seed=2))
    some.add(long)
    num_passes, done = 0, list[Task]()
    while long not in done:
        task = Task("decoding", len(text), [7], [0])
        text.append(7)
        some.add(task)
        before = engine.counters.num_computed_tokens
        done = some.run()
        assert task in done
        assert engine.counters.num_computed_tokens - before <= 16 + 1
        assert_row(some, task, text)
        num_passes += 1
    assert num_passes == 4
    assert_row(some, long, long.tokens)


def test_a_common_beginning_is_computed_once_for_all_that_come_together() -> None:
    some = schedule(max_prompt_tokens=32)
    shared = random_tokens(50, seed=1)
    tasks = [prompt(f"s{i}", [*shared, i, *random_tokens(5, seed=10 + i)]) for i in range(12)]
    for task in tasks:
        some.open(task.sequence)
        some.add(task)
    assert {task.sequence for task in run_all(some)} == {task.sequence for task in tasks}
    counters = some._engine.counters
    assert counters.num_computed_tokens == 50 + 12 * 6
    assert counters.num_reused_tokens == 11 * 50
    for task in tasks:
        assert_row(some, task, task.tokens)


def test_the_same_prompt_again_costs_one_token() -> None:
    some = schedule(max_prompt_tokens=64)
    tokens = random_tokens(40, seed=1)
    for key in ("one", "two"):
        some.open(key)
        task = prompt(key, tokens)
        some.add(task)
        run_all(some)
        assert_row(some, task, tokens)
        some.close(key)
    assert some._engine.counters.num_computed_tokens == 41


def test_rows_within_a_prompt_are_computed_though_the_cache_holds_their_tokens() -> None:
    some = schedule(max_prompt_tokens=64)
    tokens = random_tokens(20, seed=1)
    some.open("one")
    some.add(prompt("one", tokens))
    run_all(some)
    some.open("two")
    task = Task("two", 0, tokens, [12, 19, 12])
    some.add(task)
    run_all(some)
    rows_RV = gather_rows([task], some._engine)
    for row, position in zip(rows_RV, [12, 19, 12], strict=True):
        torch.testing.assert_close(row, expected(tokens[: position + 1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_more_sequences_than_the_cache_holds_all_end_with_their_own_rows(seed: int) -> None:
    generator = random.Random(seed)
    some = schedule(max_prompt_tokens=24, cache_tokens=128, max_sequences=8)
    texts = {f"s{i}": random_tokens(generator.randint(10, 30), seed=100 * seed + i) for i in range(8)}
    wanted = dict.fromkeys(texts, 30)
    num_preempted = 0
    for key in texts:
        some.open(key)
        some.add(prompt(key, texts[key]))
    for _ in range(3000):
        if not some.has_tasks:
            break
        for task in some.run():
            key = task.sequence
            if task.is_preempted:
                num_preempted += 1
            else:
                assert_row(some, task, texts[key])
                wanted[key] -= 1
                if wanted[key] == 0:
                    some.close(key)
                    continue
                texts[key] = [*texts[key], generator.randrange(tiny.VOCABULARY_SIZE)]
            try:
                next_task = (
                    prompt(key, texts[key])
                    if task.is_preempted
                    else Task(key, len(texts[key]) - 1, texts[key][-1:], [0])
                )
                some.add(next_task)
            except Preempted:
                some.add(prompt(key, texts[key]))
    assert set(wanted.values()) == {0}
    assert some.num_preemptions > 0
    assert num_preempted > 0


def test_a_prompt_that_was_preempted_half_read_waits_and_is_read_again() -> None:
    some = schedule(max_prompt_tokens=16, cache_tokens=96)
    old = random_tokens(16, seed=1)
    some.open("old")
    some.add(prompt("old", old))
    run_all(some)
    some.open("young")
    young = prompt("young", random_tokens(80, seed=2))
    some.add(young)
    some.run()
    some.run()
    for _ in range(60):
        old.append(5)
        task = Task("old", len(old) - 1, [5], [0])
        some.add(task)
        assert task in some.run()
        assert_row(some, task, old)
    assert not young.is_preempted
    some.close("old")
    assert run_all(some) == [young]
    assert_row(some, young, young.tokens)


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    some = schedule()
    with pytest.raises(EngineError, match="'x' is not open"):
        some.add(prompt("x", [1]))
    some.open("x")
    with pytest.raises(Preempted, match="holds 0 tokens, not 3"):
        some.add(Task("x", 3, [1], [0]))
    with pytest.raises(EngineError, match="token id 1000"):
        some.add(prompt("x", [1000]))
    with pytest.raises(EngineError, match="past the limit of 96"):
        some.add(prompt("x", [1] * 97))
    task = prompt("x", [1, 2])
    some.add(task)
    with pytest.raises(EngineError, match="has a step under way"):
        some.add(prompt("x", [1]))
    assert run_all(some) == [task]
    assert_row(some, task, [1, 2])


def test_a_sequence_can_be_closed_while_it_waits() -> None:
    some = schedule()
    for key in ("gone", "stays"):
        some.open(key)
        some.add(prompt(key, random_tokens(40, seed=3)))
    some.run()
    some.close("gone")
    (task,) = run_all(some)
    assert task.sequence == "stays"
    assert not some.is_open("gone")


def test_rows_of_one_pass_lie_together() -> None:
    some = schedule()
    tasks = [prompt(key, [i + 1]) for i, key in enumerate("abc")]
    for task in tasks:
        some.open(task.sequence)
    for task in reversed(tasks):
        some.add(task)
    some.run()
    together = gather_rows(tasks[::-1], some._engine)
    assert together.data_ptr() == tasks[2].found[0].rows_RW.data_ptr()
    torch.testing.assert_close(gather_rows(tasks, some._engine), together.flip(0))
