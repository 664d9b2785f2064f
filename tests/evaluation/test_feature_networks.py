"""What I3D and a user's TorchScript file are shown, and what they may return."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.evaluation.feature_networks import I3DNetwork, TorchScriptNetwork, network_input
from engine.evaluation.i3d import I3D, bilinear

CPU = torch.device("cpu")


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).mean(dim=[2, 3, 4])


class TwoLayers(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.mean(dim=[2, 3, 4]), "pooled": x.amax(dim=[2, 3, 4])}


class OnlyPooled(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pooled": x.amax(dim=[2, 3, 4])}


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class LikeStyleGanVs(nn.Module):
    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        if rescale or resize or not return_features:
            raise ValueError("called otherwise")
        return x.mean(dim=[2, 3, 4])


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def clips(num: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 9, 14, 20, 3), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("placing", ["tf1", "half-pixel"])
def test_the_networks_input(placing: str) -> None:
    """Resized as float, each frame for itself, then 2 v / 255 - 1."""
    found = network_input(clips(), placing)  # type: ignore[arg-type]
    assert found.shape == (2, 3, 9, 224, 224)
    frame = bilinear(clips()[1, 4].permute(2, 0, 1)[None].float(), 224, placing)  # type: ignore[arg-type]
    torch.testing.assert_close(found[1, :, 4], frame[0] * 2 / 255 - 1)
    flat = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 9, 4, 4, 3)
    assert network_input(flat, "tf1").amin(dim=(1, 2, 3, 4)).tolist() == [-1, 1]


def test_i3d_gives_both_layers() -> None:
    """With weights that nobody trained, on a small batch: which layer is which."""
    torch.manual_seed(0)
    plain = I3D().eval()
    network = I3DNetwork(plain, CPU)
    layers = network(clips(1), "tf1")
    assert [layers[name].shape for name in ("logits", "pooled")] == [(1, 400), (1, 1024)]
    with torch.no_grad():
        expected = plain(network_input(clips(1), "tf1"))
    torch.testing.assert_close(layers["pooled"], expected.pooled_BD)
    assert not layers["logits"].requires_grad


def test_a_file_takes_floats_or_bytes(tmp_path: Path) -> None:
    path = saved(Mean(), tmp_path / "mean.pt")
    floats = TorchScriptNetwork(path, CPU)(clips(), "half-pixel")
    expected = network_input(clips(), "half-pixel").mean(dim=(2, 3, 4))
    assert set(floats) == {"pooled"}
    torch.testing.assert_close(floats["pooled"], expected)
    as_bytes = TorchScriptNetwork(path, CPU, "uint8")(clips(), "half-pixel")
    torch.testing.assert_close(as_bytes["pooled"], clips().float().mean(dim=(1, 2, 3)))
    network = TorchScriptNetwork(path, CPU)
    assert (network.name, len(network.sha256)) == ("mean.pt", 64)


def test_a_file_may_name_its_layers(tmp_path: Path) -> None:
    network = TorchScriptNetwork(saved(TwoLayers(), tmp_path / "two.pt"), CPU)
    layers = network(clips(), "tf1")
    assert not torch.equal(layers["logits"], layers["pooled"])
    one = TorchScriptNetwork(saved(OnlyPooled(), tmp_path / "one.pt"), CPU)
    assert set(one(clips(), "tf1")) == {"pooled"}


def test_stylegan_vs_form_is_recognised(tmp_path: Path) -> None:
    network = TorchScriptNetwork(saved(LikeStyleGanVs(), tmp_path / "i3d.pt"), CPU)
    expected = network_input(clips(), "tf1").mean(dim=(2, 3, 4))
    torch.testing.assert_close(network(clips(), "tf1")["logits"], expected)


def test_files_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        TorchScriptNetwork(tmp_path / "gone.pt", CPU)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(UserError, match="is no TorchScript file"):
        TorchScriptNetwork(tmp_path / "text.pt", CPU)
    with pytest.raises(UserError, match=r"returns \[\] as pooled, not \[2, F\]"):
        TorchScriptNetwork(saved(Other(), tmp_path / "other.pt"), CPU)(clips(), "tf1")
    linear = saved(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), tmp_path / "linear.pt")
    with pytest.raises(UserError, match=r"fails on float clips \[2, 3, 9, 224, 224\]"):
        TorchScriptNetwork(linear, CPU)(clips(), "tf1")
