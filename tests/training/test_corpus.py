"""Finding and reading corpus files: names, formats, records, what is refused and how."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from corpus_files import conversation, write_jsonl

from rlm_engine.errors import InputError, UsageError
from rlm_training.corpus import Document, Input, find_inputs, parse_record
from rlm_training.readers import RecordReader


def read(path: Path, skip: int = 0) -> list[Any]:
    return [raw for _, raw in RecordReader(Input(path=path)).records(skip)]


def test_sources_are_named_by_stem_and_by_folder_where_stems_meet(tmp_path: Path) -> None:
    for name in ("chat/recipes.jsonl.zst", "text/recipes.txt", "text/books.jsonl", "text/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = find_inputs([str(tmp_path)])
    assert sorted(names) == ["books", "chat-recipes", "text-recipes"]
    assert list(find_inputs([f"{tmp_path}/**/rec*"])) == ["chat-recipes", "text-recipes"]
    assert list(find_inputs([str(tmp_path / "text/books.jsonl"), f"{tmp_path}/text/b*"])) == ["books"], "once each"


@pytest.mark.parametrize("argument", ["missing.txt", "*.jsonl", "notes.md", "."])
def test_arguments_that_name_no_corpus_are_refused(
    tmp_path: Path, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.md").touch()
    with pytest.raises(InputError, match=r"no such file|matches no file|only \.txt|no \.txt"):
        find_inputs([argument])


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/data/x.txt", "b/data/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="would both be source 'data-x'"):
        find_inputs([str(tmp_path)])


@pytest.mark.parametrize(
    ("argument", "hub", "name"),
    [
        ("hf:org/set", ("org/set", "", "train"), "org-set"),
        ("hf:org/set:en", ("org/set", "en", "train"), "org-set-en"),
        ("hf:org/set:test", ("org/set", "", "test"), "org-set-test"),
        ("hf:set:en:train[:5%]", None, ""),
        ("hf:set:en:validation", ("set", "en", "validation"), "set-en-validation"),
        ("hf:", None, ""),
    ],
)
def test_hub_datasets_are_named_with_configuration_and_split(
    argument: str, hub: tuple[str, str, str] | None, name: str
) -> None:
    if hub is None:
        with pytest.raises(UsageError, match="expected hf:NAME"):
            find_inputs([argument])
    else:
        source = Input(hub=hub)
        assert find_inputs([argument]) == {name: source}
        assert find_inputs([str(source)]) == {name: source} and "::" not in str(source)


def test_a_hub_split_of_an_unusual_name_is_not_taken_for_a_configuration() -> None:
    source = Input(hub=("org/set", "", "sample"))
    assert find_inputs([str(source)]) == {"org-set-sample": source}


def test_fingerprints_of_hub_data_are_those_of_folders_prepared_before() -> None:
    assert Input(hub=("org/set", "", "train")).fingerprint() == "hf:org/set::train"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, name: str) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n'
    (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(data) if name.endswith("zst") else data)
    documents = [parse_record(raw, "here").text for raw in read(tmp_path / name)]
    assert documents == ["a", "\ufeffb"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\n\ntwo")
    assert read(tmp_path / "b.txt") == ["one", "two"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "b.txt") == []


def test_text_files_split_at_two_empty_lines_and_at_end_of_text_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\nstill one\n\n\ntwo\r\n\r\n\r\n\n\nthrée\n<|endoftext|>\nfour\n\n\n\n\n".encode())
    assert read(path) == ["one\n\nstill one", "two", "thrée", "four"]
    assert read(path, skip=2) == ["thrée", "four"]


def test_json_lines_keep_their_line_numbers_over_empty_lines_and_block_borders(tmp_path: Path) -> None:
    lines = [b'{"text": "%s"}' % (b"x" * size) for size in (10, 200_000, 0, 131_072, 5)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n".join(lines))
    found = list(RecordReader(Input(path=path)).records())
    assert found == [(2 * i + 1, line) for i, line in enumerate(lines)]
    assert read(path, skip=3) == lines[2:]


def test_all_frames_of_a_zstd_file_are_read_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(b'{"text": "a"}\n{"te') + compress(b'xt": "b"}\n'))
    assert read(path) == [b'{"text": "a"}', b'{"text": "b"}']
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="ends in the middle"):
        read(path)
    path.write_bytes(b"no zstd at all")
    with pytest.raises(InputError, match="damaged zstd"):
        read(path)


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    rows = [{"text": f"document {i}", "id": i} for i in range(600)]
    path = tmp_path / "a.parquet"
    parquet.write_table(Table.from_pylist(rows), path)
    reader = RecordReader(Input(path=path))
    assert [parse_record(raw, "").text for _, raw in reader.records(skip=2)] == [r["text"] for r in rows[2:]]
    assert reader.read_bytes == reader.size_bytes > 0
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="damaged parquet"):
        read(path)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("a.parquet", "pyarrow", "parquet"), ("a.jsonl.zst", "zstandard", "train")]
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"needs {module}: pip install 'rlm-chat\[{extra}\]'"):
        read(tmp_path / name)


class FakeRows(list[dict[str, Any]]):
    """A streaming dataset, as far as it is used."""

    def skip(self, count: int) -> FakeRows:
        return FakeRows(self[count:])


def test_hub_datasets_stream_by_name_and_skip_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> FakeRows:
        calls.append((name, config, split, streaming))
        if name == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist on the Hub\nmore")
        return FakeRows({"text": f"row {i}"} for i in range(5))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = find_inputs(["hf:org/set:en"])["org-set-en"]
    assert list(RecordReader(source).records(skip=3)) == [(4, {"text": "row 3"}), (5, {"text": "row 4"})]
    assert calls == [("org/set", "en", "train", True)]
    with pytest.raises(InputError, match=r"hf:gone:train: cannot be read from the hub \(Dataset 'gone'"):
        list(RecordReader(Input(hub=("gone", "", "train"))).records())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"rlm-chat\[hub\]"):
        list(RecordReader(source).records())


USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a"}, Document(text="a")),
        ({"messages": [USER, REPLY]}, Document(messages=(USER, REPLY), kind="chat")),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
            Document(messages=(USER, REPLY), kind="chat"),
        ),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, Document("", (USER,), "a", "b", "preference")),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, Document("", (USER,), "a", "b", "preference")),
        (
            {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "b"}]},
            Document("", (USER,), "Hello.", "b", "preference"),
        ),
        (
            {"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "Other"}, REPLY]},
            Document("", (), "Hello.", "Hello.", "preference"),
        ),
    ],
)
def test_records_of_every_kind(record: dict[str, Any], document: Document) -> None:
    assert parse_record(record, "here") == document


def test_the_key_of_the_text_can_be_chosen() -> None:
    assert parse_record({"content": "a", "text": 3}, "here", "content").text == "a"
    with pytest.raises(InputError, match='"content"'):
        parse_record({"text": "a"}, "here", "content")


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b"\xff", b"[1]", b"3", b'{"title": "x"}', b'{"messages": [{"role": "user"}]}', b'{"messages": ["hi"]}',
        b'{"prompt": "a", "chosen": 3, "rejected": "b"}', b"[" * 100_000,
        b'{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}',
    ],
)  # fmt: skip
def test_unreadable_records_name_file_and_line(raw: bytes) -> None:
    with pytest.raises(InputError, match=r"^books, line 7: "):
        parse_record(raw, "books, line 7")


def test_a_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", ["x", conversation("a", "b")])
    two = write_jsonl(tmp_path / "other/b.jsonl", ["x", conversation("a", "b")])
    assert Input(path=one).fingerprint() == Input(path=two).fingerprint()
    two.write_bytes(two.read_bytes().replace(b"x", b"y"))
    assert Input(path=one).fingerprint() != Input(path=two).fingerprint()
