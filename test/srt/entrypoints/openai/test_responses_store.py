"""The store of responses: what it keeps, counts and drops."""

from __future__ import annotations

from sglang.srt.entrypoints.openai.responses_store import ENTRY_BYTES, ResponseStore, Turn


def test_turns_are_counted_once_and_outlive_their_response() -> None:
    store = ResponseStore()
    first = Turn(b"a" * 10, None)
    assert store.put("one", b"x", first)
    assert store.put("left", b"x", Turn(b"b" * 20, first))
    assert store.put("right", b"x", Turn(b"c" * 40, first))
    assert store.num_bytes == 3 * (1 + ENTRY_BYTES) + 70 + 3 * ENTRY_BYTES
    assert store.drop("one")
    assert not store.drop("one")
    assert store.drop("left")
    assert store.num_bytes == 1 + ENTRY_BYTES + 50 + 2 * ENTRY_BYTES
    kept = store.get("right")
    assert kept is not None
    assert [turn.messages[:1] for turn in kept.turn.chain()] == [b"c", b"a"]
    assert store.drop("right")
    assert (len(store), store.num_bytes, first.holders) == (0, 0, 0)


def test_the_oldest_goes_first() -> None:
    store = ResponseStore(limit=3 * (100 + 2 * ENTRY_BYTES))
    for number in range(5):
        assert store.put(str(number), b"x" * 60, Turn(b"y" * 40, None))
    assert [store.get(str(number)) is None for number in range(5)] == [True, True, *[False] * 3]
    assert store.num_bytes == 3 * (100 + 2 * ENTRY_BYTES)
    assert store.put("large", b"x" * (60 + 1), Turn(b"y" * 40, None))
    assert store.get("2") is store.get("3") is None
    assert store.get("4") is not None


def test_what_is_too_large_drops_nothing() -> None:
    store = ResponseStore(limit=1000 + 3 * ENTRY_BYTES)
    first = Turn(b"a" * 500, None)
    assert store.put("one", b"x" * 100, first)
    assert not store.put("two", b"x" * 400, Turn(b"b" * 101, first))
    assert store.get("one") is not None
    assert store.put("two", b"x" * 400, Turn(b"b" * 100, first))
    assert store.get("one") is None
    assert store.num_bytes == 1000 + 3 * ENTRY_BYTES


def test_a_turn_dropped_while_it_is_answered_counts_again() -> None:
    store = ResponseStore()
    root = Turn(b"a" * 10, None)
    asked = Turn(b"b" * 10, root)
    assert store.put("one", b"", asked)
    assert store.drop("one")
    assert store.num_bytes == 0
    assert store.put("two", b"", Turn(b"c" * 10, asked))
    assert store.num_bytes == 30 + 4 * ENTRY_BYTES
    assert store.drop("two")
    assert (store.num_bytes, root.holders, asked.holders) == (0, 0, 0)


def test_a_long_conversation_is_let_go_at_once() -> None:
    store = ResponseStore()
    turn = None
    for _ in range(20_000):
        turn = Turn(b"", turn)
    assert turn is not None
    assert store.put("long", b"", turn)
    del turn
    assert store.drop("long")
    assert store.num_bytes == 0
