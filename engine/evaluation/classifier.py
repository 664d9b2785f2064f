"""A small classifier of clips, trained on real ones in seconds; judges `clip_figures.recognised`.

Two views of a clip, one classifier each, because colour alone may give a class away (in the sample
set it does, from one frame):

- `colour_view`: the frames as they are. A still picture in the right colours passes.
- `motion_view`: what moves, without its colour and strength: luminance minus each pixel's mean over
  time, in units of its standard deviation, and the step to the next frame. A still clip is zero
  everywhere, which says nothing of its class. The places that move count more than the order in
  which they do: real clips with shuffled frames are mostly recognised (`persistence` finds them).

Shapes: B clips, T frames, C channels, H x W pixels; [B, T, C, H, W] with values in [-1, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.clip_figures import LEVEL, LUMA

MAX_FRAMES, MAX_PIXELS = 8, 16
"""What a classifier sees of a clip at most; more is slower and recognises no better."""
_NUM_STEPS, _BATCH_SIZE, _LEARNING_RATE = 250, 32, 2e-3
_STEP_GAIN = 2.0  # steps are smaller than what they lead to

View = Callable[[Tensor], Tensor]


def reduced(video_BTCHW: Tensor) -> Tensor:
    """At most MAX_FRAMES evenly spaced frames of at most MAX_PIXELS (mean of areas); float."""
    stride = -(-video_BTCHW.shape[1] // MAX_FRAMES)
    frames_NCHW = video_BTCHW[:, ::stride].float().flatten(0, 1)
    if frames_NCHW.shape[-1] > MAX_PIXELS:
        frames_NCHW = F.adaptive_avg_pool2d(frames_NCHW, MAX_PIXELS)
    return frames_NCHW.unflatten(0, (len(video_BTCHW), -1))


def colour_view(video_BTCHW: Tensor) -> Tensor:
    """The frames themselves."""
    return video_BTCHW


def motion_view(video_BTCHW: Tensor) -> Tensor:
    """What moves, and its steps: [B, T, 2, H, W]; zero for still clips."""
    luma_C11 = video_BTCHW.new_tensor(LUMA).view(3, 1, 1)
    moving_BT1HW = (video_BTCHW * luma_C11).sum(dim=2, keepdim=True)
    moving_BT1HW = moving_BT1HW - moving_BT1HW.mean(dim=1, keepdim=True)
    deviation_B = moving_BT1HW.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    # What is below one 8-bit level is not enlarged.
    moving_BT1HW = moving_BT1HW / deviation_B.clamp_min(LEVEL)
    steps_BT1HW = moving_BT1HW.diff(dim=1, append=moving_BT1HW[:, -1:])
    return torch.cat([moving_BT1HW, _STEP_GAIN * steps_BT1HW], dim=2)


VIEWS: dict[str, View] = {"colour": colour_view, "motion": motion_view}


class Classifier:
    """Clips to classes, through a view; a `clip_figures.Recogniser`."""

    def __init__(self, network: nn.Module, view: View, classes: list[int]) -> None:
        self._network = network
        self._view = view
        self._classes_K = torch.tensor(classes)

    @torch.no_grad()
    def __call__(self, video_BTCHW: Tensor) -> Tensor:
        """Which class each clip is taken for, [B] int64, on the CPU."""
        scores_BK = self._network(self._view(reduced(video_BTCHW.cpu())))
        return self._classes_K[scores_BK.argmax(dim=1)]


def train_classifier(
    video_BTCHW: Tensor, labels_B: Tensor, view: View, *, seed: int = 0
) -> Classifier:
    """Train on real clips, on the CPU; the same clips and seed give the same classifier.

    Clips may be `reduced` already, which changes nothing and spares memory.
    """
    classes = sorted(set(labels_B.tolist()))
    seen_BTCHW = view(reduced(video_BTCHW.cpu()))
    targets_B = torch.searchsorted(torch.tensor(classes), labels_B.cpu())
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(seen_BTCHW.shape[2], len(classes))
    adam = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=_NUM_STEPS)
    for _ in range(_NUM_STEPS):
        batch = torch.randint(len(seen_BTCHW), (_BATCH_SIZE,), generator=random)
        adam.zero_grad()
        with torch.enable_grad():
            F.cross_entropy(network(seen_BTCHW[batch]), targets_B[batch]).backward()
        adam.step()
        decay.step()
    return Classifier(network.requires_grad_(False), view, classes)


class _Network(nn.Module):
    """Two convolutions of each frame, one over time of all their pixels, and a mean over time."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.over_time = nn.Conv1d(32 * 4 * 4, 64, 3, padding=1)
        self.scores = nn.Linear(64, num_classes)

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Scores, [B, K]."""
        frames_NCHW = F.relu(self.first(video_BTCHW.flatten(0, 1)))
        if min(frames_NCHW.shape[-2:]) > 1:
            frames_NCHW = F.avg_pool2d(frames_NCHW, 2)
        frames_NCHW = self.pool(F.relu(self.second(frames_NCHW)))
        features_BTN = frames_NCHW.flatten(1).unflatten(0, video_BTCHW.shape[:2])
        over_time_BNT = F.relu(self.over_time(features_BTN.transpose(1, 2)))
        return self.scores(over_time_BNT.mean(dim=2))
