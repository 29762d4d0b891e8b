"""The 16-bit types of the GPU's activations and cache, by the names of the settings."""

from __future__ import annotations

import numpy as np
import torch

GPU_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    """What holds a 16-bit type in NumPy: float16, or uint16 bits for bf16."""
    return np.dtype(np.float16 if dtype == torch.float16 else np.uint16)
