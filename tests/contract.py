"""The words of the DIAG contract, and small helpers for its tests."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRID_KEYS = {"grid_error_mean", "grid_error_max", "grid_error_std", "on_grid_frac"}
ULP_KEYS = {"ulp_mean", "ulp_median", "ulp_max", "ulp_zero_frac"}
CORRELATION_KEYS = {
    "grad_stiff_correlation",
    "grad_stiff_ratio_mean",
    "grad_below_stiffness_frac",
}


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
