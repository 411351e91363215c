"""Networks net(x, m, t, s) -> (B, D, num_outputs) logits (App. D), and how one is built or loaded.

x (B, D) int64 holds x^(s) where m (B, D) bool is True, and x^(s-1) elsewhere. t and s are (B,)
int64. Nothing is causal: an output may depend on every known variable.

Transformer, UNet and WaveNet are the paper's. Our own networks learn more in minutes. What they add
and leave out stands in their docstrings.
"""
import ctypes
import hashlib
import math
import platform
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ardm import ARDM, UpscaleARDM, num_stages

# MKL chooses a function's kernel at its first call. If two threads make that call at once, one may
# get a coarse kernel, wrong by 1e-4: no archive could be decoded. So one thread calls them first.
for function in (torch.exp, torch.log, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.erf):
    function(torch.ones(1))
    function(torch.ones(1).double())

torch.backends.cudnn.allow_tf32 = False      # else float32 is cut in convolutions on CUDA
MAX_WAVELENGTH = 10000.0             # of the sines of positions and steps, over 2 pi


class Network(nn.Module):
    """Calls without gradients are split over rows, so their memory does not grow with the batch."""

    def __call__(self, x, *others):
        rows = rows_per_call(x.device.type, x.shape[1])
        if torch.is_grad_enabled() or len(x) <= rows:
            return super().__call__(x, *others)
        call, inputs = super().__call__, (x, *others)
        return torch.cat([call(*part) for part in zip(*(each.split(rows) for each in inputs))])


# -- Text ------------------------------------------------------------------------------------------

class Transformer(Network):
    """Bidirectional pre-norm Transformer (App. D). D is the longest input, shorter ones will do.

    With one stage an unknown variable is a class of its own, K. In an upscale model the input of
    unknown variables is x^(s-1), and a second embedding gives s and m."""

    def __init__(self, K, D, num_outputs=None, dim=128, depth=4, heads=2, stages=1):
        super().__init__()
        self.absorbed = K
        self.embed = Embedding(K + 1, dim)
        self.stage = nn.Embedding(2 * stages, dim) if stages > 1 else None
        channels = self.make_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs or K)
        angles = wave_angles(torch.arange(D).double(), channels)
        self.register_buffer("cos", angles.cos().float())  # in checkpoints, so that machines agree
        self.register_buffer("sin", angles.sin().float())

    def make_blocks(self, dim, depth, heads):
        """Makes the blocks. -> the number of channels that tell positions."""
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        return dim

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        if self.stage is None:
            h = self.embed(torch.where(m, x, self.absorbed))             # (B, D, dim)
        else:
            h = self.embed(x) + self.stage(2 * s[:, None] - 2 + m)
        h = self.body(h, self.cos[:x.shape[1]], self.sin[:x.shape[1]])
        return self.head(self.norm(h))

    def body(self, h, cos, sin):
        h = h + torch.cat((sin, cos), dim=-1)
        for block in self.blocks:
            h = block(h)
        return h


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Ours replace attention and mix."""

    def __init__(self, dim, heads, attention=None, mix=nn.Identity):
        super().__init__()
        self.attention = (attention or Attention)(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.mix = mix(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x, turned=nn.Identity()):
        x = x + self.attention(x, turned)
        return x + self.down(F.gelu(self.up(self.mix(self.norm(x)))))


class Attention(nn.Module):
    """Multi-head attention of norm(x), both ways. The linear layers have no bias."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, turned=nn.Identity()):
        """(B, D, dim) -> (B, D, dim). turned: a hook that rotates queries and keys."""
        B, D, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(B, D, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)               # (B, heads, D, d) each
        h = attention(turned(q), turned(k), v)
        return self.out(h.transpose(1, 2).reshape(B, D, dim))


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over (B, heads, D, d)."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # On a CPU in bfloat16 PyTorch's fused kernel is 2 to 7 times slower than its parts.
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def wave_angles(positions, dim):
    """(n,) float positions -> (n, dim/2) angles, wavelengths from 2 pi to 2 pi MAX_WAVELENGTH."""
    exponents = torch.linspace(0, 1, dim // 2, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * MAX_WAVELENGTH ** -exponents


# -- Images ----------------------------------------------------------------------------------------

class UNet(Network):
    """U-Net at one resolution for images (C, H, W) (App. D): `depth` ResBlocks "down", one in the
    middle (if heads > 0 also attention and one more), `depth` "up". Each "up" also gets the output
    of its twin "down". D = C * H * W variables, colour by colour. stages, b: of upscaling."""

    planes_each, timed = 2, True         # inputs for each colour; told how far the generation is

    def __init__(self, K, shape, num_outputs=None, dim=32, depth=2, heads=0, stages=1, b=None):
        super().__init__()
        self.K, self.shape, self.stages, self.b = K, tuple(shape), stages, b
        C, time = shape[0], 4 * dim if self.timed else 0   # channels of the time
        inputs = self.planes_each * C + (stages if stages > 1 else 0)
        self.first = nn.Conv2d(inputs, dim - dim // 4, 3, padding=1)
        self.embed = Embedding(K, dim // 4)
        self.mix = nn.Conv2d(C * (dim // 4), dim // 4, 1)
        self.time = Time(dim, time, math.prod(shape), stages) if time else (lambda t, s: None)
        self.down = nn.ModuleList(ResBlock(dim, dim, time) for _ in range(depth))
        self.middle = nn.ModuleList([ResBlock(dim, dim, time)])
        if heads:
            self.middle += [PixelAttention(dim, heads), ResBlock(dim, dim, time)]
        self.up = nn.ModuleList(ResBlock(2 * dim, dim, time) for _ in range(depth))
        self.run = ResBlock.__call__
        if depth > 8:                                      # compile one block, not all of them
            self.run = torch.compiler.nested_compile_region(self.run)
        self.norm = nn.GroupNorm(groups(dim), dim)
        self.head = nn.Parameter(torch.randn(C, dim, num_outputs or K) * dim ** -0.5)
        self.bias = nn.Parameter(torch.zeros(C, 1, num_outputs or K))

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        x, m = x.view(-1, *self.shape), m.view(-1, *self.shape)          # (B, C, H, W)
        if self.stages == 1:
            x = torch.where(m, x, self.K // 2)             # the value that is shown as 0
        planes = self.planes(x.to(self.head.dtype) / self.K - 0.5, m, s)
        inputs = with_stage(planes, s, self.stages)
        embedded = self.embed(x).permute(0, 1, 4, 2, 3).flatten(1, 2)    # (B, C * dim/4, H, W)
        h = torch.cat((self.first(inputs), self.mix(embedded)), dim=1)   # (B, dim, H, W)
        h = F.silu(self.norm(self.body(h, self.time(t, s))))
        return self.logits(h, planes)

    def planes(self, v, m, s):
        """Values -0.5..0.5 and mask -> what the first convolution sees, a list of (B, C, H, W)."""
        return [v, m.to(v.dtype)]

    def body(self, h, time):
        """Down, middle and up again. (B, dim, H, W) -> (B, dim, H, W)"""
        skips = []
        for block in self.down:
            h = self.run(block, h, time)
            skips.append(h)
        for block in self.middle:
            h = block(h, time)
        for block in self.up:
            h = self.run(block, torch.cat((h, skips.pop()), dim=1), time)
        return h

    def logits(self, h, planes):
        """(B, dim, H, W) -> (B, D, num_outputs): each colour has a matrix of its own."""
        pixels = h.permute(0, 2, 3, 1).flatten(1, 2)[:, None]            # (B, 1, H * W, dim)
        return (pixels @ self.head + self.bias).flatten(1, 2)


def with_stage(planes, s, stages):
    """A list of (B, .., H, W) or (B, .., D) as one tensor. If stages > 1, s joins, one-hot."""
    if stages > 1:
        size = planes[0].shape[2:]
        stage = F.one_hot(s - 1, stages).view(-1, stages, *[1] * len(size)).to(planes[0].dtype)
        planes = [*planes, stage.expand(-1, -1, *size)]
    return torch.cat(planes, dim=1)


class Time(nn.Sequential):
    """How far the generation is: step t and stage s, (B,) each -> (B, out)."""

    def __init__(self, dim, out, D, stages):
        super().__init__(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())
        self.D, self.stages = D, stages

    def forward(self, t, s):
        part = (t + (s - 1) * self.D).to(self[0].weight.dtype) / (self.stages * self.D)
        angles = wave_angles(1000 * part, self[0].in_features)
        return super().forward(torch.cat((angles.sin(), angles.cos()), dim=-1))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))). time: channels of its input, 0: none."""

    def __init__(self, width, out, time):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups(width), width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(time, out) if time else None
        self.norm2 = nn.GroupNorm(groups(out), out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.short = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(Attention):
    """x + attention between all pixels. It begins as x, as in the released code."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, time):
        """(B, dim, H, W) -> (B, dim, H, W)"""
        h = super().forward(x.flatten(2).mT.contiguous())  # (B, H * W, dim)
        return x + h.mT.reshape(x.shape)


def groups(width):
    """Groups of a GroupNorm: the released code's 32, or 8 below 128 channels."""
    return math.gcd(width, 32 if width >= 128 else 8)


# -- Audio -----------------------------------------------------------------------------------------

DILATIONS = 12                       # 1, 2, 4, .. 2048, then 1 again
WIDEST = 7.0                         # limit of a logistic's log(scale), as released


class WaveNet(Network):
    """DiffWave for audio (App. D): a WaveNet that sees both sides. Any length will do, only the
    time uses D. mixture: the outputs are what `log_mass` takes, not logits of digits."""

    def __init__(self, K, D, num_outputs, dim=48, depth=9, stages=1, b=None, mixture=True):
        super().__init__()
        self.K, self.D, self.stages, self.b = K, D, stages, b or K
        self.num_outputs, self.mixture = num_outputs, mixture
        time = self.make_inputs(dim)
        self.blocks = nn.ModuleList(GatedBlock(dim, 2 ** (i % DILATIONS), time)
                                    for i in range(depth))
        self.last = nn.Conv1d(dim, dim, 1)
        self.head = nn.Conv1d(dim, num_outputs - mixture, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def make_inputs(self, dim):
        """The first layers. -> channels of the time."""
        self.time = Time(dim, 4 * dim, self.D, self.stages)
        self.embed = nn.Embedding(self.K, dim // 4)
        planes = 2 + (self.stages if self.stages > 1 else 0)
        self.first = nn.Conv1d(planes, dim - dim // 4, 3, padding=1)
        return 4 * dim

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs)."""
        x, m = x[:, None], m[:, None]                      # (B, 1, D)
        if self.stages == 1:
            x = torch.where(m, x, self.K // 2)             # the value that is shown as 0
        h, *frame = self.inputs(x, m, s)                   # (B, dim, D)
        out = self.body(F.relu(h), self.time(t, s))
        return (self.spread(out, *frame) if self.mixture else out).mT

    def inputs(self, x, m, s):
        """(B, 1, D) values and mask -> a tuple of (B, dim, D), and of what `spread` needs."""
        dtype = self.head.weight.dtype
        h = self.first(with_stage([2 * x.to(dtype) / self.K - 1, m.to(dtype)], s, self.stages))
        return torch.cat((h, self.embed(x[:, 0]).mT), dim=1),

    def body(self, h, time):
        """The gated blocks, and the sum of their skips. (B, dim, D) -> (B, outputs of head, D)"""
        total = 0.0
        for block in self.blocks:
            h, skip = block(h, time)
            total = total + skip
        h = F.relu(total * len(self.blocks) ** -0.5)
        return self.head(F.relu(self.last(h)))

    def spread(self, out):
        """As released: logistics that begin evenly spread over all values."""
        n = self.num_outputs // 3
        weight, place, width = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(3, dim=1)
        start = torch.linspace(1 / n - 1, 1 - 1 / n, n, device=out.device, dtype=weight.dtype)
        log_scale = (width - math.log(n)).clamp(-WIDEST, WIDEST) + math.log(self.K / 2)
        anchor = torch.full_like(weight[:, :1], self.K // 2)
        return torch.cat((anchor, weight, (place + start[:, None]) * self.K / 2, log_scale), dim=1)


class GatedBlock(nn.Module):
    """tanh(a) * sigmoid(b) of a dilated convolution -> the next block's input, and a skip."""

    def __init__(self, dim, dilation, time):
        super().__init__()
        self.time = nn.Linear(time, dim) if time else None
        self.gates = nn.Conv1d(dim, 2 * dim, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(dim, 2 * dim, 1)
        for conv in (self.gates, self.out):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x, time):
        h = x if self.time is None else x + self.time(time)[:, :, None]
        a, b = self.gates(h).chunk(2, dim=1)
        out, skip = self.out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, dim=1)
        return (x + out) * 0.5 ** 0.5, skip


class MixtureARDM(ARDM):
    """The order-agnostic ARDM of audio, by `log_mass`. Only the variables of one call have
    log-probabilities of all K = 65,536 values."""

    def log_probs(self, x, m, t, s, where=None):
        """log p of every value: (B, D, K), or (n, K) of the n variables in `where`."""
        mixture, value = self.logits(x, m, t, s), torch.arange(self.K, device=x.device)
        mixture = mixture if where is None else mixture[where]
        few = max(1, (1 << 19) // self.K)                  # bounds the memory of `log_mass`
        log_p = [log_mass(part[:, None], value, value + 1, self.K)
                 for part in mixture.flatten(0, -2).split(few)]
        return torch.cat(log_p).view(*mixture.shape[:-1], self.K)

    def true_log_p(self, x, m, t, s):
        """log p of the values that x has, (B, D) nats: one mass each."""
        return log_mass(self.logits(x, m, t, s), x, x + 1, self.K)


class UpscaleMixture(UpscaleARDM):
    """The upscale ARDM of audio. A digit has the mass of its interval, divided by the mass of the
    interval that the digits before it leave (App. A.1, for a K that is too large for logits)."""

    def digits(self, mixture, x, s):
        """log p of the digits of stage s, (B, D, b) nats, normalised over b."""
        unit = self.unit(s)[..., None]
        low = self.coarsen(x, s - 1)[..., None] + unit * torch.arange(self.A, device=x.device)
        log_p = log_mass(mixture[..., None, :], low, low + unit, self.K)
        return log_p.masked_fill(low >= self.K, -torch.inf).log_softmax(dim=-1)

    def true_log_p(self, x, m, t, s):
        """log p of the digits that x has, (B, D) nats: from two masses, not b."""
        mixture = self.logits(x, m, t, s)
        digit, before = self.coarsen(x, s), self.coarsen(x, s - 1)
        return (log_mass(mixture, digit, digit + self.unit(s), self.K)
                - log_mass(mixture, before, before + self.unit(s - 1), self.K))


def log_mass(mixture, low, high, K):
    """log of the mass that a mixture of logistics puts on the values low..high - 1 of 0..K-1.

    mixture (..., 1 + 3n): the anchor, a whole number from which centres are counted; n logits of
    the weights; n centres; n log(scale)s. low and high (...) are integers. The first value owns all
    numbers below it, the last one all above it, so the K masses sum to 1.
    With a and b = (boundary - centre) / scale, and w = b - a, the mass between a and b is
    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^-w), which is exact far out, too."""
    anchor, (weight, centre, log_scale) = mixture[..., :1], mixture[..., 1:].chunk(3, dim=-1)
    low, high = low[..., None], high[..., None]
    a = (low - anchor - 0.5 - centre) * torch.exp(-log_scale)
    b = (high - anchor - 0.5 - centre) * torch.exp(-log_scale)
    w = (high - low) * torch.exp(-log_scale)
    first, last = low <= 0, high >= K
    a = torch.where(first, -torch.inf, a)
    b = torch.where(last, torch.inf, b)
    w = torch.where(first | last, torch.inf, w)
    log_p = F.logsigmoid(b) + F.logsigmoid(-a) + torch.log(-torch.expm1(-w))
    return (weight.log_softmax(dim=-1) + log_p).logsumexp(dim=-1)


# -- Skip on a first reading: what is not in the paper; models from settings and checkpoints -------

CONV = 5                             # width of the convolution that mixes neighbours
EVERY = 2                            # blocks from one with attention to the next


class OurTransformer(Transformer):
    """Not in the paper: rotary positions, attention in every second block, and convolutions."""

    def make_blocks(self, dim, depth, heads):
        self.blocks = nn.ModuleList(
            Block(dim, heads, NoAttention if i % EVERY else Attention, NeighbourConv)
            for i in reversed(range(depth)))
        return dim // heads

    def body(self, h, cos, sin):
        for block in self.blocks:
            h = block(h, lambda q: rotate(q, cos, sin))
        return h


class NoAttention(nn.Identity):
    """The attention of a block that has none."""

    def forward(self, x, turned):
        return 0


class NeighbourConv(nn.Module):
    """A depthwise convolution along D: a sum of shifted copies."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CONV, 1, dim).uniform_(-1, 1) * CONV ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, h):
        D = h.shape[1]
        around = F.pad(h, (0, 0, CONV // 2, CONV // 2))    # (B, 2 + D + 2, dim)
        return sum((around[:, i:i + D] * w for i, w in enumerate(self.weight)), self.bias)


def rotate(x, cos, sin):
    """Rotary positions: turns the pairs (x_i, x_{i+d/2}) of x (..., D, d) by angles (D, d/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class Embedding(nn.Embedding):
    """A lookup. In training on a GPU it is a product with one-hot rows: the gradient of a lookup
    adds row after row, and that took a fifth of a training step of images."""

    def forward(self, x):
        if not (self.training and x.is_cuda):
            return super().forward(x)
        one_hot = x[..., None] == torch.arange(self.num_embeddings, device=x.device)
        return (one_hot.to(self.weight.dtype) @ self.weight).to(self.weight.dtype)


WINDOWS = (17, 9, 5, 3)              # widths of the windows of `local_means`
PRIOR = 0.3                          # the larger window's mean counts as so many values
NEAR, MEAN = 16, 8                   # factors that bring differences and means to about 1


class OurUNet(UNet):
    """Not in the paper: means of the known values around each variable are inputs, the time is not.
    If the outputs are values, not digits, log-densities of a logistic are added to the logits."""

    planes_each, timed = 2 + 2 * len(WINDOWS), False

    def __init__(self, K, shape, num_outputs=None, dim=32, values=True, **sizes):
        super().__init__(K, shape, num_outputs, dim, **sizes)
        nn.init.zeros_(self.head)                          # the softmax begins as uniform
        self.place = nn.Conv2d(dim, 2 * shape[0], 1) if values else None
        if values:
            nn.init.zeros_(self.place.weight)
            nn.init.zeros_(self.place.bias)

    def logits(self, h, planes):
        logits = super().logits(h, planes)
        if self.place is not None:
            shift, width = self.place(h).chunk(2, dim=1)   # (B, C, H, W)
            location = planes[2] / MEAN + shift
            logits = logits + logistic(location.flatten(1)[..., None],
                                       width.flatten(1)[..., None], self.K)
        return logits

    def planes(self, v, m, s):
        """(B, C, H, W) each: values minus the mean of the nearest known ones, so that a darker
        image looks the same; the mask; this mean; the wider means minus this mean; counts."""
        known, seen = m.to(v.dtype), m.to(v.dtype)
        if self.stages > 1:
            # From stage 2 on, x^(s-1) leaves an interval. Its middle stands for the value.
            later = (s > 1)[:, None, None, None]
            unit = self.b ** (self.stages - s + 1)         # an integer: machines agree
            half = 0.5 * unit.to(v.dtype)[:, None, None, None] / self.K
            v = torch.where(later & ~m, v + half, v)
            seen = (m | later).to(v.dtype)
        means, counts = local_means(v, seen)               # (windows, B, C, H, W)
        near = means[-1]
        return [NEAR * (v - near) * seen, known, MEAN * near, *NEAR * (means[:-1] - near), *counts]


def local_means(v, seen, windows=WINDOWS, first=0.0):
    """Means of the seen values near each variable. v, seen (0 to 1): (B, C, H, W) or (B, 1, D).
    The windows go from wide to narrow. Each counts the mean before it as PRIOR extra values: before
    the widest window that is the mean of all of v, and before this mean it is `first`.
    -> means, and log(1 + counts) / 3: (windows, B, C, H, W) each."""
    v, places = v * seen, tuple(range(2, v.ndim))
    pool = F.avg_pool2d if v.ndim == 4 else F.avg_pool1d
    mean = (v.sum(places, keepdim=True) + PRIOR * first) / (seen.sum(places, keepdim=True) + PRIOR)
    means, counts = [], []
    for width in windows:
        n = width ** len(places)                           # from a mean back to a sum
        total, count = (n * pool(part, width, 1, width // 2) for part in (v, seen))
        mean = (total + PRIOR * mean) / (count + PRIOR)
        means.append(mean)
        counts.append(torch.log1p(count) / 3)
    return torch.stack(means), torch.stack(counts)


def logistic(location, width, K):
    """Logits (..., K) of a logistic density. They make neighbouring values similarly likely.
    The network predicts location and width (..., 1) in units of value/K - 0.5. The scale of the
    logistic is the larger one of e^(2 width - 3) and 1/(2K)."""
    values = torch.arange(K, dtype=location.dtype, device=location.device) / K - 0.5
    z = (values - location) * torch.exp(3 - 2 * width).clamp(max=2.0 * K)
    # Above its threshold softplus(z) gives z. At 20, the default, that is not exact in float64.
    return z - 2 * F.softplus(z, threshold=40)


LOUDNESS = (513, 129, 33, 9)         # windows in which the local amplitude is measured
FLOOR = 0.5                          # the smallest amplitude, in steps of the 16-bit scale
COARSE = 0.02                        # weight of a value of which only the first digits are known
NARROWEST = -3.0                     # smallest log(scale) of a logistic
STEEPEST = 6.0                       # limit of log(scale / reach), both ways


class OurWaveNet(WaveNet):
    """Not in the paper: inputs and outputs are relative to the local amplitude, so that loud and
    soft sound look alike. Means of known values are inputs, time and embedded values are not. One
    logistic is a point: the value whose further digits are 0, as in sound recorded with 8 bits."""

    def make_inputs(self, dim):
        planes = 5 + 2 * len(WINDOWS) + 2 * len(LOUDNESS) + (self.stages if self.stages > 1 else 0)
        self.first = nn.Conv1d(planes, dim, 3, padding=1)
        self.time = lambda t, s: None
        return 0

    def inputs(self, x, m, s):
        """(B, 1, D) values and mask -> (B, dim, D), and for `spread`: anchor, low, centre, reach.
        The known digits leave an interval of values. The network is shown the one nearest to zero:
        the middle would make a quiet place look loud. Without any digit this value v is 0."""
        dtype = self.head.weight.dtype
        left = self.stages - s[:, None, None] + 1 - m.long()
        unit = self.b ** left                              # how many values the known digits leave
        low = x - self.K // 2                              # of these values the first one
        v = nearest_to_zero(low, unit).to(dtype)
        weight = torch.where(m, 1.0, COARSE * (s > 1)[:, None, None]).to(dtype)
        power = v ** 2 + (unit.to(dtype) / 64) ** 2        # and what unknown digits may add
        powers, amounts = local_means(power, weight, LOUDNESS, first=(self.K / 64) ** 2)
        loud = (powers + FLOOR ** 2).sqrt()                # (windows, B, 1, D)
        means, counts = local_means(v, weight)
        amplitude, near = loud[-1], means[-1]
        zero = (x % (unit * self.b) == 0).to(dtype)        # a known value's latest digit is 0
        zeros, _ = local_means(zero, m.to(dtype), LOUDNESS[1:2])
        planes = [(v - near) / amplitude * (weight > 0), v / amplitude, near / amplitude, *amounts,
                  m.to(dtype), (unit / amplitude).log() / 5, amplitude.log() / 5, *zeros,
                  *(means[:-1] - near) / amplitude, *(loud[:-1] / amplitude).log(), *counts]
        return (self.first(with_stage(planes, s, self.stages)), self.K // 2 + v,
                low - v, near * (weight == 0), torch.minimum(amplitude, unit))

    def spread(self, out, anchor, low, centre, reach):
        """Logistics around what is known, but the first at `low`. reach: the smaller one of the
        local amplitude and the number of values that the known digits leave. In units of `reach`
        all numbers stay small, so machines agree. The clamp keeps extreme scales finite."""
        weight, place, width = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(3, dim=1)
        start = torch.arange(1 - weight.shape[1], 1, device=out.device)[:, None]
        log_scale = reach.log() + (start + width).clamp(-STEEPEST, STEEPEST)
        log_scale = torch.where(start == start[0], NARROWEST, log_scale.clamp(min=NARROWEST))
        centre = torch.where(start == start[0], low, centre + reach * place)
        return torch.cat((anchor, weight, centre, log_scale), dim=1)


def nearest_to_zero(low, unit):
    """Of the integers low, low + 1, .. low + unit - 1 the one nearest to zero, (...) each."""
    return torch.maximum(low, (low + unit - 1).clamp(max=0))


ENGLISH = Path(__file__).parent / "results" / "english.pt"  # used where no checkpoint is named
EDITION = 3                          # of the settings in a checkpoint
MOST_D = 1 << 18                     # variables in a datapoint
LOG_PROBS = 1 << 26                  # log-probabilities of one call, at most; callers obey it
WORDS = "data size recipe kind parametrization".split()     # of the settings
COUNTS = "K length rate bits batch parts branch dim depth heads seed".split()


def build(c):
    """An untrained ARDM of these settings. ValueError for sizes that do not fit together."""
    keep_freed_memory()
    kind, K, shape, b = c["kind"], c["K"], c["shape"], c["branch"]
    dim, heads = c["dim"], c["heads"]
    if dim < 4 or heads < (kind == "text") or dim % (2 * max(1, heads)):
        raise ValueError(f"--dim {dim}, --heads {heads}: take a width of 4 or more, a multiple of "
                         "2 * heads; text has one head or more")
    way, ways = c["parametrization"], ("mixture" if kind == "audio" else "data", "direct")
    if b and way not in ways:
        raise ValueError(f"--parametrization {way} is not for {kind}: choose {' or '.join(ways)}")
    D, S, ours = math.prod(shape), num_stages(K, b) if b else 1, c["recipe"] == "ours"
    axes, most = (3, 4) if kind == "image" else (1, MOST_D)
    fits = len(shape) == axes and min(shape) > 0 and shape[0] <= most
    if not fits or D > MOST_D or K > 1 << 16 or not 0 < c["depth"] <= 1000:
        raise ValueError(f"K {K}, shape {shape}, depth {c['depth']}: too much, or not of {kind}")
    values = not b or way != "direct"                      # the network speaks of values
    sizes = dict(num_outputs=K if values else S * b, dim=dim, depth=c["depth"], stages=S)
    if kind == "text":
        net = (OurTransformer if ours else Transformer)(K, D, heads=heads, **sizes)
    elif kind == "image":
        sizes |= dict(b=b or None, heads=heads)
        net = OurUNet(K, shape, values=values, **sizes) if ours else UNet(K, shape, **sizes)
    else:
        sizes["num_outputs"] = 1 + 3 * (3 if ours else 30) if values else S * b
        net = (OurWaveNet if ours else WaveNet)(K, D, b=b or None, mixture=values, **sizes)
    if kind == "audio" and values:
        return UpscaleMixture(net, D, K, b) if b else MixtureARDM(net, D, K)
    return UpscaleARDM(net, D, K, b, way) if b else ARDM(net, D, K)


def load(path, device=None):
    """(model with the averaged weights, checkpoint). Only tensors and plain values are read."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint; python train.py writes one")
    try:
        if any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
            raise ValueError("torch does not pack")        # a small file could fill the memory
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        c, weights, L = checkpoint["settings"], checkpoint["ema"], checkpoint.get("L")
        if c.get("edition") != EDITION:
            raise ValueError(f"not of edition {EDITION}")
        types, numbers = {type(c[name]) for name in WORDS}, [c[name] or 0 for name in COUNTS]
        if types != {str} or not all(type(n) is int and n >= 0 for n in numbers + c["shape"]):
            raise ValueError("a setting is no word, or no number, where one is wanted")
        there, size = sum(map(torch.numel, weights.values())), Path(path).stat().st_size
        positions = math.prod(c["shape"]) if c["kind"] == "text" else 0
        if not max(c["depth"] * c["dim"] ** 2, positions) <= there <= size:
            raise ValueError("its settings want more weights than it has, or fewer")
        if not all(each.isfinite().all() for each in weights.values()):
            raise ValueError("its weights are not numbers")
        model = build(c)
        model.load_state_dict(weights)
        if L is not None and L.shape != (model.S, model.D):
            raise ValueError("its L is not of this model")
    except Exception as error:                             # whatever a torn or foreign file raises
        reason = " ".join(f"{type(error).__name__}: {error}".partition(". ")[0].split())[:120]
        raise ValueError(f"{path} is no checkpoint of this program, or a damaged one ({reason})")
    return model.eval().to(pick_device(device)), checkpoint


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    content = b"".join(name.encode() + value.cpu().numpy().tobytes()
                       for name, value in sorted(model.state_dict().items()))
    return hashlib.sha256(content).hexdigest()[:16]


def pick_device(name=None):
    """The device of that name. Without a name: the fastest kind there is."""
    name = name or ("cuda" if torch.cuda.is_available() else
                    "mps" if torch.backends.mps.is_available() else "cpu")
    if name.partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: choose cuda, mps or cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}")


def has_bf16(device):
    """True if the processor multiplies bfloat16 itself: elsewhere it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def rows_per_call(device, D):
    """Datapoints in one call without gradients. More are slower on a CPU, or do not fit a GPU."""
    return max(1, (1 << (12 if device == "cpu" else 17)) // D)


def keep_freed_memory():
    """Lets glibc keep freed memory for the next call: to fetch it anew takes 10 to 30% longer."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1)):               # M_MMAP_MAX, M_TRIM_..
            ctypes.CDLL(None).mallopt(option, value)
