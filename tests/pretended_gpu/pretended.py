"""Whether a GPU can be pretended here."""

import os
import shutil
from pathlib import Path

import torch


def why_not() -> str | None:
    """What is missing; None where nothing is."""
    if torch.version.cuda is None:
        return "a pretended GPU needs a CUDA build of PyTorch; CONTRIBUTING.md makes one"
    if not Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include/cuda.h").is_file():
        return "a pretended GPU needs CUDA's headers; set CUDA_HOME"
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    return f"a pretended GPU needs {' and '.join(missing)}" if missing else None
