"""The result file and its tables, and the command that makes them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from result_files import CPU, document, feed, row
from small_runs import Finished

from benchmarks import report, results
from engine.errors import UserError

REPOSITORY = Path(report.__file__).resolve().parents[1]


def put(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(tree))
    return path


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    report.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "gpu.json", document())
    lines = rendered(capsys, "--results", tmp_path).splitlines()
    assert lines[0] == (
        "**NVIDIA H100, driver 570.1**, 2026-11-24, commit 0123456789; python 3.11.7, "
        "torch 2.13.0, triton 3.9.0, cuda 13.0, cudnn 91300. Measured in the same run: "
        "copy 2000 GB/s, bfloat16 matmul 700 TFLOP/s."
    )
    assert (
        "| frame_norm | 4x12x512x32x32, forward + backward | 0.5 (0.4 to 0.6) | 1.5e+03, 0.75 | "
        "2, 0.01 | 50 (200) | 3.00 (2.50 to 3.50) | 1.50 (1.40 to 1.60) |" in lines
    )
    assert "| executed | stage 2 | 12.37 | 9.62 | TFLOP |" in lines
    assert "- step: the budget is spent" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {9, 6}, "every line as long as its header"


def test_table_of_the_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feeds = [feed("decode", 0.002, 0.003), feed("pipeline", 0.003, 0.004)]
    feeds += [feed("loader", 0.004, 0.005)]
    for part in ("decode", "pipeline", "loader"):  # of a longer video: a line of its own
        feeds += [feed(part, 0.1, 0.1, case="loader_length[15000]")]
    path = put(tmp_path, "cpu.json", document(device=CPU, feeds=feeds))
    lines = rendered(capsys, path).splitlines()
    # 250 clips/s are 2.5 times what is needed: 100 clips/s, at 5 ms each half a core's work.
    row = "| 6 frames | dali-cpu, 2 | 250 (200 to 312) | 500 | 100 | 2.5 | 3.00, 4.00, 5.00 "
    row += "| 0.5 (1) |"
    assert row in lines
    assert lines[lines.index(row) - 2].count("|") == row.count("|")
    feeds += [feed("transfer", 0.0001, 0.0)]
    put(tmp_path, "cpu.json", document(device=CPU, feeds=feeds))
    assert f"{row} 10000 |" in rendered(capsys, path).splitlines()


def test_brief_leaves_out_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(direction="forward", shape="part"), row(), row(direction="step", shape="all")]
    put(tmp_path, "gpu.json", document(rows=rows))
    text = rendered(capsys, "--results", tmp_path, "--brief")
    assert "4x12x512x32x32" in text
    assert "all, step" in text
    assert "| executed |" in text
    assert "part" not in text
    assert "the budget is spent" not in text


def test_the_newest_of_each_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "z.json", document(commit="1" * 40))
    put(tmp_path, "a.json", document(commit="2" * 40, date="2026-12-01T00:00:00Z"))
    put(tmp_path, "c.json", document(commit="3" * 40, date="2025-01-01T00:00:00Z", device=CPU))
    text = rendered(capsys, "--results", tmp_path)
    assert "2222222222" in text
    assert "3333333333" in text
    assert "1111111111" not in text


def test_a_gpu_that_was_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "cpu.json", document(device=CPU, dirty=True, failed=["conv_gru 1x1 forward"]))
    lines = rendered(capsys, "--results", tmp_path).splitlines()
    assert lines[0] == "**GPU:** not run."
    assert "| separable_conv3d | not run |" in lines
    assert any("commit 0123456789 with changes" in line for line in lines)
    assert "**Refused or broken:** conv_gru 1x1 forward." in lines


def test_written_between_markers(tmp_path: Path) -> None:
    put(tmp_path, "gpu.json", document())
    page = tmp_path / "page.md"
    page.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    command = ["--results", str(tmp_path), "--write", str(page)]
    report.main(command)
    once = page.read_text()
    assert once.startswith(f"head\n{report.BEGIN}\n\n**NVIDIA H100")
    assert once.endswith(f"\n\n{report.END}\ntail\n")
    assert "old" not in once
    report.main(command)
    assert page.read_text() == once


@pytest.mark.parametrize(
    "text", ["none", f"{report.BEGIN}", f"{report.END} {report.BEGIN}", f"{report.BEGIN}" * 2]
)
def test_a_page_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    put(tmp_path, "gpu.json", document())
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(UserError, match="benchmarks -->"):
        report.main(["--results", str(tmp_path), "--write", str(page)])
    assert page.read_text() == text


BAD = {
    "not json": ("{", "cannot read"),
    "another format": (json.dumps(document(format=2)), "format"),
    "an unknown key": (json.dumps(document(speed=1)), "speed"),
    "a row without a time": (json.dumps(document(rows=[row(seconds=None)])), "rows.0.seconds"),
    "a negative rate": (json.dumps(document(rows=[row(gb_per_s=-1)])), "rows.0.gb_per_s"),
    "no number": (json.dumps(document(rows=[row(gb_per_s=float("nan"))])), "rows.0.gb_per_s"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files_are_named(tmp_path: Path, bad: str) -> None:
    text, expected = BAD[bad]
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        results.read(path)
    assert "bad.json" in str(caught.value)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """As a script, from elsewhere."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/report.py"), "--results", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no results in ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_other_bad_input(tmp_path: Path) -> None:
    path = put(tmp_path, "gpu.json", document())
    for arguments, expected in (
        ([tmp_path / "missing.json"], "cannot read"),
        ([path, path], "is a second file of a cuda run"),
        (["--no"], "unrecognized arguments: --no"),
        ([path, "--write", tmp_path / "missing.md"], "cannot read"),
    ):
        with pytest.raises(UserError, match=expected):
            report.main([str(argument) for argument in arguments])


def test_files_come_back_as_they_were_and_are_not_overwritten(tmp_path: Path) -> None:
    made = results.Document.model_validate(document())
    path = results.write(made, tmp_path)
    assert path.name == "2026-11-24T120000-cuda-nvidia-h100.json"
    assert results.read(path) == made
    with pytest.raises(UserError, match="is there already"):
        results.write(made, tmp_path)


def test_calls_are_added_to_one_file() -> None:
    done = {"case": "frame_norm 4x12x512x32x32 forward_backward", "reason": "budget"}
    before = results.Document.model_validate(
        document(rows=[row(shape="other"), row("reference", rounds=5)], skipped=[done])
    )
    both = results.added(before, results.Document.model_validate(document(skipped=[])))
    assert [(r.shape, r.side, r.rounds) for r in both.rows] == [
        ("other", "ours", 11),
        ("4x12x512x32x32", "ours", 11),
        ("4x12x512x32x32", "reference", 11),
        ("4x12x512x32x32", "compiled", 11),
    ]
    assert both.skipped == []
    assert both.seconds == 600
    assert len(both.rates) == 2
    assert len(both.counts) == 1
    fed = document(feeds=[feed("loader", 0.004, 0.005), feed("loader", 1, 1, case="other")])
    again = document(feeds=[feed("loader", 0.002, 0.005)])
    both = results.added(
        results.Document.model_validate(fed), results.Document.model_validate(again)
    )
    assert [(f.case, f.seconds.median) for f in both.feeds] == [
        ("other", 1),
        ("loader_sample[cpu]", 0.002),
    ]
    changes: list[dict[str, Any]] = [{"device": CPU}, {"commit": "f" * 40}, {"versions": {}}]
    for change in changes:
        with pytest.raises(UserError, match="cannot add to a run with another"):
            results.added(before, results.Document.model_validate(document(**change)))


def benchmarks(forks: Forks, *arguments: str) -> Finished:
    folder = str(REPOSITORY / "benchmarks")
    return forks.job("module", ["pytest", folder, "-q", "-p", "no:cacheprovider", *arguments], [{}])


def test_not_run_unless_asked_for(forks: Forks) -> None:
    done = benchmarks(forks, "-k", "frame_norm")
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if line.startswith("SKIPPED")]
    [line] = lines
    assert line.endswith("benchmarks are run by: pytest benchmarks/ --benchmark")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(forks: Forks, tmp_path: Path) -> None:
    """One size is measured on the CPU; what needs a GPU is skipped, with the reason in the file."""
    pytest.importorskip("pytest_benchmark")
    done = benchmarks(
        forks,
        "--benchmark",
        "--quick",
        "--results",
        str(tmp_path),
        "-k",
        "upsample_conv or (stage1 and fp32)",
    )
    assert done.code == 0, done.out
    [path] = tmp_path.glob("*.json")
    made = results.read(path)
    assert made.device.kind == "cpu"
    assert [r.side for r in made.rows] == ["ours", "reference"]
    assert made.rows[0].share_of_matmul is not None
    assert made.rows[1].of_ours is not None
    skipped = {skip.case: skip.reason for skip in made.skipped}
    assert skipped["whole_step[stage1-fp32]"] == "an iteration of the paper's size needs a GPU"
    assert "SSW-GAN benchmarks" in done.out
    again = benchmarks(forks, "--benchmark", "--quick", "--add-to", str(path), "--budget", "0")
    assert again.code == 0, again.out
    assert "the budget of 0 s is spent" in again.out
    assert results.read(path) == made, "nothing was measured, so nothing is added"
