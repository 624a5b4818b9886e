"""Noise is Philox4x32-10 as published, and depends on nothing but seed, sample, position and token."""

import numpy as np
import pytest
import torch

from actors.guidance import kernels
from actors.guidance.noise import gumbel, noise, philox4x32


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known-answer vectors of the Random123 library, "philox4x32 10".
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (np.array(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.array(word, dtype=np.uint64) for word in key)
    assert philox4x32((c0, c1, c2, c3), (k0, k1)).tolist() == list(expected)
    lanes = np.zeros((4, 5), dtype=np.uint64)
    first, *others = counter
    kernels.philox(np.full(5, first, dtype=np.int64), others[0], others[1], others[2], key, lanes)
    assert lanes.T.tolist() == [list(expected)] * 5


@pytest.mark.parametrize("num_blocks", [1, 7, 8, 255, 256])
def test_compiled_words_are_those_of_the_oracle(num_blocks: int) -> None:
    blocks = np.random.default_rng(num_blocks).integers(0, 2**32, num_blocks)
    lanes = np.zeros((4, num_blocks), dtype=np.uint64)
    kernels.philox(blocks, 77, 3, 0, (2**32 - 1, 12), lanes)
    c0, c1, c2, c3, k0, k1 = (np.asarray(word).astype(np.uint64) for word in (blocks, 77, 3, 0, 2**32 - 1, 12))
    assert np.array_equal(lanes.T, philox4x32((c0, c1, c2, c3), (k0, k1)))


def test_gumbel_noise_has_its_bounds() -> None:
    least, most = gumbel(torch.tensor([0, 2**32 - 1])).tolist()
    assert kernels.LEAST < least < -3.1
    assert 22.8 < most < kernels.REACH


def test_compiled_noise_is_that_of_the_oracle() -> None:
    numbers = [0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1, *torch.randint(2**32, (500,)).tolist()]
    ours = [kernels.gumbel(np.uint64(number)) for number in numbers]
    np.testing.assert_allclose(ours, gumbel(torch.tensor(numbers)), rtol=1e-14, atol=1e-15)


def test_noise_has_the_gumbel_mean_and_variance() -> None:
    g = noise(torch.arange(50_000), *words(3, 0, 17)).flatten()
    assert g.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert g.var().item() == pytest.approx(torch.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("changed", ["position", "sample", "seed", "high half of the seed"])
def test_every_part_of_the_counter_and_key_matters(changed: str) -> None:
    position, sample, seed = 5, 1, 42
    other = {
        "position": (6, 1, 42),
        "sample": (5, 2, 42),
        "seed": (5, 1, 43),
        "high half of the seed": (5, 1, 42 + 2**40),
    }[changed]
    blocks = torch.arange(8)
    assert not torch.equal(noise(blocks, *words(position, sample, seed)), noise(blocks, *words(*other)))


def test_noise_of_a_row_is_the_same_in_any_batch() -> None:
    blocks = torch.arange(100)
    alone = noise(blocks, *words(7, 0, -5))
    together = noise(blocks, torch.tensor([[1], [7]]), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[3], [-5]]))
    assert torch.equal(together[1], alone)
