"""The merged logits are those of the product of the base and the weighted guides."""

import pytest
import torch

from actors.guidance import Guidance, merge


def test_merging_raw_logits_gives_the_product_of_the_distributions() -> None:
    torch.manual_seed(0)
    base, one, two = torch.randn(3, 40)
    product = base.softmax(-1) * one.softmax(-1) ** 0.7 * two.softmax(-1) ** -0.4
    merged = merge([base], [[Guidance(0.7, one), Guidance(-0.4, two)]])[0].softmax(-1)
    assert torch.allclose(merged, product / product.sum(), atol=1e-6)


def test_rows_have_guides_of_their_own() -> None:
    base = torch.zeros(3, 4)
    guide = torch.tensor([1.0, 2.0, 3.0, 4.0])
    z = merge(list(base), [[Guidance(1.0, guide)], [], [Guidance(-2.0, guide), Guidance(0.5, guide)]])
    assert z.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [-1.5, -3, -4.5, -6]]


def test_merging_changes_no_input() -> None:
    base, guide = torch.ones(4), torch.ones(4)
    merge([base], [[Guidance(3.0, guide)]])
    assert base.tolist() == guide.tolist() == [1, 1, 1, 1]


def test_a_wider_guide_is_cut_and_a_narrower_one_forbids_what_it_lacks() -> None:
    base = torch.zeros(4)
    assert merge([base], [[Guidance(1.0, torch.ones(6))]]).tolist() == [[1, 1, 1, 1]]
    for weight in (1.0, -1.0):
        z = merge([base], [[Guidance(weight, torch.ones(3))]])[0]
        assert z.softmax(-1)[3] == 0
        assert z[:3].tolist() == [weight] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    base, guide = torch.tensor([256.0, 1.0], dtype=dtype), torch.tensor([0.125, 0.0], dtype=dtype)
    assert merge([base], [[Guidance(1.0, guide)]]).tolist() == [[256.125, 1.0]]


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_what_a_guide_forbids_stays_forbidden(weight: float) -> None:
    guide = torch.tensor([0.0, -torch.inf, 0.0])
    assert merge([torch.zeros(3)], [[Guidance(weight, guide)]]).softmax(-1).tolist() == [[0.5, 0.0, 0.5]]
