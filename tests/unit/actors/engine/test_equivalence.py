"""Whatever order a caller works in, the engine's rows are the model's own logits for the same tokens.

Shapes: P positions, R asked rows, V vocabulary.
"""

import copy
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.engine import Engine, Work
from cluster.errors import EngineError
from tests import tiny

MAX_SEQUENCES = 4
MAX_CONTEXT = 40
NUM_OPERATIONS = 150
TOLERANCE = 1e-4


@dataclass
class Caller:
    """Does random things to an engine, and knows the tokens of every open sequence."""

    engine: Engine
    model: PreTrainedModel
    random: random.Random
    sequences: dict[str, list[int]] = field(default_factory=dict)
    history: list[list[int]] = field(default_factory=list)
    """What sequences held when they were closed or rolled back."""
    num_opened: int = 0
    num_rows_checked: int = 0
    num_refused: int = 0

    def tokens(self, at_most: int) -> list[int]:
        num_tokens = self.random.randint(1, at_most)
        return [self.random.randrange(self.engine.num_token_ids) for _ in range(num_tokens)]

    def open(self) -> None:
        if len(self.sequences) < MAX_SEQUENCES:
            self.num_opened += 1
            name = f"sequence {self.num_opened}"
            self.engine.open(name)
            self.sequences[name] = []

    def reuse(self) -> None:
        """Let a sequence go on as some other one did, as far as the cache knows it."""
        others = [*self.history, *self.sequences.values()]
        if not others or not self.sequences:
            return
        name, tokens = self.random.choice(list(self.sequences.items()))
        other = self.random.choice(others)
        if other[: len(tokens)] != tokens:
            self.truncate_to(name, 0)
        wanted = [*other[len(tokens) :], *self.tokens(3)][: MAX_CONTEXT - len(tokens)]
        tokens += wanted[: self.engine.reuse(name, wanted)]
        assert self.engine.length(name) == len(tokens)

    def close(self) -> None:
        if self.sequences:
            name = self.random.choice(list(self.sequences))
            self.engine.close(name)
            self.history.append(self.sequences.pop(name))

    def truncate(self) -> None:
        if self.sequences:
            name, tokens = self.random.choice(list(self.sequences.items()))
            self.truncate_to(name, self.random.randint(0, len(tokens)))

    def truncate_to(self, name: str, length: int) -> None:
        self.history.append(list(self.sequences[name]))
        self.engine.truncate(name, length)
        del self.sequences[name][length:]

    def step(self) -> None:
        names = self.random.sample(list(self.sequences), k=self.random.randint(0, len(self.sequences)))
        longest = self.random.choice([1, 1, 1, 4, 16])
        work = []
        for name in names:
            room = MAX_CONTEXT - len(self.sequences[name])
            if room:
                tokens = self.tokens(min(longest, room))
                rows = self.random.sample(range(len(tokens)), k=self.random.randint(0, len(tokens)))
                work.append(Work(name, tokens, rows))
        expected = [self.expected_rows(item) for item in work]
        try:
            rows_RV = self.engine.step(work)
        except EngineError:
            self.num_refused += 1
            return
        for item in work:
            self.sequences[item.sequence] += item.tokens
            assert self.engine.length(item.sequence) == len(self.sequences[item.sequence])
        expected_RV = torch.cat([torch.empty(0, self.engine.vocabulary_size), *expected])
        torch.testing.assert_close(rows_RV, expected_RV, atol=TOLERANCE, rtol=0)
        self.num_rows_checked += len(rows_RV)

    def expected_rows(self, item: Work) -> Tensor:
        length = len(self.sequences[item.sequence])
        logits_PV = logits(self.model, [*self.sequences[item.sequence], *item.tokens])
        return logits_PV[[length + row for row in item.rows]]


def logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Return what the model itself gives at each position, [P, V]."""
    with torch.inference_mode():
        rows: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return rows


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_rows_are_the_models_own_in_any_order_of_work(architecture: str) -> None:
    model = tiny.ARCHITECTURES[architecture](attn_implementation="eager")
    engine = Engine(
        copy.deepcopy(model), max_sequences=MAX_SEQUENCES, max_context=MAX_CONTEXT, cache_tokens=MAX_CONTEXT + 8
    )
    num_rows_checked = num_refused = 0
    for seed in range(4):
        caller = Caller(engine, model, random.Random(seed))
        operations = [caller.step] * 10 + [caller.open, caller.reuse] * 3
        operations += [caller.truncate, caller.close] * 2
        for _ in range(NUM_OPERATIONS):
            caller.random.choice(operations)()
        num_rows_checked += caller.num_rows_checked
        num_refused += caller.num_refused
        for name in caller.sequences:
            engine.close(name)
    assert num_rows_checked > 150
    assert num_refused > 0
    assert engine.counters.num_reused_tokens > 20


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_full_batch_of_one_token_each_at_different_lengths(architecture: str) -> None:
    model = tiny.ARCHITECTURES[architecture](attn_implementation="eager")
    engine = Engine(copy.deepcopy(model), max_sequences=6, max_context=MAX_CONTEXT)
    generator = random.Random(3)
    prompts = {
        f"sequence {i}": [generator.randrange(tiny.VOCABULARY_SIZE) for _ in range(num_tokens)]
        for i, num_tokens in enumerate([9, 12, 8, 39, 1, 2])
    }
    for name in prompts:
        engine.open(name)
    engine.step([Work(name, tokens, []) for name, tokens in prompts.items()])
    rows_RV = engine.step([Work(name, [5], [0]) for name in prompts])
    expected_RV = torch.stack([logits(model, [*tokens, 5])[-1] for tokens in prompts.values()])
    torch.testing.assert_close(rows_RV, expected_RV, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_sixteen_bit_models_give_their_own_logits_up_to_rounding(architecture: str, dtype: torch.dtype) -> None:
    exact = tiny.ARCHITECTURES[architecture](attn_implementation="eager")
    engine = Engine(copy.deepcopy(exact).to(dtype), max_sequences=2, max_context=MAX_CONTEXT)
    prompts = {"one": list(range(1, 21)), "two": list(range(30, 39))}
    for name in prompts:
        engine.open(name)
    engine.step([Work(name, tokens[:-3], []) for name, tokens in prompts.items()])
    rows_RV = engine.step([Work(name, tokens[-3:], [0, 1, 2]) for name, tokens in prompts.items()])
    expected_RV = torch.cat([logits(exact, tokens)[-3:] for tokens in prompts.values()])
    assert rows_RV.dtype == dtype
    assert (rows_RV.float() - expected_RV).abs().max() < 0.05 * expected_RV.abs().max()
