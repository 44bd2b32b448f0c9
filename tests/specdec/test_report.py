"""What is printed and what is written: complete, in words, and never half a file."""

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from specdec import bench_record, record, rounds_record
from specdec.errors import SpecdecError
from specdec.metrics import Memory, compare, measure
from specdec.peer import PeerRun
from specdec.report import memory_line, side_by_side, summary
from specdec.units import number, percent, size, table
from tests.results import PROMPTS, counters, result, sweep_by_hand

ROOT = Path(__file__).parents[2]
MEMORY = Memory(process=410_000_000, mlx=120_000_000, planned=450_000_000)


def test_the_summary_tells_everything():
    experts = (
        counters(0, pinned=True, hits=60),
        counters(1, hits=30, misses=10, bytes_read=7_000_000),
    )
    text = summary(measure(result(accepted=[2, 0, 1], nodes=4, experts=experts)), MEMORY)
    for words in (
        "10 tokens, prefill 20.0 tok/s, first token after 0.60 s",
        "7 tokens, decode 2.0 tok/s, ended by: length",
        "3 rounds, mean length 2.00",
        "tokens committed per round: 1 bonus token + accepted draft tokens",
        "accepted 3 of 12 drafted (25.0 %)",
        "1: 66.7 %, 2: 33.3 %, 3: 0.0 %, 4: 0.0 %",
        "draft 200.00 ms (20.0 %)",
        "verify 500.00 ms (50.0 %)",
        "30 hits, 10 misses in unpinned layers (75.0 % hit), 90.0 % with pinned",
        "7.00 MB read, 1.00 MB per token",
        "peak 410 MB resident, 120 MB in MLX, planned 450 MB",
        "sha256 ",
    ):
        assert words in text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_a_summary_of_nothing_has_dashes():
    text = summary(measure(result(accepted=[], nodes=0, decode_seconds=0.0, experts=())), MEMORY)
    assert "decode - tok/s" in text
    assert "None" not in text


def test_side_by_side():
    plain = result(accepted=[0] * 6, nodes=0, decode_seconds=6.0)
    fast = result(accepted=[2, 2], nodes=4, decode_seconds=2.0)
    text = side_by_side(compare(plain, fast), MEMORY)
    assert re.search(r"decode tok/s +1\.0 +3\.0\n", text)
    assert re.search(r"mean acceptance length +1\.00 +3\.00\n", text)
    assert re.search(r"draft, ms per round +200\.00 +200\.00\n", text)
    assert "3.00x (decode tok/s, prefill excluded)" in text
    assert "tokens      equal" in text
    assert "SLOWER" not in text
    assert "DIFFER" not in text


def test_slower_and_different_are_said_aloud():
    plain = result(accepted=[0] * 4, nodes=0, decode_seconds=1.0)
    slow = result(accepted=[2, 1], nodes=4, decode_seconds=2.0, tokens=(0, 1, 2, 7, 8))
    text = side_by_side(compare(plain, slow), MEMORY)
    assert "SLOWER than plain decoding here: 0.50 times" in text
    assert "DIFFER from position 3 on" in text
    even = replace(compare(plain, slow), speedup=0.98, speedup_low=0.9, speedup_high=1.1)
    text = side_by_side(even, MEMORY)
    assert "no faster than plain decoding here: 0.98 times" in text
    assert "SLOWER" not in text


def test_an_overrun_plan_is_said_aloud():
    assert "ABOVE" not in memory_line(MEMORY)
    assert "10.0 % ABOVE the plan" in memory_line(Memory(110, 5, 100))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9999, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (1_234_567_890, "1.23 GB"),
        (5_000_000_000_000, "5000 GB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


def test_figures_and_tables():
    assert number(None) == percent(None) == "-"
    assert (number(1.25, 1), percent(0.5)) == ("1.2", "50.0 %")
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


# --- the JSON file


def test_json_appears_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with record.JsonFile(str(path)) as file:
        assert path.read_text() == "old"
        file.write({"text": "é", "none": None})
    assert json.loads(path.read_text()) == {"text": "é", "none": None}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), record.JsonFile(str(path)):
        raise RuntimeError("the run")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"), record.JsonFile(str(path)) as file:
        file.write({"rate": float("nan")})
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["missing/run.json", "", "file/run.json"])
def test_an_unwritable_path_is_found_on_entry(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecdecError, match="--json"), record.JsonFile(str(tmp_path / name)):
        pytest.fail("entered")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_or_folder_is_found_on_entry(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(SpecdecError, match="may not be written"), record.JsonFile(str(path)):
        pytest.fail("entered")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(SpecdecError, match="--json"), record.JsonFile(str(tmp_path / "new.json")):
        pytest.fail("entered")


def test_no_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with record.JsonFile(None) as file:
        file.write({})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_written_again_is_whole_each_time(tmp_path):
    path = tmp_path / "run.json"
    parts = [json.dumps({"run": n, "text": "€" * n}) for n in range(3)]
    with record.JsonFile(str(path)) as file:
        for count in range(4):
            for document in ({"a": 1}, {"a": "x" * 200, "b": {"c": [1, 2]}}):
                file.write(document, {"runs": parts[:count]})
                expected = document | {"runs": [json.loads(part) for part in parts[:count]]}
                assert json.loads(path.read_text()) == expected
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_a_run_in_json_is_complete():
    done = result(accepted=[2, 0], nodes=4)
    value = json.loads(json.dumps(record.run(done, measure(done)), allow_nan=False))
    assert value["tokens"] == list(done.tokens)
    assert value["text"] == done.text
    assert [one["path"] for one in value["rounds"]] == [[0, 1, 2], [0]]
    assert value["rounds"][0]["parents"] == [-1, 0, 1, 2, 3]
    assert rounds_record.from_json(value["rounds"])[0].tokens == done.rounds[0].tokens
    assert value["metrics"]["acceptance_length"] == 2
    assert value["metrics"]["experts"]["layers"][0]["bytes_read"] == 4096


def beside(run):
    """A peer's run."""
    return PeerRun(run.cell.task, run.repeat, 1.0, 0.5, run.metrics.token_sha256, None, None)


def test_every_json_field_is_documented():
    """docs/json.md names each field of each object."""
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs/json.md").read_text()))
    plain, fast = result(accepted=[0] * 3, nodes=0), result(accepted=[1, 0], nodes=2)
    swept = sweep_by_hand({1: [0] * 3, 2: [1, 0]})
    swept = replace(swept, peer=tuple(map(beside, swept.runs[::2])))
    value = [record.run(fast, measure(fast)), bench_record.sweep_json(swept)]
    value += [bench_record.run_json(run) for run in swept.runs]
    value += bench_record.prompts_json(swept.grid, {(p.id, None): [1] for p in PROMPTS})
    value.append(record.comparison(compare(plain, fast)))

    def names(part):
        if isinstance(part, list | tuple):
            return set().union(*(names(one) for one in part))
        if isinstance(part, dict):
            own = {key for key in part if not re.fullmatch(r"\d+|python|prose|all", key)}
            return own.union(*(names(one) for one in part.values()))
        return set()

    assert names(value) - documented == set()
