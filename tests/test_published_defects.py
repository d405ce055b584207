"""What is broken in the published rlm-48m, rlm-90m and rlm-198m, and works here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_vectors import REFERENCE, beside, load, make_model
from safetensors.numpy import load_file
from tiny_routers import DESIGNS, PAD, VOCABULARY, decoder_of, tiny_model

from rlm_engine import published
from rlm_engine.models.routed import RoutedModel

each_routed = pytest.mark.parametrize("name", ["90m", "198m"])
each_variant = pytest.mark.parametrize("design", ["rlm-90m", "rlm-198m"])
IDS = [7, 1, 15, 9, 2, 20, 11]


def from_file(name: str, dtype: np.dtype | None = None) -> RoutedModel:  # type: ignore[type-arg]
    """The published weights read from the file, every floating point tensor first rounded to dtype."""
    tensors = load_file(beside(REFERENCE / name, "weights.safetensors"))
    if dtype is not None:
        floats = {n: t.astype(dtype).astype(np.float32) for n, t in tensors.items() if t.dtype.kind == "f"}
        tensors |= floats
    shapes = {n: t.shape for n, t in tensors.items()}
    data = json.loads(beside(REFERENCE / name, "config.json").read_text())
    data["tie_word_embeddings"] = True  # what a library makes of the published config
    design = published.recognise(data, shapes)
    assert design is not None
    config = design.config(data, shapes, "config.json")
    model = make_model(config).eval()
    model.load_state_dict({n: torch.from_numpy(t) for n, t in design.tensors(config, tensors).items()})
    assert isinstance(model, RoutedModel)
    return model


@each_routed
def test_trained_head_survives_loading(name: str) -> None:
    """Libraries tie the head to the token table on load, without a word, and destroy it."""
    model = from_file(name)
    assert not torch.equal(model.unembedding.weight, model.tokens.weight)
    golden = load(REFERENCE / name)
    ids = golden.case("b1_t7", "input_ids")
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, golden.case("b1_t7", "logits"), rtol=0, atol=5e-5)


def test_one_model_type_stands_for_three_designs() -> None:
    found = []
    for name in ("48m", "90m", "198m"):
        tensors = load_file(beside(REFERENCE / name, "weights.safetensors"))
        data = {"model_type": "recursive_language_model"}
        found.append(published.recognise(data, {n: t.shape for n, t in tensors.items()}))
    assert found == [published.blend, published.routed, published.routed]
    assert [load(REFERENCE / n).config.biases for n in ("90m", "198m")] == [True, False]


@each_routed
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_exact_rotary_angles(name: str, half: torch.dtype) -> None:
    """Rounding the frequencies themselves puts angles off by up to 2.1 rad at position 512."""
    model = from_file(name).to(half)
    cos, sin = model._tables(513, torch.device("cpu"))
    assert cos.dtype == torch.float32
    frequencies = 10_000.0 ** (-np.arange(0, model.config.head_dim, 2) / model.config.head_dim)
    angles = 512 * frequencies
    turn = torch.atan2(sin[512], cos[512]).double().numpy()
    off = np.abs((turn - angles + np.pi) % (2 * np.pi) - np.pi)
    assert off.max() < 1e-5


@each_routed
def test_half_precision_file_loads_with_exact_rotary_angles(name: str) -> None:
    model = from_file(name, np.dtype(np.float16))
    exact = from_file(name)
    tables, expected = model._tables(512, torch.device("cpu")), exact._tables(512, torch.device("cpu"))
    assert torch.equal(tables[0], expected[0]) and torch.equal(tables[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("design", DESIGNS)
def test_half_precision_model_runs_and_stays_near(design: str, dtype: torch.dtype) -> None:
    half = make_model(tiny_model(design, 0).config).to(dtype).eval()
    half.load_state_dict(tiny_model(design, 0).state_dict())
    with torch.no_grad():
        out = half(torch.tensor([IDS]))
    assert out.logits.dtype == dtype and torch.isfinite(out.logits).all()
    decoded = decoder_of(half).feed([IDS])
    assert decoded.logits.dtype == np.float32
    np.testing.assert_allclose(decoded.logits[0], out.logits[0, -1].float().numpy(), atol=0.3)


@each_variant
def test_leading_end_of_text_gives_numbers(design: str) -> None:
    """rlm-90m's end-of-text is its padding: as the first token the published model is NaN from there on."""
    model = tiny_model(design)
    with torch.no_grad():
        padded = model(torch.tensor([[PAD, *IDS]]))
        plain = model(torch.tensor([IDS]))
        only = model(torch.tensor([[PAD]]))
    assert torch.isfinite(padded.logits).all() and torch.isfinite(only.logits).all()
    torch.testing.assert_close(padded.logits[:, 1:], plain.logits, rtol=0, atol=1e-9)
    assert torch.equal(padded.steps, plain.steps)
    decoded = decoder_of(model).feed([[PAD, *IDS]])
    np.testing.assert_allclose(decoded.logits[0], plain.logits[0, -1].numpy(), rtol=0, atol=1e-9)


def test_leading_end_of_text_gives_gradients() -> None:
    model = make_model(tiny_model("rlm-90m").config).initialise(torch.Generator().manual_seed(0))
    ids = torch.tensor([[PAD, *IDS], [*IDS, PAD]])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@each_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_real_tokens_alone(design: str, side: str) -> None:
    model = tiny_model(design, 1)
    texts = [IDS, IDS[:4], IDS[2:5]]
    rows, places = [], []
    for text in texts:
        pads = [PAD] * (len(IDS) - len(text))
        rows.append(pads + text if side == "left" else text + pads)
        places.append(slice(len(pads), None) if side == "left" else slice(0, len(text)))
    with torch.no_grad():
        batch = model(torch.tensor(rows))
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            alone = model(torch.tensor([text]))
            torch.testing.assert_close(batch.logits[row, place], alone.logits[0], rtol=0, atol=1e-9)
            assert batch.steps[row] == alone.steps[0]


@pytest.mark.parametrize("design", DESIGNS)
def test_batches_generate(design: str) -> None:
    """The published 48m and 90m loops crash with more than one row; here rows of any lengths go on by themselves."""
    model = tiny_model(design, 1)
    prompts = [IDS, IDS[:2], IDS[3:]]
    together = decoder_of(model, rows=3)
    alone = [decoder_of(model) for _ in prompts]
    fed = prompts
    for _ in range(8):
        batch = together.feed(fed)
        singles = [d.feed([ids]).logits[0] for d, ids in zip(alone, fed, strict=True)]
        np.testing.assert_allclose(batch.logits, singles, rtol=0, atol=1e-9)
        fed = [[int(row.argmax())] for row in batch.logits]


@each_variant
def test_a_batch_does_not_run_its_shallow_rows_deep(design: str) -> None:
    model = tiny_model(design, 1)
    ids = np.random.default_rng(0).integers(PAD + 1, VOCABULARY, (12, 8))
    rows: list[int] = []
    assert isinstance(model, RoutedModel)
    hook = model.recursion.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        steps = model(torch.from_numpy(ids)).steps
    hook.remove()
    assert len(steps.unique()) > 1
    assert rows == [int((steps > s).sum()) for s in range(int(steps.max()))]
