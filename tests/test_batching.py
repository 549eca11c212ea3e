"""The order of training: cut by hand-checked values, and properties that must hold for any corpus."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist import batching

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(np.array)


def test_token_batches_by_hand() -> None:
    found = [batch.tolist() for batch in batching.token_batches(np.array([3, 9, 4, 1, 4]), budget=9)]
    assert found == [[1], [2, 4], [0, 3]]  # 1 × 9; 2 × 4; 2 × 3


def test_token_batches_take_a_text_longer_than_the_budget_by_itself() -> None:
    assert [batch.tolist() for batch in batching.token_batches(np.array([50, 2]), budget=10)] == [[0], [1]]


@given(LENGTHS, st.integers(1, 200))
def test_token_batches_hold_each_text_once_and_keep_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = list(batching.token_batches(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= budget or len(batch) == 1 for batch in batches)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_windows_cover_every_shard_once(shards: int, size: int, seed: int, epoch: int) -> None:
    windows = batching.windows(shards, size, seed, epoch)
    assert sorted(shard for window in windows for shard in window) == list(range(shards))
    assert all(len(window) == size for window in windows[:-1])
    assert windows == batching.windows(shards, size, seed, epoch)


def test_windows_differ_between_epochs_and_seeds() -> None:
    orders = {str(batching.windows(64, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_language_weights_by_hand() -> None:
    counts = {"en": 500, "es": 100, "de": 400}
    natural = batching.language_weights(counts, 1.0, "en", 0.5)
    assert natural == pytest.approx({"en": 0.5, "es": 1.0, "de": 1.0})
    # Square roots are 10 and 20; the 500 translations of an epoch are shared 1 : 2.
    tempered = batching.language_weights(counts, 2.0, "en", 1.0)
    assert tempered == pytest.approx({"en": 1.0, "es": 500 / 3 / 100, "de": 1000 / 3 / 400})


def test_language_weights_leave_out_a_language_without_text() -> None:
    assert batching.language_weights({"en": 5, "es": 0, "de": 7}, 3.0, "en", 1.0) == pytest.approx({"en": 1.0, "de": 1.0})


@pytest.mark.parametrize(("tokens", "steps"), [(0, 0), (1, 1), (149, 1), (151, 2), (1000, 10)])
def test_window_steps(tokens: float, steps: int) -> None:
    assert batching.window_steps(tokens, 100) == steps


@given(st.lists(st.floats(0, 4), min_size=1, max_size=200).map(np.array), st.integers(0, 99))
def test_draw_takes_each_index_its_weight_rounded_down_or_up(weights: np.ndarray, seed: int) -> None:
    times = np.bincount(batching.draw(weights, seed, 0, 0), minlength=len(weights))
    assert (times >= np.floor(weights)).all()
    if times.sum() > 1:  # a lone index may stand in for weights that drew nothing
        assert (times <= np.ceil(weights)).all()
    assert times.sum() > 0 or not weights.any()


def test_draw_meets_the_weight_on_average() -> None:
    drawn = batching.draw(np.full(20_000, 1.3), 0, 0, 0)
    assert len(drawn) == pytest.approx(26_000, abs=4 * np.sqrt(20_000 * 0.3 * 0.7))  # four standard deviations
    assert not np.array_equal(drawn, np.sort(drawn))


def test_draws_differ_with_every_part_of_their_key() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [batching.draw(np.full(200, 0.5), *key).tolist() for key in keys]
    assert len({str(drawn) for drawn in draws}) == 4
    assert batching.draw(np.full(200, 0.5), 0, 0, 1).tolist() == draws[3]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30), st.integers(1, 4))
def test_every_drawn_index_is_in_exactly_one_micro_batch(lengths: np.ndarray, steps: int, micro_batches: int) -> None:
    drawn = batching.draw(np.ones(len(lengths)), 1, 0, 0)
    cut = batching.cut(drawn, lengths, steps, micro_batches, 1, 0, 0)
    assert len(cut) == steps
    assert all(len(step) == micro_batches for step in cut)
    rows = [row for step in cut for row in step]
    assert all(len(row) for row in rows)
    times = np.bincount(np.concatenate(rows), minlength=len(lengths))
    if len(drawn) >= steps * micro_batches:
        assert (times == 1).all()
    else:
        assert times.sum() == steps * micro_batches
        assert times.max() - times.min() <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=800, max_size=1600).map(np.array), st.integers(1, 6), st.integers(1, 2), st.integers(0, 9))
def test_micro_batches_have_equal_token_counts(lengths: np.ndarray, steps: int, micro_batches: int, seed: int) -> None:
    drawn = batching.draw(np.ones(len(lengths)), seed, 0, 0)
    tokens = [lengths[row].sum() for step in batching.cut(drawn, lengths, steps, micro_batches, seed, 0, 0) for row in step]
    # Each bound lies within one text of its ideal place: of the stretch, and of the batch within the stretch.
    assert max(abs(np.array(tokens) - lengths.sum() / (steps * micro_batches))) <= 3 * lengths.max()


def test_lengths_within_a_micro_batch_are_similar() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 20_000)
    batches = [row for step in batching.cut(np.arange(20_000), lengths, 128, 1, 0, 0, 0) for row in step]
    padded = sum(len(row) * lengths[row].max() for row in batches)
    assert padded / lengths.sum() < 1.03


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_the_order_is_a_pure_function_of_seed_epoch_and_window(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    lengths, weights = np.arange(300) % 37 + 3, np.full(300, 1.5)

    def order(key: tuple[int, int, int]) -> str:
        return str([[row.tolist() for row in step] for step in batching.cut(batching.draw(weights, *key), lengths, 6, 2, *key)])

    assert (order(one) == order(other)) == (one == other)


def test_the_workers_of_a_step_share_out_its_micro_batches() -> None:
    lengths = np.arange(200) % 17 + 3
    for step in batching.cut(batching.draw(np.ones(200), 0, 0, 0), lengths, 4, 6, 0, 0, 0):
        whole = sorted(np.concatenate(step).tolist())
        for world in (1, 2, 3):
            parts = [step[rank::world] for rank in range(world)]
            assert {len(part) for part in parts} == {6 // world}
            assert sorted(index for part in parts for row in part for index in row.tolist()) == whole


def test_generator_depends_on_the_key_alone() -> None:
    assert batching.generator(1, 2, "a").random() == batching.generator(1, 2, "a").random()
    assert batching.generator(1, 2, "a").random() != batching.generator(12, "a").random()


def test_padded() -> None:
    ids, mask = batching.padded([np.array([5, 6, 7], np.uint16), np.array([8], np.uint16)], pad=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_padded_gives_texts_without_tokens_one_place() -> None:
    ids, mask = batching.padded([np.array([], np.int64)], pad=9)
    assert ids.tolist() == [[9]]
    assert mask.tolist() == [[0]]


def test_rounded_by_hand() -> None:
    assert [batching.rounded(size) for size in (1, 16, 17, 32, 33, 64, 65, 293, 512)] == [1, 16, 18, 32, 36, 64, 72, 320, 512]


@given(st.integers(1, 100_000))
def test_rounded_adds_an_eighth_at_most_and_changes_nothing_twice(size: int) -> None:
    assert size <= batching.rounded(size) <= size * 9 / 8
    assert batching.rounded(batching.rounded(size)) == batching.rounded(size)


def test_few_shapes_by_hand() -> None:
    assert batching.few_shapes([17] * 17, longest=128) == (18, 18)
    assert batching.few_shapes([3, 17], longest=17) == (2, 17)  # no longer than any row can be
    assert batching.few_shapes([0], longest=64) == (1, 1)


def test_padded_fills_up_with_rows_of_one_padding_token() -> None:
    rows = [np.arange(1, 18)] * 17
    ids, mask = batching.padded(rows, pad=0, least=(18, 18))
    assert ids.shape == mask.shape == (18, 18)
    assert ids[:17, :17].tolist() == [row.tolist() for row in rows]
    assert not ids[17].any()
    assert mask.sum(axis=1).tolist() == [17] * 17 + [1]
    assert batching.padded(rows, pad=0, least=(3, 3))[0].shape == (17, 17)
