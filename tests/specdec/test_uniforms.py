"""Random numbers by place, against Philox as its paper defines it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.uniforms import ACCEPT, DRAWS, TARGET, uniforms

MASK = 2**64 - 1


def philox(key, counter):
    """Philox 4x64-10 (Salmon et al. 2011, section 3): four 64-bit words."""
    x, k = list(counter), [key & MASK, key >> 64]
    for _ in range(10):
        left, right = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(right >> 64) ^ x[1] ^ k[0], right & MASK, (left >> 64) ^ x[3] ^ k[1], left & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return x


def test_the_reference_is_philox():
    """Known answer of the authors' Random123 (kat_vectors, philox4x64 10, zeros)."""
    assert philox(0, (0, 0, 0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(st.integers(0, MASK), st.integers(0, 2**40), st.integers(1, 9), st.sampled_from([0, 1, 2]))
def test_a_number_is_a_function_of_its_place(seed, position, count, stream):
    words = [word for block in (1, 2, 3) for word in philox(seed, (block, position, stream, 0))]
    expected = [((word >> 11) + 0.5) / 2**53 for word in words[:count]]
    found = uniforms(seed, position, count, stream)
    assert found.tolist() == expected
    assert ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("stream", [TARGET, DRAWS, ACCEPT])
def test_numbers_are_uniform_over_positions_and_seeds(stream):
    stats = pytest.importorskip("scipy.stats")
    by_position = [uniforms(5, position, 1, stream)[0] for position in range(1500)]
    by_seed = [uniforms(seed, 5, 1, stream)[0] for seed in range(1500)]
    for numbers in (by_position, by_seed, uniforms(5, 5, 1500, stream)):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.1
