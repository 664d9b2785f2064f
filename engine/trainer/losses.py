"""The "geometric hinge" (paper): a hinge per score, then the mean over all of them.

Every discriminator's per-frame scores are concatenated to [B, N] first, so each score weighs the
same, whichever discriminator gave it.
"""

from torch import Tensor


def discriminator_hinge(real_BN: Tensor, fake_BN: Tensor) -> Tensor:
    """relu(1 - real) + relu(1 + fake), averaged over samples and outputs."""
    return (1 - real_BN).relu().mean() + (1 + fake_BN).relu().mean()


def generator_hinge(fake_BN: Tensor) -> Tensor:
    """-fake, averaged over samples and outputs."""
    return -fake_BN.mean()
