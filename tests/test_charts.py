"""The loss-curve picture: what is drawn, read back from its axes and pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from PIL import Image

from engine import curves
from engine.charts import (
    EvaluationCurve,
    moving_average,
    read_evaluations,
    read_log,
    read_windows,
    training_curves,
    training_figure,
)
from engine.errors import UserError


def entry(step: int, **changes: Any) -> str:
    values: dict[str, Any] = {
        "loss_D": 2 - step / 100,
        "loss_G": step / 50,
        "accuracy_D_real": 0.5 + step / 200,
        "accuracy_D_fake": 0.25,
        "clips_per_second": 7.0,
    }
    return json.dumps({"step": step, **values, **changes}) + "\n"


def drawn(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(entry(step) for step in range(5, 101, 5)))
    return path


def test_axes_hold_each_stages_series(tmp_path: Path, log: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(entry(1, loss_D=3.5) + entry(2, loss_D=4.5))
    figure = training_figure({"stage 1": log, "stage 2": other})

    losses_1, accuracies_1, losses_2, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "stage 1: losses",
        "stage 1: D accuracy",
        "stage 2: losses",
        "stage 2: D accuracy",
    ]
    steps = np.arange(5, 101, 5)
    raw_D, smooth_D, raw_G, smooth_G = losses_1.get_lines()
    for line, values in ((raw_D, 2 - steps / 100), (raw_G, steps / 50)):
        np.testing.assert_array_equal(line.get_xdata(), steps)
        np.testing.assert_array_equal(drawn(line), values)
    # A centred mean leaves a straight line alone, but for its two ends.
    np.testing.assert_allclose(drawn(smooth_D)[1:-1], drawn(raw_D)[1:-1])
    assert [smooth_D.get_label(), smooth_G.get_label()] == ["D", "G"]
    legend = losses_1.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["D", "G"]

    real, generated, chance = accuracies_1.get_lines()[1::2][:2] + accuracies_1.get_lines()[4:]
    assert [line.get_label() for line in (real, generated, chance)] == [
        "real",
        "generated",
        "chance",
    ]
    np.testing.assert_allclose(drawn(generated), 0.25)
    assert accuracies_1.get_ylim()[0] < 0
    assert accuracies_1.get_ylim()[1] > 1
    np.testing.assert_array_equal(drawn(losses_2.get_lines()[0]), [3.5, 4.5])


def test_picture_shows_both_curves_in_both_columns(tmp_path: Path, log: Path) -> None:
    picture = tmp_path / "curves.png"
    training_curves({"stage 1": log, "stage 2": log, "stage 3": log}, picture)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (900, 1000, 3)
    for row in np.split(pixels, 3, axis=0):
        for half in np.split(row, 2, axis=1):
            for colour in ("tab:blue", "tab:orange"):
                distance = np.abs(half - np.round(np.array(to_rgb(colour)) * 255)).max(axis=2)
                # A curve across a panel some 400 pixels wide; its legend entry alone has under 100.
                assert (distance < 8).any(axis=0).sum() > 300


def windows(motion: float, **others: float) -> dict[str, float]:
    return {"window/motion_ratio": motion} | {f"window/{k}": v for k, v in others.items()}


def test_training_windows_are_a_third_column(tmp_path: Path, log: Path) -> None:
    """Drawn at the steps that have them; a stage without them has no third panel."""
    text = entry(1) + entry(5, **windows(0.25)) + entry(7) + entry(10, **windows(0.5, judder=3.0))
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    assert read_windows(other) == {
        "window/motion_ratio": ([5, 10], [0.25, 0.5]),
        "window/judder": ([10], [3.0]),
    }
    assert read_log(other)["step"] == [1, 5, 7, 10]
    figure = training_figure({"stage 1": log, "stage 2": other})
    assert len(figure.axes) == 5
    axes_2 = figure.axes[4]
    assert axes_2.get_title(loc="left") == "stage 2: training windows, parts of real"
    motion, judder, real = axes_2.get_lines()
    assert [line.get_label() for line in (motion, judder, real)] == ["motion", "judder", "real"]
    np.testing.assert_array_equal(motion.get_xdata(), [5, 10])
    np.testing.assert_array_equal(drawn(motion), [0.25, 0.5])
    np.testing.assert_array_equal(drawn(judder), [3.0])
    np.testing.assert_array_equal(drawn(real), [1, 1])
    assert axes_2.get_ylim()[0] == 0


def test_evaluations_of_two_runs_are_in_one_panel(tmp_path: Path, log: Path) -> None:
    """Each metric has a panel above the losses; a run without evaluations has its losses only."""
    found = {"evaluation/fvd": 9.0, "evaluation/fvd/real": 2.0}
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(entry(1) + entry(2, **found) + entry(4, **found | {"evaluation/fvd": 5.0}))
    second.write_text(entry(3, **found, **{"evaluation/motion": 0.5}))
    assert read_evaluations(first) == {"fvd": EvaluationCurve([2, 4], [9.0, 5.0], [2.0, 2.0])}
    figure = training_figure({"a": first, "b": second, "c": log})
    fvd, motion, *losses = figure.axes
    assert [axes.get_title(loc="left") for axes in (fvd, motion)] == [
        "evaluated: fvd",
        "evaluated: motion",
    ]
    assert len(losses) == 6
    of_a, real_a, of_b, _ = fvd.get_lines()
    np.testing.assert_array_equal(of_a.get_xdata(), [2, 4])
    np.testing.assert_array_equal(drawn(of_a), [9, 5])
    np.testing.assert_array_equal(drawn(real_a), [2, 2])
    np.testing.assert_array_equal(drawn(of_b), [9])
    assert of_a.get_color() == real_a.get_color() != of_b.get_color()
    assert [line.get_label() for line in motion.get_lines()] == ["b"]


def test_the_script_draws_runs_and_stages(tmp_path: Path) -> None:
    """All stages of a run, or one; what has no log is one line."""
    for folder in ("run/stage1", "run/stage2", "other/stage2", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run/stage1", "run/stage2", "other/stage2"):
        (tmp_path / folder / "log.jsonl").write_text(entry(1))
    picture = tmp_path / "curves.png"
    curves.main([str(tmp_path / "run"), str(tmp_path / "other/stage2"), "--out", str(picture)])
    with Image.open(picture) as image:
        assert image.height == 900, "a row for each of three logs"
    with pytest.raises(UserError, match=f"no log.jsonl in {tmp_path / 'empty'} or"):
        curves.main([str(tmp_path / "empty"), "--out", str(picture)])


def test_a_damaged_figure_of_windows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(entry(1) + entry(2, **{"window/judder": "3"}))
    with pytest.raises(UserError, match="line 2: no number 'window/judder'"):
        training_figure({"stage 1": path})


def test_moving_average() -> None:
    values = [1.0, 2.0, 6.0, 4.0, 0.0]
    np.testing.assert_allclose(moving_average(values, 1), values)
    np.testing.assert_allclose(moving_average(values, 3), [1.5, 3.0, 4.0, 10 / 3, 2.0])
    np.testing.assert_allclose(moving_average([5.0], 3), [5.0])


def test_one_logged_step_is_visible(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(entry(1))
    _, smooth, *_ = training_figure({"stage 1": path}).axes[0].get_lines()
    assert smooth.get_marker() == "o"


def test_line_cut_short_by_a_crash_is_passed_over(log: Path) -> None:
    whole = read_log(log)
    with log.open("a") as file:
        file.write(entry(105)[:-20])
    assert read_log(log) == whole
    assert whole["step"] == list(range(5, 101, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (entry(1) + entry(2)[:-20] + "\n" + entry(3), "line 2: damaged, not a JSON object"),
        (entry(1) + entry(2)[:-20] + "\n", "line 2: damaged, not a JSON object"),
        (entry(1) + "\n" + entry(2), "line 2: damaged, not a JSON object"),
        (entry(1) + "[1]\n", "line 2: no number 'step'"),
        (entry(1, loss_G=None), "line 1: no number 'loss_G'"),
        (entry(1, accuracy_D_fake="1"), "line 1: no number 'accuracy_D_fake'"),
        ("", "has no entries yet"),
        (entry(1)[:-20], "has no entries yet"),
    ],
)
def test_damaged_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        training_curves({"stage 1": path}, tmp_path / "curves.png")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "curves.png").exists()


def test_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read log .*gone: No such file"):
        training_figure({"stage 1": tmp_path / "gone"})
