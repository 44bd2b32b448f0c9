"""`specdec report` on files that commands have really written: page, text, Markdown, JSON."""

import builtins
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.run_file import read
from tests.browser import DARK, LIGHT, brightness, picture, visit
from tests.commands import fails, run


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The page of the comparison and the sweep together."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    done = run("report", runs.compared, runs.sweep, "-o", path)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"report: {path}\n"
    return path


def report(*arguments):
    done = run("report", *arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def document(*arguments):
    return json.loads(report(*arguments, "--format", "json"))


def total(values, series):
    """The figures of a series, all classes together."""
    return [one for one in values["figures"] if one["series"] == series][-1]


# --- figures


def test_figures_are_those_of_the_run(runs):
    values = document(runs.compared)
    written = json.loads(runs.compared.read_text())
    fast = written["runs"]["speculative"]["metrics"]
    found = total(values, "budget 4")
    assert found["speed"]["value"] == fast["decode_tokens_per_second"]
    assert found["length"]["value"] == pytest.approx(fast["acceptance_length"])
    assert found["acceptance_rate"] == fast["acceptance_rate"]
    for mine, other in zip(found["depths"], fast["depths"], strict=True):
        assert mine["reached"]["value"] == pytest.approx(other["reached"])
    for mine, other in zip(found["phases"], fast["phases"], strict=True):
        assert mine["ms_per_round"] == pytest.approx(other["ms_per_round"])
    for mine, other in zip(found["layers"], fast["experts"]["layers"], strict=True):
        assert mine["hit_rate"] == other["hit_rate"]
    (verdict,) = values["comparisons"]
    told = written["comparison"]
    assert verdict["tokens_equal"] is told["tokens_equal"] is True
    assert verdict["speed"]["value"] == pytest.approx(told["speedup"])
    assert verdict["speed"]["low"] == pytest.approx(told["speedup_low"], rel=1e-3)
    assert verdict["speed"]["high"] == pytest.approx(told["speedup_high"], rel=1e-3)
    assert (verdict["speed"]["unit"], verdict["prompts"]) == ("blocks", 1)


def test_a_sweep_is_told_per_class_and_paired_by_prompt(runs):
    values, written = document(runs.sweep), json.loads(runs.sweep.read_text())
    assert {(one["series"], one["kind"]) for one in values["figures"]} == {
        (name, kind)
        for name in ("autoregressive", "budget 3", "budget auto")
        for kind in ("x", "y", "all")
    }
    for group in written["groups"]:
        name = f"budget {group['budget']}" if group["budget"] != 1 else "autoregressive"
        (mine,) = [
            one
            for one in values["figures"]
            if (one["series"], one["kind"]) == (name, group["class"])
        ]
        assert mine["speed"]["value"] == pytest.approx(group["decode_tokens_per_second"])
        assert mine["prompts"] == group["prompts"]
        assert mine["runs"] == 2 * group["prompts"]
        verdicts = [
            one
            for one in values["comparisons"]
            if (one["series"], one["kind"]) == (name, group["class"])
        ]
        if group["budget"] != 1:
            (verdict,) = verdicts
            assert verdict["speed"]["value"] == pytest.approx(group["speedup"])
            assert verdict["tokens_equal"]
            unit = "prompts" if group["class"] == "all" else "blocks"
            assert verdict["speed"]["unit"] == unit
            assert verdict["speed"]["low"] < verdict["speed"]["value"] < verdict["speed"]["high"]
            if unit == "prompts":
                assert verdict["speed"]["low"] == pytest.approx(group["speedup_low"])


def test_files_of_different_budgets_are_compared(runs):
    """Plain decoding of one file stands against the budgets of others, on the same prompt."""
    values = document(runs.compared, runs.two, runs.eight)
    against = {(one["series"], one["against"]) for one in values["comparisons"]}
    assert ("budget 8, eight", "autoregressive, compared") in against
    assert ("budget 2, two", "autoregressive, compared") in against
    assert ("budget 2, two", "budget 4, compared") in against
    assert all(one["tokens_equal"] for one in values["comparisons"])
    assert "the files kept different experts in memory" in " ".join(values["warnings"])


def test_all_formats_hold_the_same_figures(runs, page):
    arguments = (runs.compared, runs.sweep)
    values = document(*arguments)
    text, markdown = (report(*arguments, "--format", form) for form in ("text", "md"))
    words = Words.of(page.read_text())
    plain = markdown.replace("\\", "")
    for one in values["figures"]:
        for estimate, digits in ((one["speed"], 1), (one["experts"], 1), (one["misses"], 2)):
            told = f"{estimate['value']:.{digits}f}"
            assert all(told in form for form in (text, plain, words)), told
        rates = [at["rate"] for at in (*one["depths"], *one["ranks"]) if at["rate"]["low"]]
        for estimate, scale, digits in ((one["length"], 1, 2), *((at, 100, 1) for at in rates)):
            ends = [scale * estimate[name] for name in ("value", "low", "high")]
            told = "{0:.{3}f} ({1:.{3}f} to {2:.{3}f})".format(*ends, digits)
            assert one["budget"] == 1 or all(told in form for form in (text, plain, words)), told
    for one in values["comparisons"]:
        ends = one["speed"]
        told = f"{ends['value']:.2f} ({ends['low']:.2f} to {ends['high']:.2f})"
        assert all(told in form for form in (text, plain, words)), told
    for title in re.findall(r"^## (.+)$", markdown, re.MULTILINE):
        assert title in text
        assert title in words


def test_every_field_of_the_json_is_documented(runs):
    text = (Path(__file__).parents[2] / "docs/json.md").read_text()
    documented = set(re.findall(r"`(\w+)`", text))

    def names(part):
        if isinstance(part, list):
            return set().union(*map(names, part))
        if isinstance(part, dict):
            return set(part).union(*map(names, part.values()))
        return set()

    values = document(runs.compared, runs.sweep)
    for file in values["files"]:  # another document's, described there
        file["environment"], file["settings"] = {}, {}
    assert names(values) - documented == set()


def test_partial_files_are_shown_as_partial(runs):
    for path in (runs.cut, runs.cut_sweep):
        text = report(path, "--format", "text")
        assert f"{path}: PARTIAL: it was interrupted; figures are of what was run" in text
        assert "decode tok/s" in text
    words = Words.of(report(runs.cut, "-o", "-"))
    assert "PARTIAL" in words
    both = document(runs.compared, runs.cut)
    cut = [one for one in both["comparisons"] if one["series"] == "budget 4, cut"]
    assert cut
    assert all(one["tokens_equal"] for one in cut)


def test_a_file_without_runs_is_a_report_that_says_so(runs, tmp_path):
    empty = json.loads(runs.cut.read_text()) | {"runs": {}}
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(empty))
    assert "PARTIAL: no run was made" in report(path, "--format", "text")
    assert "PARTIAL: no run was made" in Words.of(report(path, "-o", "-"))


def test_files_without_a_prompt_in_common_are_not_compared(runs):
    values = document(runs.compared, runs.sweep)
    assert "not compared with other files" in " ".join(values["warnings"])
    names = {one["series"].rpartition(", ")[2] for one in values["comparisons"]}
    for one in values["comparisons"]:
        assert one["series"].rpartition(", ")[2] == one["against"].rpartition(", ")[2]
    assert names == {"compared", "sweep"}


def test_differing_tokens_and_machines_are_said_aloud(runs, tmp_path):
    other = json.loads(runs.two.read_text())
    other["environment"]["processor"] = "another one"
    run_of = other["runs"]["speculative"]
    run_of["tokens"][3] += 1
    run_of["metrics"]["token_sha256"] = "0"
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    text = report(runs.compared, path, "--format", "text")
    assert "tokens DIFFER between budget 2, other and autoregressive, compared" in text
    assert "different processor" in text
    assert "DIFFER" in text.partition("Comparisons")[2]
    other["settings"]["cache_tolerance"] = 0.1
    path.write_text(json.dumps(other))
    text = report(runs.compared, path, "--format", "text")
    assert "tokens differ, as they may with --cache-tolerance, between budget 2, other" in text


def test_slower_is_said_aloud_as_far_as_it_is_known(runs, tmp_path):
    path = tmp_path / "slow.json"
    for factor, words in ((0.999, "was no faster than"), (0.2, "was SLOWER than"), (3, None)):
        slow = json.loads(runs.compared.read_text())
        plain, fast = (slow["runs"][name]["metrics"] for name in ("autoregressive", "speculative"))
        speed = factor * plain["decode_tokens_per_second"]
        fast["decode_tokens_per_second"] = speed
        path.write_text(json.dumps(slow))
        said = [one for one in document(path)["warnings"] if "plain decoding" in one]
        assert len(said) == (words is not None)
        assert all(f"budget 4 (prompt) {words} plain decoding: {factor:.2f}" in one for one in said)


# --- where it goes


def test_the_page_lies_beside_the_first_run_and_replaces_nothing(runs, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(runs.two.read_bytes())
    assert run("report", path).exit_code == 0
    place = tmp_path / "mine.html"
    before = place.read_text()
    place.write_text("mine")
    assert fails(run("report", path), "mine.html: exists", "--force", "--output")
    assert place.read_text() == "mine"
    assert report(path, "--force", "-q") == ""
    assert place.read_text()[:200] == before[:200]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine.html", "mine.json"]


def test_a_run_is_never_overwritten(runs, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(runs.two.read_bytes())
    done = run("report", path, "--format", "json", "-o", path, "--force")
    assert fails(done, "mine.json: is one of the runs")
    assert read(path).runs
    assert fails(run("report", path, path), "named twice")
    assert fails(run("report", path, "-o", tmp_path), "exists and is not a file")
    assert fails(run("report", path, "-o", tmp_path / "no" / "page.html"), "is no folder")
    assert fails(run("report", path, "-o", tmp_path / ("x" * 300)), "File name too long")


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_what_has_no_name_is_no_run(name):
    assert fails(run("report", name), "is no file")
    assert fails(run("report", name, "--format", "text"), "Is a directory")


def test_text_formats_go_to_a_file_when_asked(runs, tmp_path):
    for form in ("text", "md", "json"):
        path = tmp_path / form
        assert report(runs.two, "--format", form, "-o", path) == ""
        assert path.read_text() == report(runs.two, "--format", form)


def test_figures_as_text_need_no_engine_and_no_plots(runs):
    code = f"""
import sys
from specdec.cli import main
try:
    main(["report", {str(runs.sweep)!r}, "--format", "json"])
except SystemExit as end:
    assert end.code == 0, end.code
needless = {{"mlx", "numba", "tokenizers", "matplotlib", "jinja2"}} & set(sys.modules)
needless |= {{"scipy.stats"}} & set(sys.modules)
assert not needless, needless
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 1, "kind": "generate"}'])
def test_what_is_no_run_is_one_line(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert fails(run("report", path), f"{path}: ")
    assert not (tmp_path / "run.html").exists()


def test_without_matplotlib_the_page_says_what_to_install(runs, monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert fails(run("report", runs.two, "-o", "-"), 'pip install "specdec[report]"')
    assert "decode tok/s" in report(runs.two, "--format", "text")


# --- the page


class Words(html.parser.HTMLParser):
    """The words of a page; `tags` are its elements, in order."""

    def __init__(self):
        super().__init__()
        self.words, self.tags, self._hidden = [], [], False

    @classmethod
    def of(cls, text):
        parser = cls()
        parser.feed(text)
        return " ".join(parser.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)


SECTIONS = ("headline", "figures", "text", "trees", "tables")


def test_the_page_is_one_small_file_without_scripts_or_addresses(page):
    text = page.read_text()
    assert len(text) < 500_000
    parser = Words()
    parser.feed(text)
    assert not [tag for tag, _ in parser.tags if tag in ("script", "iframe", "object", "img")]
    names = ("src", "href", "xlink:href", "action", "poster")
    links = [attrs[name] for _, attrs in parser.tags for name in names if name in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)|@import", text)
    ids = [attrs["id"] for _, attrs in parser.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = {link[1:] for link in links if link.startswith("#")}
    assert anchors <= set(ids)
    assert set(SECTIONS) <= set(ids)


def test_plots_have_no_colour_of_their_own(page):
    """Whatever a plot draws follows the page into the dark."""
    plots = re.findall(r'<svg role="img" aria-label=.*?</svg>', page.read_text(), re.DOTALL)
    assert len(plots) >= 9
    for svg in plots:
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?![-\w])(?=[;\"])", svg)
        assert "var(--" in svg


def test_the_text_shows_where_each_token_came_from(runs):
    text = report(runs.compared, "-o", "-")
    file = read(runs.compared)
    fast = file.runs[1]
    marks = re.findall(r'<span class="(\w+)(?: first)?" title="([^"]*)">([^<]*)</span>', text)
    assert len(marks) == len(fast.tokens)
    assert marks[0][0] == "prefill"
    accepted = sum(role == "accepted" for role, _, _ in marks)
    bonus = sum(role == "bonus" for role, _, _ in marks)
    assert accepted + bonus == len(marks) - 1
    assert accepted >= fast.metrics.accepted - 4  # what the last round had beyond the end
    assert marks[1][1].startswith("round 1: ")


HOSTILE = '<script>alert("x")</script><img src=https://example.com/x.png onerror=alert(1)>'


@pytest.fixture(scope="module")
def hostile(runs, tmp_path_factory):
    """A page of a file whose every text is an attack."""
    document = json.loads(runs.compared.read_text())
    document["prompt"] = HOSTILE
    document["vocabulary"] = dict.fromkeys(document["vocabulary"], HOSTILE)
    document["settings"]["model"] = HOSTILE
    document["environment"]["processor"] = HOSTILE
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "<b>run&.json"
    path.write_text(json.dumps(document))
    assert run("report", path, "-o", folder / "page.html").exit_code == 0
    return folder / "page.html"


def test_what_a_model_wrote_is_text(hostile):
    parser = Words()
    parser.feed(hostile.read_text())
    assert not [tag for tag, _ in parser.tags if tag in ("script", "img", "b>run&.json")]
    assert not [attrs for _, attrs in parser.tags if "onerror" in attrs]
    assert HOSTILE in "".join(parser.words)


def test_a_browser_shows_all_of_it_and_asks_for_nothing(page, tmp_path):
    seen = visit(page, tmp_path)
    assert seen.console == seen.urls == ()
    parser = Words()
    parser.feed(seen.dom)
    ids = {attrs["id"] for _, attrs in parser.tags if "id" in attrs}
    assert set(SECTIONS) <= ids
    assert sum(one.startswith("plot-") for one in ids) >= 9
    assert sum(attrs.get("class") == "tree" for _, attrs in parser.tags) >= 4
    assert "Calibration of the draft" in " ".join(parser.words)


def test_a_browser_shows_it_light_dark_and_narrow(page, tmp_path):
    assert brightness(picture(page, tmp_path, LIGHT)) > 0.85
    assert brightness(picture(page, tmp_path, DARK)) < 0.25
    narrow = picture(page, tmp_path, LIGHT, width=500)
    assert narrow[16:20] == (500).to_bytes(4, "big")  # the picture's width
    assert brightness(narrow) > 0.8


def test_a_browser_runs_nothing_of_what_a_model_wrote(hostile, tmp_path):
    seen = visit(hostile, tmp_path)
    assert seen.console == seen.urls == ()


def test_the_browser_would_tell(tmp_path):
    """A page that does what ours must not: every check above can fail."""
    path = tmp_path / "bad.html"
    path.write_text('<script>nothing()</script><img src="http://example.invalid/x.png">')
    seen = visit(path, tmp_path)
    assert any("nothing is not defined" in line for line in seen.console)
    assert "http://example.invalid/x.png" in seen.urls
