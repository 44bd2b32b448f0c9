"""Auto against a world whose costs and acceptance are known: nothing here looks at a clock."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.auto_budget import REFRESH, Auto
from specdec.break_even import CREDIT, LAST_WAIT, SHARE
from specdec.budget import Fixed
from specdec.kernels.gpu.limits import MAX_ROWS, TREE_NODES
from specdec.overlap import Overlap
from specdec.round import PhaseSeconds
from specdec.round_costs import RoundCosts
from tests.worlds import SLOTS, World, linear

PLAIN = linear(1.0, 0.3)


def auto(nodes=16, choices=None, ahead=False) -> Auto:
    """choices: as on a GPU, where each number of rows has kernels of its own."""
    return Auto(nodes, RoundCosts(nodes, compiled_each=choices is not None), choices, ahead)


def sizes(world, since=0) -> Counter:
    """Rounds by nodes verified; None: plain decoding."""
    return Counter(None if one.budget == 1 else one.tree.rows - 1 for one in world.rounds[since:])


def best_fixed(tokens=1500, **world) -> float:
    """Tokens per second of the best fixed budget, plain decoding (a second a token) included."""
    return max(1.0, *(World(**world).play(Fixed(n), tokens).rate for n in (2, 4, 6, 9, 16)))


@given(
    each=st.floats(0.0, 1.2),
    step=st.floats(0.0, 2.0),
    at=st.integers(2, 12),
    draft=st.floats(0.05, 3.0),
    confidence=st.floats(0.2, 0.9),
    top=st.floats(0.6, 1.1),
    side=st.floats(0.2, 1.0),
    hiccups=st.sampled_from([0.0, 0.01]),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_as_good_as_the_best_fixed_budget(each, step, at, draft, confidence, top, side, hiccups):
    """Cost curves with a slope and a cliff, drafts of any quality and price.

    Within 5 % of the best fixed budget and of plain decoding, after 400 tokens to learn from.
    """
    world: dict = {
        "verify": lambda rows, context: 1 + each * (rows - 1) + step * (rows > at),
        "draft": draft,
        "confidence": confidence,
        "top": top,
        "side": side,
    }
    one, budget = World(**world, hiccups=hiccups), auto()
    one.play(budget, 400)
    one.hiccups, one.seconds, one.rounds = 0.0, 0.0, []
    one.play(budget, 1500)
    assert one.rate >= 0.95 * best_fixed(**world)


def test_the_best_size_where_every_round_is_alike():
    """All drafts alike: the chosen size is the one with the highest theta, and no other."""
    log_weights = np.log(0.8) * np.arange(17)

    class Alike(World):
        def tree(self, nodes):
            whole = super().tree(nodes)
            parents = np.arange(-1, nodes, dtype=np.int32)
            return type(whole)(whole.tokens, parents, log_weights[: nodes + 1])

    for each in (0.05, 0.15, 0.3):
        world, budget = Alike(linear(1.0, each), 0.5, noise=0.0), auto()
        world.play(budget, 3000)
        gains = np.cumsum(np.exp(log_weights))
        theta = gains / (0.5 + 1 + each * np.arange(17))
        chosen = sizes(world, len(world.rounds) // 2)
        del chosen[None]
        (most, count), *_ = chosen.most_common(1)
        assert theta[most] >= 0.99 * theta.max(), (most, int(theta.argmax()))
        assert count >= 0.6 * chosen.total()


@pytest.mark.parametrize("context", [0, 4000])
def test_plain_decoding_where_drafting_loses(context):
    world, budget = World(linear(1.0, 0.9), 1.5, confidence=0.3), auto()
    world.context = context
    world.play(budget, 1000)
    chosen = sizes(world)
    assert chosen[None] >= 0.9 * len(world.rounds)
    assert world.rate >= 0.96
    assert budget.reason is not None
    assert "speculation would cost" in budget.reason
    assert "plain decoding" in budget.reason
    # tried again all the same, further and further apart
    tries = [at for at, one in enumerate(world.rounds) if one.budget > 1]
    assert len(tries) >= 1000 / LAST_WAIT / 2
    assert max(np.diff(tries)) >= LAST_WAIT


def test_the_reason_has_the_true_numbers():
    """Costs in milliseconds, tokens per round, and what plain decoding takes for as many."""
    world, budget = World(linear(0.010, 0.009), 0.020, confidence=0.3, noise=0.0), auto()
    world.play(budget, 200)
    assert budget.reason is not None
    words = budget.reason.replace(",", "").split()
    cost, tokens, plain = (float(words[at]) for at in (3, 6, 10))
    assert plain == pytest.approx(10 * tokens, rel=0.02)
    assert cost > plain
    assert 1.0 <= tokens <= 2.5


def test_nothing_to_say_where_drafting_pays():
    world, budget = World(linear(1.0, 0.02), 0.1, confidence=0.9), auto()
    world.play(budget, 500)
    assert budget.reason is None
    assert sizes(world)[None] < 0.05 * len(world.rounds)


def test_drafting_comes_back_when_the_text_turns():
    world, budget = World(linear(1.0, 0.3), 0.5, confidence=0.15), auto()
    world.play(budget, 600)
    assert sizes(world, -50)[None] >= 40
    world.confidence = 0.9
    world.play(budget, 6 * LAST_WAIT)
    assert sizes(world, -50)[None] <= 10
    world.confidence = 0.15
    world.play(budget, 600)
    assert sizes(world, -50)[None] >= 40


def test_drafting_comes_back_when_costs_change():
    """A slow draft becomes fast, rows become cheap: as when a machine's other work ends."""
    world, budget = World(linear(1.0, 0.9), 4.0), auto()
    world.play(budget, 600)
    assert sizes(world, -50)[None] >= 40
    world.draft, world.verify = 0.2, linear(1.0, 0.05)
    world.play(budget, 20 * LAST_WAIT)
    assert sizes(world, -50)[None] <= 10


@given(
    seed=st.integers(0, 2**20),
    draft=st.floats(0.1, 4.0),
    each=st.floats(0.0, 2.0),
    confidences=st.lists(st.floats(0.1, 0.95), min_size=1, max_size=6),
    top=st.floats(0.1, 1.1),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_loss_against_plain_decoding_is_bounded(seed, draft, each, confidences, top):
    """Whatever the draft costs and however it lies: texts that turn, a draft too sure of itself."""
    world = World(linear(1.0, each), draft, top=top, side=top, noise=0.02, seed=seed)
    budget = auto()
    budget.begin()
    dearest = 0.0
    for confidence in confidences * 3:
        world.confidence = confidence
        since = len(world.rounds)
        world.play(budget, 150)
        for one in world.rounds[since:]:
            took = one.seconds.draft + one.seconds.verify
            dearest = max(dearest, took - len(one.tokens))
    # What is given, the rounds in which costs were not known yet, and one more.
    allowed = 1.02 * world.tokens + CREDIT + SHARE * world.seconds + 5 * dearest
    assert world.seconds <= allowed
    if dearest < 6:
        assert world.seconds <= 1.12 * world.tokens


def test_short_texts_that_lose_are_tried_less():
    """What earlier texts said counts: a hopeless draft costs later texts little."""
    world, budget = World(linear(1.0, 0.9), 2.0, confidence=0.2), auto()
    losses = []
    for _ in range(20):
        budget.begin()
        before = world.seconds, world.context
        world.play(budget, 64)
        losses.append((world.seconds - before[0]) / (world.context - before[1]) - 1)
    assert np.mean(losses[-10:]) < 0.05
    assert any(one.budget > 1 for one in world.rounds[-640:])  # and yet it is tried


def test_a_hiccup_changes_little():
    """One round a hundred times as slow: drafting goes on."""
    world, budget = World(linear(1.0, 0.1), 0.3, confidence=0.85), auto()
    world.play(budget, 300)
    true = world.verify
    world.verify = lambda rows, context: 100 * true(rows, context)
    world.step(budget)
    world.verify = true
    since = len(world.rounds)
    world.play(budget, 200)
    assert sizes(world, since)[None] <= 0.2 * (len(world.rounds) - since)


def test_first_uses_do_not_poison_the_choice():
    """Each row count, and the draft, take a second more the first time."""
    seen = set()

    def compiling(rows, context):
        extra = 0 if rows in seen else 500.0
        seen.add(rows)
        return 1 + 0.05 * (rows - 1) + extra

    world, budget = World(compiling, 0.2, confidence=0.85), auto(choices=TREE_NODES)
    world.play(budget, 600)
    assert {None, *TREE_NODES} >= set(sizes(world)) - {0}
    last = sizes(world, -100)
    assert last[None] <= 10
    assert max(last, key=lambda size: last[size]) >= 6


def test_only_the_given_sizes():
    assert TREE_NODES[-1] == MAX_ROWS - 1
    budget = auto(8, (1, 2, 4, 6, 8, 12))
    world = World(linear(1.0, 0.02), 0.2, confidence=0.9)
    world.play(budget, 500)
    assert set(sizes(world)) <= {None, 0, 1, 2, 4, 6, 8}


def test_plain_decoding_is_measured_again():
    world, budget = World(linear(1.0, 0.05), 0.1, confidence=0.6), auto()
    world.play(budget, 3000)
    plain = [at for at, one in enumerate(world.rounds) if one.tree.rows == 1]
    assert 3 <= len(plain) < 0.02 * len(world.rounds) + 5
    assert max(np.diff(plain)) <= 20 * REFRESH


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("each", "draft", "confidence"),
    [(0.1, 0.2, 0.9), (0.1, 1.5, 0.5), (0.3, 0.05, 0.7), (0.3, 0.05, 0.75), (0.15, 0.3, 0.7)],
)
def test_what_a_gpu_is_given_ahead_is_counted(each, draft, confidence, seed):
    """Plain decoding that takes 0.6 s a token round after round, and 1 s where its passes are begun
    one by one: drafting pays if it is better than the former. A drafted root takes 1 s."""
    known: dict = {"verify": linear(1.0, each), "draft": draft, "confidence": confidence}
    world, budget = World(**known, waiting=0.4, seed=seed), auto(ahead=True)
    world.play(budget, 400)
    before = world.seconds
    world.play(budget, 2000)
    rate, best = 2000 / (world.seconds - before), best_fixed(2000, **known)
    assert rate >= 0.94 * best
    assert rate >= 0.95 / 0.6
    assert budget._plain == pytest.approx(0.6, rel=0.1)
    assert budget.costs.plain(2400) == pytest.approx(1.0, rel=0.1)


def test_drafted_roots_do_not_stand_for_plain_rounds():
    """They begin no other: what plain decoding takes is measured again among plain rounds."""
    world = World(linear(1.0, 0.4), 0.02, confidence=0.75, waiting=0.05)
    world.play(auto(ahead=True), 3000)
    among = [at for at, one in enumerate(world.rounds) if one.begun_before and one.begins_next]
    assert sum(one.budget > 1 and one.tree.rows == 1 for one in world.rounds) > 2 * len(among)
    assert max(np.diff(among)) <= 20 * REFRESH
    assert len(among) > 5


def test_what_the_first_and_the_last_of_plain_rounds_take_is_accounted_for():
    """Two passes are begun in the first: what that takes beyond a round among others is a loss that
    going back and forth brings, less what the last one saves."""
    world, budget = World(linear(1.0, 0.9), 1.5, noise=0.0, waiting=0.4), auto(ahead=True)
    losses = []
    for _ in range(300):
        before = budget._even.loss
        world.step(budget)
        losses.append(budget._even.loss - before)
    found = {
        (one.begun_before, one.begins_next): loss
        for one, loss in zip(world.rounds[10:], losses[10:], strict=True)
        if one.budget == 1
    }
    plain = 0.6
    expected = {(False, True): (1.2 - plain) / plain, (True, True): 0.0}
    expected[True, False] = (0.4 - plain) / plain
    assert found == pytest.approx(expected, abs=0.03)


def test_another_way_of_sampling_has_its_own_overlap():
    """Where tokens are drawn no pass is begun ahead; what passes take is known to both."""
    sampled = auto()
    World(linear(1.0, 0.2), 0.2, confidence=0.6).play(sampled, 200)
    greedy = Auto(16, sampled.costs, ahead=True)
    world = World(linear(1.0, 0.2), 0.2, confidence=0.6, waiting=0.4)
    world.play(greedy, 150)
    assert world.rounds[1].begun_before
    assert greedy._plain == pytest.approx(0.6, rel=0.1)
    assert world.rate > 1.5


def test_the_share_of_a_lone_round_is_at_most_all_of_it():
    """A first round among others that was kept from its work is not believed, nor alone."""
    overlap = Overlap()
    done = World(PLAIN, 0.3).step(Fixed(1))
    assert (overlap.known, overlap.share) == (False, 1.0)
    overlap.learn(done, done.seconds.verify / 20)
    assert (overlap.known, overlap.share) == (False, 1.0)
    for _ in range(2):
        overlap.learn(done, done.seconds.verify * 2)
    assert (overlap.known, overlap.share) == (True, 0.5)


def test_a_hiccup_at_an_edge_of_plain_rounds_is_no_loss():
    world, budget = World(linear(1.0, 0.9), 1.5, noise=0.0, waiting=0.4), auto(ahead=True)
    world.play(budget, 60)
    done = next(one for one in world.rounds[::-1] if one.begun_before and one.begins_next)
    budget.learn(done)
    before = budget._even.loss
    late = replace(done, begun_before=False, seconds=PhaseSeconds(verify=100.0))
    budget.learn(late)
    assert budget._even.loss - before == pytest.approx((2 * 1.0 - 0.6) / 0.6, rel=0.05)


def test_plain_rounds_begin_each_other():
    """While drafting does not pay: all passes are begun ahead but the first after a drafted round,
    and next to none in vain."""
    world, budget = World(linear(1.0, 0.9), 1.5, confidence=0.3, waiting=0.4), auto(ahead=True)
    world.play(budget, 1000)
    rounds = [(one, after) for one, after in pairwise(world.rounds[20:]) if one.budget == 1]
    assert all(one.begins_next == after.begun_before for one, after in rounds if after.budget == 1)
    wrong = [one for one, after in rounds if one.begins_next != (after.budget == 1)]
    assert len(wrong) < 0.01 * len(rounds)


def test_missing_experts_cost_what_they_take():
    """Rows that are free to compute, and a disk that makes them dear, or does not."""
    chosen = {}
    for miss in (0.0, 0.1):
        world = World(
            linear(1.0, 0.0), 0.2, misses=lambda rows: 4 * rows, miss=miss, confidence=0.8
        )
        budget = auto()
        world.play(budget, 800)
        chosen[miss] = np.mean([one.tree.rows for one in world.rounds[-100:]])
        assert budget.costs.plain(800) == pytest.approx(1 + 4 * miss, rel=0.15)
    assert chosen[0.1] < chosen[0.0] - 2
    # The disk becomes fast.
    world.miss = 0.001
    world.play(budget, 600)
    assert np.mean([one.tree.rows for one in world.rounds[-100:]]) > chosen[0.1] + 2


def test_the_cost_of_context_is_learned():
    """Attention of every row over a long context: the same text pays for fewer rows."""
    chosen = {}
    for context in (0, 8000):
        world = World(linear(1.0, 0.02, growth=5e-5), 0.2, confidence=0.8)
        world.context = context
        world.play(auto(), 800)
        chosen[context] = np.mean([one.tree.rows for one in world.rounds[-100:]])
    assert chosen[8000] < chosen[0] - 1


def test_a_tree_is_cut_to_its_first_nodes():
    world, budget = World(PLAIN, 0.3), auto()
    world.play(budget, 50)
    whole = world.tree(16)
    cut = budget.cut(whole)
    assert cut.tokens.tolist() == whole.tokens[: cut.rows].tolist()
    assert cut.parents.tolist() == whole.parents[: cut.rows].tolist()
    assert whole.rows == 17
    assert max(whole.depths) <= SLOTS


def test_fixed_asks_for_itself():
    budget, world = Fixed(5), World(PLAIN, 0.3)
    tree = world.tree(5)
    assert budget.limit() == 5
    assert budget.cut(tree) is tree
    assert all(one.tree.rows == 6 for one in world.play(budget, 30).rounds)
