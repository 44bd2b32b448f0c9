"""When drafting pays: the account that bounds its loss, and the tries that find out."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from specdec.break_even import CREDIT, FIRST_WAIT, LAST_WAIT, SHARE, BreakEven

outcomes = st.lists(
    st.tuples(st.floats(1.0, 12.0), st.floats(1.0, 8.0)),
    min_size=1,
    max_size=200,
)


@given(outcomes=outcomes, risk=st.floats(0.0, 12.0), texts=st.integers(1, 5))
def test_nothing_that_happens_loses_more_than_is_given(outcomes, risk, texts):
    """Costs and tokens of any kind, in any order: no try is begun that the account
    does not pay for, so it ends at most one round below."""
    even, dearest = BreakEven(), 0.0
    spent = lost = 0.0
    for _ in range(texts):
        even.begin()
        for cost, tokens in outcomes:
            if even.pays(risk):
                even.drafted(cost, tokens)
                spent, lost = spent + cost, lost + cost - tokens
                dearest = max(dearest, cost - tokens)
            else:
                even.plain()
                spent += 1
    # Once in the text, and once for the plain rounds since the last try, over all texts.
    assert lost <= texts * (CREDIT + dearest) + 2 * SHARE * spent + dearest


def tries(even, rounds, cost, tokens):
    """At which rounds it drafts, if every draft costs and brings that."""
    found = []
    for at in range(rounds):
        if even.pays(0.5):
            found.append(at)
            even.drafted(cost, tokens)
        else:
            even.plain()
    return found


def test_tries_are_further_and_further_apart():
    even = BreakEven()
    found = tries(even, 2000, 3.0, 1)
    gaps = [later - earlier - 1 for earlier, later in pairwise(found[2:])]
    assert gaps[0] >= FIRST_WAIT
    assert gaps == sorted(gaps)
    assert gaps[-1] >= LAST_WAIT
    assert found[-1] > 1800  # but they never end


def test_it_stays_where_it_pays_and_comes_back():
    even = BreakEven()
    assert tries(even, 50, 2.0, 3) == list(range(50))
    assert not even.pausing
    tries(even, 500, 3.0, 1)
    assert even.pausing
    assert even.advantage < 1
    back = tries(even, 300, 2.0, 4)
    assert len(back) > 150
    assert back[-10:] == list(range(290, 300))


def test_a_text_begins_with_what_the_texts_before_said():
    even = BreakEven()
    assert even.pays(0.5)
    for _ in range(10):
        even.begin()
        tries(even, 64, 3.0, 1)
    even.begin()
    assert even.advantage < 1
    assert not even.pays(0.5)
    found = tries(even, 64, 3.0, 1)
    assert 1 <= len(found) <= 2
    for _ in range(10):
        even.begin()
        tries(even, 200, 2.0, 4)
    even.begin()
    assert even.pays(0.5)


def test_a_dear_try_is_saved_up_for():
    """A try that may lose 20 plain rounds waits until 3 % of the time have paid for it."""
    even, drafted = BreakEven(), []
    for at in range(3000):
        if even.pays(20.0):
            drafted.append(at)
            even.drafted(21.0, 1)
        else:
            even.plain()
    assert drafted[0] > 500
    assert 2 <= len(drafted) <= SHARE * 3000 / 20 + 2


def test_the_account_tells_costs_and_tokens_of_a_round():
    even = BreakEven()
    for _ in range(100):
        even.drafted(3.0, 2.0)
    assert round(even.round_cost, 3) == 3.0
    assert round(even.round_tokens, 3) == 2.0
    assert round(even.loss, 3) == 100.0
