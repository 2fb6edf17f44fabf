"""Normalisation of each position: by its root mean square (Zhang and Sennrich 2019, arXiv:1910.07467), or by mean and variance too
(Ba, Kiros and Hinton 2016, arXiv:1607.06450).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    `F.rms_norm` takes its statistics in fp32 for half precision and in fp64 for fp64, and is one kernel where there is one.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias over the last dimension.

    `F.layer_norm` takes its statistics in fp32 for half precision and in fp64 for fp64, and is one kernel.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
