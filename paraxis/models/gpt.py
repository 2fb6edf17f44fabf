"""GPT-2 and what Megatron-LM trains under the name of GPT: learned positions, LayerNorm, GELU, biases everywhere.

Shapes: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (table 2, and the released checkpoints' vocabulary);
Narayanan et al. 2021, arXiv:2104.04473, table 1; Brown et al. 2020, arXiv:2005.14165, table 2.1, for 175B.
b rows, t positions, m model width, h heads, d head width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.errors import ConfigError
from paraxis.base.keys import KeyTable, Piece
from paraxis.base.layout import Gather, LayoutTable, Lookup, Split
from paraxis.base.seams import Attend
from paraxis.models.decoder import Decoder
from paraxis.models.init import Init, Normal
from paraxis.ops.attention import Sdpa
from paraxis.ops.norm import LayerNorm

# Our parameter names beside Hugging Face's, whose matrices are turned, and whose queries, keys and values are one.
KEYS: KeyTable = {
    "embed.weight": "transformer.wte.weight",
    "positions.weight": "transformer.wpe.weight",
    "layers.{i}.attention_norm.weight": "transformer.h.{i}.ln_1.weight",
    "layers.{i}.attention_norm.bias": "transformer.h.{i}.ln_1.bias",
    **{
        f"layers.{{i}}.attention.{letter}_proj.{kind}": Piece(f"transformer.h.{{i}}.attn.c_attn.{kind}", number, 3, kind == "weight")
        for number, letter in enumerate("qkv")
        for kind in ("weight", "bias")
    },
    "layers.{i}.attention.o_proj.weight": Piece("transformer.h.{i}.attn.c_proj.weight", transpose=True),
    "layers.{i}.attention.o_proj.bias": "transformer.h.{i}.attn.c_proj.bias",
    "layers.{i}.mlp_norm.weight": "transformer.h.{i}.ln_2.weight",
    "layers.{i}.mlp_norm.bias": "transformer.h.{i}.ln_2.bias",
    "layers.{i}.mlp.up_proj.weight": Piece("transformer.h.{i}.mlp.c_fc.weight", transpose=True),
    "layers.{i}.mlp.up_proj.bias": "transformer.h.{i}.mlp.c_fc.bias",
    "layers.{i}.mlp.down_proj.weight": Piece("transformer.h.{i}.mlp.c_proj.weight", transpose=True),
    "layers.{i}.mlp.down_proj.bias": "transformer.h.{i}.mlp.c_proj.bias",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT, and how its parameters start."""

    vocab_size: Annotated[int, "entries of the vocabulary"] = 50_257
    width: Annotated[int, "width of the residual stream"]
    layers: Annotated[int, "how many blocks"]
    heads: Annotated[int, "attention heads of a block; divides width"]
    mlp_width: Annotated[int | None, "width inside the feed-forward layer; none means 4 x width"] = None
    norm_eps: Annotated[float, "added to the variance before its root is taken"] = 1e-5
    tied: Annotated[bool, "use the embedding as the vocabulary projection too"] = True
    max_seq_len: Annotated[int, "positions that a vector is learned for: the longest row the model can read"] = 1024
    init_std: Annotated[float, "standard deviation of the first weights; those that add to the residual stream start narrower"] = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is not a multiple of model.heads={self.heads}; change either")
        if self.mlp_width is not None and self.mlp_width < 1:
            raise ConfigError(f"model.mlp_width={self.mlp_width} must be at least 1, or none for 4 x width")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be over 0")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Of the feed-forward layer."""
        return self.mlp_width or 4 * self.width

    def build(self) -> "GPT":
        """The model; built under `torch.device("meta")` it takes no memory."""
        return GPT(self)

    @property
    def parameters_count(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        vectors = 9 * self.width + self.inner_width  # two norms of two, and the biases of what makes width (5) and inner_width
        embeddings = self.vocab_size * (1 if self.tied else 2) + self.max_seq_len
        return self.width * (embeddings + 2) + self.layers * (self._block_matrices + vectors)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one trained token, forward and backward, in a row of `seq_len`, counted as a Llama's (see there)."""
        matrices = self.layers * self._block_matrices + self.vocab_size * self.width
        return 6.0 * matrices + 6.0 * self.layers * self.width * seq_len

    @property
    def _block_matrices(self) -> int:
        """Entries of one block's matrices."""
        return 4 * self.width**2 + 2 * self.width * self.inner_width


class Attention(nn.Module):
    """Multi-head attention with biases, and no positions of its own.

    How many heads there are is read off the weights, so a rank that holds some of them runs the same code.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.attend: Attend = Sdpa()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_btm: Tensor, mask: Any) -> Tensor:
        q_bthd, k_bthd, v_bthd = (make(x_btm).unflatten(-1, (-1, self.head_width)) for make in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q_bthd, k_bthd, v_bthd, mask).flatten(-2))


class MLP(nn.Module):
    """down(gelu(up(x))), with the approximation of GELU by tanh that GPT-2 and Megatron-LM compute (arXiv:1606.08415, section 2)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, mlp_width)
        self.down_proj = nn.Linear(mlp_width, width)

    def forward(self, x_btm: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_btm), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then the feed-forward, each on normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config.width, config.head_width)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.inner_width)

    def forward(self, x_btm: Tensor, mask: Any) -> Tensor:
        x_btm = x_btm + self.attention(self.attention_norm(x_btm), mask)
        return x_btm + self.mlp(self.mlp_norm(x_btm))


class GPT(Decoder):
    """A decoder whose positions are learned vectors."""

    layout: ClassVar[LayoutTable] = {
        **{pattern: rule for pattern, rule in Decoder.layout.items() if ".mlp" not in pattern},
        "positions": Lookup(),
        "layers.*.attention.[qkv]_proj.bias": Split("tp", 0),
        "layers.*.mlp": Gather(readers=("up_proj",)),
        "layers.*.mlp.up_proj.*": Split("tp", 0),
        "layers.*.mlp.down_proj.weight": Split("tp", 1),
    }

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            blocks=[Block(config) for _ in range(config.layers)],
            norm=LayerNorm(config.width, config.norm_eps),
            rope=None,
            positions=config.max_seq_len,
            tied=config.tied,
            init=init_table(config),
            keys=KEYS,
        )


def init_table(config: GPTConfig) -> dict[str, Init]:
    """As GPT-2 starts (section 2.3): what adds to the residual stream is narrowed by 1 / sqrt(2 layers), its number of summands.

    Positions start half as wide as tokens, as in its released code.
    """
    narrowed = Normal(config.init_std / (2 * config.layers) ** 0.5)
    wide = Normal(config.init_std)
    table: dict[str, Init] = {"*.o_proj.weight": narrowed, "*.down_proj.weight": narrowed, "*_proj.weight": wide}
    return table | {"embed.weight": wide, "head.weight": wide, "positions.weight": Normal(config.init_std / 2)}


def gpt2_124m() -> GPTConfig:
    """The smallest GPT-2."""
    return GPTConfig(width=768, layers=12, heads=12)


def gpt2_355m() -> GPTConfig:
    """GPT-2 medium."""
    return GPTConfig(width=1024, layers=24, heads=16)


def gpt2_774m() -> GPTConfig:
    """GPT-2 large."""
    return GPTConfig(width=1280, layers=36, heads=20)


def gpt2_1558m() -> GPTConfig:
    """GPT-2 XL."""
    return GPTConfig(width=1600, layers=48, heads=25)


def megatron(width: int, layers: int, heads: int, seq_len: int = 2048) -> GPTConfig:
    """A GPT as Megatron-LM trains it: GPT-2's vocabulary filled up to 51,200, so that it can be cut."""
    return GPTConfig(vocab_size=51_200, width=width, layers=layers, heads=heads, max_seq_len=seq_len)


# Width, layers, heads; by billions of parameters.
MEGATRON = {
    "1.7b": (2304, 24, 24),
    "3.6b": (3072, 30, 32),
    "7.5b": (4096, 36, 32),
    "18.4b": (6144, 40, 48),
    "39.1b": (8192, 48, 64),
    "76.1b": (10240, 60, 80),
    "145.6b": (12288, 80, 96),
    "175b": (12288, 96, 96),
    "310.1b": (16384, 96, 128),
    "529.6b": (20480, 105, 128),
    "1008b": (25600, 128, 160),
}
