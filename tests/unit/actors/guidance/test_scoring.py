"""Log probabilities are the oracle's, whatever rows, guides and gaps there are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.api import Scoring
from actors.guidance import Guidance, Spelled
from actors.guidance.reference import laws
from actors.guidance.scoring import LEAST, score

LOGITS = st.one_of(st.integers(-3000, 3000).map(lambda n: n / 100), st.sampled_from([0.0, 1.0, -math.inf]))
ROWS = st.lists(LOGITS, min_size=1, max_size=70).map(torch.tensor)


@settings(max_examples=300, deadline=None)
@given(
    base=ROWS,
    guides=st.lists(st.builds(Guidance, st.floats(-4, 4).filter(lambda w: abs(w) > 1e-3), ROWS), max_size=3),
    num_top=st.integers(0, 20),
    token=st.integers(0, 69),
)
def test_log_probabilities_are_the_oracles(base: Tensor, guides: list[Guidance], num_top: int, token: int) -> None:
    token %= len(base)
    if any(not row.amax().isfinite() for row in (base, *(guide.logits[: len(base)] for guide in guides))):
        return
    merged_V, *own = laws([base, *(guide.logits[: len(base)] for guide in guides)], guides)
    if merged_V.isnan().any():
        return
    found = score(base, guides, [], token, Scoring(num_top=num_top, has_details=True))
    assert found.tokens[0] == token
    shown = [float(merged_V[shown].clamp(min=LEAST)) for shown in found.tokens]
    assert found.logprobs == pytest.approx(shown, abs=1e-5)
    num_possible = int((merged_V > -torch.inf).sum())
    assert len(found.tokens) == 1 + min(num_top, num_possible)
    best = merged_V.sort(descending=True, stable=True).values[: len(found.tokens) - 1]
    assert found.logprobs[1:] == pytest.approx(best.clamp(min=LEAST).tolist(), abs=1e-5)
    assert found.own is not None
    for i, shown_token in enumerate(found.tokens):
        values = [voice[i] for voice in found.own]
        assert values == pytest.approx([float(law[shown_token].clamp(min=LEAST)) for law in own], abs=1e-5)
        if found.logprobs[i] > LEAST:
            guided = values[0] + sum(guide.weight * value for guide, value in zip(guides, values[1:], strict=True))
            assert guided - found.log_z == pytest.approx(found.logprobs[i], abs=1e-4)


def test_equals_are_told_in_the_order_of_their_tokens() -> None:
    row = torch.zeros(5000)
    row[40] = 1
    assert score(row, [], [], 7, Scoring(num_top=4)).tokens == [7, 40, 0, 1, 2]


def test_columns_without_a_token_have_no_probability() -> None:
    spelled = Spelled([0, 1, 4, 5])
    row = spelled.cut(torch.tensor([1.0, 2.0, 9.0, 9.0, 0.0, 1.0, 9.0]))
    found = score(row, [], spelled.guidance(), 1, Scoring(num_top=10))
    assert found.tokens == [1, 1, 0, 5, 4]
    expected = torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0]) - torch.tensor([1.0, 2.0, 0.0, 1.0]).logsumexp(0)
    assert found.logprobs == pytest.approx(expected.tolist())


@pytest.mark.parametrize("num_tokens", [1, 3, 255, 256, 257, 49_152])
def test_rows_of_any_length(num_tokens: int) -> None:
    row = 5 * torch.randn(num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    found = score(row, [], [], num_tokens - 1, Scoring(num_top=5))
    expected = row.double().log_softmax(-1)
    assert found.logprobs[0] == pytest.approx(float(expected[-1]), abs=1e-6)
    assert found.logprobs[1:] == pytest.approx(expected.topk(min(5, num_tokens)).values.tolist(), abs=1e-6)
