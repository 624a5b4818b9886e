"""Penalties, biases and a least length: the step draws the oracle's tokens, and those are right."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.api import Sampling, Shaping
from actors.guidance import Guidance, merge
from actors.guidance.drawing import merge_and_draw
from actors.guidance.reference import Voice, generate, noisy_scores, penalize_repetition, shape
from actors.guidance.shaping import Shaper
from tests import tiny

PROMPT = [5, 9, 30, 2]
NUM_TOKENS = 60
ENDS = {0, 7, 99}

SHAPINGS = st.builds(
    Shaping,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.5]),
    presence_penalty=st.sampled_from([0.0, 1.1, -0.2]),
    logit_bias=st.dictionaries(st.integers(0, NUM_TOKENS - 1), st.floats(-100, 100), max_size=5),
    min_tokens=st.integers(0, 8),
)


@settings(max_examples=200, deadline=None)
@given(
    shaping=SHAPINGS,
    prompt=st.lists(st.integers(0, 70), min_size=1, max_size=20),
    output=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=12),
    weights=st.lists(st.sampled_from([1.0, -0.6]), max_size=2),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_shaped_rows_draw_the_oracles_tokens(
    shaping: Shaping, prompt: list[int], output: list[int], weights: list[float], temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = 3 * torch.randn(NUM_TOKENS, generator=generator)
    guides = [Guidance(weight, torch.randn(NUM_TOKENS, generator=generator)) for weight in weights]
    sampling = Sampling(temperature=temperature, seed=seed)
    seen = [token for token in (*prompt, *output) if token < NUM_TOKENS]
    z_1V = merge([penalize_repetition(row, shaping, seen)], [guides])
    z_1V = shape(z_1V, shaping, output, [token for token in ENDS if token < NUM_TOKENS])
    expected = int(noisy_scores(z_1V, sampling, len(output), 0).argmax())
    shaper = Shaper(shaping, prompt=prompt, end_tokens=ENDS)
    for token in output:
        shaper.append(token)
    before = row.clone()
    plain = int(noisy_scores(merge([row], [guides]), sampling, len(output), 0).argmax())
    tokens = merge_and_draw([row, row], [guides, guides], [sampling] * 2, [len(output)] * 2, [0, 0], [shaper, None])
    assert tokens == [expected, plain]
    assert torch.equal(row, before)


def write(shaping: Shaping | None = None, **options: Any) -> Sequence[int]:
    base, guide = tiny.llama(), tiny.llama(seed=1)
    sampling = Sampling(temperature=options.pop("temperature", 1.0), seed=3)
    voices = Voice(model=base, prompt=PROMPT), [Voice(model=guide, prompt=PROMPT, weight=0.5)]
    return generate(*voices, sampling=sampling, shaping=shaping, max_tokens=30, **options).tokens


def test_the_presence_penalty_makes_greedy_text_less_repetitive() -> None:
    plain, penalized = write(temperature=0), write(Shaping(presence_penalty=2.0, frequency_penalty=2.0), temperature=0)
    assert len(set(penalized)) > len(set(plain))
    repeated = write(Shaping(frequency_penalty=-2.0, presence_penalty=-2.0), temperature=0)
    assert len(set(repeated)) <= len(set(plain))


def test_a_bias_forbids_and_forces() -> None:
    favourite = max(set(write()), key=list(write()).count)
    assert favourite not in write(Shaping(logit_bias={favourite: -100}))
    assert set(write(Shaping(logit_bias={favourite: 100}))) == {favourite}


def test_no_end_comes_before_the_least_length() -> None:
    ends = set(write()[:5])
    assert len(write(end_tokens=ends)) == 1
    assert len(write(Shaping(min_tokens=12), end_tokens=ends)) > 12


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    model = tiny.llama()
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, repetition_penalty=penalty, eos_token_id=None
    )
    shaping = Shaping(repetition_penalty=penalty)
    voice = Voice(model=model, prompt=PROMPT)
    ours = generate(voice, sampling=Sampling(temperature=0), shaping=shaping, max_tokens=20)
    assert ours.tokens == theirs[0, len(PROMPT) :].tolist()
