"""How work reports to the driver: one board for all stages of a job, by hand and through a real Ray."""

import gc
from typing import Any

import pytest

from xdist import cluster
from xdist.cluster import Board

Seen = list[tuple[int, float, list[dict[str, Any]]]]


def test_a_board_sums_the_work_of_its_stage_and_gives_each_line_once() -> None:
    board = Board()
    board.count(1, "a", 3, 0.25)
    board.count(1, "b", 4, 0.5)
    board.count(1, "a", 5, 0.3)  # in place of the 3
    board.post(1, {"step": 1})
    board.post(1, {"step": 2})
    assert board.read(1) == (9, pytest.approx(0.8), [{"step": 1}, {"step": 2}])
    assert board.read(1) == (9, pytest.approx(0.8), [])


def test_the_next_stage_begins_at_nothing_and_does_not_hear_the_one_before() -> None:
    board = Board()
    board.count(1, "a", 3, 1.0)
    board.post(1, {"step": 1})
    assert board.read(2) == (0, 0, [])
    board.count(1, "a", 4, 1.0)
    board.post(1, {"step": 2})
    board.count(2, "a", 7, 0.5)
    assert board.read(1) is None
    assert board.read(2) == (7, 0.5, [])


class Recorded:
    """A handle of an actor that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.count = self

    def remote(self, *told: Any) -> None:
        self.told.append(told)


def test_counts_in_quick_succession_are_sent_as_one_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    handle = Recorded()
    board = cluster.RemoteBoard(handle, 3)
    for value in range(1, 6):  # at 100.0, 100.2, 100.4, 100.6, 100.8
        board.count("a", value, value / 10)
        now[0] += 0.2
    assert handle.told == [(3, "a", 1, 0.1), (3, "a", 4, 0.4)]
    board.count("b", 7, 1.0)  # of the next unit; what waited of the one before is sent first
    assert handle.told[2:] == [(3, "a", 5, 0.5)]
    board.arrived()
    assert handle.told[3:] == [(3, "b", 7, 1.0)]
    board.arrived()
    assert len(handle.told) == 4


def test_stages_share_a_process_and_the_driver_sees_the_last_of_each(ray_cluster: None) -> None:
    import ray

    def report(board: cluster.RemoteBoard, value: int) -> None:
        board.post({"value": value})
        board.count("unit", value, value / 10)
        board.arrived()

    task: Any = ray.remote(report)
    actors, first = [], []

    def stage(values: list[int]) -> Seen:
        seen: Seen = []
        with cluster.watched(lambda *found: seen.append(found)) as board:
            actors.append(board.handle._actor_id)
            if first:
                ray.get(task.remote(first.pop(), 9))  # a straggler of the first stage
                gc.collect()  # nobody but the job itself holds the actor any more
            else:
                first.append(board)
            for value in values:
                ray.get(task.remote(board, value))
        return seen

    stages = [stage([4, 6]), stage([2, 3])]
    gc.collect()
    stages.append(stage([5]))
    assert len(set(actors)) == 1
    assert [seen[-1][:2] for seen in stages] == [(6, 0.6), (3, 0.3), (5, 0.5)]
    assert [[line["value"] for found in seen for line in found[2]] for seen in stages] == [[4, 6], [2, 3], [5]]
