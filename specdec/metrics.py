"""Every figure this project reports, defined once.

A run is one prompt's generation: a prefill that emits the first token, then rounds of draft,
build, verify and commit. All definitions stand in the docstrings below; docs/metrics.md gives
them with examples. Times come from `generation.Result` (wall clock); this module only divides.
A figure whose divisor is zero is None, never 0 or infinity.
"""

import resource
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdec import intervals
from specdec.errors import SpecdecError
from specdec.expert_metrics import ExpertMetrics, expert_metrics
from specdec.ratio import ratio
from specdec.sampling import GREEDY, Sampling
from specdec.substitutions import SubstitutionMetrics, substitutions
from specdec.text_times import block_times

if TYPE_CHECKING:  # for types only: counting must not pay for importing MLX
    from specdec.generation import Result

PHASES = ("draft", "build", "verify", "commit")

ACCEPTANCE_LENGTH = "tokens committed per round: 1 bonus token + accepted draft tokens"
"""The definition that is printed beside the figure."""


@dataclass(frozen=True)
class Depth:
    """How often the accepted path went `depth` draft tokens deep.

    reached: share of rounds that accepted at least `depth` draft tokens, P(accepted >= depth).
    conditional: reached at this depth / reached at the depth above (1 for the root).
    """

    depth: int
    reached: float
    conditional: float | None


@dataclass(frozen=True)
class Phase:
    """One phase's time: mean milliseconds per round, and share of the decode time.

    "other" is what lies between the phases: emitting text, counting.
    """

    name: str
    ms_per_round: float
    share: float


@dataclass(frozen=True)
class Metrics:
    """The figures of one run.

    prompt_tokens: tokens of the prompt, template included.
    generated_tokens: tokens emitted, the first (from the prefill) and an end token included.
    prefill_tokens_per_second: prompt_tokens / prefill_seconds.
    seconds_to_first_token: from the request to the first token, loading excluded; None when the
        run was interrupted before it.
    decode_seconds: from the first token to the end of the run.
    decode_tokens_per_second: (generated_tokens - 1) / decode_seconds, None where no token followed
        the first. Tokens that the last round committed beyond the end (stop string, limit) are not
        counted, its time is.
    rounds: verify passes.
    drafted: tree nodes verified, roots not counted; accepted: those that were committed.
    acceptance_length: (accepted + rounds) / rounds, bonus token counted; 1 for plain decoding.
    acceptance_rate: accepted / drafted.
    drafted_share: accepted / (accepted + rounds), the share of tokens that came from the draft.
    depths: P(accepted >= k) for k = 1 .. deepest tree.
    substitutions: None where routing was exact.
    sampling: how the tokens were chosen.
    tree_sizes: (nodes verified, rounds) ascending; 0 nodes are plain decoding.
    plain_reason: why budget "auto" went on without drafting for a while; None where it did not.
    """

    prompt_tokens: int
    generated_tokens: int
    finish: str
    prefill_seconds: float
    prefill_tokens_per_second: float | None
    seconds_to_first_token: float | None
    decode_seconds: float
    decode_tokens_per_second: float | None
    rounds: int
    drafted: int
    accepted: int
    acceptance_length: float | None
    acceptance_rate: float | None
    drafted_share: float | None
    depths: tuple[Depth, ...]
    phases: tuple[Phase, ...]
    experts: ExpertMetrics
    token_sha256: str
    substitutions: SubstitutionMetrics | None = None
    sampling: Sampling = GREEDY
    tree_sizes: tuple[tuple[int, int], ...] = ()
    plain_reason: str | None = None


@dataclass(frozen=True)
class Memory:
    """Peak memory of the process since it started, and what was planned, in bytes.

    process: largest resident set, as the operating system counts it (Python and libraries too).
    mlx: largest amount MLX had allocated.
    planned: the memory plan's total.
    """

    process: int
    mlx: int
    planned: int


@dataclass(frozen=True)
class Comparison:
    """The same prompt without (`plain`) and with (`speculative`) speculation.

    speedup: decode tokens/s, speculative over plain; prefill excluded. speedup_low, speedup_high:
        its interval at 95 % confidence, over blocks of the text; None for a short or cut-off text.
    first_difference: position of the first token that differs; None when all agree.
    """

    plain: Metrics
    speculative: Metrics
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    first_difference: int | None

    @property
    def equal(self) -> bool:
        """Whether both runs emitted the same tokens."""
        return self.first_difference is None


def measure(result: "Result") -> Metrics:
    """The figures of one run."""
    rounds = result.rounds
    drafted = sum(one.tree.rows - 1 for one in rounds)
    accepted = sum(one.accepted for one in rounds)
    return Metrics(
        prompt_tokens=result.prefill.prompt_tokens,
        generated_tokens=len(result.tokens),
        finish=result.finish,
        prefill_seconds=result.prefill.seconds,
        prefill_tokens_per_second=ratio(result.prefill.prompt_tokens, result.prefill.seconds),
        seconds_to_first_token=result.seconds_to_first_token if result.tokens else None,
        decode_seconds=result.decode_seconds,
        decode_tokens_per_second=decode_speed(len(result.tokens), result.decode_seconds),
        rounds=len(rounds),
        drafted=drafted,
        accepted=accepted,
        acceptance_length=ratio(accepted + len(rounds), len(rounds)),
        acceptance_rate=ratio(accepted, drafted),
        drafted_share=ratio(accepted, accepted + len(rounds)),
        depths=_depths(result),
        phases=_phases(result),
        experts=expert_metrics(result),
        token_sha256=result.token_sha256,
        substitutions=substitutions(result.substitutions, len(result.tokens)),
        sampling=result.sampling,
        tree_sizes=tuple(sorted(Counter(one.tree.rows - 1 for one in rounds).items())),
        plain_reason=result.plain_reason,
    )


def compare(plain: "Result", speculative: "Result") -> Comparison:
    """Both runs of one prompt, side by side."""
    before, after = measure(plain), measure(speculative)
    speedup = intervals.NOTHING
    if before.decode_tokens_per_second and after.decode_tokens_per_second:
        speedup = intervals.paired(
            after.decode_tokens_per_second / before.decode_tokens_per_second,
            [block_times([speculative], [plain])],
        )
    differing = first_difference(plain.tokens, speculative.tokens)
    return Comparison(before, after, speedup.value, speedup.low, speedup.high, differing)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position at which two token sequences differ, a missing token included."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def peak_process_bytes() -> int:
    """Largest resident set of this process so far.

    On Linux VmHWM: getrusage there keeps the peak of the process that started this one if that was
    larger (it survives exec). On macOS getrusage, which counts bytes.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) * 1024
    raise SpecdecError("/proc/self/status names no VmHWM: peak memory cannot be told")


def decode_speed(tokens: int, seconds: float) -> float | None:
    """Decode tokens per second of a run that emitted so many tokens, the first from its prefill."""
    return ratio(tokens - 1, seconds) if tokens > 1 else None


def _depths(result: "Result") -> tuple[Depth, ...]:
    deepest = max((int(one.tree.depths.max()) for one in result.rounds), default=0)
    depths: list[Depth] = []
    above = 1.0
    for depth in range(1, deepest + 1):
        reached = sum(one.accepted >= depth for one in result.rounds) / len(result.rounds)
        depths.append(Depth(depth, reached, ratio(reached, above)))
        above = reached
    return tuple(depths)


def _phases(result: "Result") -> tuple[Phase, ...]:
    if not result.rounds:
        return ()
    seconds = {name: sum(getattr(one.seconds, name) for one in result.rounds) for name in PHASES}
    # The clock around all rounds encloses theirs; rounding may still put it a hair below.
    total = max(result.decode_seconds, sum(seconds.values()))
    seconds["other"] = total - sum(seconds.values())
    return tuple(
        Phase(name, 1000 * value / len(result.rounds), ratio(value, total) or 0.0)
        for name, value in seconds.items()
    )
