"""The attention layer of a decoder block: projections, rotary positions, and an exchangeable `attend`."""

from typing import Any

from torch import Tensor, nn

from paraxis.base.seams import Attend
from paraxis.ops.attention import Sdpa
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import rotate


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): each key/value head serves heads / kv_heads query heads.

    How many heads there are is read off the weights, so a rank that holds some of them runs the same code.
    With `norm_eps`, each query and key head is normalised before it is rotated, as in Qwen3 (arXiv:2505.09388). With `bias`, what
    makes queries, keys and values has one, as in Qwen2.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, norm_eps: float | None = None, bias: bool = False) -> None:
        super().__init__()
        self.head_width = self.rope_width = head_width  # positions turn all of a head
        self.attend: Attend = Sdpa()
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)
        self.q_norm = nn.Identity() if norm_eps is None else RMSNorm(head_width, norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else RMSNorm(head_width, norm_eps)

    def forward(self, x_btm: Tensor, cos_btf: Tensor, sin_btf: Tensor, mask: Any) -> Tensor:
        q_bthd = self.q_norm(self.q_proj(x_btm).unflatten(-1, (-1, self.head_width)))
        k_btgd = self.k_norm(self.k_proj(x_btm).unflatten(-1, (-1, self.head_width)))
        v_btgd = self.v_proj(x_btm).unflatten(-1, (-1, self.head_width))
        q_bthd, k_btgd = rotate(q_bthd, cos_btf, sin_btf), rotate(k_btgd, cos_btf, sin_btf)
        return self.o_proj(self.attend(q_bthd, k_btgd, v_btgd, mask).flatten(-2))
