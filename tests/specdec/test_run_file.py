"""Run files read back: what was written is what is read, and damage is refused by name."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec import rounds_record, run_file
from specdec.errors import RunFileError
from specdec.round import PhaseSeconds, Round
from specdec.tree.draft_tree import DraftTree
from specdec.vocabulary import pieces


def test_rounds_come_back_as_they_were():
    tree = DraftTree(
        np.array([7, 1, 2, 3], np.int32),
        np.array([-1, 0, 0, 1], np.int32),
        np.array([0.0, -0.5, -math.inf, -1.25]),
    )
    seconds = PhaseSeconds(0.25, 0.5, 0.125, 1.0)
    one = Round(tree, (0, 1, 3), 9, seconds, 4, 17, experts=12, misses=5, stall=0.5)
    text = json.dumps(rounds_record.to_json([one]), allow_nan=False)
    (back,) = rounds_record.from_json(json.loads(text))
    for name in ("tokens", "parents", "log_weights"):
        assert (getattr(back.tree, name) == getattr(tree, name)).all()
    for name in ("path", "bonus", "seconds", "budget", "context", "experts", "misses", "stall"):
        assert getattr(back, name) == getattr(one, name)


def test_a_generation_is_whole(runs):
    file = run_file.read(runs.compared)
    assert (file.kind, file.partial, file.name) == ("generate", False, "compared")
    plain, fast = file.runs
    assert (plain.name, plain.budget, fast.name, fast.budget) == (
        "autoregressive",
        1,
        "speculative",
        4,
    )
    assert plain.prompt == fast.prompt
    for one in (plain, fast):
        emitted = [token for each in one.rounds for token in each.tokens]
        assert tuple([one.tokens[0], *emitted][: len(one.tokens)]) == one.tokens
        assert one.metrics.rounds == len(one.rounds)
        assert one.metrics.accepted == sum(each.accepted for each in one.rounds)
        contexts = [one.metrics.prompt_tokens + n for n in _ends(one.rounds)]
        assert [each.context for each in one.rounds] == contexts
        asked = sum(each.experts for each in one.rounds)
        assert 0 < asked < one.metrics.experts.hits + one.metrics.experts.misses
        assert 0 < sum(each.misses for each in one.rounds) < one.metrics.experts.misses
    document = json.loads(runs.compared.read_text())
    text = document["runs"]["speculative"]["text"]
    assert "".join(pieces(file.vocabulary, fast.tokens)) == text


def _ends(rounds):
    """Tokens committed before each round, after the prompt."""
    ends = np.cumsum([0, *(len(each.tokens) for each in rounds)])
    return ends[:-1].tolist()


def test_repeats_get_their_trees_back(runs):
    """A repeat is written without trees and read with them; its times are its own."""
    document = json.loads(runs.sweep.read_text())
    lean = [run for run in document["runs"] if "tokens" not in run]
    assert len(lean) >= 12  # one repeat of each prompt at budgets 1 and 3, at least
    assert all("parents" not in one for run in lean for one in run["rounds"])
    for run in run_file.read(runs.sweep).runs:
        emitted = [token for each in run.rounds for token in each.tokens]
        assert tuple([run.tokens[0], *emitted][: len(run.tokens)]) == run.tokens
        same = [
            one
            for one in document["runs"]
            if (one["prompt"], one["budget"], one["repeat"]) == (run.title, run.budget, run.repeat)
        ]
        seconds = [one["seconds"]["verify"] for one in same[0]["rounds"]]
        assert [each.seconds.verify for each in run.rounds] == seconds


def test_a_round_stands_on_one_line_and_files_stay_small(runs):
    document = json.loads(runs.compared.read_text())
    rounds = sum(len(run["rounds"]) for run in document["runs"].values())
    lines = runs.compared.read_text().splitlines()
    assert sum('"log_weights"' in line for line in lines) == rounds
    written = json.loads(runs.sweep.read_text())
    count = sum(len(run["rounds"]) for run in written["runs"])
    assert sum(len(json.dumps(run["rounds"])) for run in written["runs"]) / count < 400


def test_partial_files_say_so(runs):
    file = run_file.read(runs.cut)
    assert file.partial
    assert [len(one.rounds) for one in file.runs] == [3]
    assert file.runs[0].metrics.finish == "interrupted"
    sweep = run_file.read(runs.cut_sweep)
    assert sweep.partial
    assert 0 < len(sweep.runs) < 36


def edited(path, runs, change):
    """A copy of the generation with `change` made to its document."""
    document = json.loads(runs.compared.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": 2, "kind": "generate", "rate": NaN}', "not JSON: NaN"),
        ('{"schema": 2, "kind": "generate", "rate": -1e999}', "not JSON: -1e999"),
        ("[]", "no run of specdec, expected what `specdec generate --json`"),
        ('{"schema": 2}', "no run of specdec"),
        ('{"schema": 1, "kind": "report"}', "kind 'report', expected what"),
        ('{"schema": 1, "kind": "bench", "specdec": "0.1.0"}', "schema 1, expected 2; an older"),
        ('{"schema": 3, "kind": "bench"}', "schema 3, expected 2; a newer"),
        ('{"schema": 2, "kind": "generate"}', "the field 'settings' is missing"),
        ("\udcff", "not JSON"),
    ],
)
def test_what_is_no_run_file_is_refused(tmp_path, text, words):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunFileError) as caught:
        run_file.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(RunFileError, match=r"nope\.json: cannot be read: No such file"):
        run_file.read(tmp_path / "nope.json")
    with pytest.raises(RunFileError, match="cannot be read: Is a directory"):
        run_file.read(tmp_path)


def test_damage_inside_is_named(tmp_path, runs):
    def speculative(document):
        return document["runs"]["speculative"]

    for change, words in (
        (lambda d: speculative(d).pop("rounds"), "the field 'rounds' is missing"),
        (lambda d: speculative(d)["metrics"].update(rounds="many"), "rounds"),
        (lambda d: speculative(d)["rounds"].pop(), "rounds, there are"),
        (lambda d: d.update(vocabulary={"1": 7.5}), "not readable"),
        (lambda d: d.update(vocabulary={"1": "\ud800"}), "surrogates not allowed"),
        (lambda d: speculative(d)["metrics"]["phases"][0].update(name="x"), "phases ['x']"),
        (lambda d: d["plan"].update(slots="few"), "slots"),
        (lambda d: speculative(d)["metrics"].pop("depths"), "depths"),
        (lambda d: speculative(d)["rounds"][0].update(parents=[-1, 5]), "make no tree"),
        (lambda d: speculative(d)["rounds"][0].update(log_weights=[0.5] * 5), "make no tree"),
        (lambda d: speculative(d)["rounds"][1].update(path=[0, 0]), "round 1: its path [0, 0]"),
        (lambda d: speculative(d)["rounds"][0].pop("tokens"), "round 0 has no tree"),
        (lambda d: d["settings"].update(budget=[]), "budget is [], expected a positive number"),
    ):
        path = edited(tmp_path / "run.json", runs, change)
        with pytest.raises(RunFileError) as caught:
            run_file.read(path)
        assert words in str(caught.value), (words, str(caught.value))
    sweep = json.loads(runs.sweep.read_text())
    sweep["runs"][0] = [1]
    path.write_text(json.dumps(sweep))
    with pytest.raises(RunFileError, match="not readable"):
        run_file.read(path)


def places(value, at=()):
    """Paths to every value of a document; of a list its first and last."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list):
        for index in {0, len(value) - 1} if value else ():
            yield from places(value[index], (*at, index))


JUNK = st.sampled_from([None, -1, 2**40, 0.5, "x", [], {}, [1], {"a": 1}, True, "<script>"])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_value_of_another_kind_is_reported_or_refused(tmp_path, runs, data):
    """The report of a damaged file is a report or one error, never a traceback."""
    from specdec.reports import formats
    from specdec.reports.report import Report

    source = data.draw(st.sampled_from([runs.compared, runs.sweep]))
    document = json.loads(source.read_text())
    *above, last = data.draw(st.sampled_from([at for at in places(document) if at]))
    inside = document
    for key in above:
        inside = inside[key]
    inside[last] = data.draw(JUNK)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    try:
        report = Report.of([run_file.read(path)])
    except RunFileError:
        return
    formats.text(report)
