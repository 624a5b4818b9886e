"""The compiled step draws the oracle's tokens: those of noise over the whole vocabulary and a full sort."""

import importlib.util
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.guidance import Guidance, Sampling, merge
from actors.guidance.drawing import merge_and_draw
from actors.guidance.noise import noise
from actors.guidance.reference import noisy_scores
from actors.jit import compiled

TEMPERATURES = [0, 1e-3, 0.3, 1.0, 2.0, 5.0]
FILTERS = {
    "none": {},
    "top_k": {"top_k": 40},
    "top_k beyond a quarter": {"top_k": 400},
    "top_p": {"top_p": 0.9},
    "top_p, nearly all": {"top_p": 0.99999},
    "min_p": {"min_p": 0.02},
    "all": {"top_k": 90, "top_p": 0.7, "min_p": 0.005},
}


def expected(
    base: Tensor, guides: Sequence[Guidance], sampling: Sampling, position: int = 0, sample: int = 0
) -> int | None:
    """The oracle's token."""
    z_1V = merge([base], [guides])
    if not z_1V.amax().isfinite():
        return None
    return int(noisy_scores(z_1V, sampling, position, sample).argmax())


def drawn(
    base: Tensor, guides: Sequence[Guidance], sampling: Sampling, position: int = 0, sample: int = 0
) -> int | None:
    """The compiled step's token."""
    return merge_and_draw([base], [guides], [sampling], [position], [sample])[0]


def rows(shape: str, num_rows: int, num_tokens: int) -> Tensor:
    """Logits [num_rows, num_tokens] of a kind that models give, or might."""
    normal = torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(len(shape) + num_tokens))
    if shape == "flat":
        return normal * 0.3
    if shape == "peaked":
        return normal * 12
    if shape == "tied":
        return normal.round()
    if shape == "holes":
        return (normal * 3).masked_fill(normal.roll(1) > 0.5, -torch.inf)
    return normal * 3


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("shape", ["flat", "usual", "peaked", "tied", "holes"])
def test_tokens_are_the_oracles(shape: str, filters: dict[str, float]) -> None:
    base, guide, other = rows(shape, 8, 1203), rows("usual", 8, 1300), rows("holes", 8, 1101)
    for temperature in TEMPERATURES:
        for i in range(8):
            sampling = Sampling(temperature=temperature, seed=i * 2**61 - 5, **filters)  # type: ignore[arg-type]
            guides = [Guidance(0.7, guide[i]), Guidance(-0.4, other[i])][: i % 3]
            assert drawn(base[i], guides, sampling, i, i % 2) == expected(base[i], guides, sampling, i, i % 2)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_tokens_are_the_oracles_at_the_size_of_a_model(filters: dict[str, float]) -> None:
    base, guide = rows("usual", 6, 49_152), rows("flat", 6, 49_152)
    sampling = Sampling(seed=3, **filters)  # type: ignore[arg-type]
    guidance = [[Guidance(1.5, row)] for row in guide]
    tokens = merge_and_draw(list(base), guidance, [sampling] * 6, range(6), [0] * 6)
    assert tokens == [expected(base[i], guidance[i], sampling, i) for i in range(6)]


LOGITS = st.one_of(st.integers(-3000, 3000).map(lambda n: n / 100), st.sampled_from([0.0, 1.0, -1.0, -math.inf]))
ROWS = st.lists(LOGITS, min_size=1, max_size=70).map(torch.tensor)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(1e-6, 5)),
    top_k=st.integers(0, 80),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    seed=st.integers(-(2**70), 2**70),
)


@settings(max_examples=300, deadline=None)
@given(
    base=ROWS,
    guides=st.lists(st.builds(Guidance, st.floats(-4, 4).filter(bool), ROWS), max_size=3),
    sampling=SAMPLINGS,
    position=st.integers(0, 2**20),
    sample=st.integers(0, 7),
)
def test_small_rows_of_any_kind_draw_the_oracles_tokens(
    base: Tensor, guides: list[Guidance], sampling: Sampling, position: int, sample: int
) -> None:
    assert drawn(base, guides, sampling, position, sample) == expected(base, guides, sampling, position, sample)


def test_a_token_far_behind_wins_by_great_noise() -> None:
    # Over a million draws of noise, the largest is 14 or more.
    noise_TV = noise(torch.arange(10_000), torch.arange(40)[:, None], torch.tensor(0), torch.tensor(0)).flatten(1)
    position, token = divmod(int(noise_TV.argmax()), noise_TV.shape[1])
    assert noise_TV[position, token] > 13
    row = torch.full((40_000,), -60.0)
    row[7] = 0
    for lead, winner in ((0.01, token), (-0.01, 7)):
        row[token] = noise_TV[position, 7] - noise_TV[position, token] + lead
        assert drawn(row, [], Sampling(), position) == expected(row, [], Sampling(), position) == winner


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 1023, 1024, 1025, 1027])
def test_every_token_of_a_last_short_block_can_be_drawn(num_tokens: int) -> None:
    for token in range(max(0, num_tokens - 5), num_tokens):
        row = torch.zeros(num_tokens)
        row[token] = 90
        assert drawn(row, [], Sampling()) == drawn(row, [], Sampling(temperature=0)) == token


def test_greedy_ties_go_to_the_lowest_token() -> None:
    for first in range(9):
        row = torch.zeros(23)
        row[first] = row[first + 1] = row[20] = 5
        assert drawn(row, [], Sampling(temperature=0)) == first


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("base", "guide"),
    [
        ([0.0, math.nan, 2.0, 1.0, 0.0], None),
        ([0.0, 1.0, 2.0, 1.0, math.nan], None),
        ([math.nan] * 5, None),
        ([-math.inf] * 5, None),
        ([0.0, math.inf, 0.0, 0.0, 0.0], None),
        ([0.0] * 5, [0.0, 0.0, math.nan, 0.0, 0.0]),
        ([0.0, -math.inf], [-math.inf, 0.0]),
        ([math.inf, 0.0], [-math.inf, 0.0]),
        ([-math.inf, -math.inf, 1.0], [0.0, 0.0]),
    ],
)
def test_nothing_is_drawn_from_what_is_not_finite(
    base: list[float], guide: list[float] | None, temperature: float
) -> None:
    row = torch.tensor(base)
    guides = [Guidance(1.0, torch.tensor(guide))] if guide else []
    sampling = Sampling(temperature=temperature, top_k=2, top_p=0.5)
    assert expected(row, guides, sampling) is None
    assert merge_and_draw([row, torch.zeros(1)], [guides, []], [sampling] * 2, [0, 0], [0, 0]) == [None, 0]


def test_rows_in_shared_memory_are_read_where_they_lie() -> None:
    with mmap.mmap(-1, 4 * 1000) as memory:
        row = torch.frombuffer(memory, dtype=torch.float32)
        row[:] = rows("usual", 1, 1000)[0]
        before = row.clone()
        guides = [Guidance(0.5, row)]
        for sampling in (Sampling(), Sampling(top_k=9, top_p=0.8, min_p=0.01)):
            assert drawn(row, [], sampling) == expected(before, [], sampling)
            assert drawn(row, guides, sampling) == expected(before, [Guidance(0.5, before)], sampling)
        assert torch.equal(row, before)
        del row, guides


def test_rows_need_not_be_contiguous() -> None:
    columns = rows("usual", 500, 6)
    for i in range(6):
        guides = [Guidance(-1.5, columns[:, 5 - i])]
        assert drawn(columns[:, i], guides, Sampling()) == expected(columns[:, i], guides, Sampling())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_may_be_of_sixteen_bits(dtype: torch.dtype) -> None:
    base, guide = rows("usual", 20, 500).to(dtype), rows("flat", 20, 500).to(dtype)
    for i in range(20):
        guides = [Guidance(0.3, guide[i])]
        assert drawn(base[i], guides, Sampling(), i) == expected(base[i], guides, Sampling(), i)


def test_rows_may_come_from_inference_mode() -> None:
    with torch.inference_mode():
        row = rows("usual", 1, 50)[0] + 0
    assert drawn(row, [Guidance(1.0, row)], Sampling()) == expected(row, [Guidance(1.0, row)], Sampling())


def test_a_weight_too_small_for_float32_still_forbids() -> None:
    guides = [Guidance(-1e-200, torch.tensor([0.0, -torch.inf]))]
    assert drawn(torch.zeros(2), guides, Sampling()) == expected(torch.zeros(2), guides, Sampling()) == 0


def test_a_top_k_of_any_size_keeps_all() -> None:
    row = rows("flat", 1, 50)[0]
    assert drawn(row, [], Sampling(top_k=10**30)) == drawn(row, [], Sampling())


def test_where_no_cache_can_be_written_kernels_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file in the place of a directory cannot be written into, whoever runs the tests.
    (tmp_path / "__pycache__").touch()
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    source = tmp_path / "doubling.py"
    source.write_text("def double(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("doubling", source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(module.double)
    assert compiled(module.double)(21) == 42
