"""Corpus files to shards: see `rlm-train prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlm_engine.chat import encode_chat_with_mask
from rlm_engine.tokenizer.gpt2 import Gpt2Tokenizer
from rlm_training.corpus import find_files, read_documents, source_names
from rlm_training.shards import CHAT_FORMAT, CHAT_TOKENS, VERSION, ShardWriter, read_index, write_json


def prepare(paths: list[Path], target: Path, workers: int = 1, progress: bool = False) -> dict[str, Any]:
    """Tokenize files into `target` and return the index. Sources that are already complete are kept."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = Gpt2Tokenizer(added_tokens=CHAT_TOKENS)
    end = tokenizer.special["<|endoftext|>"]
    if (target / "index.json").exists():
        index = read_index(target)
    else:
        index = {"version": VERSION, "tokenizer": "gpt2", "added_tokens": list(CHAT_TOKENS), "sources": {}}
    for name, path in source_names(find_files(paths)).items():
        if name in index["sources"]:
            continue
        kind = "text"
        with ShardWriter(target, f"{name}-00000", np.uint16) as writer:
            for document in read_documents(path):
                if document.chosen:
                    kind = "preference"
                    for reply in (document.chosen, document.rejected):
                        turn = {"role": "assistant", "content": reply}
                        ids, mask = encode_chat_with_mask([*document.messages, turn], tokenizer, CHAT_FORMAT)
                        before = len(encode_chat_with_mask(document.messages, tokenizer, CHAT_FORMAT)[0])
                        mask[:before] = [False] * before
                        writer.add(np.asarray(ids), np.asarray(mask))
                    continue
                if document.messages:
                    kind = "chat"
                    ids, mask = encode_chat_with_mask(document.messages, tokenizer, CHAT_FORMAT)
                else:
                    ids = tokenizer.encode(document.text)
                    mask = [False] * len(ids)
                if not ids or ids[-1] != end:
                    ids, mask = [*ids, end], [*mask, False]
                writer.add(np.asarray(ids), np.asarray(mask))
            shard = writer.close()
        index["sources"][name] = {
            "kind": kind,
            "dtype": "uint16",
            "documents": shard["documents"],
            "tokens": shard["tokens"],
            "shards": [shard],
        }
        write_json(target / "index.json", index)
    return index
