"""The compiled mixer of a gated delta layer, one key head and its value heads after the other."""

import math

import numpy as np

from specdec.kernels.cpu.decode import address, aligned
from specdec.kernels.cpu.exp import fma, silu
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.team import take
from specdec.kernels.cpu.vectors import add_products, read, update


@jit
def mix_heads(  # type: ignore[no-untyped-def]
    left,
    key_head,
    qkv,
    z,
    b,
    a,
    qkv_start,
    z_start,
    b_start,
    a_start,
    weight,
    a_log,
    dt_bias,
    norm,
    eps,
    key_heads,
    conv,
    state,
    parents,
    places,
    kept,
    tape,
    out,
    last,
):
    """All rows of key heads and of their value heads, one key head a part."""
    rows, channels = len(parents), conv.shape[1]
    heads, key_dim, value_dim = state.shape
    keys, group = key_heads * key_dim, heads // key_heads
    deltas = channels + keys
    width = group * value_dim
    queries = np.empty((rows, key_dim), np.float32)
    values = np.empty((rows, width), np.float32)
    betas = np.empty((rows, group), np.float32)
    mixed = np.empty(key_dim, np.float32)
    states = aligned(kept, key_dim * value_dim).reshape(kept, key_dim, value_dim)
    by_key, by_query = np.empty(value_dim, np.float32), np.empty(value_dim, np.float32)
    done = 0
    while key_head >= 0:
        at = key_head * key_dim
        first_value = key_head * width
        for row in range(rows):
            source = weight, conv, qkv, qkv_start, parents, row, tape
            _convolve(*source, at, mixed)
            _unit(mixed, 1 / math.sqrt(key_dim), queries[row])
            _convolve(*source, keys + at, mixed)
            _unit(mixed, 1.0, tape[row, channels + at : channels + at + key_dim])
            _convolve(*source, 2 * keys + first_value, values[row])
            for h in range(group):
                head = key_head * group + h
                x = a[row, a_start + head] + dt_bias[head]
                # log(1 + exp(x)), without overflow
                softplus = max(x, np.float32(0)) + math.log1p(math.exp(-abs(x)))
                decay = math.exp(-math.exp(a_log[head]) * softplus)
                tape[row, deltas + heads * value_dim + head] = decay
                betas[row, h] = 1 / (1 + math.exp(-b[row, b_start + head]))

        for h in range(group):
            head = key_head * group + h
            first = head * value_dim
            for row in range(rows):
                key, query = tape[row, channels + at : channels + at + key_dim], queries[row]
                delta = tape[row, deltas + first : deltas + first + value_dim]
                decay = tape[row, deltas + heads * value_dim + head]
                beta, value = betas[row, h], values[row, h * value_dim : (h + 1) * value_dim]
                parent = np.int64(parents[row])
                source = state[head] if parent < 0 else states[places[parent]]
                read(source, key, query, by_key, by_query)
                product = np.float32(0)
                for i in range(key_dim):
                    product += key[i] * query[i]
                y = out[row, first : first + value_dim]
                for v in range(value_dim):
                    delta[v] = fma(-decay, by_key[v], value[v]) * beta
                    y[v] = fma(product, delta[v], decay * by_query[v])
                final = len(last) > 0 and row == rows - 1
                if places[row] >= 0 or final:
                    target = last[head] if final else states[places[row]]
                    update(source, decay, key, delta, target)
                normalize(y, norm, eps, by_query)
                gate = z[row, z_start + first : z_start + first + value_dim]
                for v in range(value_dim):
                    y[v] = by_query[v] * silu(gate[v])
        key_head = take(left)
        done += 1
    return done


@jit
def _convolve(weight, conv, qkv, start, parents, row, tape, first, mixed):  # type: ignore[no-untyped-def]
    """The channels from `first` on of one row: mixed, and on the tape as they came.

    From the row upwards, then through the committed rows before the root.
    """
    taps, width = weight.shape[0], len(mixed)
    for i in range(width):
        mixed[i] = 0
    above = np.int64(row)
    for tap in range(taps - 1, -1, -1):
        if above >= 0:
            source = address(qkv) + above * qkv.strides[0] + 4 * (start + first)
            above = np.int64(parents[above])
        else:
            source = address(conv) + (taps - 1 + above) * conv.strides[0] + 4 * first
            above -= 1
        add_products(source, address(weight) + tap * weight.strides[0] + 4 * first, mixed)
    for i in range(width):
        mixed[i] = silu(mixed[i])
    kept, came = tape[row, first : first + width], qkv[row, start + first : start + first + width]
    for i in range(width):
        kept[i] = came[i]


@jit
def _unit(x, scale, out):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(scale / math.sqrt(total + 1e-6))
    for i in range(len(x)):
        out[i] = x[i] * factor
