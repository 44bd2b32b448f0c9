"""Linear layers and the embedding against float64 products of the decoded matrices."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.linear import Projections, embed, linear
from specdec.kernels.weight import Weight
from tests.backends import (
    Operations,
    each_backend,
    each_exact_backend,
    fetch,
    needs_numba,
    same_bits,
)
from tests.kernels.weights import PACKINGS, dense, normal, packed, some_weight

ANY = [None, *PACKINGS]


@each_backend
@pytest.mark.parametrize("packing", ANY)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_linear_is_the_product_with_the_decoded_matrix(backend, packing, rows):
    rng = np.random.default_rng(rows)
    weight, matrix = some_weight(rng, 40, 384, packing=packing)
    x = normal(rng, rows, 384)
    y = Operations(backend)(linear, x, weight)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ matrix.T, atol=2e-5)


@each_backend
@pytest.mark.parametrize(("out", "size"), [(1, 1), (3, 7), (7, 33), (5, 131)])
def test_dense_matrices_of_odd_sizes(backend, out, size):
    rng = np.random.default_rng(out)
    weight, matrix = dense(rng, out, size)
    x = normal(rng, 5, size)
    expected = x.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(Operations(backend)(linear, x, weight), expected, atol=1e-5)


@each_backend
@pytest.mark.parametrize("packing", [(3, 32), (4, 32), (5, 32), (6, 32), (8, 32), (4, 128)])
@pytest.mark.parametrize("out", [1, 8, 13])
def test_quantized_matrices_with_an_odd_number_of_outputs_and_groups(backend, packing, out):
    rng = np.random.default_rng(out)
    weight, matrix = some_weight(rng, out, 5 * packing[1], packing=packing)
    x = normal(rng, 4, 5 * packing[1])
    expected = x.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(Operations(backend)(linear, x, weight), expected, atol=2e-5)


@each_exact_backend
@pytest.mark.parametrize("packing", [None, (2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 64)])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 26), out=st.integers(1, 70))
@settings(max_examples=12, deadline=None)
def test_a_row_of_linear_has_the_same_bits_in_any_company(backend, packing, seed, rows, out):
    rng = np.random.default_rng(seed)
    weight, _ = some_weight(rng, out, 256, packing=packing)
    x = normal(rng, rows, 256)
    on = Operations(backend)
    y = on(linear, x, weight)
    for row in range(rows):
        assert same_bits(on(linear, x[row : row + 1], weight)[0], y[row])
    order = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    assert same_bits(on(linear, x[order], weight), y[order])


@each_exact_backend
@pytest.mark.parametrize("formats", ["equal", "mixed", "alternating"])
def test_projections_computed_together_have_the_bits_of_each_alone(backend, formats):
    rng = np.random.default_rng(1)
    formats_of: dict[str, list[tuple[int, int] | None]] = {
        "equal": [(4, 64)] * 3,
        "mixed": [(4, 64), (4, 64), (8, 64), None, None],
        "alternating": [(8, 32), (4, 32), (8, 32)],
    }
    weights = [
        some_weight(rng, out, 128, packing=packing)[0].on(backend)
        for out, packing in zip((24, 8, 5, 3, 16), formats_of[formats], strict=False)
    ]
    together = Projections(weights)
    assert len(together.matrices) == {"equal": 1, "mixed": 3, "alternating": 3}[formats]
    x = Operations(backend).place(normal(rng, 6, 128))
    outputs = fetch([piece.values for piece in together(x)])
    for output, weight in zip(outputs, weights, strict=True):
        assert same_bits(np.ascontiguousarray(output), fetch(linear(x, weight)))


@each_backend
@pytest.mark.parametrize("packing", ANY)
def test_embed_decodes_the_rows_of_the_matrix(backend, packing):
    rng = np.random.default_rng(2)
    weight, matrix = some_weight(rng, 50, 256, packing=packing)
    ids = np.array([49, 0, 7, 7, 31], np.int32)
    x = fetch(embed(ids, weight.on(backend)))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, matrix[ids], rtol=1e-6, atol=1e-7)


@each_exact_backend
@pytest.mark.parametrize("packing", [None, (4, 64), (6, 32)])
def test_an_embedded_row_has_the_same_bits_in_any_company(backend, packing):
    rng = np.random.default_rng(3)
    weight = some_weight(rng, 50, 128, packing=packing)[0].on(backend)
    ids = rng.integers(0, 50, 9).astype(np.int32)
    x = fetch(embed(ids, weight))
    for row, token in enumerate(ids):
        assert same_bits(fetch(embed(np.array([token], np.int32), weight))[0], x[row])


def test_codes_are_packed_as_mlx_packs_them():
    """The tests' own packing, and with it the NumPy kernels', against mx.dequantize."""
    for bits, group_size in PACKINGS:
        rng = np.random.default_rng(bits)
        weight, matrix = packed(rng, 3, 256, bits=bits, group_size=group_size)
        decoded = mx.dequantize(
            weight.data, weight.scales, weight.biases, group_size=group_size, bits=bits
        )
        np.testing.assert_allclose(np.array(decoded), matrix, atol=1e-6)


def test_weight_sizes():
    rng = np.random.default_rng(4)
    weight, _ = packed(rng, 10, 192, bits=3, group_size=64)
    assert (weight.in_features, weight.out_features) == (192, 10)
    assert weight.nbytes == 10 * 192 * 3 // 8 + 2 * 10 * 3 * 4
    assert not weight.same_format(Weight(weight.scales))
    rows = weight.rows(np.array([9, 0, 3]))
    assert np.array_equal(np.array(rows.data), np.array(weight.data)[[9, 0, 3]])


@needs_numba
@pytest.mark.parametrize("size", [7, 96, 256])
@pytest.mark.parametrize("rows", [1, 4, 7, 20])
def test_bfloat16_matrices_are_read_as_they_are(size, rows):
    """To the bits of the same matrix in float32."""
    rng = np.random.default_rng(size)
    wide = mx.array(normal(rng, 13, size)).astype(mx.bfloat16)
    kept = Weight(np.array(wide.view(mx.uint16)))
    cast = Weight(np.array(wide.astype(mx.float32)))
    assert kept.in_features == size
    x = normal(rng, rows, size)
    assert same_bits(linear(x, kept), linear(x, cast))
