"""What a run is told in words: a summary, and two runs side by side. Figures: specdec.metrics."""

from specdec.metrics import ACCEPTANCE_LENGTH, Comparison, Memory, Metrics
from specdec.units import interval, number, percent, size, table


def summary(metrics: Metrics, memory: Memory) -> str:
    """The figures of one run, one subject a line."""
    rows = [
        ("prompt", _prompt(metrics)),
        ("sampling", str(metrics.sampling)),
        ("generated", _generated(metrics)),
        ("acceptance", _acceptance(metrics)),
        *_tree_sizes(metrics),
        *_depths(metrics),
        ("round", _phases(metrics)),
        ("experts", _experts(metrics)),
        ("", _expert_bytes(metrics)),
        ("", _expert_waiting(metrics)),
        ("", _streaming(metrics)),
        *prefetch_rows(metrics),
        *substitution_rows(metrics),
        *_layer_rows(metrics),
        ("memory", memory_line(memory)),
        ("tokens", f"sha256 {metrics.token_sha256}"),
    ]
    return "\n".join(f"{label:<12}{text}" for label, text in rows)


def side_by_side(comparison: Comparison, memory: Memory) -> str:
    """Both runs of a comparison in two columns, then the verdict in words."""
    runs = (comparison.plain, comparison.speculative)
    rows: list[tuple[str, ...]] = [
        ("", "autoregressive", "speculative"),
        ("prompt tokens", *(str(run.prompt_tokens) for run in runs)),
        ("generated tokens", *(str(run.generated_tokens) for run in runs)),
        ("prefill tok/s", *(number(run.prefill_tokens_per_second) for run in runs)),
        ("first token after, s", *(number(run.seconds_to_first_token, 2) for run in runs)),
        ("decode tok/s", *(number(run.decode_tokens_per_second) for run in runs)),
        ("rounds", *(str(run.rounds) for run in runs)),
        ("mean acceptance length", *(number(run.acceptance_length, 2) for run in runs)),
        ("accepted / drafted", *(f"{run.accepted} / {run.drafted}" for run in runs)),
    ]
    names = [phase.name for phase in comparison.speculative.phases]
    for name in names:
        rows.append((f"{name}, ms per round", *(_phase_ms(run, name) for run in runs)))
    rows += [
        ("expert hits (unpinned)", *(str(run.experts.hits) for run in runs)),
        ("expert misses (unpinned)", *(str(run.experts.misses) for run in runs)),
        ("hit rate (unpinned)", *(percent(run.experts.hit_rate) for run in runs)),
        ("hit rate (with pinned)", *(percent(run.experts.effective_hit_rate) for run in runs)),
        ("read per token", *(_bytes(run.experts.bytes_per_token) for run in runs)),
        ("read per round", *(_bytes(run.experts.bytes_per_round) for run in runs)),
        ("read per second", *(_bytes(run.experts.read_bandwidth) for run in runs)),
        ("waited for reads, s", *(number(run.experts.stall_seconds, 2) for run in runs)),
        ("evictions", *(str(run.experts.evictions) for run in runs)),
    ]
    lines = [table(rows), "", f"sampling    {comparison.speculative.sampling}"]
    lines.append(f"mean acceptance length: {ACCEPTANCE_LENGTH}")
    about = _tree_sizes(comparison.speculative) + _depths(comparison.speculative)
    lines += [f"{label:<12}{text}" for label, text in about]
    for name, run in (("plain", comparison.plain), ("speculative", comparison.speculative)):
        lines += [f"{label:<12}{name}: {text}" for label, text in substitution_rows(run)]
    lines.append(f"streaming   {_streaming(comparison.speculative)}")
    for name, run in (("plain", comparison.plain), ("speculative", comparison.speculative)):
        lines += [f"{label:<12}{name}: {text}" for label, text in prefetch_rows(run)]
    for name, run in (("plain", comparison.plain), ("speculative", comparison.speculative)):
        lines += [f"{label:<12}{name}: {text}" for label, text in _layer_rows(run)]
    lines += [f"memory      {memory_line(memory)}", *verdict(comparison)]
    return "\n".join(lines)


def verdict(comparison: Comparison) -> list[str]:
    """Speed-up and agreement in plain words, bad news included."""
    speedup = comparison.speedup
    if speedup is None:
        lines = ["speed-up    none to tell: a run is too short to time"]
    else:
        lines = [f"speed-up    {speedup:.2f}x (decode tok/s, prefill excluded)"]
        if comparison.speedup_low is not None:
            ends = interval(comparison.speedup_low, comparison.speedup_high)
            lines[0] += f", 95 % interval {ends} over blocks of this text"
        if speedup < 1:
            even = comparison.speedup_high is not None and comparison.speedup_high >= 1
            lines.append(
                f"            Speculation was {'no faster' if even else 'SLOWER'} than plain "
                f"decoding here: {speedup:.2f} times its speed. A smaller --budget may help."
            )
    run = comparison.speculative
    if not comparison.equal and run.substitutions is not None:
        lines.append("tokens      differ, as they may with --cache-tolerance")
    elif not comparison.equal and not run.sampling.same_for_every_budget:
        lines.append(
            "tokens      differ, as they do with --accept swor: drawn from the same distribution, "
            "not the same draws"
        )
    elif comparison.equal:
        lines.append(f"tokens      equal, sha256 {comparison.plain.token_sha256}")
    else:
        lines.append(
            f"tokens      DIFFER from position {comparison.first_difference} on: "
            f"autoregressive sha256 {comparison.plain.token_sha256}, "
            f"speculative sha256 {comparison.speculative.token_sha256}"
        )
    return lines


def substitution_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """What cache-aware routing changed; nothing where routing was exact."""
    one = metrics.substitutions
    if one is None:
        return []
    return [
        (
            "NOT EXACT",
            f"{one.substituted} of {one.choices} choices substituted ({percent(one.rate)}, "
            f"{number(one.per_token, 2)} per token), KL {number(one.kl, 6)} nats per row and layer",
        )
    ]


def memory_line(memory: Memory) -> str:
    """Peak against plan; says so when the plan was overrun."""
    over = memory.process - memory.planned
    text = (
        f"peak {size(memory.process)} resident, {size(memory.mlx)} in MLX, "
        f"planned {size(memory.planned)}"
    )
    if over > 0:
        text += f": {percent(over / memory.planned)} ABOVE the plan"
    return text


def _prompt(metrics: Metrics) -> str:
    return (
        f"{metrics.prompt_tokens} tokens, prefill "
        f"{number(metrics.prefill_tokens_per_second)} tok/s, "
        f"first token after {number(metrics.seconds_to_first_token, 2)} s"
    )


def _generated(metrics: Metrics) -> str:
    return (
        f"{metrics.generated_tokens} tokens, decode "
        f"{number(metrics.decode_tokens_per_second)} tok/s, ended by: {metrics.finish}"
    )


def _acceptance(metrics: Metrics) -> str:
    text = f"{metrics.rounds} rounds, mean length {number(metrics.acceptance_length, 2)}"
    if metrics.drafted:
        text += (
            f" ({ACCEPTANCE_LENGTH}); accepted {metrics.accepted} of {metrics.drafted} drafted "
            f"({percent(metrics.acceptance_rate)})"
        )
    return text


def _tree_sizes(metrics: Metrics) -> list[tuple[str, str]]:
    """How many nodes were verified, where that was decided round by round."""
    if len(metrics.tree_sizes) < 2:
        return []
    sizes = ", ".join(f"{nodes}: {rounds}" for nodes, rounds in metrics.tree_sizes)
    return [("", f"rounds by nodes verified: {sizes}")]


def _depths(metrics: Metrics) -> list[tuple[str, str]]:
    if not metrics.depths:
        return []
    reached = ", ".join(f"{one.depth}: {percent(one.reached)}" for one in metrics.depths)
    return [("", f"rounds that accepted at least k draft tokens: {reached}")]


def _phases(metrics: Metrics) -> str:
    return ", ".join(
        f"{one.name} {one.ms_per_round:.2f} ms ({percent(one.share)})" for one in metrics.phases
    )


def _experts(metrics: Metrics) -> str:
    experts = metrics.experts
    return (
        f"{experts.hits} hits, {experts.misses} misses in unpinned layers "
        f"({percent(experts.hit_rate)} hit), {percent(experts.effective_hit_rate)} with pinned "
        "layers counted"
    )


def _expert_bytes(metrics: Metrics) -> str:
    experts = metrics.experts
    return (
        f"{size(experts.bytes_read)} read, {_bytes(experts.bytes_per_token)} per token, "
        f"{_bytes(experts.bytes_per_round)} per round, at {_bytes(experts.read_bandwidth)}/s"
    )


def _expert_waiting(metrics: Metrics) -> str:
    experts = metrics.experts
    return (
        f"{experts.stall_seconds:.2f} s waited for reads, {experts.evictions} evictions, "
        f"{number(experts.synchronizations_per_pass)} host synchronizations per pass"
    )


def _streaming(metrics: Metrics) -> str:
    """How experts were read and kept."""
    one = metrics.experts
    if one.protect is None:
        return "-"
    first, last = one.protect
    prefetch = f"; prefetch {one.prefetch.way}" if one.prefetch is not None else ""
    return (
        f"{one.io} reads, {one.queue_depth} at a time; policy {one.policy}; "
        f"first {first} and last {last} layers protected{prefetch}"
    )


def prefetch_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """What was read ahead, how much of it in time and in vain, and what "auto" decided."""
    one = metrics.experts.prefetch
    if one is None or not one.passes:
        return []
    passes = ", ".join(f"{way} in {count} passes" for way, count in sorted(one.passes.items()))
    text = f"{one.way}: {passes}"
    if one.experts:
        text += (
            f"; {size(one.bytes)} read ahead, {percent(one.coverage)} of misses covered, "
            f"{one.late} came late, {percent(one.waste)} of it wasted"
        )
    if one.failed:
        text += f"; {one.failed} reads FAILED, and were made again when needed"
    return [("prefetch", text), *(("", f"prefetch {words}") for words in one.verdicts)]


def _layer_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """Where each layer spent its time, if it was timed."""
    layers = metrics.experts.layer_seconds
    if layers is None:
        return []
    hits = {one.layer: one for one in metrics.experts.layers}
    rows: list[tuple[str, ...]] = [
        ("layer", "kind", "mixer ms", "I/O wait ms", "experts ms", "hit")
    ]
    for one in layers:
        milliseconds = (f"{1000 * part:.1f}" for part in (one.mixer, one.io_wait, one.experts))
        hit = hits[one.layer].hit_rate if one.layer in hits else None
        rows.append((str(one.layer), one.kind.replace("_", " "), *milliseconds, percent(hit)))
    total = [sum(getattr(one, part) for one in layers) for part in ("mixer", "io_wait", "experts")]
    rows.append(("all", "", *(f"{1000 * part:.1f}" for part in total), ""))
    lines = table(rows, left=(1,)).splitlines()
    return [("timing" if at == 0 else "", line) for at, line in enumerate(lines)]


def _phase_ms(metrics: Metrics, name: str) -> str:
    found = [one.ms_per_round for one in metrics.phases if one.name == name]
    return number(found[0] if found else None, 2)


def _bytes(count: float | None) -> str:
    return "-" if count is None else size(count)
