"""PyTorch as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import torch

__all__ = ["maximum", "minimum", "sqrt", "sum"]

sqrt = torch.sqrt


def maximum(x1: Any, x2: Any, /) -> Any:
    """Take the larger; the second may be a number, and both sizes that are not known yet."""
    if not torch.is_tensor(x1):
        return torch.sym_max(x1, x2)  # type: ignore[no-untyped-call]
    return torch.maximum(x1, x2) if torch.is_tensor(x2) else torch.clamp_min(x1, x2)


def minimum(x1: Any, x2: Any, /) -> Any:
    """Take the smaller; the second may be a number."""
    return torch.minimum(x1, x2) if torch.is_tensor(x2) else torch.clamp_max(x1, x2)


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes; over none of them, too."""
    return torch.sum(x, dim=axis, keepdim=keepdims) if axis else x
