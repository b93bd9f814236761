"""How do NumPy and torch see the same memory?"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as a NumPy array; bfloat16 is that of ``ml_dtypes``."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """View an array as a tensor."""
    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return as_numpy(torch.empty(0, dtype=dtype)).dtype
