"""The hinge losses against numbers worked out by hand."""

import torch
from torch import tensor

from engine.models.discriminators import Scores
from engine.trainer.losses import discriminator_hinge, generator_hinge


def test_discriminator_hinge() -> None:
    real = tensor([[2.0, 0.5, -1.0], [1.0, 0.0, 3.0]])  # hinges 0, 0.5, 2, 0, 1, 0
    fake = tensor([[-2.0, 0.5, -1.0], [1.0, 0.0, -0.5]])  # hinges 0, 1.5, 0, 2, 1, 0.5
    # 3.5/6 + 5/6; sixths are rounded.
    torch.testing.assert_close(discriminator_hinge(real, fake), tensor(8.5 / 6))


def test_generator_hinge_has_no_margin() -> None:
    assert generator_hinge(tensor([[2.0, -5.0], [1.0, 0.0]])).item() == 0.5


def test_discriminator_gradient_stops_at_the_margin() -> None:
    real = tensor([[2.0, 0.0]], requires_grad=True)
    fake = tensor([[-2.0, 0.0]], requires_grad=True)
    discriminator_hinge(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    # Mean of two scores: a half each, none beyond the margin.
    assert real.grad.tolist() == [[0.0, -0.5]]
    assert fake.grad.tolist() == [[0.0, 0.5]]


def test_generator_gradient_raises_every_score() -> None:
    fake = tensor([[5.0, -5.0, 0.0, 1.0]], requires_grad=True)
    generator_hinge(fake).backward()
    assert fake.grad is not None
    assert fake.grad.tolist() == [[-0.25] * 4]


def test_every_output_weighs_the_same_whichever_discriminator_gave_it() -> None:
    """One spatial, three temporal and two matching scores: a sixth each, not a third per D."""
    scores = Scores(
        spatial=tensor([[6.0]], requires_grad=True),
        temporal=tensor([[0.0, 0.0, 12.0]], requires_grad=True),
        matching=tensor([[0.0, 0.0]], requires_grad=True),
    )
    loss = generator_hinge(scores.all)
    assert loss.item() == -3.0
    loss.backward()
    for part in scores:
        assert part is not None
        assert part.grad is not None
        torch.testing.assert_close(part.grad, torch.full_like(part, -1 / 6))
