"""The sweep: order, medians per group, agreement of tokens, runs that need not be made again."""

import json
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec import bench, bench_record
from specdec.bench_grid import Budget, Cell, Grid, Group
from specdec.bench_table import report
from specdec.prompts import Prompt
from tests.results import PROMPTS, result, sweep_by_hand

TWO = {1: [0] * 3, 4: [1, 1]}


def key(run):
    cell = run.cell
    return run.repeat, cell.prompt.id, cell.temperature, cell.context, cell.budget


def test_budgets_are_the_inner_loop_and_repeats_the_outer():
    seen: list[bench.Run] = []
    axes = {"temperatures": (0.0, 0.8), "contexts": (64, 512)}
    done = sweep_by_hand(TWO, on_run=lambda _, run: seen.append(run), **axes)
    order = list(product((0, 1), ("a", "b"), (0.0, 0.8), (64, 512), (1, 4)))
    assert [key(run) for run in seen] == order
    assert done.runs == tuple(seen)
    assert done.grid.planned == len(order)


def test_every_temperature_and_budget_warms_up_untimed():
    calls: list[Cell] = []

    def generate(cell):
        calls.append(cell)
        return result(accepted=[1], nodes=2)

    prompts = (Prompt("a", "python", "x"), Prompt("b", "python", "y"))
    grid = Grid(prompts, (1, 6), 1, (0.0, 0.5))
    done = bench.sweep(generate, grid, lambda *_: None)
    assert calls == [*list(grid.cells)[:4], *grid.cells]
    assert len(done.runs) == 8
    calls.clear()
    kept = [run for run in done.runs if run.cell.budget == 1]
    bench.sweep(generate, grid, lambda *_: None, kept)
    assert {cell.budget for cell in calls} == {6}


def test_classes_and_their_figures():
    done = sweep_by_hand(TWO)
    assert done.grid.classes == ("python", "prose", "all")
    one = done.aggregate(Group("python", 0.0, None), 4)
    assert one.prompts == 1
    assert one.acceptance_length == 2
    assert one.speedup == pytest.approx((3 / 2) / (3 / 3))
    every = Group("all", 0.0, None)
    assert done.aggregate(every, 4).prompts == 2
    assert sweep_by_hand({4: [1, 1]}).aggregate(every, 4).speedup is None


def test_different_tokens_are_found_and_told():
    assert sweep_by_hand(TWO).disagreements() == ()
    done = sweep_by_hand(TWO, wrong={("b", 4)})
    assert list(map(done.label, done.disagreements())) == ["b"]
    assert "tokens DIFFER between runs of: b" in report(done)
    assert bench_record.sweep_json(done)["tokens_equal"] is False
    done = sweep_by_hand(TWO, wrong={("b", 4)}, temperatures=(0.0, 0.8))
    names = ["b (temperature 0)", "b (temperature 0.8)"]
    assert list(map(done.label, done.disagreements())) == names


def test_without_one_text_for_all_budgets_only_repeats_must_agree():
    """--accept swor; temperature 0 stays as strict as ever, and budget auto may draw anew."""
    axes = {"temperatures": (0.0, 0.8), "same_tokens": False}
    done = sweep_by_hand(TWO, wrong={("b", 4)}, **axes)
    assert list(map(done.label, done.disagreements())) == ["b (temperature 0)"]
    assert "budgets draw anew" in report(sweep_by_hand(TWO, **axes))

    def generate(cell):
        tokens.append(len(tokens))
        return result(accepted=[1], nodes=2, tokens=(0, 1, tokens[-1]))

    budgets: list[tuple[Budget, int]] = [(4, 1), ("auto", 0)]
    for budget, expected in budgets:
        tokens: list[int] = []
        grid = Grid(PROMPTS[:1], (budget,), 2, (0.8,), same_tokens=False)
        done = bench.sweep(generate, grid, lambda *_: None)
        assert len(done.disagreements()) == expected


def test_the_report_is_readable_and_honest():
    text = report(sweep_by_hand({1: [0] * 3, 4: [1, 1], 6: [0] * 5, "auto": [1, 1]}))
    assert text.startswith("python (1 prompts, 2 repeats)\nbudget ")
    assert re.search(r"^1 +1\.0 +1\.00 +- +1\.00 ", text, re.MULTILINE)
    assert re.search(r"^4 +1\.5 +1\.50 +- +2\.00 +100\.0 % ", text, re.MULTILINE)
    assert re.search(r"^auto +1\.5 +1\.50 +- +2\.00 ", text, re.MULTILINE)
    assert "tokens equal over all budgets and repeats, 2 prompts" in text
    assert "SLOWER than plain decoding at budget 6" in text
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_speed_up_has_its_interval():
    """Of six prompts it lies between the least and the greatest: all six on one side of the true
    median happens once in 32 times."""
    prompts = tuple(Prompt(str(n), "python", "p") for n in range(6))
    rounds = {str(n): 10 + n for n in range(6)}

    def generate(cell):
        count = 30 if cell.budget == 1 else rounds[cell.prompt.id]
        return result(accepted=[0] * count, nodes=2, tokens=tuple(range(31)))

    done = bench.sweep(generate, Grid(prompts, (1, 4), 1), lambda *_: None)
    one = done.aggregate(Group("python", 0.0, None), 4)
    assert one.speedup == pytest.approx((30 / 12 + 30 / 13) / 2)
    assert (one.speedup_low, one.speedup_high) == (pytest.approx(30 / 15), pytest.approx(30 / 10))
    assert re.search(r"^4 +\d+\.\d +2\.40 +2\.00-3\.00 ", report(done), re.MULTILINE)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ((31, 32, 33, 34, 35, 36), "SLOWER than plain decoding at budget 4"),
        ((29, 32, 33, 34, 35, 36), "no faster than plain decoding at budget 4"),
        ((10, 11, 12, 13, 14, 40), None),
    ],
)
def test_slower_is_said_where_it_is_known(rounds, words):
    """Where the interval holds 1, it is not."""
    prompts = tuple(Prompt(str(n), "python", "p") for n in range(6))

    def generate(cell):
        count = 30 if cell.budget == 1 else rounds[int(cell.prompt.id)]
        return result(accepted=[0] * count, nodes=2, tokens=tuple(range(31)))

    text = report(bench.sweep(generate, Grid(prompts, (1, 4), 1), lambda *_: None))
    assert re.findall("^.* than plain decoding.*$", text, re.MULTILINE) == [words] * bool(words)


def test_a_table_is_named_by_what_there_is_more_than_one_of():
    def names(**axes):
        return re.findall(r"^(.*) \(\d prompts", report(sweep_by_hand(TWO, **axes)), re.MULTILINE)

    assert names() == ["python", "prose", "all"]
    assert names(temperatures=(0.8,), contexts=(64,)) == ["python", "prose", "all"]
    assert names(temperatures=(0.0, 0.8))[:2] == [
        "python, temperature 0",
        "python, temperature 0.8",
    ]
    both = names(temperatures=(0.0, 0.8), contexts=(64, 2048))
    assert len(both) == 3 * 2 * 2
    assert both[-1] == "all, temperature 0.8, context 2048"


@given(st.data())
def test_kept_runs_are_not_made_again(data):
    axes = {"temperatures": (0.0, 0.8), "contexts": (64, 512)}
    whole = sweep_by_hand(TWO, **axes)
    kept = data.draw(st.lists(st.sampled_from(whole.runs), unique_by=key))
    made: list[bench.Run] = []
    done = sweep_by_hand(TWO, on_run=lambda _, run: made.append(run), kept=kept, **axes)
    assert done.kept == len(kept)
    assert done.runs == (*kept, *made)
    assert sorted(map(str, map(key, done.runs))) == sorted(map(str, map(key, whole.runs)))
    assert [key(run) for run in made] == [key(r) for r in whole.runs if r not in kept]
    for group in done.grid.groups:
        assert done.aggregate(group, 4) == whole.aggregate(group, 4)


def test_a_sweep_so_far_is_partial():
    seen: list[bool] = []
    sweep_by_hand(TWO, on_run=lambda so_far, _: seen.append(so_far.partial))
    assert seen == [True] * 7 + [False]


def test_the_json_of_a_sweep_is_json():
    done = sweep_by_hand({1: [0] * 3, "auto": [1, 1]}, temperatures=(0.0, 0.8))
    value = json.loads(json.dumps(bench_record.sweep_json(done), allow_nan=False))
    assert value["budgets"] == [1, "auto"]
    assert len(value["groups"]) == 3 * 2 * 2
    one = value["groups"][-1]
    assert (one["class"], one["temperature"], one["budget"]) == ("all", 0.8, "auto")
    assert one["speedup"] == pytest.approx(1.5)
