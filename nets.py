"""Networks: net(x, m, t, s) -> (B, D, num_outputs) logits (App. D).

x (B, D) int64 holds x^(s) where m (B, D, bool) is True and x^(s-1) elsewhere; t and s are (B,)
int64. Every variable may look at every other: nothing here is causal, what is unknown is hidden
by the mask.
"""
import torch
from torch import nn
from torch.nn import functional as F

NEIGHBOURS = ((-1, 1), (-2, -1), (1, 2))     # relative positions of the pairs that are embedded
MOST_PAIRS = 8191                            # rows of such an embedding; of bytes many share one


class Transformer(nn.Module):
    """Bidirectional pre-norm Transformer for text; D is the longest input, shorter may be given.

    The paper's network is positions="sinusoidal", pairs=False, conv=0, qk_norm=False,
    zero_init=False. The defaults learn more in the same time (bench.py ablation):

    positions   rotary: queries and keys are turned by an angle that grows with the position, so
                that attention knows distances from the first step on
    pairs       embeddings of pairs of known neighbours, the nearest context there is: the two
                beside a position, the two before it, the two behind it
    conv        width of a depthwise convolution before attention, which mixes neighbours; 0: none
    qk_norm     queries and keys are brought to mean 0 and variance 1
    zero_init   every block begins as the identity and the output as the uniform distribution
    time        show the network t as well (Sec. 3: optional; the mask tells how much is known)
    stages      S of an upscale model: what is unknown holds x^(s-1), the network is told s and m
    """

    def __init__(self, K, D, num_outputs=None, dim=128, depth=4, heads=2, mlp=None,
                 positions="rotary", pairs=True, conv=5, qk_norm=True, zero_init=True, time=False,
                 stages=1):
        super().__init__()
        assert dim % (2 * heads) == 0, f"dim {dim} must be a multiple of 2 * heads = {2 * heads}"
        self.absorbed, self.rotary = K, positions == "rotary"    # class K: not yet known
        self.embed = nn.Embedding(K + 1, dim)
        rows = min((K + 1) ** 2, MOST_PAIRS)
        self.pairs = nn.ModuleList(nn.Embedding(rows, dim) for _ in (NEIGHBOURS if pairs else ()))
        self.stage = nn.Embedding(2 * stages, dim) if stages > 1 else None
        self.time = nn.Linear(dim, dim) if time else None
        self.blocks = nn.ModuleList(Block(dim, heads, mlp or 4 * dim, conv, qk_norm, zero_init)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs or K)
        for embed in self.pairs:                                 # a correction, not the main thing
            nn.init.normal_(embed.weight, std=0.02)
        if zero_init:
            nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        angles = wave_angles(torch.arange(D).double(), dim // heads if self.rotary else dim)
        self.register_buffer("cos", angles.cos().float())        # (D, dim // heads / 2), or dim / 2
        self.register_buffer("sin", angles.sin().float())

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        D = x.shape[1]
        if self.stage is None:
            x = torch.where(m, x, self.absorbed)                 # (B, D), text without stages
        h = self.embed(x)                                        # (B, D, dim)
        if self.stage is not None:
            h = h + self.stage(2 * s[:, None] - 2 + m)
        around = F.pad(x, (2, 2), value=self.absorbed)           # (B, 2 + D + 2)
        for (i, j), embed in zip(NEIGHBOURS, self.pairs):
            pair = around[:, 2 + i:2 + i + D] * (self.absorbed + 1) + around[:, 2 + j:2 + j + D]
            h = h + embed(pair % embed.num_embeddings)
        cos, sin = self.cos[:D], self.sin[:D]
        if not self.rotary:
            h, cos, sin = h + torch.cat((sin, cos), dim=-1), None, None
        if self.time is not None:
            angles = wave_angles(t.to(h.dtype), h.shape[-1])
            h = h + self.time(torch.cat((angles.sin(), angles.cos()), dim=-1))[:, None]
        for block in self.blocks:
            h = block(h, cos, sin)
        return self.head(self.norm(h))                           # (B, D, num_outputs)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, mlp, conv, qk_norm, zero_init):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # 2-d, on (B, dim, 1, D): to it a transposed h is channels-last and need not be copied, as
        # Conv1d would do; several times as fast on a CPU.
        self.conv = nn.Conv2d(dim, dim, (1, conv), padding="same", groups=dim) if conv else None
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        if zero_init:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin):
        """(B, D, dim) -> (B, D, dim); cos, sin: of the rotary angles, or None."""
        B, D, dim = x.shape
        h = self.norm1(x)
        if self.conv is not None:
            h = self.conv(h.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        qkv = self.qkv(h).view(B, D, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]                                  # (2, B, heads, D, d) and one
        if self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:])
        if cos is not None:
            qk = rotate(qk, cos, sin)
        h = attention(*qk, v)                                    # (B, heads, D, d)
        x = x + self.out(h.transpose(1, 2).reshape(B, D, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def wave_angles(positions, dim):
    """(n,) float positions -> (n, dim/2) angles, wavelengths from 2 pi to 2 pi 10000."""
    exponents = torch.linspace(0, 1, dim // 2, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * 10000.0 ** -exponents


def rotate(x, cos, sin):
    """Rotary positions: turns the pairs (x_i, x_{i+d/2}) of x (..., D, d) by the angles."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)                  # (D, d/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over (B, heads, D, d), every position sees every other."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # PyTorch's fused kernel is 2 to 7 times slower than its parts in bfloat16 on a CPU.
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
