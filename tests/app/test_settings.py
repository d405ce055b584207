"""The settings file: what is accepted, what is refused, and that a broken file costs nothing."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from rlm_chat import settings
from rlm_chat.settings import Settings, SettingsError, load_settings, settings_from_dict


def test_a_missing_file_means_defaults_without_a_word(tmp_path: Path) -> None:
    assert load_settings(tmp_path / "settings.toml") == (Settings(), None)


def test_every_value_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        'theme = "rlm-light"\nsend_key = "ctrl+j"\ndepth_view = "heat"\n'
        '[model]\nchat = "/models/mine"\nbackend = "torch"\ndtype = "bfloat16"\n'
        "[sampling]\ntemperature = 1\nseed = 7\ngreedy = true\n[depth]\nmax_steps = 4\n",
        encoding="utf-8",
    )
    found, notice = load_settings(path)
    assert notice is None
    assert (found.theme, found.send_key, found.depth_view) == ("rlm-light", "ctrl+j", "heat")
    assert (found.model.chat, found.model.base, found.model.backend) == ("/models/mine", "base", "torch")
    assert (found.model.device, found.model.dtype) == ("auto", "bfloat16")
    assert (found.sampling.temperature, found.sampling.seed, found.sampling.greedy) == (1.0, 7, True)
    assert isinstance(found.sampling.temperature, float)
    assert found.depth.max_steps == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"theme = ", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b'them = "x"', "them is not a setting; there are depth, depth_view"),
        (b"theme = 3", "theme must be a text, got 3"),
        (b'send_key = "F5"', "send_key must be enter or ctrl\\+j"),
        (b"sampling = 3", "sampling must be a table"),
        (b"[sampling]\ntemperature = -1", "sampling.temperature must be between 0"),
        (b"[sampling]\ntemperature = nan", "sampling.temperature must be between"),
        (b"[sampling]\ntop_k = 1.5", "sampling.top_k must be a whole number"),
        (b"[sampling]\ntop_k = true", "sampling.top_k must be a whole number"),
        (b"[sampling]\nmax_tokens = 0", "sampling.max_tokens must be between 1"),
        (b"[depth]\nmax_steps = 0", "depth.max_steps must be between 1"),
        (b'[model]\nbackend = "tpu"', "model.backend must be auto or onnx or torch"),
    ],
)
def test_a_broken_file_means_defaults_and_a_notice_and_is_left_alone(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    found, notice = load_settings(path)
    assert found == Settings()
    assert notice is not None and notice.startswith(str(path))
    assert re.search(words, notice), notice
    assert path.read_bytes() == content


def test_a_directory_in_its_place_is_a_notice(tmp_path: Path) -> None:
    found, notice = load_settings(tmp_path)
    assert found == Settings()
    assert notice is not None and "directory" in notice


def test_an_environment_variable_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('theme = "rlm-light"')
    monkeypatch.setenv("RLM_CHAT_SETTINGS", str(path))
    assert load_settings()[0].theme == "rlm-light"


def test_settings_errors_name_the_table() -> None:
    with pytest.raises(SettingsError, match=r"^sampling\.warmth is not a setting"):
        settings_from_dict({"sampling": {"warmth": 1}})


def test_sampling_settings_are_those_of_the_engine() -> None:
    from rlm_engine.sampling import Sampling

    engine = Sampling(**vars(Settings().sampling))
    assert dataclasses.asdict(engine) == dataclasses.asdict(Sampling())


def test_every_field_says_what_it_is_for() -> None:
    classes = [n for n in ast.parse(inspect.getsource(settings)).body if isinstance(n, ast.ClassDef)]
    count = 0
    for cls in classes:
        for node, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                count += 1
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(node.target)}"
    assert count == sum(
        len(dataclasses.fields(getattr(settings, c.name))) for c in classes if c.name != "SettingsError"
    )
