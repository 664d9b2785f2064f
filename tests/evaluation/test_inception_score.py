"""The inception score of predictions whose score is known, and torchmetrics'."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore as TheirScore

from engine.evaluation.inception_score import InceptionScore

SURE = 50.0


def logits(num: int, num_classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2, size=(num, num_classes))


def test_sure_and_various_is_the_number_of_classes() -> None:
    """Each of 5 classes surely and as often: 5. All of one class: 1. All unsure: 1."""
    sure = SURE * np.eye(5)[np.arange(20) % 5]
    assert InceptionScore(sure, 1)().mean == pytest.approx(5)
    assert InceptionScore(sure, 4)() == pytest.approx((5, 0))
    assert InceptionScore(sure[::5], 1)().mean == pytest.approx(1)
    assert InceptionScore(np.ones((20, 5)), 2)().mean == pytest.approx(1)


def test_splits_in_the_order_given() -> None:
    """Two classes in the first half, one in the second: 2 and 1."""
    sure = SURE * np.eye(3)[[0, 1, 0, 1, 2, 2, 2, 2]]
    assert InceptionScore(sure, 2)() == pytest.approx((1.5, 0.5))
    # 3/8 of one, 3/8 of another... here 2, 2 and 4 of 8.
    entropy = 2 * 0.25 * math.log(4) + 0.5 * math.log(2)
    assert InceptionScore(sure, 1)().mean == pytest.approx(math.exp(entropy))


def test_as_torchmetrics_has_it() -> None:
    """In float32 of its own; it shuffles, so one split."""

    class Given(torch.nn.Module):
        num_features = 7

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :7]

    given = logits(40, 7).astype(np.float32)
    theirs = TheirScore(feature=Given(), splits=1)
    padded = np.zeros((40, 9), np.float32)
    padded[:, :7] = given
    theirs.update(torch.from_numpy(padded).view(40, 1, 3, 3))
    found = theirs.compute()[0].item()
    assert InceptionScore(given, 1)().mean == pytest.approx(found, rel=1e-5)


def test_weights_repeat_clips() -> None:
    given = logits(12, 4)
    weights = np.array([2, 0, 1, 1, 3, 1, 0, 0, 1, 1, 1, 1])
    first, second = np.repeat(given[:6], weights[:6], 0), np.repeat(given[6:], weights[6:], 0)
    expected = [InceptionScore(part, 1)().mean for part in (first, second)]
    found = InceptionScore(given, 2)(weights.astype(float))
    assert found == pytest.approx((np.mean(expected), np.std(expected)))


def test_no_splits_without_clips() -> None:
    with pytest.raises(ValueError, match="3 clips cannot be cut into 4 splits"):
        InceptionScore(logits(3, 4), 4)
    with pytest.raises(ValueError, match="finite"):
        InceptionScore(np.full((3, 4), np.inf), 1)
