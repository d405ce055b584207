"""The models that ship: they load on both backends, really are trained, and talk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rlm_engine import Depth, Model, Sampling, bundled_models, load_model
from rlm_engine.checkpoint import read_model_directory
from rlm_engine.generate import BUNDLED, describe_model

TEXT = "The old man went to the market and bought some bread. Then he came home and ate it with his wife."
PROMPTS = [
    "hello", "How are you?", "What is your name?", "Tell me a joke", "I am tired", "What is a cat?", "Thank you",
    "Good night", "Write a short poem", "What is 2 plus 3?", "Who are you?", "Are you a robot?", "I am happy today",
    "Give me a tip", "What is the sun?", "Tell me a story", "Do you like music?", "I lost my key", "bye", "help me",
]  # fmt: skip


@pytest.fixture(scope="module", params=["onnx", "torch"])
def chat(request: pytest.FixtureRequest) -> Model:
    return load_model("chat", backend=request.param)


def said(model: Model, prompt: str, sampling: Sampling) -> tuple[str, str]:
    generation = model.chat([{"role": "user", "content": prompt}], sampling)
    return "".join(token.text for token in generation), generation.summary.stop_reason


def test_default_backend_is_onnx() -> None:
    assert load_model("chat").backend_name == "onnx"
    assert load_model("base").can_chat


def test_models_are_trained() -> None:
    """A uniform guess costs ln(50,259) = 10.8 nats a token, a unigram model of such text about 6.5."""
    scored = load_model("base").score(TEXT)
    assert -np.mean(scored.logprobs) < 5.0
    assert math.isfinite(scored.perplexity)


def test_depth_is_adaptive(chat: Model) -> None:
    scored = chat.score(TEXT + " " + TEXT.upper())
    assert 2.0 < np.mean(scored.depths) < 7.9
    assert len(set(scored.depths)) >= 3


def test_replies_end_by_themselves_and_never_leak_the_format(chat: Model) -> None:
    ended = 0
    for seed, prompt in enumerate(PROMPTS):
        text, reason = said(chat, prompt, Sampling(temperature=0.6, seed=seed, max_tokens=150))
        ended += reason == "end_of_turn"
        assert text.strip() and "<|" not in text
    assert ended >= 15


def test_same_seed_same_reply(chat: Model) -> None:
    sampling = Sampling(temperature=0.9, seed=11, max_tokens=40)
    assert said(chat, "Tell me a story", sampling) == said(chat, "Tell me a story", sampling)


def test_less_depth_is_really_less(chat: Model) -> None:
    generation = chat.chat([{"role": "user", "content": "hello"}], Sampling(seed=1, max_tokens=20), Depth(max_steps=2))
    assert {token.depth for token in generation} <= {1.0, 2.0}


def test_base_and_chat_share_the_table() -> None:
    assert not np.array_equal(
        read_model_directory(BUNDLED / "base")[1]["block.wq.weight"],
        read_model_directory(BUNDLED / "chat")[1]["block.wq.weight"],
    )
    assert (BUNDLED / "chat" / "model.safetensors").stat().st_size < 5_000_000
    assert not (BUNDLED / "chat" / "onnx" / "tables.bin").exists()
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*")) < 110_000_000


def test_every_design_can_be_tried() -> None:
    designs = {describe_model(BUNDLED / name)["architecture"]: name for name in bundled_models() if name != "chat"}
    assert sorted(designs) == ["act", "blend", "mixture", "routed"]
    for name in designs.values():
        model = load_model(name)
        scored = model.score(TEXT)
        assert -np.mean(scored.logprobs) < 6.5, name  # a unigram model of such text: about 7
        sampling = Sampling(seed=3, max_tokens=24)
        first, second = ([t.id for t in model.generate("The old man", sampling)] for _ in range(2))
        assert first == second and len(set(first)) > 5
        assert (BUNDLED / name / "README.md").is_file()


@pytest.mark.slow
def test_fp32_export_gives_the_same_greedy_text_and_depths(tmp_path: Path) -> None:
    """20 prompts, PyTorch against ONNX Runtime in single precision."""
    from rlm_engine.export.onnx import export_onnx

    target = tmp_path / "chat"
    export_onnx(BUNDLED / "chat", target, precision="fp32")
    reference, exported = load_model("chat", backend="torch"), load_model(str(target), backend="onnx")
    greedy = Sampling(greedy=True, max_tokens=40)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ours = [(t.id, t.depth) for t in exported.chat(messages, greedy)]
        assert ours == [(t.id, t.depth) for t in reference.chat(messages, greedy)]
    ids = reference.encode(TEXT)
    np.testing.assert_allclose(exported.logits(ids), reference.logits(ids), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_eight_bit_weights_cost_less_than_one_percent() -> None:
    """Of perplexity, and of likeliest tokens (on 1,500 of them; benchmarks/quantization.py measures more)."""
    small, full = load_model("base", backend="onnx"), load_model("base", backend="torch")
    text = (Path(__file__).parents[1] / "LICENSE").read_text()[:6000] + TEXT * 20
    nats = {m.backend_name: -np.mean(m.score(text).logprobs) for m in (small, full)}
    assert abs(math.exp(nats["onnx"] - nats["torch"]) - 1) < 0.01
    ids = full.encode(text)[:1500]
    same = [
        (small.logits(piece).argmax(axis=1) == full.logits(piece).argmax(axis=1)).mean()
        for piece in (ids[start : start + 250] for start in range(0, len(ids), 250))
    ]
    assert np.mean(same) >= 0.985  # 0.99, less three standard errors of a sample of this size
