"""Slots and quotas: who holds what, who has to go, and what nobody may take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.target.policy import POLICIES, Lru, S3Fifo, make_policy
from specdec.target.quotas import protected_layers, quotas, union
from specdec.target.slots import SlotTable

LAYERS, EXPERTS = 3, 8


def table_of(slots, quota=None, policy="lru"):
    quota = quota or dict.fromkeys(range(LAYERS), 0)
    return SlotTable(slots, EXPERTS, quota, make_policy(policy, slots))


def load(table, layer, *experts, live=()):
    slots = table.reserve(layer, np.array(experts, np.int64), np.array(live, np.int64))
    table.fill(slots)
    return slots


class Model:
    """LRU with quotas, as a list from the least recent on."""

    def __init__(self, slots, quota):
        self.slots, self.quota, self.held = slots, quota, []

    def count(self, layer):
        return sum(owner == layer for owner, _ in self.held)

    def load(self, layer, experts, live):
        for _ in range(len(self.held) + len(experts) - self.slots):
            over = {i: self.count(i) - self.quota[i] for i in self.quota}
            self.held.remove(
                next(
                    key
                    for key in self.held
                    if key not in live and (key[0] == layer or over[key[0]] > 0)
                )
            )
        self.held += [(layer, expert) for expert in experts]

    def touch(self, layer, experts):
        for key in [(layer, expert) for expert in sorted(experts)]:
            if key in self.held:
                self.held.remove(key)
                self.held.append(key)


steps = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4),
        st.sets(st.integers(0, EXPERTS - 1)),
    ),
    max_size=25,
)


@given(slots=st.integers(2, 24), steps=steps, quota=st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_an_lru_with_quotas(slots, steps, quota):
    quota = dict.fromkeys(range(LAYERS), min(quota, slots // LAYERS))
    table, model = table_of(slots, quota), Model(slots, quota)
    for layer, wanted, touched in steps:
        here = set(table.resident(layer).tolist())
        live = {(layer, expert) for expert in wanted & here}
        slots_live = table.places(layer)[sorted(wanted & here)]
        missing = sorted(wanted - here)[: table.room(layer, slots_live)]
        load(table, layer, *missing, live=slots_live)
        model.load(layer, missing, live)
        table.touch(layer, np.array(sorted(touched), np.int64))
        model.touch(layer, touched)
        for each in range(LAYERS):
            expected = sorted(expert for owner, expert in model.held if owner == each)
            assert table.resident(each).tolist() == expected


@pytest.mark.parametrize("policy", POLICIES)
@given(slots=st.integers(1, 24), steps=steps, quota=st.integers(0, 8), abandon=st.booleans())
@settings(max_examples=100, deadline=None)
def test_quotas_hold_and_live_slots_stay(policy, slots, steps, quota, abandon):
    quota = dict.fromkeys(range(LAYERS), min(quota, slots // LAYERS))
    table = table_of(slots, quota, policy)
    for step, (layer, wanted, touched) in enumerate(steps):
        before = {i: set(table.resident(i).tolist()) for i in range(LAYERS)}
        hits = sorted(wanted & before[layer])
        live = table.places(layer)[hits]
        room = table.room(layer, live)
        assert room >= quota[layer] - len(hits)
        reserved = table.reserve(layer, np.array(sorted(wanted - set(hits))[:room], int), live)
        assert not table.full(reserved).any()
        assert set(hits) <= set(table.resident(layer).tolist())
        if abandon and step % 2:
            table.rebuild() if step % 4 == 1 else table.release(reserved)
        else:
            table.fill(reserved)
        table.touch(layer, np.array(sorted(touched), np.int64))
        places = np.concatenate([table.places(i) for i in range(LAYERS)])
        taken = places[places >= 0]
        assert len(set(taken.tolist())) == len(taken)
        for other in set(range(LAYERS)) - {layer}:
            left = set(table.resident(other).tolist())
            assert left <= before[other]
            assert len(left) >= min(len(before[other]), quota[other])


def test_a_layer_keeps_its_quota_and_may_grow_into_what_is_shared():
    table = table_of(6, {0: 2, 1: 2, 2: 0})
    load(table, 0, *range(6))
    assert table.room(1) == 4
    load(table, 1, 0, 1, 2, 3)
    assert (len(table.resident(0)), len(table.resident(1))) == (2, 4)
    assert table.room(2) == 2
    assert table.evictions == {0: 4, 1: 0, 2: 0}


def test_reserved_slots_are_believed_by_nobody():
    table = table_of(4)
    load(table, 0, 1, 2)
    slots = table.reserve(0, np.array([3, 4]))
    assert table.resident(0).tolist() == [1, 2]
    assert (table.places(0)[[3, 4]] == slots).all()
    assert table.room(1) == 2  # what is being filled cannot be evicted
    table.rebuild()
    assert table.room(1) == 4
    assert table.places(0)[3] == -1


def test_what_was_loaded_ahead_stays_until_its_layer_has_asked():
    table = table_of(4)
    load(table, 0, 0, 1)
    slots = table.reserve(1, np.array([5, 6]))
    table.fill(slots, early=True)
    load(table, 2, 7)  # though what came early was never used
    assert (table.resident(0).tolist(), table.resident(1).tolist()) == ([1], [5, 6])
    assert table.asked(1, np.array([5, 7])) == 1
    assert table.asked(1, np.array([5])) == 0  # counted once
    load(table, 2, 0)
    assert table.resident(1).tolist() == [6]


def test_a_guess_that_arrives_after_its_layer_asked_for_others_is_first_to_go():
    table = table_of(4)
    slots = table.reserve(1, np.array([5]))
    assert table.asked(1, np.array([7])) == 0
    table.fill(slots, early=True)
    load(table, 0, 0, 1, 2)
    load(table, 2, 7)
    assert table.resident(1).tolist() == []
    assert table.unused[1] == 1


# --- policies


def use(policy, slots, *, keys=None, early=False):
    slots = np.array(slots)
    policy.loaded(slots, keys or [(0, int(slot)) for slot in slots], early)


def test_lru_forgets_what_was_used_longest_ago():
    policy = Lru(4)
    use(policy, [0, 1, 2, 3])
    policy.used(np.array([1, 0]))
    assert policy.rank(np.arange(4)).tolist() == [2, 3, 1, 0]


def test_s3_fifo_lets_go_first_of_what_nobody_came_back_to():
    policy = S3Fifo(20)
    use(policy, range(20))
    policy.used(np.arange(10))  # the passes that loaded them were committed
    policy.used(np.array([3, 4]))  # and these were used again
    assert policy.rank(np.arange(20))[:3].tolist() == [0, 1, 2]
    assert set(policy.rank(np.arange(20))[-2:].tolist()) == {3, 4}
    policy.evicted(np.arange(5, 20), [(0, slot) for slot in range(5, 20)])
    use(policy, [7], keys=[(0, 7)])  # it left the small queue a moment ago: to the main one
    use(policy, [8], keys=[(9, 9)])
    assert policy.rank(np.array([7, 8])).tolist() == [8, 7]


def test_s3_fifo_spares_what_is_used_and_takes_a_use_for_it():
    policy = S3Fifo(4)
    use(policy, range(4))
    policy.used(np.array([0, 0]))
    policy.used(np.array([0, 1]))
    policy.used(np.array([1]))
    policy.evicted(np.array([3]), [(0, 3)])  # 0 and 1 are older: they move to the main queue
    use(policy, [3], keys=[(5, 5)])
    assert policy.rank(np.arange(4)).tolist()[:2] == [2, 3]


@pytest.mark.parametrize("name", POLICIES)
def test_what_came_early_goes_before_what_was_used(name):
    policy = make_policy(name, 3)
    use(policy, [0, 1])
    policy.used(np.array([0, 1]))
    policy.used(np.array([0, 1]))
    use(policy, [2], early=True)
    assert policy.rank(np.arange(3)).tolist()[0] == 2


# --- quotas


def test_the_union_is_what_rows_are_expected_to_need():
    assert union(256, 8, 1) == 16  # at least twice top-k
    assert union(256, 8, 6) == 44
    assert union(8, 2, 100) == 8


def test_protected_layers_are_the_first_and_the_last():
    assert protected_layers((6, 3), range(40)) == {0, 1, 2, 3, 4, 5, 37, 38, 39}
    assert protected_layers((1, 1), (2, 5, 7)) == {2, 7}
    assert protected_layers((6, 3), range(4)) == {0, 1, 2, 3}
    assert protected_layers((0, 0), range(4)) == set()


def test_quotas_give_every_layer_its_union_and_favour_the_protected():
    layers = range(10)
    assert quotas(160, layers, 16, 8, ()) == dict.fromkeys(layers, 16)
    shared = quotas(200, layers, 16, 8, {0, 9})
    assert shared == {**dict.fromkeys(layers, 16), 0: 26, 9: 26}  # half of 40 is theirs
    assert quotas(1000, layers, 16, 8, {0}) == {**dict.fromkeys(layers, 16), 0: 32}
    assert quotas(100, layers, 16, 8, {0}) == dict.fromkeys(layers, 10)  # less than the union
    assert quotas(79, layers, 16, 8, {0}) == dict.fromkeys(layers, 0)  # less than top-k each


@given(
    slots=st.integers(1, 500),
    count=st.integers(1, 40),
    wanted=st.integers(1, 64),
    first=st.integers(0, 10),
)
def test_quotas_never_exceed_the_slots(slots, count, wanted, first):
    found = quotas(slots, range(count), wanted, min(8, wanted), range(first))
    assert sum(found.values()) <= slots
    assert len({found[i] for i in range(count) if i >= first}) <= 1
