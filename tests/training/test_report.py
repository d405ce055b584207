"""The report page: well-formed, complete, true to the metrics."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from tiny_scoring import byte_scorer

from rlm_engine.errors import InputError
from rlm_training.cli import main
from rlm_training.evaluate import Plan, evaluate
from rlm_training.plots import Line, depth_map, line_plot, ticks
from rlm_training.report import epochs_of_run, html_report, read_run, training_table, write_report

STEPS = 40


def write_run(folder: Path, steps: int = STEPS, **more: Any) -> Path:
    """A run as the loop writes it: loss falling from 4 to 2, validation every 10 steps."""
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(steps):
        row = {
            "step": step, "loss": 4.0 - 2.0 * step / (STEPS - 1), "depth": 4.0 + step / STEPS, "depth_std": 1.0,
            "budget": 8, "price": 0.001 * step, "lr_scale": 1.0 - step / STEPS, "grad_norm": 0.5, "tokens": 100,
            "tokens_per_s": 1000.0 + step, "depth_histogram": [0, 0, 10, 20, 30, 25, 10, 4, 1], "mfu": 0.4,
        } | more  # fmt: skip
        if (step + 1) % 10 == 0:
            row["heldout"] = {"books": 3.0 - step / 100, "chat & <talk>": 2.0}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = {
        "name": "tiny", "stage": "pretrain", "model": {"architecture": "act", "d_model": 16},
        "data": {"mix": {"books": 3, "chat": 1}}, "train": {"tokens": 4000, "rows": 2, "sequence": 50},
        "optim": {"lr": 0.01},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    data = {"steps": STEPS, "epochs": {"books": 2.0, "chat": 4.0}, "stream_tokens": 4000}
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_the_page_is_well_formed_and_holds_everything(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my-run")
    (tmp_path / "texts.jsonl").write_text('{"text": "A small text."}\n' * 6, encoding="utf-8")
    evaluation = evaluate(byte_scorer(1), Plan(heldout=(tmp_path / "texts.jsonl",), random_depth_seeds=()))
    evaluation["tasks"] = {"arc": {"kind": "choice", "items": 9, "acc": 0.25, "acc_stderr": 0.1, "chance": 0.25}}
    (run / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    target = write_report(run)
    page = target.read_text(encoding="utf-8")
    assert target == run / "report.html"
    root = ET.fromstring(page)
    titles = [element.text for element in root.iter("h2")]
    for expected in (
        "Loss", "Validation loss by domain", "Learning rate", "Depth", "Depth histogram over time", "Throughput",
        "Utilisation", "Gradient norm", "Training table", "Evaluation: evaluation.json", "Recipe",
    ):  # fmt: skip
        assert expected in titles
    assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 10  # nine curves and perplexity per depth
    text = "".join(root.itertext())
    assert "chat & <talk>" in text and "25.0 % ± 10.0" in text and "Perplexity per depth" in text
    assert "<script" not in page and not re.search(r"(?:href|src)=", page)
    assert "nan" not in re.sub(r"<[a-z]+>", "", page).lower().split()


def test_the_training_table_has_an_epoch_a_row(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r"))
    # 3/4 of the stream reads books twice, 1/4 chat four times: the data hold 7/16 of the stream, 16/7 epochs
    assert epochs_of_run(run) == pytest.approx(16 / 7)
    rows = training_table(run)
    assert [row.step for row in rows] == [17, 34, 39]
    assert [row.epoch for row in rows] == pytest.approx([18 / 40 * 16 / 7, 35 / 40 * 16 / 7, 16 / 7])
    losses = [4.0 - 2.0 * step / 39 for step in range(40)]
    assert rows[0].train_loss == pytest.approx(sum(losses[:18]) / 18)
    assert rows[1].train_loss == pytest.approx(sum(losses[18:35]) / 17)
    assert rows[0].validation_loss == pytest.approx((3.0 - 0.09 + 2.0) / 2)  # the last validation before: step 9
    assert rows[2].perplexity == pytest.approx(math.exp((3.0 - 0.39 + 2.0) / 2))
    assert rows[2].tokens == 4000


def test_a_run_of_less_than_two_epochs_is_told_by_tenths(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", steps=20)
    (folder / "data.json").write_text(json.dumps({"steps": STEPS}), encoding="utf-8")
    rows = training_table(read_run(folder))
    assert [row.epoch for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # half done
    assert rows[0].validation_loss is None and rows[0].perplexity is None


def test_a_run_being_written_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", steps=12)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 12, "lo')
    run = read_run(folder)
    assert len(run.metrics) == 12
    ET.fromstring(html_report(run))


def test_metrics_of_other_stages_need_no_depth(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    rows = [{"step": s, "loss": 1.0, "tokens": 10, "tokens_per_s": 5.0, "price": None} for s in (0, 4, 8)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = read_run(folder)
    assert run.tokens == [10, 50, 90]  # steps between logged ones count
    page = html_report(run)
    ET.fromstring(page)
    assert "<h2>Depth" not in page and "<h2>Loss" in page


def test_folders_without_metrics_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="no metrics yet"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 4
    assert main(["report", str(write_run(tmp_path / "r")), "--out", str(tmp_path / "pages" / "r.html")]) == 0
    assert "pages/r.html" in capsys.readouterr().out.replace("\\", "/")
    assert (tmp_path / "pages" / "r.html").stat().st_size > 5000


def points_of(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'<polyline points="([^"]*)"', svg)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_line_is_drawn_where_its_numbers_are() -> None:
    svg = line_plot("t", "x", "y", [Line("", [0.0, 5.0, 10.0], [0.0, 10.0, 5.0])], y_min=0.0)
    ET.fromstring(svg)
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)  # 5 lies halfway between 0 and 10
    assert y1 < y0  # up is more
    logarithmic = points_of(line_plot("t", "x", "y", [Line("", [1.0, 2.0, 3.0], [1.0, 10.0, 100.0])], log_y=True))
    assert logarithmic[1][1] == pytest.approx((logarithmic[0][1] + logarithmic[2][1]) / 2, abs=0.1)


def test_long_lines_are_thinned_to_means_and_non_finite_points_left_out() -> None:
    many = [float(i % 2) for i in range(4000)]
    drawn = points_of(line_plot("t", "x", "y", [Line("", list(map(float, range(4000))), many)]))
    assert len(drawn) == 400 and len({y for _, y in drawn}) == 1  # ten neighbours average to one half
    assert len(points_of(line_plot("t", "x", "y", [Line("", [0.0, 1.0, 2.0], [1.0, math.nan, 2.0])]))) == 2
    assert line_plot("t", "x", "y", [Line("", [1.0], [math.inf])]) == ""


def test_the_depth_map_shows_shares_as_opacity() -> None:
    svg = depth_map("t", "x", "depth", [0.0, 1.0], [[0.25, 0.75], [0.0, 1.0]], first=2)
    ET.fromstring(svg)
    cells = re.findall(r'<rect [^>]*y="([\d.]+)"[^>]*fill-opacity="([\d.]+)"', svg)
    assert [opacity for _, opacity in cells] == ["0.250", "0.750", "1.000"]
    assert float(cells[1][0]) < float(cells[0][0])  # depth 3 above depth 2


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.0, 10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(0.013, 0.049, 4) == pytest.approx([0.02, 0.03, 0.04])
    assert ticks(3.0, 3.0) == [3.0]


def test_markdown_shows_the_same_with_plots_beside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my-run")
    target = write_report(run, tmp_path / "page.md")
    text = target.read_text(encoding="utf-8")
    assert text.startswith("# my-run\n")
    plots = re.findall(r"!\[[^]]+\]\((page/[a-z0-9-]+\.svg)\)", text)
    assert "page/loss.svg" in plots and "page/depth-histogram-over-time.svg" in plots and len(plots) == 9
    for plot in plots:
        root = ET.fromstring((tmp_path / plot).read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "| epoch | step | tokens | train loss | validation loss | perplexity |" in text
    assert "| 2.29 | 40 | 4,000 |" in text


def test_the_unigram_model_stands_beside_the_losses(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert "unigram" not in html_report(read_run(run))
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    (run / "data.json").write_text(json.dumps(data | {"unigram": {"books": 5.0, "chat": 4.5}}), encoding="utf-8")
    page = html_report(read_run(run))
    assert "<td>4.7500</td>" in page and "validation of a unigram model" in page


@pytest.mark.parametrize(
    ("histogram", "words"),
    [
        ([0, 0, 100, 0, 0], "2.00 on average; 100.0 % at 2, 0.0 % at 4"),  # collapsed
        ([0, 0, 0, 0, 7], "4.00 on average; 100.0 % at 4, 100.0 % at 4"),  # stuck
        ([0, 0, 1, 2, 1], "3.00 on average; 25.0 % at 2, 25.0 % at 4"),
    ],
)
def test_a_collapsed_or_stuck_depth_can_be_seen(tmp_path: Path, histogram: list[int], words: str) -> None:
    assert words in html_report(read_run(write_run(tmp_path / "r", depth_histogram=histogram)))
