"""Clustering: experts used together come to lie together, and what that gains is counted right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.checkpoint import Checkpoint
from specdec.cluster import adjacency, cluster, coactivation, report
from specdec.errors import RoutingLogError
from specdec.repack_check import verify
from specdec.routing_log import RoutingLog
from specdec.target.config import TargetConfig
from specdec.target.expert_store import ExpertStore
from tests.checkpoints import write_checkpoint
from tests.commands import fails, run
from tests.logs import header, log_of, write_log


def naive(log, places):
    """(requests, reads, bytes), one pass and layer at a time."""
    requests = reads = nbytes = 0
    for at in range(log.passes):
        rows = log.rows[log.starts[at] : log.starts[at + 1]]
        if (rows["flags"] & 2).any():
            continue
        for column, layer in enumerate(log.header.layers):
            spots = {places[layer][expert] for expert in rows["experts"][:, column].ravel()}
            requests += len(spots)
            reads += sum(spot - 1 not in spots for spot in spots)
            nbytes += len(spots) * log.header.disk_bytes[column]
    return requests, reads, nbytes


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), passes=st.integers(1, 8), rows=st.integers(1, 4))
def test_adjacency_is_the_naive_count(seed, passes, rows):
    random = np.random.default_rng(seed)
    log = log_of(header(layers=3, experts=8, top_k=2), random, passes=passes, rows=rows, prompt=2)
    places = {layer: random.permutation(8).tolist() for layer in range(3)}
    found = adjacency(log, places)
    requests, reads, nbytes = naive(log, places)
    assert (found.requests, found.reads) == (requests, reads)
    assert found.bytes_per_read == nbytes / reads
    assert found.adjacent == 1 - reads / requests


def grouped(experts=64, passes=400, seed=0):
    """A log whose rows choose within groups of eight experts that lie scattered."""
    random = np.random.default_rng(seed)
    groups = [np.random.default_rng(layer).permutation(experts).reshape(-1, 8) for layer in (0, 1)]

    def choose(shape):
        rows, layers, top_k = shape
        chosen = np.empty(shape, np.int64)
        for row in range(rows):
            for layer in range(layers):
                group = groups[layer][random.integers(len(groups[layer]))]
                chosen[row, layer] = random.choice(group, top_k, replace=False)
        return chosen

    return log_of(header(2, experts, 4), random, passes=passes, rows=1, choose=choose)


def test_groups_are_found_and_the_gain_is_on_unseen_passes():
    done = cluster(grouped())
    assert all(sorted(one) == list(range(64)) for one in done.places.values())
    assert done.passes == (200, 200)
    assert done.after.adjacent > done.before.adjacent + 0.25
    assert done.after.bytes_per_read > 1.4 * done.before.bytes_per_read
    again = adjacency(grouped().part(200, 400), done.places)
    assert again == done.after
    assert "neighbours" in report(done)[1]


def test_random_routing_is_not_said_to_gain():
    random = np.random.default_rng(5)
    done = cluster(log_of(header(1, 64, 2), random, passes=60, rows=1))
    assert done.after.bytes_per_read < 1.2 * done.before.bytes_per_read
    if done.after.bytes_per_read <= done.before.bytes_per_read:
        assert "NOTHING" in report(done)[-1]


def test_coactivation_counts_pairs():
    together = coactivation(np.array([[0, 2], [2, 1], [0, 2]]), 4)
    assert together.tolist() == [[2, 0, 2, 0], [0, 1, 1, 0], [2, 1, 3, 0], [0, 0, 0, 0]]


def test_one_pass_is_too_little():
    log = log_of(header(1, 8, 2), np.random.default_rng(0), passes=1, rows=1)
    with pytest.raises(RoutingLogError, match="has 1 passes"):
        cluster(log)


def test_repack_follows_the_log(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe")
    path = tmp_path / "log"
    write_log(path, log_of(header(4, 8, 2), np.random.default_rng(1), passes=20, rows=2))
    done = run("repack", folder, tmp_path / "out", "--cluster", path)
    assert done.exit_code == 0, done.stderr
    assert "bytes per merged read" in done.stdout
    index, _ = verify(tmp_path / "out", hashes=True)
    wanted = cluster(RoutingLog.read(path)).places
    assert {layer.layer: layer.places for layer in index.layers} == wanted
    assert index.order.startswith("clustered by routing log sha256 ")


def test_a_log_of_another_model_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe")
    with Checkpoint.open(folder) as checkpoint:
        assert ExpertStore(checkpoint, TargetConfig.of(checkpoint)).num_experts == 8
    path = tmp_path / "log"
    write_log(path, log_of(header(4, 16, 2), np.random.default_rng(1), passes=4, rows=2))
    done = run("repack", folder, tmp_path / "out", "--cluster", path)
    assert fails(done, str(path), "4 layers of 16 experts", "4 of 8")
    assert not (tmp_path / "out").exists()
