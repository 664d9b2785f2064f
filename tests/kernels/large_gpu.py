"""For tests of what is past int32 offsets, which not every GPU has the memory for."""

import pytest
import torch

CUDA = torch.cuda.is_available()
MEMORY_GB = torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else 0.0


def needs_gpu_memory(gigabytes: int) -> pytest.MarkDecorator:
    """Skips without a CUDA device of as much."""
    return pytest.mark.skipif(
        gigabytes > MEMORY_GB, reason=f"needs a CUDA device of {gigabytes} GB"
    )
