"""The shim against kernels that are not ours: mlx-lm's gated delta rule and its reference."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta

from tests.metal.build import compiler
from tests.metal.run import run_msl

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


@pytest.fixture
def on_metal(monkeypatch):
    """mlx-lm writes its kernels only where Metal is said to be."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("packed", "tokens", "key_dim", "value_dim", "dtype", "tolerance"),
    [
        (False, 6, 64, 8, mx.float32, 3e-6),
        (False, 3, 32, 4, mx.bfloat16, 2e-2),
        (True, 6, 128, 16, mx.float32, 3e-6),
        (True, 2, 128, 16, mx.float16, 3e-3),
    ],
)
def test_gated_delta_kernels_of_mlx_lm(
    on_metal, packed, tokens, key_dim, value_dim, dtype, tolerance
):
    key_heads, value_heads = 2, 4
    rng = np.random.default_rng(0)

    def normal(*shape):
        return mx.array(rng.standard_normal(shape, np.float32))

    q = (normal(1, tokens, key_heads, key_dim) / key_dim).astype(dtype)
    k = (normal(1, tokens, key_heads, key_dim) / key_dim**0.5).astype(dtype)
    v = normal(1, tokens, value_heads, value_dim).astype(dtype)
    g = mx.exp(-mx.abs(normal(1, tokens, value_heads)))
    beta = mx.sigmoid(normal(1, tokens, value_heads)).astype(dtype)
    state = normal(1, value_heads, value_dim, key_dim)

    if packed:
        kernel = gated_delta._make_gated_delta_packed_kernel()
        grid, threadgroup = (32, value_dim // 8, value_heads), (32, 2, 1)
    else:
        kernel = gated_delta._make_gated_delta_kernel()
        grid, threadgroup = (32, value_dim, value_heads), (32, 4, 1)
    template = {"InT": dtype, "StT": mx.float32, "Dk": key_dim, "Dv": value_dim}
    y, new_state = run_msl(
        kernel,
        [q, k, v, g, beta, state, tokens],
        [(1, tokens, value_heads, value_dim), state.shape],
        [dtype, mx.float32],
        grid,
        threadgroup,
        {**template, "Hk": key_heads, "Hv": value_heads},
    )
    q, k, v, beta = (x.astype(mx.float32) for x in (q, k, v, beta))
    y_expected, state_expected = gated_delta.gated_delta_ops(q, k, v, g, beta, state)
    np.testing.assert_allclose(y, np.array(y_expected), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(new_state, np.array(state_expected), rtol=1e-5, atol=1e-5)
