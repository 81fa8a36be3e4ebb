"""The order of the stream as pure mathematics."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffzoo.data.order import Balanced, LaneOrder, Layout, full_shuffle, lanes_for, permutation

RECORDED = [6, 0, 7, 9, 1, 5, 2, 8, 4, 3]
BLOCKS = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any)


def test_permutation_is_recorded() -> None:
    """A change of these numbers breaks the resume of every run in the world."""
    assert permutation(10, 3, "blocks", 1).tolist() == RECORDED
    assert sorted(permutation(1000, 0)) == list(range(1000))


@given(BLOCKS, st.integers(1, 24), st.integers(1, 9), st.integers(1, 50), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_epoch_is_complete(blocks: list[int], lanes: int, run: int, window: int, epoch: int) -> None:
    order = LaneOrder(np.array(blocks), Layout(0, lanes, run, window))
    places = order.places(epoch * order.rows, order.rows)
    assert sorted(p.row for p in places) == list(range(sum(blocks)))
    assert {p.visit for p in places} == {epoch}


@given(BLOCKS, st.integers(1, 12), st.integers(1, 9), st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_a_window_holds_what_its_places_say(blocks: list[int], lanes: int, run: int, window: int) -> None:
    order = LaneOrder(np.array(blocks), Layout(1, lanes, run, window))
    shown: dict[tuple, list[int]] = {}
    for place in order.places(0, 2 * order.rows):
        shown.setdefault(place.window, []).append(place.row)
    for name, rows in shown.items():
        assert order.window_rows(name).tolist() == rows


def test_position_is_random_access() -> None:
    """The place at a position does not depend on what was asked before."""
    a, b = (LaneOrder(np.array([7, 0, 19, 30]), Layout(5, 6, 2, 4)) for _ in range(2))
    whole = a.places(0, 200)
    assert [b.place(p) for p in (150, 3, 199, 57, 0)] == [whole[p] for p in (150, 3, 199, 57, 0)]


@pytest.mark.parametrize(
    "order",
    [LaneOrder(np.array([7, 0, 19, 30]), Layout(5, 6, 2, 4)), Balanced(np.array([0, 1, 1, 2, 2, 2]), 3)],
    ids=["lanes", "balanced"],
)
def test_a_copy_in_another_process_is_the_same(order: LaneOrder | Balanced) -> None:
    """Workers that are not forked get it pickled."""
    places = order.places(0, 50)
    assert pickle.loads(pickle.dumps(order)).places(0, 50) == places


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(p.row for p in LaneOrder(np.full(8, 8), Layout(seed, 4, 2, 8)).places(64 * epoch, 64))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_a_batch_comes_from_all_over_the_source() -> None:
    """Mean distance of two samples of a batch, in rows of the source: n / 3 for a full permutation, and 7/8 of that
    for a batch from eight lanes."""
    rows, batch = 20_000, 256
    for layout, least in ((full_shuffle(0, rows), 0.97), (lanes_for(0, batch, 64, 8192), 0.97 * 7 / 8)):
        order = LaneOrder(np.full(rows // 50, 50), layout)
        shown = np.array([p.row for p in order.places(0, rows // batch * batch)]).reshape(-1, batch)
        distance = np.abs(shown[:, :, None] - shown[:, None]).mean()
        assert least < distance / (rows / 3) < 1.03


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_each_lane_belongs_to_one_worker(workers: int, world: int) -> None:
    """With 1, 2, 4 or 8 workers and ranks, no two processes read the same lane in an epoch."""
    batch = 64
    order = LaneOrder(np.full(100, 40), lanes_for(0, batch, 64, 1024))
    owner: dict[int, tuple[int, int]] = {}
    for step in range(order.rows // batch):
        for slot, place in enumerate(order.places(step * batch, batch)):
            process = (slot * world // batch, step % workers)
            assert owner.setdefault(place.window[1], process) == process


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_balanced_is_even_and_fair(labels: list[int], seed: int) -> None:
    order = Balanced(np.array(labels), seed)
    present = sorted(set(labels))
    turns = 4 * max(labels.count(c) for c in present)
    places = order.places(0, turns * len(present))
    by_class = {c: [p for p in places if labels[p.row] == c] for c in present}
    assert {len(v) for v in by_class.values()} == {turns}
    for c, shown in by_class.items():
        size = labels.count(c)
        for k in range(turns // size):
            visit = shown[k * size : (k + 1) * size]
            assert sorted(p.row for p in visit) == [i for i, x in enumerate(labels) if x == c]
            assert {p.visit for p in visit} == {k}
