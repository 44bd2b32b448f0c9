"""Results made by hand, for everything that counts and prints."""

import numpy as np

from specdec import bench
from specdec.bench_grid import Grid
from specdec.generation import Result
from specdec.prompts import Prompt
from specdec.round import PhaseSeconds, Prefill, Round
from specdec.target.expert_cache import LayerCounters
from specdec.tree.draft_tree import DraftTree


def chain(root, tokens):
    """A tree without branches."""
    return DraftTree(
        np.array([root, *tokens], np.int32),
        np.arange(-1, len(tokens), dtype=np.int32),
        -np.arange(len(tokens) + 1, dtype=np.float64),
    )


def counters(layer, pinned=False, hits=0, misses=0, bytes_read=0):
    return LayerCounters(layer, pinned, hits, misses, bytes_read)


def result(accepted, nodes, decode_seconds=None, experts=None, cut=None, tokens=None):
    """A run whose rounds verify chains of `nodes` and accept as told; the text is 0, 1, 2, ...

    A round takes 0.2 + 0.05 + 0.5 + 0.1 s in its phases and 1 s in all; a prefill of 10 tokens 0.5.
    """
    rounds, emitted = [], [0]
    share = 1.0 if decode_seconds is None else decode_seconds / max(len(accepted), 1)
    seconds = PhaseSeconds(0.2 * share, 0.05 * share, 0.5 * share, 0.1 * share)
    for count in accepted:
        right = range(emitted[-1] + 1, emitted[-1] + 1 + count)
        tree = chain(emitted[-1], [*right, *[999] * (nodes - count)])
        rounds.append(Round(tree, tuple(range(count + 1)), emitted[-1] + count + 1, seconds))
        emitted.extend(rounds[-1].tokens)
    tokens = tuple(emitted[:cut]) if tokens is None else tokens
    return Result(
        tokens=tokens,
        text="".join(f"{token} " for token in tokens),
        finish="length",
        prefill=Prefill(0, 10, 0.5),
        rounds=tuple(rounds),
        seconds_to_first_token=0.6,
        decode_seconds=float(len(accepted)) if decode_seconds is None else decode_seconds,
        experts=(counters(0, hits=6, misses=2, bytes_read=4096),) if experts is None else experts,
    )


PROMPTS = (Prompt("a", "python", "def"), Prompt("b", "prose", "Once"))


def sweep_by_hand(accepted, wrong=(), repeats=2, on_run=lambda *_: None, kept=(), **axes):
    """A sweep of two prompts whose budgets accept as told (budget -> accepted per round).

    Every run emits 0, 1, 2, 3 within a second per round; (prompt, budget) pairs in `wrong` do not.
    axes: other parts of the grid.
    """

    def generate(cell):
        bad = (cell.prompt.id, cell.budget) in wrong
        tokens = (0, 1, 2, 7) if bad else (0, 1, 2, 3)
        nodes = 0 if cell.budget == 1 else 4 if cell.budget == "auto" else cell.budget - 1
        return result(accepted=accepted[cell.budget], nodes=nodes, tokens=tokens)

    grid = Grid(PROMPTS, tuple(accepted), repeats, **axes)
    return bench.sweep(generate, grid, on_run, kept)
