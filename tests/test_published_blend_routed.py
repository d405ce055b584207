"""Reading published rlm-48m, rlm-90m and rlm-198m checkpoints: what is recognised, converted and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import REFERENCE, beside, make_model
from safetensors.numpy import load_file

from rlm_engine import published
from rlm_engine.config import BlendConfig, RoutedConfig, config_from_dict
from rlm_engine.errors import ModelError
from rlm_engine.published import blend, routed

DESIGNS = {"48m": blend, "90m": routed, "198m": routed}
HUGGING_FACE = {
    "model_type": "recursive_language_model",
    "architectures": ["RecursiveLanguageModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling.RecursiveLanguageModel"},
    "torch_dtype": "float32",
    "transformers_version": "4.46.3",
    "tie_word_embeddings": True,
}
each_checkpoint = pytest.mark.parametrize("name", DESIGNS)
Checkpoint = tuple[dict[str, Any], dict[str, np.ndarray]]


def checkpoint(name: str) -> Checkpoint:
    prefix = Path(REFERENCE / name)
    data = json.loads(beside(prefix, "config.json").read_text()) | HUGGING_FACE
    return data, load_file(beside(prefix, "weights.safetensors"))


def shapes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def read(name: str, data: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    config = DESIGNS[name].config(data, shapes_of(tensors), "config.json")
    return DESIGNS[name].tensors(config, tensors)  # type: ignore[arg-type]


def full_size(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], int]:
    facts = json.loads((REFERENCE / "full_state_dicts.json").read_text())[name]
    shapes = {n: tuple(t["shape"] if isinstance(t, dict) else t) for n, t in facts["tensors"].items()}
    return facts["settings"] | HUGGING_FACE, shapes, facts["parameters"]


@each_checkpoint
def test_tensor_names_tell_the_designs_apart(name: str) -> None:
    data, tensors = checkpoint(name)
    assert published.recognise(data, shapes_of(tensors)) is DESIGNS[name]
    assert [d for d in (blend, routed) if d.matches(data, shapes_of(tensors))] == [DESIGNS[name]]


def test_something_else_is_not_recognised() -> None:
    assert published.recognise({}, {"model.layers.0.weight": (2, 2), "layers.0.weight": (2, 2)}) is None


@each_checkpoint
def test_every_tensor_of_the_model_is_read(name: str) -> None:
    data, tensors = checkpoint(name)
    config = DESIGNS[name].config(data, shapes_of(tensors), "config.json")
    model = make_model(config)
    state = model.state_dict()
    converted = DESIGNS[name].tensors(config, tensors)  # type: ignore[arg-type]
    assert shapes_of(converted) == {n: tuple(t.shape) for n, t in state.items()}
    assert config_from_dict(json.loads(config.to_json())) == config


@each_checkpoint
def test_full_size_checkpoint_fits_the_full_size_model(name: str) -> None:
    data, shapes, parameters = full_size(name)
    config = DESIGNS[name].config(data, shapes, "config.json")
    with torch.device("meta"):
        model = make_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.tokenizer == "gpt2" and config.eos_token_id == 50256


def test_chat_formats_come_with_the_vocabulary_they_need() -> None:
    full = {name: DESIGNS[name].config(*full_size(name)[:2], "config.json") for name in DESIGNS}
    assert full["48m"].chat_format is None and full["48m"].added_tokens == ()
    assert full["90m"].added_tokens == ("<|user|>", "<|assistant|>")
    assert full["198m"].added_tokens == ("<|pad|>", "<|user|>", "<|assistant|>")
    assert isinstance(full["90m"], RoutedConfig) and isinstance(full["198m"], RoutedConfig)
    assert (full["90m"].pad_token_id, full["198m"].pad_token_id) == (50256, 50257)
    assert (full["90m"].rolling_window, full["198m"].rolling_window) == (False, True)
    for name in ("90m", "198m"):
        chat = full[name].chat_format
        assert chat is not None and chat.prefix["assistant"] == "<|assistant|>\n" and "<|endoftext|>" in chat.stop
        data, tensors = checkpoint(name)
        tiny = DESIGNS[name].config(data, shapes_of(tensors), "config.json")
        assert (tiny.tokenizer, tiny.added_tokens, tiny.chat_format) == ("none", (), None)


@each_checkpoint
def test_a_missing_tensor_is_named_with_its_shape(name: str) -> None:
    data, tensors = checkpoint(name)
    config = DESIGNS[name].config(data, shapes_of(tensors), "config.json")
    victim = next(n for n in tensors if n.endswith(("norm1.weight", "ln1.weight")))
    del tensors[victim]
    with pytest.raises(ModelError, match=rf"tensor '{victim}' is missing, expected \[32\]"):
        DESIGNS[name].config(data, shapes_of(tensors), "config.json")
    with pytest.raises(ModelError, match=f"tensor '{victim}' is missing"):
        DESIGNS[name].tensors(config, tensors)  # type: ignore[arg-type]


@each_checkpoint
def test_an_unknown_tensor_is_refused(name: str) -> None:
    data, tensors = checkpoint(name)
    tensors["extra.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(ModelError, match=r"'extra.weight' \[2, 3\] is not part"):
        read(name, data, tensors)


@each_checkpoint
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 999_999),
        ("embedding_dim", 16384),
        ("num_layers", 7),
        ("num_layers", 1),
        ("intermediate_size", 96),
        ("max_recursion_steps", 64),
        ("max_position_embeddings", 1_000_000),
    ],
)
def test_sizes_that_contradict_the_tensors_are_refused_before_anything_is_allocated(
    name: str, key: str, value: int
) -> None:
    data, tensors = checkpoint(name)
    read_by = {"48m": {"intermediate_size"}, "90m": {"max_recursion_steps", "max_position_embeddings"}}
    if key in read_by["48m" if name == "48m" else "90m"]:
        assert read(name, data | {key: value}, tensors)  # not a size of this design's tensors
        return
    with pytest.raises(ModelError, match=r"^config.json: (tensor|eos_token_id)"):
        DESIGNS[name].config(data | {key: value}, shapes_of(tensors), "config.json")


@each_checkpoint
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", None, "'vocab_size' is missing"),
        ("vocab_size", "211", "vocab_size must be an integer"),
        ("embedding_dim", 32.0, "embedding_dim must be an integer"),
        ("num_attention_heads", 5, "not a multiple"),
        ("num_attention_heads", True, "must be an integer"),
        ("num_layers", 10**9, "n_layers must be between"),
        ("num_layers", -1, "n_layers must be between"),
        ("eos_token_id", 211, "outside the vocabulary"),
        ("eos_token_id", [210], "must be an integer"),
        ("dropout_rate", float("nan"), "finite"),
        ("hidden_dropout_prob", float("nan"), "finite"),
        ("layer_norm_eps", "tiny", "finite"),
        ("simple_recursion_steps", 0, "steps must be"),
        ("pad_token_id", 300, "pad_token_id"),
    ],
)
def test_impossible_settings_are_one_clear_line(name: str, key: str, value: Any, message: str) -> None:
    data, tensors = checkpoint(name)
    ours = {"dropout_rate"} if name == "48m" else {"hidden_dropout_prob", "layer_norm_eps", "simple_recursion_steps"}
    if name == "48m":
        ignored = {"hidden_dropout_prob", "layer_norm_eps", "simple_recursion_steps", "pad_token_id"}
    else:
        ignored = {"dropout_rate"}
    if key in ignored - ours:
        assert read(name, data | {key: value}, tensors)
        return
    with pytest.raises(ModelError, match=message) as error:
        DESIGNS[name].config(data | {key: value}, shapes_of(tensors), "some/config.json")
    assert str(error.value).startswith("some/config.json: ") and "\n" not in str(error.value)


@each_checkpoint
def test_whole_number_weights_are_refused(name: str) -> None:
    data, tensors = checkpoint(name)
    victim = next(n for n in tensors if n.endswith("1.weight"))
    tensors[victim] = tensors[victim].astype(np.int64)
    with pytest.raises(ModelError, match=f"'{victim}' holds int64"):
        read(name, data, tensors)


def test_tied_head_may_be_in_the_file_but_must_be_the_token_table() -> None:
    data, tensors = checkpoint("48m")
    expected = read("48m", data, tensors)
    tensors[blend.HEAD] = tensors[blend.TOKEN_TABLE].copy()
    converted = read("48m", data, tensors)
    assert all(np.array_equal(converted[n], expected[n]) for n in expected) and converted.keys() == expected.keys()
    tensors[blend.HEAD][0, 0] += 1
    with pytest.raises(ModelError, match="ties them"):
        read("48m", data, tensors)


def test_step_table_must_agree_with_the_config() -> None:
    data, tensors = checkpoint("198m")
    assert read("198m", data, tensors)
    tensors["router.steps_map"] = np.array([1, 2, 3])
    with pytest.raises(ModelError, match=r"steps_map' says \[1, 2, 3\] passes"):
        read("198m", data, tensors)


@pytest.mark.parametrize("name", ["90m", "198m"])
def test_rotary_frequencies_of_another_base_are_refused(name: str) -> None:
    data, tensors = checkpoint(name)
    victim = next(n for n in tensors if n.endswith("inv_freq"))
    without = {n: t for n, t in tensors.items() if not n.endswith("inv_freq")}
    assert read(name, data, without).keys() == read(name, data, tensors).keys()
    tensors[victim] = tensors[victim] * 1.1
    with pytest.raises(ModelError, match=f"'{victim}' holds rotary frequencies of another base"):
        read(name, data, tensors)


def test_configs_are_of_the_right_kind() -> None:
    kinds = {name: type(DESIGNS[name].config(*full_size(name)[:2], "config.json")) for name in DESIGNS}
    assert kinds == {"48m": BlendConfig, "90m": RoutedConfig, "198m": RoutedConfig}
