"""The draw follows the guided distribution exactly, whatever filters are set and whatever else is in the batch."""

import math
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from actors.guidance import Guidance, Sampling, merge
from actors.guidance.drawing import merge_and_draw
from actors.guidance.noise import noise

NUM_DRAWS = 20_000
CASES = {
    "plain": Sampling(),
    "cooler": Sampling(temperature=0.6),
    "hotter": Sampling(temperature=2.5),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.1),
    "all": Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
}


def draw(z_BV: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], samples: Sequence[int]) -> Tensor:
    """One token per row of guided logits, int64 [B]."""
    return torch.tensor(merge_and_draw(list(z_BV), [[]] * len(z_BV), samplings, positions, samples))


def guided_logits(vocabulary_size: int) -> Tensor:
    torch.manual_seed(3)
    base, guide, other = torch.randn(3, vocabulary_size) * 1.5
    return merge([base], [[Guidance(0.8, guide), Guidance(-0.5, other)]])[0]


def expected_probabilities(z: Tensor, sampling: Sampling) -> list[float]:
    """The filtered distribution, written with sorted lists instead of tensors."""
    shifted = [(value - max(z.tolist())) / sampling.temperature for value in z.tolist()]
    weights = {token: math.exp(value) for token, value in enumerate(shifted)}
    order = sorted(weights, key=lambda token: -weights[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if mass / total >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= sampling.min_p]
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(z))]


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
def test_draws_fit_the_exact_guided_distribution(sampling: Sampling) -> None:
    z = guided_logits(16)
    tokens = draw(z.expand(NUM_DRAWS, -1), [sampling] * NUM_DRAWS, range(NUM_DRAWS), [0] * NUM_DRAWS)
    counts = torch.bincount(tokens, minlength=16).tolist()
    expected = expected_probabilities(z, sampling)
    assert [count for count, p in zip(counts, expected, strict=True) if p == 0 and count] == []
    possible = [(count, p * NUM_DRAWS) for count, p in zip(counts, expected, strict=True) if p > 0]
    assert len(possible) > 1
    assert chisquare(*zip(*possible, strict=True)).pvalue > 1e-3


@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_leaving_out_hopeless_tokens_changes_no_draw(spread: float) -> None:
    torch.manual_seed(1)
    z = torch.randn(32, 1003) * spread
    scaled = z.double() - z.double().amax(-1, keepdim=True)
    everywhere = noise(torch.arange(251), torch.arange(32)[:, None], torch.tensor(0), torch.full((32, 1), 9)).flatten(
        1
    )[:, :1003]
    expected = (scaled + everywhere).argmax(-1)
    assert torch.equal(draw(z, [Sampling(seed=9)] * 32, range(32), [0] * 32), expected)


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    torch.manual_seed(2)
    z = torch.randn(len(CASES) + 1, 501) * 3
    samplings = [*CASES.values(), Sampling(temperature=0)]
    positions, samples = list(range(8)), [0, 1] * 4
    together = draw(z, samplings, positions, samples).tolist()
    alone = [draw(z[i : i + 1], [samplings[i]], [positions[i]], [samples[i]]).item() for i in range(8)]
    assert together == alone


def test_temperature_zero_is_greedy() -> None:
    z = guided_logits(50)
    assert draw(z[None], [Sampling(temperature=0, top_k=3, top_p=0.1)], [4], [0]).item() == z.argmax().item()


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    z = guided_logits(50)
    assert draw(z[None], [Sampling(temperature=1e-30, seed=5)], [4], [0]).item() == z.argmax().item()


TIED = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, -9.0])


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 4}),
        ({"top_k": 3}, {0, 1, 4}),
        ({"top_k": 4}, {0, 1, 2, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.4}, {1, 4}),
        ({"top_p": 0.7}, {0, 1, 4}),
        ({"top_k": 4, "top_p": 0.8}, {0, 1, 4}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1, 4}),
        # What is as probable as the best, is at least as probable.
        ({"min_p": 1.0}, {1, 4}),
        ({"min_p": 0.3}, {0, 1, 2, 3, 4}),
    ],
)
def test_of_tokens_that_tie_the_lower_ones_are_kept(filters: dict[str, float], kept: set[int]) -> None:
    tokens = draw(TIED.expand(900, -1), [Sampling(**filters)] * 900, range(900), [0] * 900)  # type: ignore[arg-type]
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "top_p": 0.5, "min_p": 1.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_filter_that_keeps_one_token_is_greedy_where_logits_tie(
    filters: dict[str, float], dtype: torch.dtype, temperature: float
) -> None:
    torch.manual_seed(3)
    rows = torch.randn(200, 999).to(dtype) * 0.5
    rows[:, 500:] = rows[:, :499].flip(-1)
    one = Sampling(temperature=temperature, seed=1, **filters)  # type: ignore[arg-type]
    assert torch.equal(
        draw(rows, [one] * 200, range(200), [0] * 200),
        draw(rows, [Sampling(temperature=0)] * 200, range(200), [0] * 200),
    )


def test_seeds_beyond_64_bits_count_by_their_low_64() -> None:
    z = guided_logits(500).expand(64, -1)
    big, small = ([Sampling(seed=seed)] * 64 for seed in (2**64 + 7, 7))
    assert torch.equal(draw(z, big, range(64), [0] * 64), draw(z, small, range(64), [0] * 64))


def test_another_seed_gives_other_draws() -> None:
    z = guided_logits(500).expand(64, -1)
    one, two = ([Sampling(seed=seed)] * 64 for seed in (7, -7))
    assert not torch.equal(draw(z, one, range(64), [0] * 64), draw(z, two, range(64), [0] * 64))
