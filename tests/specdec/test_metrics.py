"""Every figure against a run counted by hand."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.aggregate import aggregate, median
from specdec.metrics import compare, first_difference, measure
from specdec.report import verdict
from specdec.units import interval
from tests.results import counters, result


def test_a_run_counted_by_hand():
    """Three rounds of four nodes that accept 2, 0 and 1 draft tokens."""
    metrics = measure(result(accepted=[2, 0, 1], nodes=4))
    assert metrics.prompt_tokens == 10
    assert metrics.prefill_tokens_per_second == pytest.approx(10 / 0.5)
    # 1 from the prefill, then 3 + 1 + 2
    assert metrics.generated_tokens == 7
    assert metrics.decode_tokens_per_second == pytest.approx(6 / 3.0)
    assert metrics.rounds == 3
    assert (metrics.drafted, metrics.accepted) == (12, 3)
    assert metrics.acceptance_length == pytest.approx(2.0)
    assert metrics.acceptance_rate == pytest.approx(3 / 12)
    assert metrics.drafted_share == pytest.approx(3 / 6)
    assert [one.reached for one in metrics.depths] == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert [one.conditional for one in metrics.depths] == [
        pytest.approx(2 / 3),
        pytest.approx(1 / 2),
        0,
        None,
    ]
    assert [(one.name, one.ms_per_round) for one in metrics.phases] == [
        ("draft", pytest.approx(200)),
        ("build", pytest.approx(50)),
        ("verify", pytest.approx(500)),
        ("commit", pytest.approx(100)),
        ("other", pytest.approx(150)),
    ]
    assert sum(one.share for one in metrics.phases) == pytest.approx(1)


def test_plain_decoding():
    metrics = measure(result(accepted=[0] * 4, nodes=0))
    assert metrics.acceptance_length == 1
    assert metrics.drafted == metrics.accepted == 0
    assert metrics.acceptance_rate is None
    assert metrics.drafted_share == 0
    assert metrics.depths == ()


def test_a_run_without_rounds_has_no_rates():
    """The first token was the end: no figure is made up."""
    metrics = measure(result(accepted=[], nodes=4, decode_seconds=1e-5))
    assert metrics.generated_tokens == 1
    assert metrics.decode_tokens_per_second is None
    assert metrics.acceptance_length is None
    assert metrics.depths == metrics.phases == ()


def test_tokens_beyond_the_end_do_not_count_as_speed():
    cut = result(accepted=[4], nodes=4, cut=3)
    metrics = measure(cut)
    assert metrics.generated_tokens == 3
    assert metrics.decode_tokens_per_second == pytest.approx(2 / cut.decode_seconds)
    assert metrics.acceptance_length == 5


def test_expert_traffic():
    metrics = measure(
        result(
            accepted=[1, 1],
            nodes=2,
            experts=(
                counters(0, pinned=True, hits=60, misses=0, bytes_read=0),
                counters(1, pinned=False, hits=15, misses=5, bytes_read=500),
                counters(2, pinned=False, hits=10, misses=10, bytes_read=1000),
            ),
        )
    )
    experts = metrics.experts
    assert (experts.hits, experts.misses, experts.pinned_requests) == (25, 15, 60)
    assert experts.hit_rate == pytest.approx(25 / 40)
    assert experts.effective_hit_rate == pytest.approx(85 / 100)
    assert experts.bytes_read == 1500
    assert experts.bytes_per_token == pytest.approx(1500 / 5)
    assert [one.misses for one in experts.layers] == [0, 5, 10]


def test_no_expert_traffic_has_no_rate():
    experts = measure(result(accepted=[1], nodes=2, experts=())).experts
    assert experts.hit_rate is None
    assert experts.effective_hit_rate is None
    assert experts.bytes_per_token == 0


def test_comparison():
    plain = result(accepted=[0] * 6, nodes=0, decode_seconds=6.0)
    fast = result(accepted=[2, 2], nodes=4, decode_seconds=2.0)
    done = compare(plain, fast)
    assert done.speedup == pytest.approx(3)
    assert done.equal
    assert done.first_difference is None


def test_a_comparison_has_an_interval_over_the_text():
    """Rounds of a steady pace leave no doubt, others do; a short text has no interval."""
    plain = result(accepted=[0] * 40, nodes=0, decode_seconds=40.0)
    steady = compare(plain, result(accepted=[1] * 20, nodes=2, decode_seconds=20.0))
    assert steady.speedup_low == pytest.approx(2.0)
    assert steady.speedup_high == pytest.approx(2.0)
    uneven = compare(plain, result(accepted=[0] * 12 + [3] * 7, nodes=3, decode_seconds=19.0))
    assert uneven.speedup_low is not None
    assert uneven.speedup is not None
    assert uneven.speedup_high is not None
    assert uneven.speedup_low < 0.8 * uneven.speedup < uneven.speedup < 0.8 * uneven.speedup_high
    words = verdict(uneven)[0]
    low, high = uneven.speedup_low, uneven.speedup_high
    assert f"95 % interval {interval(low, high)} over blocks of this text" in words
    short = compare(result(accepted=[0] * 3, nodes=0), result(accepted=[1], nodes=2))
    assert short.speedup_low is None
    assert "interval" not in verdict(short)[0]


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((), (5,), 0), ((), (), None)],
)
def test_first_difference(left, right, position):
    assert first_difference(left, right) == position


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.floats(0.01, 100),
)
def test_the_figures_agree_with_each_other(accepted, decode_seconds):
    metrics = measure(result(accepted=accepted, nodes=6, decode_seconds=decode_seconds))
    # The mean acceptance length is 1 + the sum over depths of P(accepted >= depth).
    assert metrics.acceptance_length == pytest.approx(1 + sum(d.reached for d in metrics.depths))
    assert metrics.acceptance_length is not None
    assert metrics.drafted_share == pytest.approx(1 - 1 / metrics.acceptance_length)
    reached = [1.0, *(d.reached for d in metrics.depths)]
    assert reached == sorted(reached, reverse=True)
    assert sum(one.share for one in metrics.phases) == pytest.approx(1)
    assert all(one.share >= 0 for one in metrics.phases)


def test_aggregate_weighs_prompts_equally():
    def run(accepted, seconds):
        return measure(result(accepted=accepted, nodes=4, decode_seconds=seconds))

    prompts = [
        [run([1] * 5, 1.0), run([1] * 5, 2.0), run([1] * 5, 10.0)],  # 10, 5, 1 tok/s; length 2
        [run([3] * 10, 1.0)] * 3,  # 40 tok/s; length 4
        [run([4] * 2, 1.0)] * 3,  # 10 tok/s; length 5
    ]
    plain = [[run([0] * 5, 1.0)] * 3, [run([0] * 10, 1.0)] * 3, [run([0] * 4, 1.0)] * 3]
    done = aggregate(prompts, plain)
    assert done.prompts == 3
    assert done.decode_tokens_per_second == pytest.approx(10)  # of 5, 40, 10
    assert done.speedup == pytest.approx(2.5)  # of 1, 4, 2.5
    assert done.acceptance_length == pytest.approx((2 + 4 + 5) / 3)
    # Pooled rounds: 15 of length 2, 30 of 4, 6 of 5.
    assert done.depths == pytest.approx((1, 36 / 51, 36 / 51, 6 / 51))
    assert aggregate(prompts, None).speedup is None


def test_median_ignores_what_is_missing():
    assert median([None, 3.0, 1.0, None, 2.0]) == 2.0
    assert median([None]) is None


def test_peak_memory_is_this_process_own():
    """A child of a large process does not inherit its parent's peak."""
    held = np.ones(400_000_000, np.uint8)
    code = "from specdec.metrics import peak_process_bytes; print(peak_process_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5_000_000 < int(done.stdout) < len(held) // 2
