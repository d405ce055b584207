"""Published checkpoints become model directories that compute the same; damaged or hostile ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlm_engine.backends.torch import TorchBackend
from rlm_engine.checkpoint import read_model_directory
from rlm_engine.config import MixtureConfig, config_from_dict
from rlm_engine.convert import convert_checkpoint
from rlm_engine.decoding.mixture import MixtureDecoder
from rlm_engine.errors import InputError, ModelError, UsageError
from rlm_engine.models.mixture import MixtureModel
from rlm_engine.tokenizer import load_tokenizer
from rlm_engine.tokenizer.technical_training import train_technical

DATA = Path(__file__).parent / "data"
REFERENCE = DATA / "reference"


def published() -> dict[str, torch.Tensor]:
    weights = load_file(REFERENCE / "mor_weights.safetensors")
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def save(path: Path, state: dict[str, torch.Tensor], **extra: object) -> Path:
    torch.save({"epoch": 15, "model_state_dict": state, "metrics": {"loss": 2.07}, **extra}, path)
    return path


def published_directory(path: Path, prefix: str) -> Path:
    path.mkdir()
    shutil.copy(REFERENCE / f"{prefix}_config.json", path / "config.json")
    shutil.copy(REFERENCE / f"{prefix}_weights.safetensors", path / "model.safetensors")
    return path


def larger(vocabulary: int) -> dict[str, torch.Tensor]:
    """The checkpoint with room for a real tokenizer."""
    state = published()
    for name in ("embeddings.token_embedding.weight", "lm_head.weight"):
        state[name] = torch.randn(vocabulary, state[name].shape[1], generator=torch.Generator().manual_seed(1))
    return state


def test_converted_checkpoint_continues_as_the_golden_text(tmp_path: Path) -> None:
    source = save(tmp_path / "best_model.pt", published())
    config = convert_checkpoint(source, tmp_path / "new" / "mor", heads=4)
    found, tensors = read_model_directory(tmp_path / "new" / "mor")
    assert found == config and isinstance(found, MixtureConfig)
    assert (found.n_layers, found.max_steps, found.ffn, found.context_length) == (3, 4, 72, 32)
    assert found.tokenizer == "none" and load_tokenizer(found, tmp_path) is None
    assert found.provenance["converted_from"] == "best_model.pt" and len(found.provenance["sha256"]) == 64
    model = MixtureModel(found).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    entry = json.loads((REFERENCE / "mor_golden.json").read_text())["greedy"][0]
    decoder = MixtureDecoder(TorchBackend(model.pieces(), torch.float32), found)
    tokens = fed = list(entry["prompt"])
    while len(tokens) < len(entry["output"]):
        fed = [int(decoder.feed([fed]).logits[0].argmax())]
        tokens = tokens + fed
    assert tokens == entry["output"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mor"]  # nothing is left behind


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_wrappers_and_older_files_give_the_same_tensors(tmp_path: Path, prefix: str, bare: bool, zipped: bool) -> None:
    state = {prefix + name: tensor for name, tensor in published().items()}
    data = state if bare else {"model_state_dict": state}
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    convert_checkpoint(tmp_path / "a.pth", tmp_path / "a", heads=4)
    convert_checkpoint(save(tmp_path / "b.pt", published()), tmp_path / "b", heads=4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_heads_default_to_64_dimensions_each(tmp_path: Path) -> None:
    assert convert_checkpoint(save(tmp_path / "a.pt", published()), tmp_path / "a").n_heads == 1
    with pytest.raises(ModelError, match="not a multiple of n_heads 5"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b", heads=5)


def test_technical_tokenizer_goes_along(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pt", larger(383))
    config = convert_checkpoint(source, tmp_path / "a", tokenizer=DATA / "tokenizer")
    assert config.tokenizer == "technical" and config.chat_format is not None
    tokenizer = load_tokenizer(config, tmp_path / "a")
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode("The model")) == "Themodel"
    assert tokenizer.encode(config.chat_format.prefix["user"], allow_special=True) == [2, 5]
    assert not (tmp_path / "a" / "golden.json").exists()
    without = convert_checkpoint(source, tmp_path / "b")
    assert without.tokenizer == "none" and without.chat_format is None


def test_lossless_tokenizer_goes_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    trained = train_technical([DATA / "tokenizer" / "train_text.txt"], vocab_size=350)
    trained.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = convert_checkpoint(save(tmp_path / "a.pt", larger(350)), tmp_path / "a", tokenizer=tmp_path / "tokenizer")
    tokenizer = load_tokenizer(config, tmp_path / "a")
    assert config.tokenizer == "file" and tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("x_1 = 2x\n")) == "x_1 = 2x\n"


def test_tokenizer_of_another_model_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pt", published())
    with pytest.raises(ModelError, match=r"tokenizer has 383 tokens, the model only 211"):
        convert_checkpoint(source, tmp_path / "a", tokenizer=DATA / "tokenizer")
    with pytest.raises(InputError, match="neither"):
        convert_checkpoint(source, tmp_path / "a", tokenizer=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("prefix", ["48m", "90m", "198m", "mor"])
def test_published_directories_of_every_design(tmp_path: Path, prefix: str) -> None:
    source = published_directory(tmp_path / "published", prefix)
    config = convert_checkpoint(source, tmp_path / "ours")
    before, after = read_model_directory(source), read_model_directory(tmp_path / "ours")
    assert after[0] == config
    assert config_from_dict(json.loads((tmp_path / "ours" / "config.json").read_text())) == config
    assert before[1].keys() == after[1].keys()
    assert all(np.array_equal(before[1][name], after[1][name]) for name in before[1])
    with pytest.raises(UsageError, match="already"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(UsageError, match="leave heads out"):
        convert_checkpoint(source, tmp_path / "again", heads=4)


def test_bare_safetensors_file(tmp_path: Path) -> None:
    config = convert_checkpoint(REFERENCE / "mor_weights.safetensors", tmp_path / "a", heads=4)
    assert config.n_heads == 4
    with pytest.raises(UsageError, match=r"needs its config\.json"):
        convert_checkpoint(REFERENCE / "90m_weights.safetensors", tmp_path / "b")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pt", published())
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in ("there", "link", "a.pt"):
        with pytest.raises(UsageError, match="exists already"):
            convert_checkpoint(source, tmp_path / target)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        convert_checkpoint(source, tmp_path / "file" / "below")
    assert not list((tmp_path / "there").iterdir())


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    data = {"model_state_dict": published(), "metrics": Hostile(trap)}
    torch.save(data, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="code from a checkpoint is refused"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "a")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(ModelError, match="not a readable checkpoint"):
        convert_checkpoint(tmp_path / "b.pt", tmp_path / "a")
    assert not trap.exists()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.pt", published()).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.pt: not a readable checkpoint") as error:
            convert_checkpoint(tmp_path / "cut.pt", tmp_path / "a")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def without(name: str) -> dict[str, torch.Tensor]:
    state = published()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("layers.1.attention.w_o.bias"), r"'layers\.1\.attention\.w_o\.bias' is missing"),
        (without("embeddings.layer_norm.weight"), r"'embeddings\.layer_norm\.weight' is missing"),
        (published() | {"layers.0.extra": torch.zeros(2)}, r"'layers\.0\.extra' \[2\] is not part"),
        (published() | {"final_norm.bias": torch.zeros(31)}, r"'final_norm\.bias' is \[31\], the config says \[32\]"),
        (published() | {"final_norm.bias": torch.full((32,), float("nan"))}, "NaN"),
        (published() | {"final_norm.bias": torch.zeros(32, dtype=torch.int64)}, "floating point"),
        (published() | {"lm_head.weight": torch.zeros(1).expand(10**9, 32)}, "not stored as it should be"),
        (published() | {"module.final_norm.bias": torch.zeros(32)}, "twice"),
        ({"something.weight": torch.zeros(2, 2)}, "fit none of the published designs"),
        ({}, "no state dict"),
        ({"a": 1}, "no state dict"),
    ],
)
def test_damaged_state_dicts_are_refused(tmp_path: Path, state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert_checkpoint(save(tmp_path / "a.pt", state), tmp_path / "a", heads=4)
    assert not (tmp_path / "a").exists()


def test_missing_and_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        convert_checkpoint(tmp_path / "missing.pt", tmp_path / "a")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"expected a directory"):
        convert_checkpoint(tmp_path / "a.txt", tmp_path / "a")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="no state dict"):
        convert_checkpoint(tmp_path / "list.pt", tmp_path / "a")


def test_fixed_router_may_leave_its_router_out(tmp_path: Path) -> None:
    """And a router that is there is dropped: a fixed model never asks it."""
    for kept in (True, False):
        source = tmp_path / f"source{kept}"
        source.mkdir()
        data = json.loads((REFERENCE / "mor_config.json").read_text()) | {"router_type": "fixed"}
        (source / "config.json").write_text(json.dumps(data))
        state = {n: t.numpy() for n, t in published().items() if kept or ".router." not in n}
        save_file(state, source / "model.safetensors")
        config = convert_checkpoint(source, tmp_path / f"target{kept}")
        assert isinstance(config, MixtureConfig) and config.router == "fixed"
        assert "layers.0.router_in.weight" not in load_file(tmp_path / f"target{kept}" / "model.safetensors")


def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    for key, value in (("d_model", 36), ("n_layers", 4), ("max_steps", 3), ("vocab_size", 210), ("max_seq_len", "32")):
        source = published_directory(tmp_path / key, "mor")
        data = json.loads((source / "config.json").read_text()) | {key: value}
        (source / "config.json").write_text(json.dumps(data))
        with pytest.raises(ModelError, match="config"):
            convert_checkpoint(source, tmp_path / "target")
