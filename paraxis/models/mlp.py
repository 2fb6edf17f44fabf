"""The gated feed-forward layer of a decoder block."""

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_btm: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_btm)) * self.up_proj(x_btm))
