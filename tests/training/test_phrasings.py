"""Conversations written with alternatives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_engine.errors import InputError
from rlm_training.cli import main
from rlm_training.phrasings import compose, expand, parse_entries

ENTRY = "u: hi | hello | hey\na: Hello! | Hi there.\nu: bye\na: Bye.\\nSee you.\n"


def test_every_alternative_occurs_and_shorter_lists_start_again() -> None:
    (entry,) = parse_entries(ENTRY, "x")
    conversations = expand(entry)
    assert [[m["content"] for m in c] for c in conversations] == [
        ["hi", "Hello!", "bye", "Bye.\nSee you."],
        ["hello", "Hi there.", "bye", "Bye.\nSee you."],
        ["hey", "Hello!", "bye", "Bye.\nSee you."],
    ]
    assert [m["role"] for m in conversations[0]] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("u: hi\n\nu: a\na: b", 1, "add its reply"),
        ("a: hi", 1, "'u:'"),
        ("u: hi\na: yes\na: no", 3, "'u:'"),
        ("u: hi\nwhat", 2, "'a:'"),
        ("u: hi |  | you\na: x", 1, "empty"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, what: str) -> None:
    with pytest.raises(InputError, match=f"moon.txt, line {line}: .*{what}"):
        list(parse_entries(text, "moon.txt"))


words = st.text(st.characters(blacklist_characters="|\\", blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1)
turns = st.lists(words.map(str.strip).filter(bool), min_size=1, max_size=4)


@given(st.lists(st.lists(turns, min_size=2, max_size=6).filter(lambda e: len(e) % 2 == 0), max_size=4))
def test_what_is_written_is_read_back(entries: list[list[list[str]]]) -> None:
    blocks = (
        "".join(f"{'a' if i % 2 else 'u'}: {' | '.join(alternatives)}\n" for i, alternatives in enumerate(entry))
        for entry in entries
    )
    assert list(parse_entries("\n".join(blocks), "x")) == entries


def test_compose_writes_what_prepare_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "small.txt", tmp_path / "out" / "all.jsonl"
    source.write_text(ENTRY + "\nu: ok\na: Good.\n", encoding="utf-8")
    assert main(["compose", str(source), "--out", str(out)]) == 0
    assert "4 conversations of 2 entries" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 4
    assert records[3] == {
        "messages": [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "Good."}],
        "source": "small",
    }


def test_nothing_is_written_when_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(InputError):
        compose([tmp_path / "bad.txt"], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
