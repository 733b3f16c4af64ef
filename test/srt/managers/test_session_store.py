"""Sessions: what a request goes on from, what is kept of it, and the bound of it all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray, SessionParams
from sglang.srt.managers.session_store import ENTRY_BYTES, ID_BYTES, SessionStore, SessionTurn


def ids(*values: int) -> IdArray:
    return np.array(values, np.int32)


def begin(store: SessionStore, name: str, now: float = 0.0, /, **wanted: Any) -> SessionTurn:
    return store.begin(SessionParams(**{"id": "s", **wanted}), name, now)


def run(store: SessionStore, name: str, new: int, out: int, /, **wanted: Any) -> list[int]:
    """A request that brings the ids new, new + 1, and generates out; its whole prompt."""
    turn = begin(store, name, **wanted)
    brought = ids(new, new + 1)
    whole = turn.prompt(brought).tolist()
    store.keep(turn, brought, [ids(out)])
    store.end(turn, 0.0)
    assert isinstance(whole, list)
    return whole


@pytest.fixture
def store() -> SessionStore:
    made = SessionStore()
    assert made.open("s", False, None, 0.0) == "s"
    return made


def test_a_request_goes_on_from_the_one_it_names(store: SessionStore) -> None:
    assert run(store, "a", 10, 19) == [10, 11]
    assert run(store, "b", 20, 29, rid="a") == [10, 11, 19, 20, 21]
    assert run(store, "c", 30, 39, rid="b") == [10, 11, 19, 20, 21, 29, 30, 31]
    assert run(store, "other", 40, 49, rid="a") == [10, 11, 19, 40, 41]
    assert run(store, "fresh", 50, 59) == [50, 51]


@pytest.mark.parametrize(
    ("wanted", "gone_on_from"),
    [
        ({"drop_previous_output": True}, [10, 11, 19, 20, 21]),
        ({"offset": 4}, [10, 11, 19, 20]),
        ({"offset": 1}, [10]),
        ({"offset": -1}, [10, 11, 19, 20, 21]),
        ({"offset": -5}, [10]),
        ({"offset": -99}, []),
        ({"offset": 99}, [10, 11, 19, 20, 21, 29]),
        ({"offset": 0}, [10, 11, 19, 20, 21, 29]),
        ({"offset": -1, "drop_previous_output": True}, [10, 11, 19, 20]),
    ],
)
def test_what_is_gone_on_from_can_be_cut(
    store: SessionStore, wanted: dict[str, Any], gone_on_from: list[int]
) -> None:
    run(store, "a", 10, 19)
    run(store, "b", 20, 29, rid="a")
    assert run(store, "c", 30, 39, rid="b", **wanted) == [*gone_on_from, 30, 31]
    # What was cut is another's still.
    assert run(store, "d", 40, 49, rid="c") == [*gone_on_from, 30, 31, 39, 40, 41]
    assert run(store, "e", 50, 59, rid="b") == [10, 11, 19, 20, 21, 29, 50, 51]


def test_replacing_forgets_what_else_went_on(store: SessionStore) -> None:
    run(store, "a", 10, 19)
    run(store, "b", 20, 29, rid="a")
    run(store, "c", 30, 39, rid="b")
    run(store, "fresh", 40, 49)
    size = store.num_bytes
    assert run(store, "d", 50, 59, rid="a", replace=True) == [10, 11, 19, 50, 51]
    assert store.num_bytes == size - ENTRY_BYTES - 3 * ID_BYTES
    for gone in ("b", "c"):
        with pytest.raises(RequestError, match=f"no request '{gone}'"):
            begin(store, "x", rid=gone)
    assert run(store, "e", 60, 69, rid="fresh") == [40, 41, 49, 60, 61]
    run(store, "alone", 70, 79, replace=True)
    with pytest.raises(RequestError, match="no request 'a'"):
        begin(store, "x", rid="a")
    assert run(store, "f", 80, 89, rid="alone") == [70, 71, 79, 80, 81]


def test_a_request_that_is_not_kept_leaves_all_as_it_was(store: SessionStore) -> None:
    run(store, "a", 10, 19)
    run(store, "b", 20, 29, rid="a")
    size = store.num_bytes
    turn = begin(store, "c", rid="a", replace=True)
    with pytest.raises(RequestError, match="has a request 'c' already"):
        begin(store, "c")
    with pytest.raises(RequestError, match="no request 'c'"):
        begin(store, "d", rid="c")
    store.end(turn, 0.0)
    assert store.num_bytes == size
    assert run(store, "c", 30, 39, rid="b")[:3] == [10, 11, 19]


def test_what_was_replaced_meanwhile_is_not_kept(store: SessionStore) -> None:
    run(store, "a", 10, 19)
    run(store, "b", 20, 29, rid="a")
    late = begin(store, "late", rid="b")
    run(store, "c", 30, 39, rid="a", replace=True)
    store.keep(late, ids(1), [])
    store.end(late, 0.0)
    with pytest.raises(RequestError, match="no request 'late'"):
        begin(store, "x", rid="late")


def test_a_closed_session_frees_everything(store: SessionStore) -> None:
    run(store, "a", 10, 19)
    turn = begin(store, "b", rid="a")
    store.close("s", 0.0)
    assert (len(store), store.num_bytes) == (0, 0)
    store.keep(turn, ids(1), [])
    store.end(turn, 0.0)
    assert store.num_bytes == 0
    for use in (lambda: begin(store, "c"), lambda: store.close("s", 0.0)):
        with pytest.raises(RequestError, match="no session 's'") as error:
            use()
        assert error.value.http_status == 400
    store.open("s", False, None, 0.0)
    with pytest.raises(RequestError, match="no request 'a'"):
        begin(store, "c", rid="a")


def test_a_streaming_session_goes_on_from_its_last_request() -> None:
    store = SessionStore()
    store.open("s", True, None, 0.0)
    assert run(store, "a", 10, 19) == [10, 11]
    assert run(store, "b", 20, 29) == [10, 11, 19, 20, 21]
    assert run(store, "c", 30, 39, rid="b") == [10, 11, 19, 20, 21, 29, 30, 31]
    for wanted in ({"offset": 1}, {"replace": True}, {"drop_previous_output": True}):
        with pytest.raises(RequestError, match="only added to"):
            begin(store, "x", **wanted)
    with pytest.raises(RequestError, match="from its last request only"):
        begin(store, "x", rid="a")
    turn = begin(store, "d")
    with pytest.raises(RequestError, match="has not ended"):
        begin(store, "e")
    store.end(turn, 0.0)
    assert run(store, "e", 40, 49)[-3:] == [39, 40, 41]


def test_idle_sessions_are_closed() -> None:
    store = SessionStore()
    store.open("s", False, 10.0, now=0.0)
    store.open("stays", False, None, now=0.0)
    turn = begin(store, "a", 9.0)
    store.open("looks", False, None, now=50.0)
    assert len(store) == 3  # a request is under way
    store.keep(turn, ids(1), [])
    store.end(turn, now=60.0)
    store.end(begin(store, "b", 69.9, rid="a"), now=69.9)
    with pytest.raises(RequestError, match="no session 's'"):
        begin(store, "c", 79.9)
    assert len(store) == 2


def test_the_time_of_the_session_that_is_used_counts_to_the_letter() -> None:
    store = SessionStore()
    store.open("s", False, 0.5, now=10.0)
    store.open("t", False, 0.5, now=10.0)
    with pytest.raises(RequestError, match="a session 's' already"):
        store.open("s", False, None, now=10.49)
    with pytest.raises(RequestError, match="no session 's'"):
        begin(store, "a", 10.5)
    assert len(store) == 1  # the other one is looked at a second after the last look
    store.open("t", False, None, now=10.6)
    store.open("u", False, 0.1, now=10.6)
    store.open("v", False, None, now=11.0)
    assert len(store) == 2


def test_the_store_is_bounded() -> None:
    store = SessionStore(limit=3 * ENTRY_BYTES + 100)
    store.open("s", False, None, 0.0)
    store.open("t", False, None, 0.0)
    turn = begin(store, "a")
    store.check_room(281)
    with pytest.raises(RequestError, match="close some") as error:
        store.check_room(282)
    assert error.value.http_status == 503
    store.keep(turn, ids(*range(281)), [ids(1)])
    store.end(turn, 0.0)
    for use in (lambda: begin(store, "b"), lambda: store.open("u", False, None, 0.0)):
        with pytest.raises(RequestError, match="close some"):
            use()
    store.close("t", 0.0)
    store.close("s", 0.0)
    assert store.num_bytes == 0


def test_an_id_names_one_session(store: SessionStore) -> None:
    with pytest.raises(RequestError, match="a session 's' already"):
        store.open("s", False, None, 0.0)
    first, second = (store.open(None, False, None, 0.0) for _ in range(2))
    assert first != second


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(-8, 8), st.booleans(), st.booleans(), st.booleans()
        ),
        max_size=12,
    )
)
def test_a_session_is_what_whole_lists_of_ids_would_be(
    steps: list[tuple[int, int, bool, bool, bool]],
) -> None:
    """Against a model that keeps every request's whole prompt and whole text."""
    store = SessionStore()
    store.open("s", False, None, 0.0)
    prompts: dict[str, list[int]] = {}
    wholes: dict[str, list[int]] = {}
    parents: dict[str, str | None] = {}
    for number, (back, offset, drops, replaces, ends_well) in enumerate(steps):
        rid = f"r{number}"
        parent = f"r{number - back}"
        given_parent = parent if parent in wholes else None
        before: list[int] = []
        if given_parent is not None:
            before = (prompts if drops else wholes)[given_parent]
            before = before[:offset] if offset else before
        wanted = {"rid": given_parent, "offset": offset}
        turn = begin(store, rid, drop_previous_output=drops, replace=replaces, **wanted)
        new = ids(2 * number, 2 * number)
        assert turn.prompt(new).tolist() == [*before, *new.tolist()]
        if ends_well:
            store.keep(turn, new, [ids(2 * number + 1), ids()])
            if replaces:
                for other in list(wholes):
                    line: list[str | None] = [parents[other]]
                    while line[-1] is not None:
                        line.append(parents.get(line[-1]))
                    if given_parent in line:
                        del wholes[other], prompts[other]
            prompts[rid] = [*before, *new.tolist()]
            wholes[rid] = [*prompts[rid], 2 * number + 1]
            parents[rid] = given_parent
        store.end(turn, 0.0)
        assert store.num_bytes == ENTRY_BYTES + len(wholes) * (ENTRY_BYTES + 3 * ID_BYTES)
