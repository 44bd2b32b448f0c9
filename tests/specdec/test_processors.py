"""From logits to a distribution: against mlx-lm, transformers, and the definitions written out."""

import math
import tracemalloc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specdec.footprint import SAMPLED
from specdec.processors import distribution, kept, nucleus, penalized, top
from specdec.sampling import Sampling

NONE = np.empty(0, np.int64)


def rows(least=2, most=40):
    """Logits with many ties (quarters), or few; what differs does so by more than rounding."""
    tied = st.integers(-40, 40).map(lambda n: n / 4)
    wide = st.integers(-60_000, 60_000).map(lambda n: n / 1000)
    return st.one_of(
        st.lists(tied, min_size=least, max_size=most), st.lists(wide, min_size=least, max_size=most)
    ).map(lambda values: np.array(values, np.float32))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.5, 0.8, 1.0, 1.7, 5.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.6, 0.1, 1e-9]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 39, 1000]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def naive(logits, sampling):
    """Probabilities [vocab] by the definitions, in Python's floats."""
    p = softmax(logits).tolist()
    left = set(range(len(p)))
    for i, own in enumerate(p):
        above = math.fsum(other for j, other in enumerate(p) if logits[j] > logits[i])
        if sampling.top_p < 1 and above >= sampling.top_p:
            left.discard(i)
        if own < sampling.min_p * max(p):
            left.discard(i)
        better = sum((-logits[j], j) < (-logits[i], i) for j in range(len(p)))
        if sampling.top_k and better >= sampling.top_k:
            left.discard(i)
    below = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    weights = [math.exp(below[i]) if i in left else 0.0 for i in range(len(p))]
    return np.array(weights) / math.fsum(weights)


def clear(logits, sampling):
    """Not so close to a threshold that rounding decides."""
    p = softmax(logits)
    above = np.array([p[logits > one].sum() for one in logits])
    if sampling.top_p < 1.0:
        assume((abs(above - sampling.top_p) > 1e-4 * sampling.top_p).all())
    if 0.0 < sampling.min_p < 1.0:
        assume((abs(p / p.max() - sampling.min_p) > 1e-4 * sampling.min_p).all())


def probabilities(found, vocab):
    return found.probabilities(np.arange(vocab))


@settings(deadline=None)
@given(rows(), samplings)
def test_the_distribution_is_the_definitions(logits, sampling):
    clear(logits, sampling)
    before = logits.copy()
    found = distribution(logits, sampling, NONE)
    assert np.array_equal(logits, before)
    expected = naive(logits, sampling)
    got = probabilities(found, len(logits))
    assume(not ((expected > 1e-31) & (expected < 1e-29)).any())  # no doubt what counts as none
    np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-30)
    assert np.array_equal(got > 1e-30, expected > 1e-30)


@settings(deadline=None)
@given(rows(), samplings)
def test_the_distribution_is_mlx_lms(logits, sampling):
    """The samplers of mlx_lm.sample_utils in the order in which make_sampler applies them."""
    utils = pytest.importorskip("mlx_lm.sample_utils")
    clear(logits, sampling)
    vocab = len(logits)
    # Its top-k takes any of equally probable tokens, and its own restriction on k.
    assume(sampling.top_k == 0 or len(set(logits.tolist())) == vocab)
    with mx.stream(mx.cpu):
        logs = mx.array(logits)[None]
        logs = logs - mx.logsumexp(logs, keepdims=True)
        if sampling.top_p < 1.0:
            logs = utils.apply_top_p(logs, sampling.top_p)
        if sampling.min_p:
            logs = utils.apply_min_p(logs, sampling.min_p)
        if 0 < sampling.top_k < vocab:
            logs = utils.apply_top_k(logs, sampling.top_k)
        expected = np.array(mx.softmax(logs * (1 / sampling.temperature), axis=-1))[0]
    got = probabilities(distribution(logits, sampling, NONE), vocab)
    assume(not ((expected > 1e-31) & (expected < 1e-29)).any())  # no doubt what counts as none
    if sampling.min_p == 1.0 or sampling.top_p == 1e-9:  # log-softmax rounds there: compare the top
        assert got[expected.argmax()] > 0
        return
    assert np.array_equal(got > 1e-30, expected > 1e-30)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-30)  # float32 logs of -60


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@settings(deadline=None)
@given(logits=rows(), data=st.data())
def test_the_penalty_is_transformers_and_mlx_lms(penalty, logits, data):
    utils = pytest.importorskip("mlx_lm.sample_utils")
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=30))
    got = penalized(logits, penalty, np.array(seen, np.int64))
    with mx.stream(mx.cpu):
        theirs = utils.make_repetition_penalty(penalty, context_size=100)(
            mx.array(seen, mx.int32) if seen else [], mx.array(logits)[None]
        )
        assert np.array_equal(got, np.array(theirs)[0])
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    if seen:
        theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([seen]), torch.tensor(logits)[None]
        )
        assert np.array_equal(got, theirs[0].numpy())


@settings(deadline=None)
@given(rows(), samplings.filter(lambda one: one.top_p != 1e-9 and one.min_p != 1.0))
def test_filters_at_temperature_1_are_transformers(logits, sampling):
    """There each filter renormalizes before the next one, which differs with two of them; so one at
    a time."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    vocab, distinct = len(logits), len(set(logits.tolist())) == len(logits)
    assume(distinct)  # it keeps all that tie for rank k, and breaks ties of top-p by its sort
    plain = Sampling(temperature=1.0)
    for name, warper in (
        ("top_p", process.TopPLogitsWarper(sampling.top_p)),
        ("min_p", process.MinPLogitsWarper(sampling.min_p)),
        ("top_k", process.TopKLogitsWarper(sampling.top_k or vocab)),
    ):
        one = replace(plain, **{name: getattr(sampling, name)})
        if one == plain:
            continue  # it makes no warper then
        clear(logits, one)
        scores = warper(None, torch.tensor(logits)[None])
        ids = kept(logits, one)
        expected = np.flatnonzero(np.isfinite(scores[0].numpy()))
        assert np.array_equal(np.arange(vocab) if ids is None else ids, expected)


@settings(deadline=None)
@given(rows(), samplings, st.randoms(use_true_random=False))
def test_filters_do_not_look_at_ids_but_for_ties_of_top_k(logits, sampling, random):
    sampling = replace(sampling, top_k=0)
    order = list(range(len(logits)))
    random.shuffle(order)
    there = kept(logits, sampling)
    shuffled = kept(logits[order], sampling)
    if there is None or shuffled is None:
        assert there is None
        assert shuffled is None
    else:
        assert {order[i] for i in shuffled} == set(there.tolist())


@settings(deadline=None)
@given(rows(), samplings)
def test_tighter_filters_keep_less_and_never_lose_the_top(logits, sampling):
    everything = set(range(len(logits)))
    ids = kept(logits, sampling)
    here = everything if ids is None else set(ids.tolist())
    assert int(logits.argmax()) in here
    for tighter in (
        replace(sampling, top_p=sampling.top_p / 2),
        replace(sampling, min_p=(1 + sampling.min_p) / 2),
        replace(sampling, top_k=1),
    ):
        less = kept(logits, tighter)
        assert less is not None
        assert set(less.tolist()) <= here


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [255, 256, 257, 5000, 40_000])
def test_large_vocabularies(vocab, spread):
    """The shortcuts for many tokens against sorting all of them; spread 0: all tie."""
    random = np.random.default_rng(vocab)
    logits = (random.normal(0, 1, vocab) * spread).astype(np.float32)
    if spread == 1.0:
        logits = np.round(logits, 1)
    order = np.argsort(-logits, kind="stable")
    p = softmax(logits)
    above = np.cumsum(p[order]) - p[order]
    for count in (1, 2, 50, vocab // 2, vocab - 1):
        assert np.array_equal(top(logits, count), np.sort(order[:count]))
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999):
        least = float(logits[order[np.count_nonzero(above < top_p) - 1]])
        assert nucleus(logits, top_p) == least


@settings(deadline=None)
@given(rows(), samplings)
def test_bits_do_not_depend_on_where_the_row_lies(logits, sampling):
    """A row of a batch and a row alone: same bits."""
    batch = np.zeros((3, len(logits) + 1), np.float32)
    batch[1, 1:] = logits
    alone, there = (distribution(x, sampling, NONE) for x in (logits.copy(), batch[1, 1:]))
    assert alone.weights.tobytes() == there.weights.tobytes()
    assert (alone.ids is None) == (there.ids is None)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_a_rows_memory_is_what_the_plan_counts(spread):
    vocab = 100_000
    logits = (np.random.default_rng(0).normal(0, 1, vocab) * spread).astype(np.float32)
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1),
        Sampling(temperature=1.0, top_p=0.9999, min_p=1e-9),
        Sampling(temperature=1.0, top_p=0.99, top_k=vocab - 1),
    ):
        tracemalloc.start()
        found = distribution(logits, sampling, np.arange(10))
        found.draw(0.5)
        found.without(np.arange(5))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= SAMPLED * vocab


def test_extremes_stay_finite():
    big = float(np.finfo(np.float32).max)
    logits = np.array([big, -big, 0.0, 1.0], np.float32)
    for sampling in (
        Sampling(temperature=1e-300, top_p=0.5, repetition_penalty=1e9),
        Sampling(temperature=1e300, min_p=1e-9, repetition_penalty=1e-9),
        Sampling(temperature=5e-324),
        Sampling(temperature=1.0, repetition_penalty=5e-324),
        Sampling(temperature=1.0, repetition_penalty=1e308),
    ):
        with np.errstate(all="raise"):
            found = distribution(logits, sampling, np.array([0, 1, 2]))
        assert np.isfinite(found.weights).all()
        assert found.weights.max() == 1.0
    assert distribution(logits, Sampling(temperature=5e-324), NONE).draw(0.999) == 0
