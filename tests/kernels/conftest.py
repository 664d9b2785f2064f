"""Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

import contextlib
import os
import sys

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported and when it meets a kernel, and never again.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set")
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # Triton need not be installed
        from quick_interpreter import patch_language_once

        patch_language_once()
