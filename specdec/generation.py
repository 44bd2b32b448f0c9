"""Generation: a prompt in, text out, and everything that can be counted about it.

The engine emits tokens round by round; here they become text and the text ends: at an end token or
a stop string (also inside an accepted path), at the token limit, at the end of the model's context
or at an interrupt. Where it ends does not depend on how the tokens were grouped into rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from specdec.auto_budget import AUTO_NODES, Auto
from specdec.budget import Budget, Fixed
from specdec.engine import Engine
from specdec.errors import PlanError, PromptError, SpecdecError
from specdec.interrupt import Interrupts
from specdec.round import Prefill, Round
from specdec.sampling import GREEDY, Sampling
from specdec.target.config import TargetConfig
from specdec.target.expert_counters import LayerCounters
from specdec.target.layer_clock import LayerTime
from specdec.target.prefetch import PrefetchUse
from specdec.target.read_queue import ReadCounters
from specdec.target.streaming import Streaming
from specdec.target.tolerance import LayerSubstitutions
from specdec.token_hash import token_sha256
from specdec.tokenizer import Tokenizer
from specdec.writer import Piece, Writer


@dataclass(frozen=True)
class Request:
    """What to generate. eos_ids: token ids that end the text; empty to ignore end tokens.

    budget: tree nodes per round; 1 is plain decoding; "auto" what pays (specdec.auto_budget), with
    trees of max_budget nodes at most (None: 16, or what memory was planned for if that is less).
    sampling: how the next token is chosen.
    """

    prompt_tokens: tuple[int, ...]
    budget: int | Literal["auto"] = 6
    tree: str = "best-first"
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    sampling: Sampling = GREEDY
    max_budget: int | None = None

    def __post_init__(self) -> None:
        assert self.budget == "auto" or self.budget >= 1
        assert self.max_budget is None or self.max_budget >= 2
        assert self.max_tokens >= 1


@dataclass(frozen=True)
class Result:
    """What came of a request.

    tokens: emitted tokens up to the one that ended the text, an end token included.
    text: their text without the end token and from the stop string on.
    finish: "eos", "stop", "length", "context", "interrupted" or "error".
    rounds: every round that was run; the last may hold tokens beyond the end.
    seconds_to_first_token: from the request on, prefill included; to the interrupt if none came.
    decode_seconds: from the first token to the end.
    experts: expert traffic of this request, prefill included; prompt_bytes_read: the prefill's.
    reads: what the disk delivered for it. streaming: how experts were read and kept. prefetch: how
        they were foreseen. None where nothing told.
    layer_times: seconds per layer, where --timing asked for them.
    substitutions: per layer what --cache-tolerance changed; None where routing was exact.
    sampling: how the tokens were chosen.
    plain_reason: why budget "auto" went on without drafting for a while; None where it did not.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    prefill: Prefill
    rounds: tuple[Round, ...]
    seconds_to_first_token: float
    decode_seconds: float
    experts: tuple[LayerCounters, ...]
    substitutions: tuple[LayerSubstitutions, ...] | None = None
    prompt_bytes_read: int = 0
    reads: ReadCounters | None = None
    streaming: Streaming | None = None
    prefetch: PrefetchUse | None = None
    layer_times: tuple[LayerTime, ...] | None = None
    sampling: Sampling = GREEDY
    plain_reason: str | None = None

    @property
    def token_sha256(self) -> str:
        """What equal tokens have in common."""
        return token_sha256(self.tokens)


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    request: Request,
    on_text: Callable[[Piece], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Result:
    """Run a request on an engine from nothing.

    on_text gets the text as it becomes certain; on_progress(done, total) the prompt's progress;
    on_round each round, before its text.
    PromptError as check_prompt says, PlanError for more than the engine was loaded for. A
    SpecdecError amid the run (an expert cannot be read, on_text cannot write) is raised with what
    was done until then as its `result`, whose finish is "error".
    """
    check_prompt(request.prompt_tokens, engine.target.config)
    room = engine.target.config.max_position - len(request.prompt_tokens)
    limit = min(request.max_tokens, room)
    _check_plan(engine, request, limit)
    writer = Writer(tokenizer.detokenizer(), request.stop, request.eos_ids, limit, on_text)
    engine.target.experts.reset_counters()
    engine.target.prefetcher.reset()
    tolerance = engine.target.tolerance
    if tolerance is not None:
        tolerance.reset()
    rounds: list[Round] = []
    budget = _budget(engine, request)
    prefill, finish = Prefill(None, len(request.prompt_tokens), 0.0), None
    failure: SpecdecError | None = None
    clock, prompt_bytes = engine.target.clock, 0
    if clock is not None:
        clock.reset()
    start, first = perf_counter(), None
    with Interrupts() as interrupts:

        def progress(done: int, total: int) -> None:
            interrupts.check()
            if on_progress is not None:
                on_progress(done, total)

        try:
            prefill = engine.prefill(
                request.prompt_tokens, request.budget != 1, progress, request.sampling
            )
            first = perf_counter()
            prompt_bytes = sum(one.bytes_read for one in engine.target.experts.counters())
            assert prefill.token is not None
            finish = writer.emit((prefill.token,))
            while finish is None:
                interrupts.check()
                rounds.append(engine.step(budget, request.tree))
                if on_round is not None:
                    on_round(rounds[-1])
                finish = writer.emit(rounds[-1].tokens)
            interrupts.check()
        except KeyboardInterrupt:
            finish = "interrupted"
        except SpecdecError as error:
            finish, failure = "error", error
    end = perf_counter()
    first = end if first is None else first
    try:
        writer.flush()
    except SpecdecError as error:
        finish, failure = "error", failure or error
    if finish == "length" and len(writer.tokens) < request.max_tokens:
        finish = "context"
    result = Result(
        tokens=tuple(writer.tokens),
        text=writer.text,
        finish=finish,
        prefill=prefill,
        rounds=tuple(rounds),
        seconds_to_first_token=first - start,
        decode_seconds=end - first,
        experts=engine.target.experts.counters(),
        prompt_bytes_read=prompt_bytes,
        reads=engine.target.experts.reads(),
        streaming=engine.target.experts.streaming,
        prefetch=engine.target.prefetcher.use(),
        layer_times=clock.times() if clock is not None else None,
        sampling=request.sampling,
        substitutions=tolerance.counts() if tolerance is not None else None,
        plain_reason=budget.reason if isinstance(budget, Auto) else None,
    )
    if failure is not None:
        failure.result = result
        raise failure
    return result


def _budget(engine: Engine, request: Request) -> Budget:
    """What the engine is to ask; without a draft there is nothing to choose."""
    if request.budget != "auto":
        return Fixed(request.budget)
    most = engine.max_budget
    nodes = request.max_budget or (AUTO_NODES if most is None else min(AUTO_NODES, most))
    if engine.draft is None or nodes < 2:
        return Fixed(1)
    auto = engine.auto(nodes, request.sampling)
    auto.begin()
    return auto


def check_prompt(tokens: Sequence[int], config: TargetConfig) -> None:
    """PromptError unless the prompt has a token, leaves room for one more in the model's context,
    and all its tokens are in the model's vocabulary."""
    if not tokens:
        raise PromptError("the prompt is empty: expected at least one token")
    if len(tokens) >= config.max_position:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens; the model's context is {config.max_position}, "
            "and at least one token must fit after the prompt"
        )
    bad = next((token for token in tokens if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise PromptError(
            f"the prompt has the token {bad}; the model's vocabulary ends at "
            f"{config.vocab_size - 1}: its tokenizer.json belongs to another model"
        )


def _check_plan(engine: Engine, request: Request, answer: int) -> None:
    """PlanError for a request that would take more memory than was planned for."""
    context = len(request.prompt_tokens) + answer
    if engine.context is not None and context > engine.context:
        raise PlanError(
            f"the request may need {context} tokens of context, memory was planned for "
            f"{engine.context}: load with a larger context"
        )
    nodes = request.max_budget if request.budget == "auto" else request.budget
    if engine.max_budget is not None and (nodes or 1) > engine.max_budget:
        raise PlanError(
            f"the request has budget {nodes}, memory was planned for "
            f"{engine.max_budget}: load with a larger budget"
        )
