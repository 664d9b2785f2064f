"""A cascade is exported, read back and generates the same; nothing damaged is taken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import sample
from torch import Tensor

from engine import Cascade
from engine.command_line import report
from engine.errors import UserError
from engine.export import main
from engine.exported import find_trained
from engine.trainer.checkpoints import sha256


@pytest.fixture(scope="module")
def exported(cascade_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "released"
    main(["--checkpoint", str(cascade_run), "--out", str(out), "--passes", "3"])
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for file in exported.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors, and the hash with them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    described["weights_sha256"] = sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described))


def test_a_folder_of_three_files(exported: Path) -> None:
    names = sorted(file.name for file in exported.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1
    card = (exported / "README.md").read_text()
    assert "| 2 | 16x16/6 | 25 | separable_conv |" in card
    assert "3 passes of 8 videos of 6 frames, sigma 1, seed 0" in card


def test_it_generates_what_the_checkpoint_does(
    cascade_run: Path, exported: Path, tmp_path: Path
) -> None:
    """To the bit, at the length that the statistics are of."""
    hashes = []
    for number, source in enumerate((cascade_run, exported)):
        options = ["--passes", "3"] if source is cascade_run else []
        out = tmp_path / str(number)
        finished = sample("--checkpoint", source, "--out", out, "--num", "3", *options)
        assert finished.code == 0, finished.err
        listed = json.loads((out / "samples.json").read_text())
        hashes.append([clip["sha256"] for clip in listed["clips"]])
        assert (out / "norm-statistics.pt").exists() == (source is cascade_run)
    assert hashes[0] == hashes[1]


def test_other_lengths_use_the_statistics_that_there_are(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "long"
    finished = sample("--checkpoint", exported, "--out", out, "--num", "1", "--frames", "150")
    assert finished.code == 0, finished.err
    assert "note: norm statistics of 6 frames serve 150" in finished.out
    assert json.loads((out / "samples.json").read_text())["statistics_frames"] == 6


def test_another_sigma_takes_statistics_of_its_own(exported: Path, tmp_path: Path) -> None:
    options = "--num", "1", "--sigma", "0.5", "--passes", "2"
    finished = sample("--checkpoint", exported, "--out", tmp_path / "x", *options)
    assert finished.code == 0, finished.err
    assert (tmp_path / "x" / "norm-statistics.pt").exists()


def test_in_python(exported: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(exported)
    assert (cascade.resolution, cascade.trained_frames) == (16, 6)
    assert cascade.frames_per_second == 25
    videos = cascade.generate(num_frames=7, classes=[1, cascade.classes[0]], seed=4)
    assert videos.shape == (2, 7, 3, 16, 16)
    assert videos.dtype == torch.uint8
    # The n-th video of a class is the same, whatever else is asked for.
    again = cascade.generate(num_frames=7, classes=[0, 1, 0], seed=4)
    assert torch.equal(again[:2].flip(0), videos)
    assert not torch.equal(again[0], again[2])
    streamed = [torch.cat(list(chunks)) for chunks in cascade.stream(150, classes=[1], seed=4)]
    assert streamed[0].shape == (150, 3, 16, 16)
    cascade.save_pretrained(tmp_path / "again")
    assert sha256(tmp_path / "again" / "model.safetensors") == sha256(
        exported / "model.safetensors"
    )


def test_a_checkpoint_in_python(cascade_run: Path, tmp_path: Path) -> None:
    cascade = Cascade.from_pretrained(cascade_run)
    videos = cascade.generate(num=3, seed=2)
    cascade.save_pretrained(tmp_path / "out")
    assert torch.equal(Cascade.from_pretrained(tmp_path / "out").generate(num=3, seed=2), videos)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"classes": []}, "classes must name at least one"),
        ({"classes": [9]}, "'9' is neither a class name nor 0 to 1"),
        ({"sigma": float("nan")}, "sigma must be positive and finite"),
    ],
    ids=str,
)
def test_what_nothing_is_made_with(exported: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Cascade.from_pretrained(exported).generate(**options)


def drop_a_weight(tensors: dict[str, Tensor]) -> None:
    del tensors["stages.2.weights.base.bias"]


def spoil_a_weight(tensors: dict[str, Tensor]) -> None:
    tensors["stages.2.weights.base.bias"].fill_(float("nan"))


def widen_a_weight(tensors: dict[str, Tensor]) -> None:
    tensors["stages.1.weights.base.bias"] = torch.zeros(3)


def shorten_statistics(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".mean"))
    tensors[name] = tensors[name][:, :1].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_weight, "stage 2: base.bias is in only one of the file and the network"),
        (spoil_a_weight, "stage 2: base.bias has values that are not finite"),
        (widen_a_weight, "stage 1: base.bias is torch.float32 (3,), the network has"),
        (shorten_statistics, "norm statistics are not of this generator"),
    ],
)
def test_other_tensors_are_refused(copy: Path, change: Any, message: str) -> None:
    rewrite(copy, change)
    finished = sample("--checkpoint", copy, "--out", copy / "out", "--num", "1")
    assert finished.code == 2
    assert message in finished.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an exported cascade's"),
        ("[]", "is not an exported cascade's"),
        ('{"format": 2}', "has export format 2; this version reads 1"),
        ('{"format": 1}', "missing key stage"),
    ],
)
def test_a_config_that_is_none(copy: Path, text: str, message: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        find_trained(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 3}, "there is no stage 3"),
        ({"stage": "2"}, "stage should be a valid integer"),
        ({"more": 1}, "unknown key more"),
        ({"class_counts": [1]}, "class_counts must have 2 items"),
        ({"frames_per_second": 0.0}, "frames_per_second"),
        ({"config": {}}, "missing key name"),
        ({"classes": ["a", "b\x00"]}, "is no class name"),
    ],
    ids=str,
)
def test_a_config_that_says_something_else(copy: Path, changes: Any, message: str) -> None:
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(described | changes))
    with pytest.raises(UserError, match=re.escape(message)):
        find_trained(copy)


def test_damaged_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        Cascade.from_pretrained(copy)
    path.write_bytes(b"\x80\x04\x95")  # a pickle
    described = json.loads((copy / "config.json").read_text())
    described["weights_sha256"] = sha256(path)
    (copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="is not a file of tensors"):
        Cascade.from_pretrained(copy)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        Cascade.from_pretrained(copy)


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        Cascade.from_pretrained(tmp_path / "nowhere")
    report(error.value)
    assert len(capsys.readouterr().err.splitlines()) == 1
