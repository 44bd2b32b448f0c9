"""A sweep in words: a table per group with a row per budget, and whether all runs agree."""

from specdec.bench import Sweep
from specdec.bench_grid import Group
from specdec.ratio import ratio
from specdec.units import interval, number, percent, size, table

HEADINGS = (
    "budget",
    "tok/s",
    "speed-up",
    "95 %",
    "accepted",
    "P(>=1)",
    "P(>=2)",
    "P(>=4)",
    "first s",
    "hit rate",
    "read/tok",
)
LEGEND = (
    "tok/s: decoding; 95 %: interval of the speed-up, over prompts; accepted: mean acceptance "
    "length;\nfirst s: seconds to the first token. Speeds and times are medians, the rest means."
)


def report(done: Sweep) -> str:
    """The tables, then what must be said: partial, not exact, differing or slower runs."""
    blocks = []
    if done.partial:
        blocks.append(f"PARTIAL: ended after {len(done.runs)} of {done.grid.planned} runs")
    if done.runs:
        blocks += [_group_table(done, group) for group in done.grid.groups]
        blocks.append(LEGEND)
    blocks += _prefetch(done)
    blocks += _substitutions(done)
    blocks += _agreement(done)
    blocks += _slower(done)
    return "\n\n".join(blocks)


def _prefetch(done: Sweep) -> list[str]:
    """Of all runs together, budget by budget."""
    parts = []
    for budget in done.grid.budgets:
        runs = [run.metrics.experts for run in done.runs if run.cell.budget == budget]
        some = [one.prefetch for one in runs if one.prefetch is not None and one.prefetch.experts]
        if some:
            in_time, wasted = sum(i.in_time for i in some), sum(i.wasted_bytes for i in some)
            missed = in_time + sum(one.misses for one in runs)
            read = sum(i.bytes for i in some)
            parts.append(
                f"budget {budget} {size(read)} read ahead, {percent(ratio(in_time, missed))} of "
                f"misses covered, {percent(ratio(wasted, read))} wasted"
            )
    return ["prefetch: " + "; ".join(parts)] if parts else []


def _substitutions(done: Sweep) -> list[str]:
    changed = [one for run in done.runs if (one := run.metrics.substitutions) is not None]
    if not changed:
        return []
    choices = sum(one.choices for one in changed)
    substituted = sum(one.substituted for one in changed)
    share = percent(substituted / choices if choices else None)
    return [
        f"NOT EXACT (--cache-tolerance): {substituted} of {choices} choices of experts were "
        f"substituted ({share})"
    ]


def _agreement(done: Sweep) -> list[str]:
    differing = [done.label(task) for task in done.disagreements()]
    if differing:
        return ["tokens DIFFER between runs of: " + ", ".join(differing)]
    if not done.runs:
        return []
    if done.partial:
        return ["tokens equal over the runs that were made"]
    grid = done.grid
    text = f"tokens equal over all budgets and repeats, {len(grid.prompts)} prompts"
    if not grid.same_tokens:
        text += "; above temperature 0 budgets draw anew (--accept swor), and only repeats agree"
    return [text]


def _slower(done: Sweep) -> list[str]:
    """Budgets that cost more than they brought, of all prompts: a line per setting."""
    lines = []
    for group in done.grid.groups:
        if group.kind != done.grid.classes[-1]:
            continue
        told: dict[str, list[str]] = {}
        for budget in done.grid.budgets:
            one = done.aggregate(group, budget)
            if budget == 1 or one.speedup is None or one.speedup >= 1:
                continue
            even = one.speedup_high is not None and one.speedup_high >= 1
            words = "no faster than" if even else "SLOWER than"
            told.setdefault(words, []).append(str(budget))
        name = done.grid.name(None, group.temperature, group.context)
        where = f" ({name})" if name else ""
        for words, budgets in told.items():
            lines.append(f"{words} plain decoding at budget {', '.join(budgets)}{where}")
    return ["\n".join(lines)] if lines else []


def _group_table(done: Sweep, group: Group) -> str:
    rows: list[tuple[str, ...]] = [HEADINGS]
    for budget in done.grid.budgets:
        one = done.aggregate(group, budget)
        depths = [percent(one.depths[k - 1]) if len(one.depths) >= k else "-" for k in (1, 2, 4)]
        rows.append(
            (
                str(budget),
                number(one.decode_tokens_per_second),
                number(one.speedup, 2),
                "-" if budget == 1 else interval(one.speedup_low, one.speedup_high),
                number(one.acceptance_length, 2),
                *depths,
                number(one.seconds_to_first_token, 2),
                percent(one.effective_hit_rate),
                "-" if one.bytes_per_token is None else size(one.bytes_per_token),
            )
        )
    count = done.aggregate(group, done.grid.budgets[0]).prompts
    return f"{done.grid.name(*group)} ({count} prompts, {done.grid.repeats} repeats)\n{table(rows)}"
