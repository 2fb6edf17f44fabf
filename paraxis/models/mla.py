"""Multi-head latent attention: keys and values of all heads are made of one narrow vector a position.

DeepSeek-V2 (arXiv:2405.04434, section 2.1); for training, keys and values are written out, and an ordinary `attend` is used.
b rows, t positions, m model width, h heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.seams import Attend
from paraxis.ops.attention import Sdpa
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import rotate_neighbours

# The norms of the latent vectors have their own, whatever the model's other norms have: so it is in the released code.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """A head's queries and keys are `nope_width` entries that positions leave alone and `rope_width` that they turn; of keys, all heads
    share the latter. Values are `value_width` wide, which may be less; for `attend` they are filled up with zeros, which change nothing:
    most kernels, attention over several ranks and caches of keys and values know heads of one width only.

    Queries come from a latent vector of width `q_rank` too, or straight from the input where that is None. `score_scale` is a factor
    on the attention scores beside 1 / sqrt(nope_width + rope_width), which is all that an `attend` knows of: it goes into the queries.
    How many heads there are is read off the weights, so a rank that holds some of them runs the same code.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        q_rank: int | None,
        kv_rank: int,
        nope_width: int,
        rope_width: int,
        value_width: int,
        score_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_width = nope_width + rope_width
        self.nope_width, self.rope_width, self.value_width, self.score_scale = nope_width, rope_width, value_width, score_scale
        self.attend: Attend = Sdpa()
        if q_rank is None:
            self.q_proj = nn.Linear(width, heads * self.head_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, q_rank, bias=False)
            self.q_a_norm = RMSNorm(q_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(q_rank, heads * self.head_width, bias=False)
        self.q_rank = q_rank
        self.kv_a_proj = nn.Linear(width, kv_rank + rope_width, bias=False)
        self.kv_a_norm = RMSNorm(kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (nope_width + value_width), bias=False)
        self.o_proj = nn.Linear(heads * value_width, width, bias=False)

    def forward(self, x_btm: Tensor, cos_btf: Tensor, sin_btf: Tensor, mask: Any) -> Tensor:
        q_bthd = self._queries(x_btm, cos_btf, sin_btf)
        k_bthd, v_bthd = self._keys_and_values(x_btm, cos_btf, sin_btf)
        v_bthd = F.pad(v_bthd, (0, self.head_width - self.value_width))
        return self.o_proj(self.attend(q_bthd, k_bthd, v_bthd, mask)[..., : self.value_width].flatten(-2))

    def _queries(self, x_btm: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> Tensor:
        q = self.q_proj(x_btm) if self.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_btm)))
        nope_bthd, rope_bthd = q.unflatten(-1, (-1, self.head_width)).split((self.nope_width, self.rope_width), dim=-1)
        q_bthd = torch.cat((nope_bthd, rotate_neighbours(rope_bthd, cos_btf, sin_btf)), dim=-1)
        return q_bthd if self.score_scale == 1 else q_bthd * self.score_scale

    def _keys_and_values(self, x_btm: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> tuple[Tensor, Tensor]:
        latent_btr, rope_btd = self.kv_a_proj(x_btm).split((self.kv_b_proj.in_features, self.rope_width), dim=-1)
        kv_bthd = self.kv_b_proj(self.kv_a_norm(latent_btr)).unflatten(-1, (-1, self.nope_width + self.value_width))
        nope_bthd, v_bthd = kv_bthd.split((self.nope_width, self.value_width), dim=-1)
        rope_bt1d = rotate_neighbours(rope_btd.unsqueeze(2), cos_btf, sin_btf)
        return torch.cat((nope_bthd, rope_bt1d.expand(-1, -1, nope_bthd.shape[2], -1)), dim=-1), v_bthd
