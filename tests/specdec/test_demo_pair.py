"""The demo pair that ships: in mlx-lm and here, with and without the draft.

On the shipped prompts, none of which it was trained on. The pair is part of the package: where it
is missing, these tests fail.
"""

from itertools import count

import mlx.core as mx
import numpy as np
import pytest

from specdec import demo_pair
from specdec.generation import Request, generate
from specdec.load import Settings, load
from specdec.prompts import read_prompts
from specdec.tree.build import KINDS
from tests.commands import run as run_command

TOKENS = 64  # of every prompt
PEER_PROMPTS = 10  # the shortest ones: MLX runs a CPU token in 30 ms
CONTEXT = 1024
# (pinned layers, slots): the default, the documented one, everything from disk
PLACES = ((None, None), (20, 48), (0, 24))
MODES = [(budget, KINDS[n % 3], n % 3) for n, budget in enumerate(range(2, 25))]


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(demo_pair.PROMPTS)


@pytest.fixture(scope="module")
def places():
    """The pair loaded with each choice of pins and slots."""
    loaded = [
        load(Settings(pin_layers=pins, cache_slots=slots, context=CONTEXT, budget=24))
        for pins, slots in PLACES
    ]
    yield loaded
    for each in loaded:
        each.engine.target.experts.store.checkpoint.close()


def run(loaded, prompt: str, budget: int, kind: str = "best-first"):
    """End tokens are tokens like any other here."""
    tokens = tuple(loaded.tokenizer.encode(prompt))
    return generate(loaded.engine, loaded.tokenizer, Request(tokens, budget, kind, TOKENS))


@pytest.fixture(scope="module")
def alone(places, prompts):
    """Every prompt's tokens without speculation."""
    return [run(places[0], prompt.text, 1).tokens for prompt in prompts]


def test_enough_prompts_and_tokens(alone, prompts):
    assert len(prompts) >= 20
    assert sum(map(len, alone)) >= 2000
    assert {len(tokens) for tokens in alone} == {TOKENS}
    assert len(set(alone)) == len(prompts)


def test_the_same_tokens_for_budgets_trees_pins_and_slots(places, prompts, alone):
    """Every prompt in one mode; every budget, kind and place occurs."""
    wrong, accepted, rounds = [], 0, 0
    for prompt, expected, n in zip(prompts, alone, count(), strict=False):
        budget, kind, place = MODES[n % len(MODES)]
        place = (place + n // len(MODES)) % len(PLACES)
        result = run(places[place], prompt.text, budget, kind)
        accepted += sum(r.accepted for r in result.rounds)
        rounds += len(result.rounds)
        if result.tokens != expected:
            wrong.append((prompt.id, budget, kind, PLACES[place]))
    assert not wrong
    # a trained draft: about half of what is emitted is drafted, at the very least
    assert accepted > rounds


def test_one_prompt_in_every_mode(places, prompts, alone):
    n = next(n for n, prompt in enumerate(prompts) if prompt.kind == "code")
    for budget, kind, place in MODES[1::6]:
        result = run(places[place], prompts[n].text, budget, kind)
        assert result.tokens == alone[n], (budget, kind, PLACES[place])


def test_text_is_that_of_mlx_lm(prompts, alone, places):
    """Greedy text of mlx-lm on the same files in float32; near-ties may fall either way."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.generate import generate_step

    model, tokenizer = mlx_lm.load(str(demo_pair.TARGET))
    model.set_dtype(mx.float32)
    encoded = [tokenizer.encode(prompt.text) for prompt in prompts]
    assert encoded == [places[0].tokenizer.encode(prompt.text) for prompt in prompts]
    for n in sorted(range(len(prompts)), key=lambda n: len(encoded[n]))[:PEER_PROMPTS]:
        ids = encoded[n]
        steps = generate_step(mx.array(ids), model, max_tokens=TOKENS)
        theirs = tuple(int(token) for token, _ in steps)
        if theirs == alone[n]:
            continue
        at = next(i for i, (a, b) in enumerate(zip(theirs, alone[n], strict=True)) if a != b)
        logits = np.array(model(mx.array([ids + list(theirs[:at])]))[0, -1])
        second, first = np.sort(logits)[-2:]
        print(f"{prompts[n].id}: first difference at token {at}, top-2 gap {first - second:.2e}")
        assert first - second < 1e-3


def test_the_doctor_finds_that_the_pair_fits():
    done = run_command("doctor", "--positions", "60", "--quiet")
    assert done.exit_code == 0, done.output
    assert "The pair fits" in done.stdout
