"""Networks: net(x, m, t, s) -> (B, D, num_outputs) logits (App. D).

x (B, D) int64 holds x^(s) where m (B, D, bool) is True and x^(s-1) elsewhere; t and s are (B,)
int64. Every variable may look at every other: nothing here is causal, what is unknown is hidden
by the mask.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

NEIGHBOURS = ((-1, 1), (-2, -1), (1, 2))     # relative positions of the pairs that are embedded
MOST_PAIRS = 8191                            # rows of such an embedding; of bytes many share one

# On a CPU, MKL chooses the kernel of a function when it is first called. Where two threads made
# that call at once, one of them now and then got a coarse kernel, wrong by 1e-4, for that call:
# enough to make an archive undecodable. So each function is first called here, by one thread.
for function in (torch.exp, torch.log, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.erf):
    function(torch.ones(1)), function(torch.ones(1).double())


class Transformer(nn.Module):
    """Bidirectional pre-norm Transformer for text; D is the longest input, shorter may be given.

    The paper's network is positions="sinusoidal", pairs=False, conv=0, every=1, zero_init=False.
    The defaults, all but zero_init, learn more in the same time (bench.py ablation):

    positions   rotary: queries and keys are turned by an angle that grows with the position, so
                that attention knows distances from the first step on
    pairs       embeddings of pairs of neighbours, known or not, the nearest context there is: the
                two beside a position, the two before it, the two behind it
    conv        width of the depthwise convolution before each hidden layer, which mixes neighbours;
                0: none
    every       blocks from one with attention to the next, counted back from the last; 1: all have
                it. The others mix only neighbours: the same time trains on more text
    zero_init   every block begins as the identity, but for a constant, and the output as the
                uniform distribution
    time        show the network t as well (Sec. 3: optional; the mask tells how much is known)
    stages      S of an upscale model: what is unknown holds x^(s-1), the network is told s and m
    """

    def __init__(self, K, D, num_outputs=None, dim=128, depth=4, heads=2, mlp=None,
                 positions="rotary", pairs=True, conv=5, every=2, zero_init=True, time=False,
                 stages=1):
        super().__init__()
        assert dim % (2 * heads) == 0, f"dim {dim} must be a multiple of 2 * heads = {2 * heads}"
        self.absorbed, self.rotary = K, positions == "rotary"    # class K: not yet known
        self.embed = nn.Embedding(K + 1, dim)
        rows = min((K + 1) ** 2, MOST_PAIRS)
        self.pairs = nn.ModuleList(nn.Embedding(rows, dim) for _ in (NEIGHBOURS if pairs else ()))
        self.stage = nn.Embedding(2 * stages, dim) if stages > 1 else None
        self.time = nn.Linear(dim, dim) if time else None
        self.blocks = nn.ModuleList(
            Block(dim, 0 if i % every else heads, mlp or 4 * dim, conv, zero_init)
            for i in reversed(range(depth)))                     # the last one has i = 0
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs or K)
        for embed in self.pairs:                                 # a correction, not the main thing
            nn.init.normal_(embed.weight, std=0.02)
        if zero_init:
            nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        angles = wave_angles(torch.arange(D).double(), dim // heads if self.rotary else dim)
        self.register_buffer("cos", angles.cos().float())        # (D, dim // heads / 2), or dim / 2
        self.register_buffer("sin", angles.sin().float())

    def matrices(self):
        """What the optimiser Muon is for, the weights of the blocks: {parts: list}, parts = 3 where
        three matrices lie on top of each other."""
        attentions = [block.attention for block in self.blocks if block.attention is not None]
        layers = [part.out for part in attentions] + [
            layer for block in self.blocks for layer in (block.up, block.down)]
        return {3: [part.qkv.weight for part in attentions], 1: [layer.weight for layer in layers]}

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        return self.at(x, m, t, s, torch.ones_like(m)).view(*x.shape, -1)

    def at(self, x, m, t, s, where):
        """The same for the n variables in `where` (B, D, bool) alone: (n, num_outputs). What
        comes after the last mix of neighbours, a fifth of the work of four blocks, is done for
        these only."""
        x, h = self.body(x, m, t, s)
        here = where.flatten().nonzero()[:, 0]                   # (n,)
        x, h = (part.flatten(0, 1).index_select(0, here) for part in (x, h))     # (n, dim)
        return self.head(self.norm(x + self.blocks[-1].mlp(h)))

    def body(self, x, m, t, s):
        """All but the last hidden layer -> what it adds to and what it sees, (B, D, dim) each."""
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
        for block in self.blocks[:-1]:
            h = block(h, cos, sin)
        return self.blocks[-1].attend(h, cos, sin)


class Block(nn.Module):
    """x + attention(x), where it has attention, then x + mlp(mix(norm(x)))."""

    def __init__(self, dim, heads, mlp, conv, zero_init):
        super().__init__()
        self.attention = Attention(dim, heads, zero_init) if heads else None
        self.norm = nn.LayerNorm(dim)
        self.mix = NeighbourConv(dim, conv) if conv else nn.Identity()
        self.up, self.down = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        if zero_init:
            nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin):
        """(B, D, dim) -> (B, D, dim); cos, sin: of the rotary angles, or None."""
        x, h = self.attend(x, cos, sin)
        return x + self.mlp(h)

    def attend(self, x, cos, sin):
        """x after attention, where there is any, and what the hidden layer sees of it: (B, D, dim)
        each."""
        if self.attention is not None:
            x = x + self.attention(x, cos, sin)
        return x, self.mix(self.norm(x))

    def mlp(self, h):
        return self.down(F.gelu(self.up(h)))


class Attention(nn.Module):
    """What every position hears of every other, by norm(x)."""

    def __init__(self, dim, heads, zero_init):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        if zero_init:
            nn.init.zeros_(self.out.weight)

    def forward(self, x, cos, sin):
        B, D, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(B, D, 3, self.heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]                                  # (2, B, heads, D, d) and one
        if cos is not None:
            qk = rotate(qk, cos, sin)
        h = attention(*qk, v)                                    # (B, heads, D, d)
        return self.out(h.transpose(1, 2).reshape(B, D, dim))


class NeighbourConv(nn.Conv2d):
    """Depthwise convolution of width `width` along D, on (B, D, dim).

    2-d, on (B, dim, 1, D): to it a transposed h is channels-last and need not be copied, as Conv1d
    would do; several times as fast on a CPU.
    """

    def __init__(self, dim, width):
        super().__init__(dim, dim, (1, width), padding="same", groups=dim)

    def forward(self, h):
        if h.dtype == torch.float64:             # for which the fast convolutions are not made
            return self.shifted(h)
        return super().forward(h.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)

    def shifted(self, h):
        """The same, as a sum of shifted copies."""
        (width, D), out = (self.kernel_size[1], h.shape[1]), self.bias.expand_as(h).clone()
        padded = F.pad(h, (0, 0, width // 2, width // 2))
        for i in range(width):
            out.addcmul_(padded[:, i:i + D], self.weight[:, 0, 0, i])
        return out


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


class UNet(nn.Module):
    """U-Net for images (C, H, W): D = C * H * W variables, colour by colour, each with its mask.

    The paper's is dim=256, depth=32, levels=1, heads=1, neighbours=False, logistic=False,
    time=True, zero_init=False: everything at full resolution. The defaults learn more in the same
    time, but for levels, which cost steps in a short run (bench.py images):

    depth       ResBlocks of each level, on the way down and again on the way up
    levels      resolutions, each half of the one before; below the first with twice the channels
    heads       of the attention between all pixels in the middle; 0: none
    neighbours  also show the network, for each colour, means of the known values near by, and how
                many they are, in windows of several sizes
    logistic    the logits are those of values (not of digits: direct parametrisation): of a
                logistic distribution around the mean of what is known near by, moved and scaled by
                the network, and a correction, a softmax as the paper's. So classes are ordered from
                the first step on
    zero_init   the softmax begins as the uniform distribution
    time        show the network t and s as numbers as well
    stages      S of an upscale model: the network is told s and, where x is unknown, x^(s-1)
    """

    def __init__(self, K, shape, num_outputs=None, dim=32, depth=2, levels=3, heads=0,
                 neighbours=True, logistic=True, time=False, zero_init=True, stages=1):
        super().__init__()
        self.K, self.shape, self.stages = K, tuple(shape), stages
        self.neighbours, self.logistic, self.num_outputs = neighbours, logistic, num_outputs or K
        C, quarter = shape[0], dim // 4
        inputs = (2 + (2 * len(WINDOWS) + (stages > 1) if neighbours else 0)) * C
        self.first = nn.Conv2d(inputs + (stages if stages > 1 else 0), dim - quarter, 3, padding=1)
        self.embed, self.mix = nn.Embedding(K, quarter), nn.Conv2d(C * quarter, quarter, 1)
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim),
                                  nn.SiLU()) if time else None

        def block(width, out):
            return ResBlock(width, out, time=4 * dim if time else 0)
        self.down, self.up, width = nn.ModuleList(), nn.ModuleList(), dim
        widths = [dim * min(2, 2 ** level) for level in range(levels)]
        for w in widths:
            self.down.append(nn.ModuleList(block(width if i == 0 else w, w) for i in range(depth)))
            width = w
        self.middle = nn.ModuleList([block(width, width)])
        if heads:
            self.middle += [PixelAttention(width, heads), block(width, width)]
        for w in reversed(widths):               # each block also sees what its like said before
            self.up.append(nn.ModuleList(block((width if i == 0 else w) + w, w)
                                         for i in range(depth)))
            width = w
        self.norm = nn.GroupNorm(groups(width), width)
        std = 0.0 if zero_init else width ** -0.5
        self.head = nn.Parameter(std * torch.randn(C, width, self.num_outputs))
        self.bias = nn.Parameter(torch.zeros(C, 1, self.num_outputs))
        self.place = nn.Conv2d(width, 2 * C, 1) if logistic else None
        if logistic:
            nn.init.zeros_(self.place.weight), nn.init.zeros_(self.place.bias)
        self.to(memory_format=torch.channels_last)       # several times as fast on a CPU

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        return self.at(x, m, t, s, torch.ones_like(m)).view(*x.shape, -1)

    def matrices(self):
        """As of the Transformer; attention's queries, keys and values are taken as one here."""
        parts = (self.down, self.middle, self.up)
        return {1: [p for part in parts for p in part.parameters() if p.ndim == 4]}

    def at(self, x, m, t, s, where):
        """The same for the n variables in `where` (B, D, bool) alone: (n, num_outputs)."""
        h, place = self.body(x, m, t, s)                 # (B * H * W, dim), (B * D, 2) or None
        (C, H, W), flat = self.shape, where.flatten().nonzero()[:, 0]    # (n,)
        colour = flat // (H * W) % C
        pixel = flat // (C * H * W) * (H * W) + flat % (H * W)
        logits = [torch.addmm(self.bias[c], h.index_select(0, pixel[colour == c]), self.head[c])
                  for c in range(C)]
        logits = torch.cat(logits).index_select(0, colour.argsort(stable=True).argsort())
        if place is None:
            return logits
        return logits + logistic(*place.index_select(0, flat).split(1, dim=-1), self.K)

    def body(self, x, m, t, s):
        """-> h (B * H * W, dim), from which the logits of a pixel's colours come, and (B * D, 2)
        what `logistic` takes for each variable, or None."""
        (B, D), shape = x.shape, self.shape
        x, m = x.view(B, *shape), m.view(B, *shape)
        if self.stages == 1:
            x = torch.where(m, x, self.K // 2)           # the value that is shown as 0
        inputs, near = self.look(x.to(self.head.dtype) / self.K - 0.5, m, s)
        digits = self.embed(x).permute(0, 1, 4, 2, 3).flatten(1, 2)      # (B, C * dim / 4, H, W)
        h = torch.cat((self.first(inputs), self.mix(digits)), dim=1)
        h = F.silu(self.norm(self.pyramid(h, self.steps(t, s, D))))      # (B, dim, H, W)
        place = None
        if self.logistic:
            shift, scale = self.place(h).chunk(2, dim=1)                 # (B, C, H, W)
            place = torch.stack((near + shift, scale), dim=-1).view(B * D, 2)
        return h.permute(0, 2, 3, 1).flatten(0, 2), place

    def look(self, v, m, s):
        """What the first convolution sees, (B, inputs, H, W), of v and m (B, C, H, W) and s (B,);
        and the mean of what is known next to each variable, (B, C, H, W), or 0."""
        known, near = m.to(v.dtype), 0.0
        inputs = [v, known]
        if self.neighbours:
            means, counts = local_means(v, known)                        # (windows, B, C, H, W)
            near = means[-1]
            # All but one are shown as they differ from the nearest mean: a small number, which
            # shall count, and the same wherever the image is darker as a whole.
            inputs = [16 * (v - near) * known, known, 8 * near, *16 * (means[:-1] - near), *counts]
            if self.stages > 1:
                inputs.append(16 * (v - near) * (1 - known))             # x^(s-1)
        if self.stages > 1:
            stage = F.one_hot(s - 1, self.stages)[:, :, None, None].to(v.dtype)
            inputs.append(stage.expand(-1, -1, *v.shape[2:]))
        inputs = torch.cat(inputs, dim=1)
        return inputs.contiguous(memory_format=torch.channels_last), near

    def steps(self, t, s, D):
        """What the blocks are told of the time: (B, 4 * dim), or None."""
        if self.time is None:
            return None
        part = 1000 * (t + (s - 1) * D).to(self.head.dtype) / (self.stages * D)
        angles = wave_angles(part, self.time[0].in_features)
        return self.time(torch.cat((angles.sin(), angles.cos()), dim=-1))

    def pyramid(self, h, time):
        """Down through the levels, keeping what every block says, and up again with it."""
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            for block in blocks:
                h = block(h, time)
                skips.append(h)
        for block in self.middle:
            h = block(h, time)
        for blocks in self.up:
            for block in blocks:
                if h.shape[2:] != skips[-1].shape[2:]:   # once a level: back to its resolution
                    H, W = skips[-1].shape[2:]
                    h = F.interpolate(h, scale_factor=2)[:, :, :H, :W]
                h = block(torch.cat((h, skips.pop()), dim=1), time)
        return h


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with two 3x3 convolutions."""

    def __init__(self, width, out, time=0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups(width), width), nn.GroupNorm(groups(out), out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out) if time else None
        self.short = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """x + attention between all pixels of norm(x)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups(width), width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x, time):
        B, dim, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, -1)
        h = attention(*qkv.permute(2, 0, 3, 1, 4))                       # (B, heads, H * W, d)
        return x + self.out(h.permute(0, 1, 3, 2).reshape(B, dim, H, W))


WINDOWS = (17, 9, 5, 3)                      # widths of the windows of `local_means`


def local_means(v, known, prior=0.3):
    """Means of the known values near each variable: v, known (B, C, H, W), known 0 or 1.

    From the whole image to the smallest window, each mean also counts the mean of the window before
    it, as `prior` values. So where nothing is known near by, the larger window speaks. Returns the
    means and the logarithms of the counts, (windows, B, C, H, W) each.
    """
    v = v * known
    mean = v.sum((2, 3), keepdim=True) / (known.sum((2, 3), keepdim=True) + prior)   # (B, C, 1, 1)
    means, counts = [], []
    for width in WINDOWS:
        total, count = (F.avg_pool2d(part, width, 1, width // 2, divisor_override=1)
                        for part in (v, known))
        mean = (total + prior * mean) / (count + prior)
        means.append(mean), counts.append(torch.log1p(count) / 3)
    return torch.stack(means), torch.stack(counts)


def logistic(location, width, K):
    """Log-density of the logistic distribution at the K values, but for a constant: (n, K).

    location (n, 1) on the scale of value/K - 0.5, its scale is e^(2 width - 3), at least 1/(2K).
    """
    values = torch.arange(K, dtype=location.dtype, device=location.device) / K - 0.5
    z = (values - location) * torch.exp(3 - 2 * width).clamp(max=2.0 * K)         # (n, K)
    # above its threshold softplus(z) is taken to be z: at 40 that is exact, at the usual 20 not
    return z - 2 * F.softplus(z, threshold=40)


def groups(width):
    """How many groups a GroupNorm has: the released code's 32, or 8 below 128 channels."""
    return math.gcd(width, 32 if width >= 128 else 8)
