"""Each compiled part agrees with the plain tensor code that it stands for."""

import math

import numpy as np
import pytest
import torch

from actors.guidance import Guidance, Sampling, merge
from actors.guidance.filters import exponentials, filter_floor, kth_largest
from actors.guidance.kernels import NOTHING, Floats, add_guide, find_best
from actors.guidance.sampling import keep_likely, scale


@pytest.mark.parametrize("num_tokens", [1, 7, 1003, 4096])
@pytest.mark.parametrize("guide_tokens", [1, 5, 900, 5000])
def test_guides_are_added_to_the_bit_as_torch_adds_them(num_tokens: int, guide_tokens: int) -> None:
    torch.manual_seed(num_tokens + guide_tokens)
    base, *guides = torch.randn(num_tokens), *torch.randn(3, guide_tokens) * 5
    guides[1][::7] = -torch.inf
    weights = [0.7, -1 / 3, 2.1]
    z_V = base.numpy().copy()
    for weight, guide in zip(weights, guides, strict=True):
        add_guide(z_V, guide.numpy(), weight)
    merged = merge([base], [[Guidance(weight, guide) for weight, guide in zip(weights, guides, strict=True)]])
    assert z_V.tobytes() == merged.numpy().tobytes()


def filter_cases() -> list[Sampling]:
    return [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.2, 1.0, 4.0)
        for top_k in (0, 1, 3, 60, 900, 2000)
        for top_p in (1.0, 0.999999, 0.9, 0.3, 1e-9)
        for min_p in (0.0, 0.01, 1.0)
    ]


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 15.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 6, 1003])
def test_the_floor_and_its_end_keep_what_the_sorting_filters_keep(spread: float, num_tokens: int) -> None:
    torch.manual_seed(int(spread * 10) + num_tokens)
    rows = torch.randn(4, num_tokens) * spread
    rows[1] = rows[1].round()
    rows[2, 1::3] = -torch.inf
    for sampling in filter_cases():
        scores = scale(rows, [sampling] * 4)
        kept = keep_likely(scores.clone(), [sampling] * 4)
        for z, scores_V, kept_V in zip(rows.numpy(), scores, kept, strict=True):
            maxima, best_block = find_best(z)
            floor, end = filter_floor(
                z,
                maxima,
                float(maxima[best_block]),
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                sampling.min_p,
            )
            dropped = (scores_V < floor) | ((scores_V == floor) & (torch.arange(num_tokens) >= end))
            assert torch.equal(scores_V.masked_fill(dropped, -torch.inf), kept_V), sampling


def finite_floats() -> Floats:
    """Floats of every size and sign, both zeros among them, and -inf."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    floats = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, -np.inf, 1e-45, -1e-45], dtype=np.float32)])
    return np.ascontiguousarray(floats[np.isfinite(floats) | (floats == -np.inf)])


@pytest.mark.parametrize("k", [1, 2, 3, 300, 501, 502, 800, 1500, -1])
def test_the_kth_largest_is_that_of_a_sort(k: int) -> None:
    floats = finite_floats()
    rank = k % len(floats)
    maxima, best_block = find_best(floats)
    least = kth_largest(floats, maxima, float(maxima[best_block]), 1.0, rank)
    assert least == np.sort(floats)[::-1][rank - 1]


def test_the_best_block_is_the_first_of_those_that_tie() -> None:
    z = np.array([0, 1, 2, 3, 9, 0, 0, 0, 0, 0, 9], dtype=np.float32)
    maxima, best_block = find_best(z)
    assert (maxima.tolist(), best_block) == ([3, 9, 9], 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(10))
def test_one_value_that_is_not_finite_leaves_no_best(value: float, place: int) -> None:
    z = np.zeros(10, dtype=np.float32)
    z[place] = value
    assert find_best(z)[1] == NOTHING


@pytest.mark.parametrize("num_scores", [1, 7, 256])
def test_exponentials_are_exact_to_fourteen_digits(num_scores: int) -> None:
    scores = -np.geomspace(1e-20, 690, num_scores)
    powers = np.empty(num_scores)
    exponentials(scores, powers)
    np.testing.assert_allclose(powers, np.exp(scores), rtol=1e-13)
    exponentials(np.array([0.0, -0.0, -1e9, -np.inf]), powers := np.empty(4))
    assert powers[:2].tolist() == [1, 1]
    assert (powers[2:] < 1e-300).all()
