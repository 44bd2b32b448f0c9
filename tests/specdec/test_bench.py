"""The sweep: order, medians per class, agreement of tokens."""

import re

import pytest

from specdec import bench, record
from specdec.prompts import Prompt
from tests.results import result, sweep_by_hand


def test_budgets_are_the_inner_loop_and_repeats_the_outer():
    seen: list[bench.Run] = []
    sweep_by_hand({1: [0] * 3, 4: [1, 1]}, on_run=seen.append)
    order = [(run.repeat, run.prompt.id, run.budget) for run in seen]
    assert order == [(r, p, b) for r in (0, 1) for p in ("a", "b") for b in (1, 4)]


def test_every_budget_warms_up_untimed():
    calls: list[int] = []

    def generate(prompt, budget):
        calls.append(budget)
        return result(accepted=[1], nodes=2)

    prompts = (Prompt("a", "python", "x"),)
    done = bench.sweep(generate, prompts, (1, 6), 1, lambda run: None)
    assert calls == [1, 6, 1, 6]
    assert len(done.runs) == 2


def test_classes_and_their_figures():
    done = sweep_by_hand({1: [0] * 3, 4: [1, 1]})
    assert done.classes == ("python", "prose", "all")
    one = done.aggregate("python", 4)
    assert one.prompts == 1
    assert one.acceptance_length == 2
    assert one.speedup == pytest.approx((3 / 2) / (3 / 3))
    assert done.aggregate("all", 4).prompts == 2
    assert sweep_by_hand({4: [1, 1]}).aggregate("all", 4).speedup is None


def test_different_tokens_are_found_and_told():
    assert sweep_by_hand({1: [0] * 3, 4: [1, 1]}).disagreements() == ()
    done = sweep_by_hand({1: [0] * 3, 4: [1, 1]}, wrong={("b", 4)})
    assert done.disagreements() == ("b",)
    assert "tokens DIFFER between runs of: b" in bench.report(done)
    assert record.bench(done)["tokens_equal"] is False


def test_the_report_is_readable_and_honest():
    text = bench.report(sweep_by_hand({1: [0] * 3, 4: [1, 1], 6: [0] * 5}))
    title = "python (1 prompts, 2 repeats; speeds and times are medians, the rest means)\n"
    assert title in text
    assert re.search(r"^1 +1\.0 +1\.00 +1\.00 ", text, re.MULTILINE)
    assert re.search(r"^4 +1\.5 +1\.50 +2\.00 +100\.0 % ", text, re.MULTILINE)
    assert "tokens equal over all budgets and repeats, 2 prompts" in text
    assert "SLOWER than plain decoding at budget 6" in text
    assert "None" not in text
