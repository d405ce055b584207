"""Pretraining streams and packed conversations: what every batch holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_engine.errors import UsageError
from rlm_training.shards import Concatenated, Source
from rlm_training.stream import UNIT_TOKENS, FirstRows, MixedStream, PackedConversations, first_conversations


def source(name: str, lengths: list[int], first: int, parts: int = 1, chat: bool = False) -> Source:
    """Tokens first, first+1, ...: every token says where it stands.

    In a chat the second half of every other document counts, and all of those between (an assistant began them).
    """
    tokens = np.arange(first, first + sum(lengths), dtype=np.uint32)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    mask = (
        np.concatenate([np.arange(n) >= n // 2 * (i % 2) for i, n in enumerate(lengths)]).astype(np.uint8)
        if chat
        else None
    )
    split = [p for p in np.array_split(tokens, parts) if len(p)]
    kind = "chat" if chat else "text"
    return Source(name, Concatenated(split) if parts > 1 else tokens, offsets, mask, kind)


def whole_row(stream: MixedStream, row: int, sequence: int) -> np.ndarray:
    steps = (stream.row_tokens - 1) // sequence
    return np.concatenate([stream.batch(step, sequence).inputs[row] for step in range(steps)])


A = [300, 5, 2500, 40, 1024, 1025, 7] * 2
B = [80] * 60


def two_sources() -> dict[str, Source]:
    return {"a": source("a", A, 0, parts=3), "b": source("b", B, 1_000_000)}


def test_rows_are_contiguous_and_targets_are_the_next_tokens() -> None:
    stream = MixedStream(two_sources(), {"a": 3, "b": 1}, 6000, rows=3, seed=1)
    for row in range(3):
        long, short = whole_row(stream, row, 64), whole_row(stream, row, 16)
        assert long.tolist() == short[: len(long)].tolist(), "a row is one stream, however long the steps"
    batch = stream.batch(4, 64)
    after = stream.batch(5, 64)
    assert batch.inputs[:, 1:].tolist() == batch.targets[:, :-1].tolist()
    assert batch.targets[:, -1].tolist() == after.inputs[:, 0].tolist()
    assert batch.inputs.dtype == batch.targets.dtype == np.int64 and (batch.weights == 1).all()


def test_documents_stay_in_order_and_whole_up_to_the_unit_size() -> None:
    sources = two_sources()
    stream = MixedStream(sources, {"a": 1}, 8000, rows=1, seed=2)
    row = whole_row(stream, 0, 1)
    breaks = np.flatnonzero(np.diff(row) != 1) + 1
    starts = set(sources["a"].documents.tolist())
    for piece in np.split(row, breaks)[1:]:
        offset = int(piece[0]) - max(s for s in starts if s <= piece[0])
        assert offset % UNIT_TOKENS == 0, "a unit starts a document, or continues a long one at a multiple of its size"


def test_every_unit_is_read_at_most_once_an_epoch_and_at_least_once_per_whole_one() -> None:
    sources = two_sources()
    tokens = int(2.5 * sum(B))
    stream = MixedStream(sources, {"b": 1}, tokens, rows=1, seed=3)
    assert stream.epochs() == {"b": pytest.approx(2.5, abs=0.05)}
    row = np.append(whole_row(stream, 0, 1), stream.batch(stream.row_tokens - 2, 1).targets[0])
    counts = np.bincount(row - 1_000_000, minlength=sum(B))
    assert set(counts.tolist()) <= {2, 3}
    assert len(set(counts.reshape(-1, 80).sum(axis=1))) == 2, "units are read whole"


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 1000))
def test_shares_are_honoured_to_one_unit(a: float, b: float, seed: int) -> None:
    sources = two_sources()
    tokens = 20_000
    stream = MixedStream(sources, {"a": a, "b": b}, tokens, rows=2, seed=seed)
    for name, share in (("a", a / (a + b)), ("b", b / (a + b))):
        read = stream.epochs()[name] * len(sources[name].tokens)
        assert share * tokens <= read <= share * tokens + UNIT_TOKENS + 1


def test_batches_are_a_function_of_seed_and_step() -> None:
    def batch(seed: int, step: int) -> list[list[int]]:
        stream = MixedStream(two_sources(), {"a": 1, "b": 1}, 6000, rows=2, seed=seed)
        return stream.batch(step, 32).inputs.tolist()

    assert batch(1, 7) == batch(1, 7) != batch(2, 7)
    assert batch(1, 7) != batch(1, 8)


def test_a_stream_ends_where_it_says() -> None:
    stream = MixedStream(two_sources(), {"b": 1}, 1000, rows=2, seed=1)
    last = (stream.row_tokens - 1) // 32 - 1
    assert stream.batch(last, 32).inputs.shape == (2, 32)
    with pytest.raises(UsageError, match=f"ends before step {last + 1}"):
        stream.batch(last + 1, 32)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1.0}, {"c": 1}])
def test_impossible_mixes_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"weight above 0|'c' is not in the prepared data; it holds a, b"):
        MixedStream(two_sources(), weights, 100, 1, 1)


def packed_documents(packed: PackedConversations, sequence: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and the weights on them as targets, of every document in every batch."""
    found = []
    for step in range(packed.steps):
        batch = packed.batch(step, sequence)
        assert batch.documents is not None
        for row in range(packed.rows):
            # The row with its last target, so that a document that fills it is whole.
            ids = np.append(batch.inputs[row], batch.targets[row, -1])
            weights = np.insert(batch.weights[row], 0, 0.0)
            last = batch.documents[row, -1] if ids[-1] else -1
            numbers = np.append(batch.documents[row], last)
            for number in sorted(set(numbers[numbers >= 0].tolist())):
                places = np.flatnonzero(numbers == number)
                assert (np.diff(places) == 1).all(), "a document is contiguous"
                found.append((ids[places].tolist(), weights[places].tolist()))
            assert not weights[numbers < 0].any(), "padding does not count"
    return found


CHATS = [12, 30, 7, 33, 20, 34, 5, 9, 16, 25, 11, 8, 31, 6, 14, 21] * 3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.lists(st.integers(2, 40), min_size=20, max_size=60))
def test_conversations_are_packed_whole_with_their_masks(seed: int, rows: int, lengths: list[int]) -> None:
    chats = source("c", lengths, 1, chat=True)
    packed = PackedConversations({"c": chats}, {"c": 1}, sequence=32, rows=rows, seed=seed)
    starts = chats.documents[:-1].tolist()
    seen = []
    for ids, weights in packed_documents(packed, 32):
        number = starts.index(ids[0] - 1)
        length = lengths[number]
        assert ids == list(range(starts[number] + 1, starts[number] + 1 + length)), "whole and in order"
        counted = [float(i >= length // 2 * (number % 2)) for i in range(1, length)]
        assert weights == [0.0, *counted], "the reply counts, no more; nothing precedes a first token"
        seen.append(number)
    assert len(seen) == len(set(seen)), "each once"
    fitting = sum(n <= 33 for n in lengths)
    assert all(lengths[n] <= 33 for n in seen)
    if rows == 1:
        assert len(seen) == fitting, "none is lost but those that are too long"


def test_packing_wastes_little_and_repeats_as_told() -> None:
    chats = source("c", CHATS, 1, parts=2, chat=True)
    packed = PackedConversations({"c": chats}, {"c": 2.5}, sequence=64, rows=2, seed=1)
    documents = packed_documents(packed, 64)
    counts = np.bincount([ids[0] for ids, _ in documents])
    assert counts.max() <= 3 and abs(len(documents) - 2.5 * len(CHATS)) < 12
    used = sum(len(ids) for ids, _ in documents)
    assert used > 0.93 * packed.steps * 2 * 65


def test_packed_batches_are_a_function_of_seed_and_step() -> None:
    def inputs(seed: int) -> list[list[int]]:
        chats = {"c": source("c", CHATS, 1, chat=True)}
        return PackedConversations(chats, {"c": 1}, 64, 2, seed).batch(3, 64).inputs.tolist()

    assert inputs(1) == inputs(1) != inputs(2)


def test_replayed_rows_are_the_pretraining_stream() -> None:
    sources = {"c": source("c", CHATS, 1, chat=True), **two_sources()}
    replay = MixedStream(sources, {"a": 1}, 4000, rows=1, seed=5)
    packed = PackedConversations(sources, {"c": 1}, 64, 4, seed=1, replay=replay)
    batch, own = packed.batch(2, 64), replay.batch(2, 64)
    assert batch.inputs[3].tolist() == own.inputs[0].tolist() and batch.targets[3].tolist() == own.targets[0].tolist()
    assert batch.documents is not None and (batch.weights[3] == 1).all() and (batch.documents[3] == 0).all()


def test_texts_cannot_be_packed_and_steps_are_bounded() -> None:
    sources = {"c": source("c", CHATS, 1, chat=True), **two_sources()}
    with pytest.raises(UsageError, match="'a' holds no conversations"):
        PackedConversations(sources, {"a": 1}, 64, 1, 1)
    packed = PackedConversations(sources, {"c": 1}, 64, 1, 1)
    with pytest.raises(UsageError, match=f"there are {packed.steps} SFT steps"):
        packed.batch(packed.steps, 64)


def test_conversations_longer_than_a_row_are_counted() -> None:
    chats = source("c", CHATS, 1, chat=True)
    packed = PackedConversations({"c": chats}, {"c": 2}, sequence=29, rows=2, seed=1)
    assert packed.left_out == {"c": 3 * 3}  # 33, 34 and 31
    assert len(packed_documents(packed, 29)) <= 2 * (len(CHATS) - 9)


def test_held_out_conversations_are_read_as_those_trained_on() -> None:
    chats = source("c", CHATS, 1, chat=True)
    together = first_conversations(chats, sequence=64, most=3, alone=False)
    assert together.rows == 3 and together.steps >= 1
    documents = packed_documents(together, 64)
    assert len(documents) > 3, "packed, not one a row"
    assert {tokens[0] - 1 for tokens, _ in documents} <= set(chats.documents.tolist()), "whole conversations"
    alone = first_conversations(chats, sequence=64, most=3, alone=True).batch(0, 64)
    assert alone.documents is not None and set(np.unique(alone.documents)) <= {-1, 0}
    assert first_conversations(chats, sequence=3, most=3, alone=False).rows == 0  # none fits


def test_held_out_text_is_read_from_its_beginning() -> None:
    text = two_sources()["a"]
    batch = FirstRows(text, sequence=16, most=2).batch(0, 16)
    assert batch.inputs[0].tolist() == list(range(16)) and batch.targets[1].tolist() == list(range(18, 34))
    assert FirstRows(text, sequence=10**6, most=2).rows == 0
