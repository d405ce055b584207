"""Preference pairs from JSON lines to DPO batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import conversation, texts, write_jsonl

from rlm_engine.chat import encode_chat
from rlm_engine.errors import InputError, UsageError
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer
from rlm_training.preferences import PreferenceBatches, load_preferences
from rlm_training.prepare import PrepareOptions, prepare
from rlm_training.shards import CHAT_FORMAT, CHAT_TOKENS, load_sources

END = 50256


def pair(number: int, chosen: int = 6, rejected: int = 6) -> dict[str, Any]:
    """A prompt of three turns, replies of about so many tokens."""
    prompt = conversation(f"Question {number}?", "An earlier reply.", f"And number {number}?")["messages"]
    return {"prompt": prompt, "chosen": f"{number}" + " yes" * chosen, "rejected": f"{number}" + " no" * rejected}


@pytest.fixture(scope="module")
def tokenizer() -> Gpt2Tokenizer:
    return Gpt2Tokenizer(CHAT_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs in two files and several shards, beside a text; the last pair is long, the one before uneven."""
    base = tmp_path_factory.mktemp("pairs")
    write_jsonl(base / "one.jsonl", [pair(i, 4 + i % 5, 9 - i % 4) for i in range(12)])
    write_jsonl(base / "two.jsonl", [*(pair(i) for i in range(12, 19)), pair(19, 30, 5), pair(20, 80, 80)])
    write_jsonl(base / "text.jsonl", texts(3, seed=1))
    prepare([base], base / "out", PrepareOptions(shard_tokens=300))
    return base / "out"


def test_pairs_are_kept_apart_from_texts(folder: Path) -> None:
    assert list(load_sources(folder)) == ["text"]
    sources = load_preferences(folder)
    assert [(s.name, (len(s.documents) - 1) // 2) for s in sources] == [("one", 12), ("two", 9)]


def test_rows_are_prompt_and_reply_and_only_the_reply_counts(folder: Path, tokenizer: Gpt2Tokenizer) -> None:
    pairs = PreferenceBatches(load_preferences(folder), sequence=96, rows=4, seed=1)
    for step in range(pairs.steps):
        batch = pairs.batch(step)
        for row, number in enumerate(batch.pairs):
            prompt = pair(int(number))["prompt"]
            for half, key in ((batch.chosen, "chosen"), (batch.rejected, "rejected")):
                assert half.documents is not None
                length = int((half.documents[row] == 0).sum())
                ids = half.inputs[row, :length].tolist()
                assert half.targets[row, : length - 1].tolist() == ids[1:], "targets are the next tokens"
                assert not half.inputs[row, length:].any() and not half.weights[row, length - 1 :].any()
                assert ids[-1] == END
                learned = half.targets[row][half.weights[row] > 0].tolist()
                assert learned == ids[-len(learned) :] and int(half.weights[row].sum()) == len(learned)
                assert ids[: -len(learned)] == encode_chat(prompt, tokenizer, CHAT_FORMAT)
                reply = tokenizer.decode(learned)
                first, *others = reply.split()
                assert first == str(number) and set(others) == {"yes" if key == "chosen" else "no"}
                if number == 19:
                    assert reply == pair(19, 30, 5)[key]


def test_every_pair_once_an_epoch_in_an_order_of_its_own(folder: Path) -> None:
    sources = load_preferences(folder)
    pairs = PreferenceBatches(sources, sequence=96, rows=4, seed=1)
    assert (pairs.count, pairs.left_out, pairs.steps) == (20, 1, 5)
    epochs = [np.concatenate([pairs.batch(e * 5 + s).pairs for s in range(5)]).tolist() for e in range(2)]
    assert [sorted(e) for e in epochs] == [list(range(20))] * 2 and epochs[0] != epochs[1]
    again = PreferenceBatches(sources, sequence=96, rows=4, seed=1)
    assert again.batch(7).pairs.tolist() == pairs.batch(7).pairs.tolist()
    assert PreferenceBatches(sources, 96, 4, seed=2).batch(7).pairs.tolist() != pairs.batch(7).pairs.tolist()


def test_uneven_pairs_can_be_left_out(folder: Path) -> None:
    pairs = PreferenceBatches(load_preferences(folder), 96, 4, seed=1, max_length_ratio=1.5)
    lengths = pairs.reply_tokens
    assert (lengths.max(axis=1) <= 1.5 * lengths.min(axis=1)).all()
    everything = PreferenceBatches(load_preferences(folder), 96, 4, seed=1).reply_tokens
    uneven = (everything.max(axis=1) > 1.5 * everything.min(axis=1)).sum()
    assert pairs.count == 20 - uneven and uneven >= 1


def test_reply_lengths_and_any_rows_can_be_asked_for(folder: Path) -> None:
    pairs = PreferenceBatches(load_preferences(folder), 96, 4, seed=1)
    batch = pairs.rows_of(np.array([19, 0, 5]))
    assert batch.pairs.tolist() == [19, 0, 5] and batch.chosen.inputs.shape == (3, 96)
    both = np.column_stack((batch.chosen.weights.sum(axis=1), batch.rejected.weights.sum(axis=1)))
    assert both.tolist() == pairs.reply_tokens[[19, 0, 5]].tolist()


def test_rows_can_be_as_short_as_the_longest_pair(folder: Path) -> None:
    sources = load_preferences(folder)
    full, cut = (PreferenceBatches(sources, 96, 4, seed=1, pad_to=n) for n in (0, 8))
    widths = set()
    for step in range(5):
        wide, narrow = full.batch(step), cut.batch(step)
        width = narrow.chosen.inputs.shape[1]
        widths.add(width)
        assert width % 8 == 0 and narrow.rejected.inputs.shape == (4, width)
        for a, b in ((wide.chosen, narrow.chosen), (wide.rejected, narrow.rejected)):
            assert b.targets.tolist() == a.targets[:, :width].tolist() and not a.weights[:, width:].any()
            assert b.weights.sum() == a.weights.sum()
    assert max(widths) < 96


def test_too_few_pairs_and_folders_without_any_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="20 of 21 preference pairs can be used, fewer than the 64 rows"):
        PreferenceBatches(load_preferences(folder), 96, 64, seed=1)
    prepare([write_jsonl(tmp_path / "a.jsonl", texts(3, seed=2))], tmp_path / "out")
    with pytest.raises(InputError, match="no preference pairs here"):
        load_preferences(tmp_path / "out")


def test_pairs_and_texts_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1), *texts(1, seed=3)])
    with pytest.raises(InputError, match="preference pairs and other records in one file"):
        prepare([path], tmp_path / "out")
    assert not list((tmp_path / "out").glob("a-*"))
