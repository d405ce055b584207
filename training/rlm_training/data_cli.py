"""The data commands of rlm-train: prepare, compose, tokenizer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `prepare`, `compose` and `tokenizer`."""
    prepare = commands.add_parser("prepare", help="filter, deduplicate and tokenize text into memory-mapped shards")
    add = prepare.add_argument
    add("paths", nargs="*", metavar="PATH", help=".txt, .jsonl, .jsonl.zst, .parquet; a folder; a pattern; or "
        "hf:NAME[:CONFIG][:SPLIT], a dataset of the Hugging Face hub")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for the shards; run again to continue or to add files")
    add("--verify", type=Path, metavar="DIR", help="only check the files of a prepared folder against their SHA-256")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: all cores)")
    add("--filter", action="append", default=[], metavar="[SOURCE=]NAMES", help="quality filters: none, default "
        "(if not given), 90m, mor, chat-short, or several with commas; SOURCE may be a pattern")  # fmt: skip
    add("--keep-duplicates", action="store_true", help="keep documents that differ only in case and white space")
    add("--near-duplicates", type=float, default=0.0, metavar="SIMILARITY",
        help="drop documents this similar to an earlier one (say 0.8; default 0: keep them)")  # fmt: skip
    add("--decontaminate", nargs="+", type=Path, default=[], metavar="FILE",
        help="drop documents that share 13 words in a row with these evaluation files")  # fmt: skip
    add("--heldout", type=float, default=0.0, metavar="SHARE", help="documents (by hash) for OUT/heldout, say 0.005")
    add("--max-documents", action="append", default=[], metavar="[SOURCE=]N", help="keep a source's first N")
    add("--max-tokens", action="append", default=[], metavar="[SOURCE=]N", help="stop a source after N tokens")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer.json, vocab.json and merges.txt, or a model (default: GPT-2)",
    )
    add("--chat-format", default="", metavar="FORMAT", help="ours (default), 90m, mor, or a model's directory")
    add("--text-key", default="text", metavar="KEY", help="key of the text in records (default text)")
    add(
        "--shard-tokens",
        type=int,
        default=2**26,
        metavar="N",
        help="size of a shard, and of what an interruption costs",
    )
    prepare.set_defaults(run=_prepare)

    compose = commands.add_parser("compose", help="conversations written with alternatives, as JSON lines")
    compose.add_argument("files", nargs="+", type=Path, metavar="FILE", help="see rlm_training/phrasings.py")
    compose.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="what prepare reads")
    compose.set_defaults(run=_compose)

    tokenizer = commands.add_parser("tokenizer", help="train a lossless byte-level tokenizer for technical text")
    tokenizer.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".txt or .jsonl")
    tokenizer.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tokenizer.json")
    tokenizer.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="tokens at most (default 32000)")
    tokenizer.add_argument("--min-frequency", type=int, default=2, metavar="N", help="a merge's occurrences at least")
    tokenizer.set_defaults(run=_tokenizer)


def _prepare(options: argparse.Namespace) -> int:
    from rlm_engine.errors import UsageError

    if options.verify is not None:
        from rlm_training.shards import verify

        print(f"{options.verify}: {verify(options.verify)} files are as they were written")
        return 0
    if not options.paths or options.out is None:
        raise UsageError("prepare: give files or folders and --out DIR (or --verify DIR)")
    from rlm_training.data_report import format_report, make_report
    from rlm_training.prepare import PrepareOptions, prepare

    chosen = PrepareOptions(
        filters=tuple(_per_source(text, "filter", str) for text in options.filter),
        deduplicate=not options.keep_duplicates,
        near_duplicates=options.near_duplicates,
        decontaminate=tuple(options.decontaminate),
        heldout=options.heldout,
        max_documents=tuple(_per_source(text, "max-documents", int) for text in options.max_documents),
        max_tokens=tuple(_per_source(text, "max-tokens", int) for text in options.max_tokens),
        tokenizer=options.tokenizer,
        chat_format=options.chat_format,
        text_key=options.text_key,
        shard_tokens=options.shard_tokens,
    )
    index = prepare(options.paths, options.out, chosen, options.workers, progress=sys.stderr.isatty())
    print(format_report(make_report(index)))
    return 0


def _per_source(text: str, option: str, kind: type) -> tuple[str, Any]:
    """ "SOURCE=VALUE" or "VALUE" (for every source)."""
    from rlm_engine.errors import UsageError

    pattern, equals, value = text.rpartition("=")
    try:
        return pattern if equals else "*", kind(value.replace("_", "") if kind is int else value)
    except ValueError:
        raise UsageError(f"--{option} {text!r}: expected a number, or SOURCE=number") from None


def _compose(options: argparse.Namespace) -> int:
    from rlm_training.phrasings import compose

    entries, conversations = compose(options.files, options.out)
    print(f"{options.out}: {conversations:,} conversations of {entries:,} entries")
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from rlm_engine.errors import InputError
    from rlm_engine.tokenizer.technical_training import train_technical

    for path in options.files:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    trained = train_technical(options.files, options.vocab_size, options.min_frequency)
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "tokenizer.json"
    temporary = target.with_name("tokenizer.json.tmp")
    trained.save(str(temporary))
    temporary.replace(target)
    print(f"{target}: {trained.get_vocab_size():,} tokens")
    return 0
