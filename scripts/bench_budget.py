"""Budget auto against plain decoding and against every fixed budget, prompt by prompt.

    python scripts/bench_budget.py           # all held-out prompts, resident and streamed
    python scripts/bench_budget.py --quick   # every second prompt: under ten minutes

All settings take turns on a prompt, each repeat in another order. Ratios are of decoding times of
the same tokens: a prompt's is the median over its repeats, a class's that of the total times, with
a 95 % interval over the prompts. "plain again" is plain decoding a second time: what differs there
is the machine. "fresh" is auto that has forgotten what it learned from earlier texts, as in a
process that generates one text. Streamed: no layer pinned, a share of the experts in slots.

The promise: auto is never more than 5 % slower than plain decoding, and at least 95 % of the best
fixed budget.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from specdec import intervals
from specdec.demo_pair import PROMPTS
from specdec.generation import Request, generate
from specdec.load import Loaded, Settings, load, plan_for
from specdec.prompts import ALL, Prompt, read_prompts
from specdec.units import table

PLAIN, AGAIN, AUTO, FRESH = "plain", "plain again", "auto", "fresh"
NODES = 16
BAR = 0.95


@dataclass(frozen=True)
class Times:
    """Decoding seconds by (prompt id, setting), a value per repeat; nodes that auto verified."""

    seconds: dict[tuple[str, str], list[float]]
    plain_rounds: dict[str, float]

    def ratio(self, prompts: Sequence[Prompt], one: str, other: str) -> intervals.Estimate:
        """How many times as fast `one` is as `other`, over the prompts' total times."""
        pairs = [[(self.typical(p, other), self.typical(p, one))] for p in prompts]
        return intervals.pooled(intervals.Clusters.of(pairs))

    def worst(self, prompts: Sequence[Prompt], one: str, other: str) -> tuple[float, str]:
        """The prompt at which `one` is slowest against `other`: the ratio of speeds, and its id.

        A repeat's two runs are neighbours in time: their ratio is taken, then the median.
        """
        found = []
        for prompt in prompts:
            pairs = zip(self.seconds[prompt.id, other], self.seconds[prompt.id, one], strict=True)
            found.append((median(slow / fast for slow, fast in pairs), prompt.id))
        return min(found)

    def typical(self, prompt: Prompt, setting: str) -> float:
        return median(self.seconds[prompt.id, setting])


def measure(loaded: Loaded, prompts: Sequence[Prompt], options: argparse.Namespace) -> Times:
    """Every setting on every prompt, `repeat` times, after one run of each that is not timed."""
    settings = [PLAIN, *map(str, options.budgets), AUTO, FRESH, AGAIN]
    tokens = {p.id: tuple(loaded.tokenizer.encode(p.text)) for p in prompts}
    seconds: dict[tuple[str, str], list[float]] = {}
    plain_rounds: dict[str, float] = {}
    hashes: dict[str, str] = {}

    def run(prompt: Prompt, setting: str) -> float:
        learned = dict(loaded.engine.autos)
        if setting == FRESH:
            loaded.engine.autos.clear()
        request = Request(
            prompt_tokens=tokens[prompt.id],
            budget=int(setting) if setting.isdigit() else 1 if "plain" in setting else "auto",
            max_tokens=options.tokens,
            max_budget=NODES,
        )
        result = generate(loaded.engine, loaded.tokenizer, request)
        if result.finish == "interrupted":
            raise KeyboardInterrupt
        if setting == FRESH:
            loaded.engine.autos.update(learned)
        if hashes.setdefault(prompt.id, result.token_sha256) != result.token_sha256:
            raise SystemExit(f"{prompt.id}: {setting} emitted other tokens than {PLAIN}")
        if setting == AUTO:
            plain = sum(one.budget == 1 for one in result.rounds)
            plain_rounds[prompt.id] = plain / len(result.rounds)
        return result.decode_seconds

    for setting in settings:
        run(prompts[0], setting)
    for repeat in range(options.repeat):
        for at, prompt in enumerate(prompts):
            turn = (repeat + at) % len(settings)
            for setting in settings[turn:] + settings[:turn]:
                seconds.setdefault((prompt.id, setting), []).append(run(prompt, setting))
    return Times(seconds, plain_rounds)


def report(times: Times, prompts: Sequence[Prompt], options: argparse.Namespace) -> str:
    """A row per class, then whether the promise was kept."""
    fixed = list(map(str, options.budgets))
    rows: list[tuple[str, ...]] = [
        (
            "",
            *(f"{n}/plain" for n in fixed),
            "auto/plain",
            "auto/best fixed",
            "fresh/plain",
            "worst auto/plain",
            "worst again/plain",
            "plain rounds",
        )
    ]
    lines = []
    classes = list(dict.fromkeys(prompt.kind for prompt in prompts))
    for kind in [*classes, ALL]:
        some = [prompt for prompt in prompts if kind in (prompt.kind, ALL)]
        ratios = {n: times.ratio(some, n, PLAIN).value or 0.0 for n in fixed}
        best = max([*fixed, PLAIN], key=lambda name: ratios.get(name, 1.0))
        gain, against = times.ratio(some, AUTO, PLAIN), times.ratio(some, AUTO, best)
        worst, again = times.worst(some, AUTO, PLAIN), times.worst(some, AGAIN, PLAIN)
        share = sum(times.plain_rounds[prompt.id] for prompt in some) / len(some)
        rows.append(
            (
                f"{kind} ({len(some)})",
                *(f"{ratios[n]:.2f}" for n in fixed),
                _text(gain),
                f"{_text(against)} ({best})",
                _text(times.ratio(some, FRESH, PLAIN)),
                f"{worst[0]:.2f} ({worst[1]})",
                f"{again[0]:.2f}",
                f"{share:.0%}",
            )
        )
        if kind == ALL:
            lines.append(_verdict("every prompt, auto/plain", worst[0]))
        else:
            lines.append(_verdict(f"{kind}, auto/plain", gain.value or 0.0))
            lines.append(_verdict(f"{kind}, auto/best fixed", against.value or 0.0))
    return "\n".join([table(rows, left=(0,)), *lines])


def _text(one: intervals.Estimate) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:.2f}"
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _verdict(what: str, ratio: float) -> str:
    return f"{'kept  ' if ratio >= BAR else 'MISSED'}  {what} {ratio:.3f}, promised {BAR}"


def _load(place: str, options: argparse.Namespace) -> Loaded:
    settings = Settings(options.model, options.draft, budget=max(NODES, *options.budgets))
    if place == "resident":
        return load(settings)
    settings = replace(settings, pin_layers=0, cache_slots=1_000_000)
    experts = plan_for(settings).slots  # cut to as many as there are experts
    return load(replace(settings, cache_slots=max(1, int(options.slots * experts))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the demo pair")
    parser.add_argument("--draft")
    parser.add_argument("--quick", action="store_true", help="--every 2 --repeat 3")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th prompt")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 6, 12])
    parser.add_argument("--slots", type=float, default=0.5, help="share of experts, streamed")
    parser.add_argument("--places", nargs="+", default=["resident", "streamed"])
    options = parser.parse_args()
    if options.quick:
        options.every, options.repeat = 2, 3
    prompts = read_prompts(PROMPTS)[:: options.every]
    for place in options.places:
        loaded = _load(place, options)
        slots = f"{loaded.plan.slots} slots" if loaded.plan.slots else "all experts pinned"
        print(
            f"{place}: {slots}; {len(prompts)} prompts, {options.tokens} tokens, "
            f"{options.repeat} repeats",
            flush=True,
        )
        print(report(measure(loaded, prompts, options), prompts, options), "\n", flush=True)


if __name__ == "__main__":
    main()
