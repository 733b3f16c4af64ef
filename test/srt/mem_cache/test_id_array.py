from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.mem_cache.id_array import IdArray, is_run


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_append_keeps_old_views_true() -> None:
    array = IdArray(ids(1, 2, 3))
    view = array.view()
    for value in range(4, 200):
        array.append(ids(value))
    assert view.tolist() == [1, 2, 3]
    assert array.view().tolist() == list(range(1, 200))
    assert array[0] == 1
    assert array[-1] == 199


def test_append_one_is_append_of_one() -> None:
    array = IdArray()
    views = []
    for value in range(300):
        array.append_one(value)
        views.append(array.view())
        assert array[-1] == value
        assert array.capacity <= max(16, 4 * len(array))
    assert all(view.tolist() == list(range(n + 1)) for n, view in enumerate(views))
    array.cut_tail(299)
    array.append_one(7)
    assert array.view().tolist() == [0, 7]


def test_index_outside_the_live_part_raises() -> None:
    array = IdArray(ids(1, 2, 3))
    array.cut_tail(1)
    assert [array[0], array[1], array[-2]] == [1, 2, 1]
    for index in (2, -3):
        with pytest.raises(IndexError):
            array[index]


def test_growth_copies_amortised() -> None:
    array, replaced, buffer = IdArray(), 0, None
    for value in range(10_000):
        array.append(ids(value))
        if array._buffer is not buffer:
            replaced, buffer = replaced + 1, array._buffer
    assert replaced <= 12
    assert array.capacity <= 2 * 10_000


def test_dead_room_is_given_back() -> None:
    array = IdArray(np.arange(10_000, dtype=np.int32))
    assert array.cut_tail(9_990).tolist() == list(range(10, 10_000))
    assert array.capacity <= 64
    assert array.view().tolist() == list(range(10))


@pytest.mark.parametrize("count", [1, 3, 5, 8, 9])
def test_split_head_leaves_two_independent_arrays(count: int) -> None:
    tail = IdArray(np.arange(10, dtype=np.int32))
    head = tail.split_head(count)
    head.append(ids(100))
    tail.append(ids(200))
    assert head.view().tolist() == [*range(count), 100]
    assert tail.view().tolist() == [*range(count, 10), 200]


ACTION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 30)),
    st.tuples(st.just("cut"), st.integers(0, 30)),
    st.tuples(st.just("split"), st.integers(0, 30)),
)


@given(st.lists(ACTION, max_size=30))
def test_against_lists(actions: list[tuple[str, int]]) -> None:
    arrays, models, counter = [IdArray()], [[]], 0
    for name, amount in actions:
        array, model = arrays[-1], models[-1]
        if name == "append":
            new = list(range(counter, counter + amount))
            counter += amount
            array.append(np.array(new, np.int32))
            model.extend(new)
        elif name == "cut":
            amount = min(amount, len(model))
            cut = array.cut_tail(amount)
            assert cut.tolist() == model[len(model) - amount :]
            del model[len(model) - amount :]
        else:
            amount = min(amount, len(model))
            arrays.insert(0, array.split_head(amount))
            models.insert(0, model[:amount])
            del model[:amount]
        assert [a.view().tolist() for a in arrays] == models


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.integers(0, 5))
def test_is_run_is_what_it_says(steps: list[int], first: int) -> None:
    array = first + np.cumsum(ids(0, *steps), dtype=np.int32)
    assert is_run(array) == (np.diff(array) == 1).all()


@pytest.mark.parametrize("length", [1, 65_535, 65_536, 65_537, 200_000])
def test_is_run_of_long_arrays(length: int) -> None:
    array = np.arange(7, 7 + length, dtype=np.int32)
    assert is_run(array)
    for place in {0, length // 2, length - 1}:
        changed = array.copy()
        changed[place] += 1
        assert is_run(changed) == (length == 1)
