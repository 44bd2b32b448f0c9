"""Sampling with speculation emits the target's processed distribution; biased rules do not.

Thousands of texts from tables (tests/chance.py) through the real engine, against probabilities
written out here in float64: chi-square over whole texts, so that dependence between positions shows
too. Seeds are fixed: a test passes always or never.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specdec import swor
from specdec.budget import Fixed
from specdec.matching import Matching
from specdec.sampling import Sampling
from specdec.swor import Swor, drawing_order
from specdec.tree.block import Block
from specdec.tree.build import build
from specdec.tree.draft_tree import DraftTree
from tests.chance import draw, table_engine

VOCAB, LENGTH, TEXTS = 4, 3, 1500
PROMPT = [1, 2]
FILTERED = {"temperature": 1.2, "top_p": 0.93, "min_p": 0.02, "repetition_penalty": 1.4}
PLAIN = {"temperature": 0.9}


def next_token(logits, sampling, tokens):
    """Probabilities of the next token, by the definitions."""
    logits = logits.astype(np.float64)
    for token in set(tokens):
        penalty = sampling.repetition_penalty
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    p = np.exp(logits) / np.exp(logits).sum()
    above = np.array([p[p > own].sum() for own in p])
    kept = (above < sampling.top_p) & (p >= sampling.min_p * p.max())
    weights = np.where(kept, np.exp(logits / sampling.temperature), 0.0)
    return weights / weights.sum()


def expected(target, sampling):
    """The probability of every text of LENGTH tokens after the prompt."""
    found = {}
    for text in product(range(VOCAB), repeat=LENGTH):
        share, tokens = 1.0, list(PROMPT)
        for token in text:
            share *= next_token(target.after(tokens), sampling, tokens)[token]
            tokens.append(token)
        found[text] = share
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def chance(sampling, budget, kind="best-first", texts=TEXTS, seed=0) -> float:
    """How likely the drawn texts are, or worse ones, if they follow the target's distribution.

    The p-value of a chi-square test.
    """
    engine = table_engine(VOCAB, seed)
    counts: dict[tuple[int, ...], int] = {}
    for number in range(texts):
        one = Sampling(**sampling, seed=number)
        text = draw(engine, PROMPT, one, budget, kind, LENGTH)
        counts[text] = counts.get(text, 0) + 1
    shares = expected(engine.target, Sampling(**sampling))
    if any(shares[text] == 0.0 for text in counts):
        return 0.0  # it came, and cannot
    common = [text for text, share in shares.items() if share * texts >= 5]
    seen = [counts.get(text, 0) for text in common]
    wanted = [shares[text] * texts for text in common]
    rest = texts - sum(wanted)
    if rest > 1e-6 * texts:
        seen.append(texts - sum(seen))
        wanted.append(rest)
    assert len(wanted) > 8
    return float(stats.chisquare(seen, wanted).pvalue)


FAIR, BIASED = 1e-3, 1e-6


@pytest.mark.parametrize(
    ("budget", "kind", "sampling"),
    [
        (1, "best-first", PLAIN),
        (6, "best-first", FILTERED),
    ],
)
def test_match_emits_the_targets_distribution(budget, kind, sampling):
    assert chance(sampling, budget, kind) > FAIR


@pytest.mark.parametrize(
    ("budget", "kind", "sampling"),
    [
        (1, "best-first", FILTERED),
        (4, "chain", FILTERED),
        (6, "best-first", PLAIN),
        (9, "spine", FILTERED),
        (40, "best-first", PLAIN),
    ],
)
def test_swor_emits_the_targets_distribution(budget, kind, sampling):
    assert chance({**sampling, "accept": "swor"}, budget, kind) > FAIR


def test_swor_with_other_tables():
    assert chance({**PLAIN, "accept": "swor"}, 7, seed=3) > FAIR


def most_likely(self, bonus, block, budget, kind):
    """The draft's best tokens are no draws, yet the residual rule takes them for such."""
    q = swor.draft_probabilities(block, self._sampling)
    self._drawn = swor._Drawn(block.tokens, q)
    return build(bonus, block, budget, kind)


def without_the_unlikely(self, bonus, block, budget, kind, real=Swor.grow):
    """A candidate that is improbable is left out, and with it what was drawn after it."""
    tree = real(self, bonus, block, budget, kind)
    kept, closed = [0], set()
    for row in range(1, tree.rows):
        depth, parent = tree.depths[row] - 1, int(tree.parents[row])
        rank = np.flatnonzero(self._drawn.tokens[depth] == tree.tokens[row])[0]
        if self._drawn.probabilities[depth, rank] < 0.3:
            closed.add(parent)
        if parent in kept and parent not in closed:
            kept.append(row)
    parents = [-1, *(kept.index(tree.parents[row]) for row in kept[1:])]
    return DraftTree(tree.tokens[kept], np.array(parents, np.int32), tree.log_weights[kept])


def keeps_all_of_p(p, tokens, q, chances, last, real=swor.accept):
    """After a rejection the token is drawn from p as it was."""
    token, at = real(p, tokens, q, chances, last)
    return (token, at) if at is not None else (p.draw(last), None)


def takes_any_likely_child(self, logits, path):
    """Typical acceptance: what the target finds likely enough is accepted, drawn or not."""
    found = self._distribution(logits, path)
    shares = found.probabilities(np.arange(VOCAB))
    return int(shares.argmax()) if shares.max() > 0.5 else found.draw(self._uniform(path))


def same_number_twice(seed, position, count, stream, real=swor.uniforms):
    """Acceptance is decided by the numbers that the candidates were drawn with."""
    return real(seed, position, count, swor.DRAWS)


def sorted_draws(q, numbers):
    """The right set of candidates, most probable first: the first is no draw from q."""
    order = drawing_order(q, numbers)
    return np.sort(order, axis=1)


@pytest.mark.parametrize(
    ("where", "what", "rule", "accept"),
    [
        (Swor, "grow", most_likely, "swor"),
        (Swor, "grow", without_the_unlikely, "swor"),
        (swor, "accept", keeps_all_of_p, "swor"),
        (swor, "uniforms", same_number_twice, "swor"),
        (swor, "drawing_order", sorted_draws, "swor"),
        (Matching, "_token", takes_any_likely_child, "match"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_biased_rule_fails_the_same_test(where, what, rule, accept, monkeypatch):
    monkeypatch.setattr(where, what, rule)
    assert chance({**PLAIN, "accept": accept}, 6) < BIASED


def test_a_draft_that_is_right_is_always_accepted_by_swor():
    """Drafted from the target's own distribution, a candidate is never rejected; by matching it is
    only when the target happens to draw the likeliest token."""
    accepted = {}
    for accept in ("match", "swor"):
        engine = table_engine(VOCAB)
        draft: Any = engine.draft

        def propose(bonus, width, slots=None, target=engine.target):
            p = next_token(target.after([*target.tokens, bonus]), Sampling(temperature=1.0), [])
            order = np.argsort(-p, kind="stable")[None]
            return Block(order.astype(np.int32), np.log(p)[order])

        draft.propose = propose
        engine.prefill(PROMPT, True, None, Sampling(temperature=1.0, accept=accept))
        rounds = [engine.step(Fixed(2), "chain").accepted for _ in range(300)]
        accepted[accept] = np.mean(rounds)
    assert accepted["swor"] == 1.0
    assert accepted["match"] < 0.8
