"""`onnx/` folders: written whole or not at all, checked before use, and run where there is no PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import DESIGNS, model_of, tensors_of

from rlm_chat.cli import main
from rlm_engine import Sampling, load_model
from rlm_engine.backends.onnx import _providers
from rlm_engine.checkpoint import write_model_directory
from rlm_engine.config import ActConfig, ModelConfig
from rlm_engine.errors import ModelError, UsageError
from rlm_engine.export import onnx as onnx_export
from rlm_engine.export.external import external_tensors
from rlm_engine.export.manifest import check_files, read_manifest
from rlm_engine.export.onnx import export_onnx, share_tables
from rlm_engine.generate import describe_model

GREEDY = Sampling(greedy=True, max_tokens=6)
PROMPT = [5, 9, 2, 11, 17]


def save(directory: Path, design: str = "act") -> Path:
    model = model_of(design)
    write_model_directory(directory, model.config, {n: torch.from_numpy(t) for n, t in tensors_of(model).items()})
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with weights and export."""
    directory = save(tmp_path_factory.mktemp("models") / "tiny")
    export_onnx(directory)
    return directory


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "tiny"))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_export_compares_itself_with_pytorch(tmp_path: Path, design: str, precision: str) -> None:
    manifest = export_onnx(save(tmp_path / "m", design), precision=precision)
    found = manifest.verification
    assert found is not None and found.tokens >= 12
    if precision == "fp32":
        assert found.logits_max_difference < 5e-4
        assert found.depth_agreement == found.top1_agreement == found.greedy_agreement == 1.0
    else:
        assert found.logits_max_difference > 1e-5  # int8 that changed nothing would not be int8
    assert found.logits_tolerance is not None and found.logits_max_difference < found.logits_tolerance
    assert found.greedy_agreement is not None and 0.0 <= found.greedy_agreement <= 1.0
    assert read_manifest(tmp_path / "m", model_of(design).config) == manifest
    assert not list((tmp_path / "m").glob(".*"))


def test_an_export_beyond_its_tolerance_replaces_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copy / "onnx" / "manifest.json").read_bytes()
    monkeypatch.setitem(onnx_export.TOLERANCE, "int8", 1e-6)
    with pytest.raises(ModelError, match="differ from PyTorch"):
        export_onnx(copy, precision="int8")
    assert (copy / "onnx" / "manifest.json").read_bytes() == before


def test_auto_takes_the_export_and_generates_the_same(exported: Path) -> None:
    ours, theirs = load_model(str(exported)), load_model(str(exported), backend="torch")
    assert (ours.backend_name, theirs.backend_name) == ("onnx", "torch")
    assert ours.parameters == theirs.parameters
    found, expected = ([*model.generate(PROMPT, GREEDY)] for model in (ours, theirs))
    assert [t.id for t in found] == [t.id for t in expected] and found
    assert [t.depth for t in found] == [t.depth for t in expected]
    np.testing.assert_allclose(ours.logits(PROMPT), theirs.logits(PROMPT), rtol=0, atol=1e-4)


def test_a_directory_needs_no_weights_beside_its_export(exported: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    export_onnx(exported, target, "int8")
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "onnx"]
    assert [*load_model(str(target)).generate(PROMPT, GREEDY)]
    assert describe_model(target)["parameters"] == describe_model(exported)["parameters"]
    with pytest.raises(ModelError, match="ONNX export only"):
        load_model(str(target), backend="torch")
    shutil.rmtree(target / "onnx")
    with pytest.raises(ModelError, match="no ONNX export"):
        load_model(str(target), backend="onnx")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_two_models_share_their_tables(copy: Path, precision: str) -> None:
    tuned, config = copy.parent / "tuned", model_of("act").config
    tensors = {n: torch.from_numpy(t) for n, t in tensors_of(model_of("act")).items()}
    write_model_directory(tuned, config, tensors | {"block.inject": tensors["block.inject"] + 0.3})
    for directory in (copy, tuned):
        export_onnx(directory, precision=precision)
    expected, theirs = (load_model(str(d), backend="onnx").logits(PROMPT) for d in (tuned, copy))
    share_tables(tuned, "tiny")
    assert not (tuned / "onnx" / "tables.bin").exists() and read_manifest(tuned, config).shared_with == "tiny"
    np.testing.assert_array_equal(load_model(str(tuned), backend="onnx").logits(PROMPT), expected)
    assert np.abs(theirs - expected).max() > 1e-3
    share_tables(tuned, "tiny")  # once more changes nothing
    with pytest.raises(ModelError, match="not the same"):
        share_tables(copy, "tuned")  # whose tables are not its own
    (copy / "onnx" / "tables.bin").write_bytes(b"\0" * (copy / "onnx" / "tables.bin").stat().st_size)
    with pytest.raises(ModelError, match=r"tiny/onnx/tables\.bin: its SHA-256"):
        load_model(str(tuned), backend="onnx")


def test_other_tables_are_not_shared(copy: Path) -> None:
    tuned = copy.parent / "tuned"
    tensors = {n: torch.from_numpy(t) for n, t in tensors_of(model_of("act")).items()}
    write_model_directory(
        tuned, model_of("act").config, tensors | {"embedding.weight": tensors["embedding.weight"] * 2}
    )
    export_onnx(tuned)
    with pytest.raises(ModelError, match="nothing was deleted"):
        share_tables(tuned, "tiny")
    assert load_model(str(tuned)).backend_name == "onnx"


def test_new_weights_put_an_old_export_out_of_use(copy: Path) -> None:
    save(copy)
    assert load_model(str(copy)).backend_name == "torch"


def test_what_is_exported_replaces_what_was_there(copy: Path) -> None:
    export_onnx(copy, precision="int8")
    assert read_manifest(copy, model_of("act").config).precision == "int8"
    assert load_model(str(copy)).backend_name == "onnx"


def test_an_export_that_computes_something_else_is_not_kept(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlm_engine.export import graphs

    before = (copy / "onnx" / "manifest.json").read_bytes()
    rotate = graphs.GraphBuilder.rotate
    monkeypatch.setattr(graphs.GraphBuilder, "rotate", lambda self, x, c: self.op("Neg", rotate(self, x, c)))
    export_onnx(copy)  # both q and k negated: nothing changes
    monkeypatch.setattr(graphs.GraphBuilder, "silu", graphs.GraphBuilder.gelu)
    with pytest.raises(ModelError, match="differ from PyTorch"):
        export_onnx(copy)
    assert (copy / "onnx" / "manifest.json").read_bytes() != before
    assert load_model(str(copy)).backend_name == "onnx" and not list(copy.glob(".*"))


def test_tied_tables_and_shared_matrices_are_stored_once(exported: Path, tmp_path: Path) -> None:
    export_onnx(exported, tmp_path / "int8", "int8")
    for directory in (exported, tmp_path / "int8"):
        folder = directory / "onnx"
        places: dict[str, set[tuple[int, int]]] = {}
        for name in ("embed", "head", "step", "key_value"):
            data = (folder / f"{name}.onnx").read_bytes()
            places[name] = {(t.offset, t.length) for t in external_tensors(data)}
        assert places["embed"] <= places["head"] and places["embed"]
        assert places["key_value"] <= places["step"] and places["key_value"]


def test_external_tensors_are_those_the_onnx_package_sees(exported: Path) -> None:
    for path in (exported / "onnx").glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = []
        for tensor in model.graph.initializer:
            entries = {e.key: e.value for e in tensor.external_data}
            if entries:
                expected.append((entries["location"], int(entries["offset"]), int(entries["length"])))
        assert [(t.location, t.offset, t.length) for t in external_tensors(path.read_bytes())] == expected


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_graphs_raise_value_errors_only(exported: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray((exported / "onnx" / "step.onnx").read_bytes())
    for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    with contextlib.suppress(ValueError, KeyError):
        external_tensors(bytes(data[: int(rng.integers(1, len(data)))]))


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "onnx" / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_graph(directory: Path, change: Callable[[onnx.ModelProto], Any], name: str = "step") -> None:
    """Change a graph and make the manifest agree, as an attacker would."""
    import hashlib

    path = directory / "onnx" / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    raw = model.SerializeToString()
    path.write_bytes(raw)
    entry = {"size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(directory, lambda data: data["files"].update({f"{name}.onnx": entry}))


def external_location(model: onnx.ModelProto, location: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location


def external_number(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == key).value = value


def hidden_in_a_subgraph(model: onnx.ModelProto) -> None:
    """A constant inside an If branch that would read another file."""
    tensor = onnx.TensorProto(name="c", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "/etc/passwd"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    inner = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    out = onnx.helper.make_tensor_value_info("c", 1, [1])
    branch = onnx.helper.make_graph([inner], "b", [], [out])
    model.graph.node.append(onnx.helper.make_node("If", ["step"], ["unused"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: external_location(m, "/etc/passwd"), "wants to read '/etc/passwd'"),
        (lambda m: external_location(m, "../model.safetensors"), r"wants to read '../model.safetensors'"),
        (lambda m: external_location(m, "./weights.bin"), "wants to read './weights.bin'"),
        (lambda m: external_location(m, "tables.bin"), "wants to read 'tables.bin'"),
        (lambda m: external_number(m, "offset", str(1 << 40)), "beyond the end"),
        (lambda m: external_number(m, "length", "-8"), "beyond the end"),
        (lambda m: external_number(m, "offset", "zero"), "not an ONNX graph"),
        (hidden_in_a_subgraph, "wants to read '/etc/passwd'"),
        (lambda m: m.graph.input.append(onnx.helper.make_tensor_value_info("more", 1, [1])), "its inputs are"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_param", "d"), "config.json asks for"),
        (lambda m: m.graph.node.pop(3), "ONNX Runtime refuses it"),
        (lambda m: setattr(m.graph.node[2], "op_type", "ReadSecrets"), "ONNX Runtime refuses it"),
    ],
)
def test_hostile_graphs_are_refused_in_one_line(copy: Path, change: Callable[..., Any], message: str) -> None:
    replace_graph(copy, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(copy))
    assert "step.onnx" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), "not format 2"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("precision"), "'precision' is missing"),
        (lambda d: d.update(precision="int3"), "unknown precision"),
        (lambda d: d.update(parameters=True), "parameters must be"),
        (lambda d: d.update(files=[]), "again"),
        (lambda d: d.update(settings=3), "settings an object"),
        (lambda d: d.update(verification={"tokens": 1}), "again"),
        (lambda d: d["files"].pop("head.onnx"), "'head.onnx' is missing"),
        (lambda d: d["files"].update({"../../x": d["files"]["head.onnx"]}), "not wanted"),
        (lambda d: d["files"]["head.onnx"].update(size_bytes="9"), "size_bytes"),
        (lambda d: d["files"]["head.onnx"].update(sha256="0" * 64), "SHA-256"),
        (lambda d: d["settings"].update(norm_eps=1e-5), "norm_eps"),
        (lambda d: d["settings"].pop("ffn"), "ffn"),
        (lambda d: d.update(shared_with="../elsewhere"), "name of a sibling"),
        (lambda d: d.update(shared_with=["base"]), "name of a sibling"),
        (lambda d: d.update(shared_with="nobody"), "No such file"),
    ],
)
def test_hostile_manifests_are_refused_in_one_line(copy: Path, change: Callable[..., Any], message: str) -> None:
    edit_manifest(copy, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "\udcff", '{"a": 1, "a": 2}'])
def test_manifests_that_are_no_json_object(copy: Path, text: str) -> None:
    (copy / "onnx" / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"manifest\.json"):
        load_model(str(copy))


def test_a_changed_configuration_is_noticed_where_the_graphs_depend_on_it(copy: Path) -> None:
    data = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(data | {"context_length": 8, "halt_epsilon": 0.2}))
    assert load_model(str(copy)).config.context_length == 8
    (copy / "config.json").write_text(json.dumps(data | {"logit_softcap": 30.0}))
    with pytest.raises(ModelError, match=r"exported with logit_softcap 15\.0"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["weights.bin", "tables.bin", "step.onnx", "manifest.json"])
def test_damaged_missing_and_linked_files(copy: Path, tmp_path: Path, name: str) -> None:
    path = copy / "onnx" / name
    original = path.read_bytes()
    for damaged in (original[:-3], original[:-1] + b"\0\0", bytes([original[0] ^ 1]) + original[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=name):
            load_model(str(copy), backend="onnx")
    path.unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(original)
    path.symlink_to(outside)
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(str(copy), backend="onnx")
    path.unlink()
    with pytest.raises(ModelError, match=r"No such file|no ONNX export"):
        load_model(str(copy), backend="onnx")
    if hasattr(os, "mkfifo") and name != "manifest.json":  # a pipe would hang whoever reads it
        os.mkfifo(path)
        with pytest.raises(ModelError, match="not a regular file"):
            load_model(str(copy), backend="onnx")


def test_a_linked_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "onnx").rename(tmp_path / "elsewhere")
    (copy / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="not a folder"):
        load_model(str(copy))


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    directory = save(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"ffn": 32}))
    with pytest.raises(ModelError, match=r"'block.w_gate.weight' is \[24, 16\], the configuration says \[32, 16\]"):
        export_onnx(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["config.json", "model.safetensors"]
    tensors = tensors_of(model_of("act")) | {"stray": np.zeros(2, np.float32)}
    write_model_directory(directory, model_of("act").config, {n: torch.from_numpy(t) for n, t in tensors.items()})
    with pytest.raises(ModelError, match="'stray' does not belong"):
        export_onnx(directory)


REFERENCE = Path(__file__).parent / "data" / "reference"


@pytest.mark.parametrize("name", ["48m", "90m", "198m"])
def test_published_checkpoints_export_into_a_model_of_our_own(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "published", tmp_path / "ours"
    source.mkdir()
    shutil.copy(REFERENCE / f"{name}_weights.safetensors", source / "model.safetensors")
    shutil.copy(REFERENCE / f"{name}_config.json", source / "config.json")
    with pytest.raises(UsageError, match="give --out"):
        export_onnx(source)
    found = export_onnx(source, target).verification
    assert found is not None and found.logits_max_difference < 5e-4 and found.depth_agreement == 1.0
    assert load_model(str(target)).backend_name == "onnx"


def test_misuse_of_the_exporter(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision must be"):
        export_onnx(exported, precision="int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not an empty directory"):
        export_onnx(exported, tmp_path / "full")


def test_devices_this_machine_does_not_have() -> None:
    with pytest.raises(ModelError, match=r"has only: .*cpu"):
        _providers("directml")
    with pytest.raises(UsageError, match="device must be"):
        load_model(".", device="tpu")
    with pytest.raises(UsageError, match="backend must be"):
        load_model(".", backend="jax")


def test_the_checks_need_no_session(exported: Path) -> None:
    config: ModelConfig = model_of("act").config
    assert isinstance(config, ActConfig)
    sizes = check_files(exported, read_manifest(exported, config))
    assert sizes["embed"] == 61 * 16 * 4 and sizes["step"] > sizes["key_value"] > 0
    smaller = dataclasses.replace(config, d_model=8)
    with pytest.raises(ModelError, match="d_model"):
        read_manifest(exported, smaller)


NO_TORCH = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Nowhere())
import rlm_engine
model = rlm_engine.load_model(sys.argv[1])
tokens = [*model.generate([5, 9, 2], rlm_engine.Sampling(greedy=True, max_tokens=4))]
assert tokens and model.backend_name == "onnx"
assert not {"torch", "onnx"} & set(sys.modules), "imported"
try:
    rlm_engine.load_model(sys.argv[1], backend="torch")
except rlm_engine.ModelError as error:
    assert "PyTorch is not installed" in str(error)
print(" ".join(str(t.id) for t in tokens))
"""


def test_generating_imports_no_torch(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(exported)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    expected = load_model(str(exported), backend="torch").generate([5, 9, 2], Sampling(greedy=True, max_tokens=4))
    assert done.stdout.split() == [str(t.id) for t in expected]


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "onnx", str(exported), "--out", str(tmp_path / "out"), "--precision", "int8"]
    assert main(arguments) == 0
    assert "int8" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 2  # it is not empty any more
    assert main(["export", "onnx", str(exported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compared"]["depth_agreement"] == 1.0
    assert main(["export", "onnx", str(tmp_path / "nowhere")]) == 3


def test_bundled_models_are_exported_by_name_and_never_over_themselves(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlm_engine.generate.BUNDLED", exported.parent)
    before = {file.name: file.read_bytes() for file in (exported / "onnx").iterdir()}
    assert main(["export", "onnx", exported.name]) == 2
    assert "give --out" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (exported / "onnx").iterdir()} == before
    assert main(["export", "onnx", exported.name, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "onnx" / "manifest.json").is_file()
