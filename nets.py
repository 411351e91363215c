"""Networks: net(x, m, t, s) -> (B, D, num_outputs) logits (App. D), and how one is built or loaded.

x (B, D) int64 holds x^(s) where m (B, D) bool is True and x^(s-1) elsewhere; t and s are (B,)
int64. Every variable sees every other: nothing here is causal; the mask hides what is unknown.

With extras=False a network is the paper's. With extras=True it has in addition what learns more in
minutes; every extra stands in a place of its own, marked "not in the paper".
"""
import ctypes
import hashlib
import math
import platform
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ardm import ARDM, UpscaleARDM, num_stages

# On a CPU, MKL chooses the kernel of a function when it is first called. Where two threads made
# that call at once, one of them now and then got a coarse kernel, wrong by 1e-4, for that call:
# enough to make an archive undecodable. So each function is first called here, by one thread.
for function in (torch.exp, torch.log, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.erf):
    function(torch.ones(1))
    function(torch.ones(1).double())


# -- Text ------------------------------------------------------------------------------------------

CONV = 5                             # width of the convolution that mixes neighbours
EVERY = 2                            # blocks from one with attention to the next


class Transformer(nn.Module):
    """Bidirectional pre-norm Transformer (App. D); D is the longest input, shorter ones will do.

    stages: S of an upscale model. Without stages an unknown variable is an extra class, K; with
    them it holds x^(s-1), and an embedding tells s and m.
    """

    def __init__(self, K, D, num_outputs=None, dim=128, depth=4, heads=2, stages=1, extras=True):
        super().__init__()
        self.absorbed, self.extras = K, extras
        self.embed = Embedding(K + 1, dim)
        self.stage = nn.Embedding(2 * stages, dim) if stages > 1 else None
        self.blocks = nn.ModuleList()
        for i in range(depth):
            # Not in the paper: every second block has no attention and mixes only neighbours.
            has_attention = not extras or (depth - 1 - i) % EVERY == 0
            self.blocks.append(Block(dim, heads if has_attention else 0, extras))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs or K)
        angles = wave_angles(torch.arange(D).double(), dim // heads if extras else dim)
        self.register_buffer("cos", angles.cos().float())     # in checkpoints, so that
        self.register_buffer("sin", angles.sin().float())     # machines agree
        if not extras:
            self.apply(xavier)

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        D = x.shape[1]
        if self.stage is None:
            x = torch.where(m, x, self.absorbed)
        h = self.embed(x)                                  # (B, D, dim)
        if self.stage is not None:
            h = h + self.stage(2 * s[:, None] - 2 + m)
        cos, sin = self.cos[:D], self.sin[:D]
        if not self.extras:
            h = h + torch.cat((sin, cos), dim=-1)          # the paper's positions
        for block in self.blocks:
            h = block(h, cos, sin)
        return self.head(self.norm(h))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, extras):
        super().__init__()
        self.attention = Attention(dim, heads, extras) if heads else None
        self.norm = nn.LayerNorm(dim)
        self.mix = NeighbourConv(dim) if extras else nn.Identity()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x, cos, sin):
        """(B, D, dim) -> (B, D, dim); cos and sin: (D, ...) of the angles of the positions."""
        if self.attention is not None:
            x = x + self.attention(x, cos, sin)
        return x + self.down(F.gelu(self.up(self.mix(self.norm(x)))))


class Attention(nn.Module):
    """Multi-head attention of norm(x); every position sees every other, no bias anywhere."""

    def __init__(self, dim, heads, rotary):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cos, sin):
        B, D, dim = x.shape
        qkv = self.qkv(self.norm(x)).view(B, D, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)               # (B, heads, D, d) each
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.out(attention(q, k, v).transpose(1, 2).reshape(B, D, dim))


class Embedding(nn.Embedding):
    """In training on a GPU a product with one-hot rows: of a lookup, all gradients of one value are
    added up one after the other, which took nearly a fifth of a step of images."""

    def forward(self, x):
        return self.product(x) if self.training and x.is_cuda else super().forward(x)

    def product(self, x):
        one_hot = x[..., None] == torch.arange(self.num_embeddings, device=x.device)
        return (one_hot.to(self.weight.dtype) @ self.weight).to(self.weight.dtype)


class NeighbourConv(nn.Module):
    """Not in the paper: a depthwise convolution along D, as a sum of shifted copies."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CONV, 1, dim).uniform_(-1, 1) * CONV ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, h):
        D = h.shape[1]
        around = F.pad(h, (0, 0, CONV // 2, CONV // 2))    # (B, 2 + D + 2, dim)
        return sum((around[:, i:i + D] * w for i, w in enumerate(self.weight)), self.bias)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over (B, heads, D, d)."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # On a CPU in bfloat16 PyTorch's fused kernel is 2 to 7 times slower than its parts.
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rotate(x, cos, sin):
    """Rotary positions, not in the paper: turns the pairs (x_i, x_{i+d/2}) of x (..., D, d)."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)            # (D, d/2)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


def wave_angles(positions, dim):
    """(n,) float positions -> (n, dim/2) angles, wavelengths from 2 pi to 2 pi 10000."""
    exponents = torch.linspace(0, 1, dim // 2, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * 10000.0 ** -exponents


def xavier(layer):
    """The released code's initialisation of a text network's dense layers."""
    if isinstance(layer, nn.Linear):
        parts = 3 if layer.out_features == 3 * layer.in_features else 1  # queries, keys, values
        for part in layer.weight.detach().chunk(parts):
            nn.init.xavier_uniform_(part)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# -- Images ----------------------------------------------------------------------------------------

WINDOWS = (17, 9, 5, 3)              # widths of the windows of `local_means`


class UNet(nn.Module):
    """U-Net at one resolution for images (C, H, W) (App. D): `depth` ResBlocks down, one in the
    middle (with heads attention and another one), `depth` up, which also get what those down gave.

    D = C * H * W variables, colour by colour, each with its own mask. heads: of the attention
    between all pixels; 0: none. stages, b: of an upscale model.
    values: the outputs are logits of the K values, not of digits.
    """

    def __init__(self, K, shape, num_outputs=None, dim=32, depth=2, heads=0, stages=1, b=None,
                 values=True, extras=True):
        super().__init__()
        self.K, self.shape, self.stages, self.b, self.extras = K, tuple(shape), stages, b, extras
        C, time = shape[0], 0 if extras else 4 * dim
        means = 2 * len(WINDOWS) * C if extras else 0
        inputs = 2 * C + means + (stages if stages > 1 else 0)
        self.first = nn.Conv2d(inputs, dim - dim // 4, 3, padding=1)
        self.embed = Embedding(K, dim // 4)
        self.mix = nn.Conv2d(C * (dim // 4), dim // 4, 1)
        self.time = Time(dim, time, math.prod(shape), stages) if time else None
        self.down = nn.ModuleList(ResBlock(dim, dim, time) for _ in range(depth))
        self.middle = nn.ModuleList([ResBlock(dim, dim, time)])
        if heads:
            self.middle += [PixelAttention(dim, heads), ResBlock(dim, dim, time)]
        self.up = nn.ModuleList(ResBlock(2 * dim, dim, time) for _ in range(depth))
        self.run = ResBlock.__call__
        if depth > 8:                                      # one block is compiled, not all
            self.run = torch.compiler.nested_compile_region(self.run)
        self.norm = nn.GroupNorm(groups(dim), dim)
        self.head = nn.Parameter(torch.randn(C, dim, num_outputs or K) * dim ** -0.5)
        self.bias = nn.Parameter(torch.zeros(C, 1, num_outputs or K))
        self.place = None
        if extras:                                         # not in the paper, like all below
            nn.init.zeros_(self.head)                      # the softmax begins as uniform
        if extras and values:                              # and shares the work with `logistic`
            self.place = nn.Conv2d(dim, 2 * C, 1)
            nn.init.zeros_(self.place.weight)
            nn.init.zeros_(self.place.bias)

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs) logits."""
        B, D = x.shape
        x, m = x.view(B, *self.shape), m.view(B, *self.shape)
        if self.stages == 1:
            x = torch.where(m, x, self.K // 2)             # the value that is shown as 0
        v = x.to(self.head.dtype) / self.K - 0.5
        if self.extras:
            inputs, near = self.neighbours(v, m, s)
        else:
            inputs = [v, m.to(v.dtype)]
        if self.stages > 1:
            stage = F.one_hot(s - 1, self.stages)[:, :, None, None].to(v.dtype)
            inputs.append(stage.expand(-1, -1, *self.shape[1:]))
        inputs = torch.cat(inputs, dim=1)
        digits = self.embed(x).permute(0, 1, 4, 2, 3).flatten(1, 2)      # (B, C * dim/4, H, W)
        h = torch.cat((self.first(inputs), self.mix(digits)), dim=1)     # (B, dim, H, W)
        h = F.silu(self.norm(self.body(h, self.time(t, s) if self.time else None)))
        pixels = h.permute(0, 2, 3, 1).reshape(B, 1, -1, h.shape[1])     # (B, 1, H * W, dim)
        logits = (pixels @ self.head + self.bias).flatten(1, 2)          # (B, D, num_outputs)
        if self.place is not None:
            shift, scale = self.place(h).chunk(2, dim=1)   # (B, C, H, W)
            logits = logits + logistic((near + shift).reshape(B, D, 1),
                                       scale.reshape(B, D, 1), self.K)
        return logits

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

    def neighbours(self, v, m, s):
        """Not in the paper: means of the known values around each variable, and the inputs as they
        differ from the nearest mean: small numbers, the same where an image is darker as a whole.

        -> [inputs], and the nearest mean (B, C, H, W).
        """
        known, seen = m.to(v.dtype), m.to(v.dtype)
        if self.stages > 1:
            # After the first stage the middle of the interval that x^(s-1) leaves is known, too.
            later = (s > 1)[:, None, None, None]
            unit = self.b ** (self.stages - s + 1)         # an integer: machines agree
            half = 0.5 * unit.to(v.dtype)[:, None, None, None] / self.K
            v = torch.where(later & ~m, v + half, v)
            seen = (m | later).to(v.dtype)
        means, counts = local_means(v, seen)               # (windows, B, C, H, W)
        near = means[-1]
        return [16 * (v - near) * seen, known, 8 * near, *16 * (means[:-1] - near), *counts], near


class Time(nn.Sequential):
    """How far the generation is: step t and stage s, (B,) each -> (B, out)."""

    def __init__(self, dim, out, D, stages):
        super().__init__(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())
        self.D, self.stages = D, stages

    def forward(self, t, s):
        part = 1000 * (t + (s - 1) * self.D).to(self[0].weight.dtype) / (self.stages * self.D)
        angles = wave_angles(part, self[0].in_features)
        return super().forward(torch.cat((angles.sin(), angles.cos()), dim=-1))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), with two 3x3 convolutions."""

    def __init__(self, width, out, time=0):
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


class PixelAttention(nn.Module):
    """x + attention between all pixels of norm(x)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups(dim), dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, time):
        B, dim, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).mT.contiguous()          # for the fused kernels
        q, k, v = qkv.view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = attention(q, k, v)                             # (B, heads, H * W, d)
        return x + self.out(h.permute(0, 1, 3, 2).reshape(B, dim, H, W))


def local_means(v, seen, windows=WINDOWS, prior=0.3, first=0.0):
    """Means of the seen values near each variable: v and seen (0 to 1) (B, C, H, W), or (B, 1, D).

    From the whole of x to the smallest window, each mean also counts the mean of the window before
    it, as `prior` values: where nothing is seen near by, the larger window speaks. Returns means
    and logarithms of the counts, (windows, B, C, H, W) each.
    """
    v, places = v * seen, tuple(range(2, v.ndim))
    pool = F.avg_pool2d if v.ndim == 4 else F.avg_pool1d
    mean = (v.sum(places, keepdim=True) + prior * first) / (seen.sum(places, keepdim=True) + prior)
    means, counts = [], []
    for width in windows:
        n = width ** len(places)                           # of a mean back to a sum
        total, count = (n * pool(part, width, 1, width // 2) for part in (v, seen))
        mean = (total + prior * mean) / (count + prior)
        means.append(mean)
        counts.append(torch.log1p(count) / 3)
    return torch.stack(means), torch.stack(counts)


def logistic(location, width, K):
    """Not in the paper: logits of values are those of a logistic distribution, moved and scaled by
    the network, plus a softmax's, for near values are alike. Its log-density but for a constant.

    location (..., 1) on the scale of value/K - 0.5; its scale is e^(2 width - 3), 1/(2K) or more.
    """
    values = torch.arange(K, dtype=location.dtype, device=location.device) / K - 0.5
    z = (values - location) * torch.exp(3 - 2 * width).clamp(max=2.0 * K)
    # Above its threshold softplus(z) is taken to be z: exact at 40, not at the usual 20.
    return z - 2 * F.softplus(z, threshold=40)


def groups(width):
    """Groups of a GroupNorm: the released code's 32, or 8 below 128 channels."""
    return math.gcd(width, 32 if width >= 128 else 8)


# -- Audio -----------------------------------------------------------------------------------------

LOUDNESS = (513, 129, 33, 9)         # samples around, of which the local amplitude is measured
FLOOR = 0.5                          # the least amplitude, in steps of the 16-bit scale
NARROWEST = -3.0                     # log of the least scale of a logistic
STEEPEST = 6.0                       # and of the least and largest one in proportion to its reach


class WaveNet(nn.Module):
    """DiffWave for audio (App. D): a WaveNet that sees both sides, `depth` gated blocks with
    dilations 1, 2, 4, .. 2048, 1, .. The input may have any length; D counts for the time alone.

    stages, b: of an upscale model. mixture: the outputs are what `log_mass` takes, an anchor and
    three numbers for each logistic, not logits of digits.
    """

    def __init__(self, K, D, num_outputs, dim=48, depth=9, stages=1, b=None, mixture=True,
                 extras=True):
        super().__init__()
        self.K, self.num_outputs, self.stages, self.b = K, num_outputs, stages, b or K
        self.mixture, self.extras = mixture, extras
        time, inputs = (0, 20) if extras else (4 * dim, 2)
        inputs += stages if stages > 1 else 0
        self.time = Time(dim, time, D, stages) if time else None
        self.embed = None if extras else nn.Embedding(K, dim // 4)
        self.first = nn.Conv1d(inputs, dim if extras else dim - dim // 4, 3, padding=1)
        self.blocks = nn.ModuleList(GatedBlock(dim, 2 ** (i % 12), time) for i in range(depth))
        self.last = nn.Conv1d(dim, dim, 1)
        self.head = nn.Conv1d(dim, num_outputs - mixture, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, m, t, s):
        """(B, D) values and mask, (B,) step and stage -> (B, D, num_outputs)."""
        x, m = x[:, None], m[:, None]                      # (B, 1, D)
        if self.stages == 1:
            x = torch.where(m, x, self.K // 2)             # the value that is shown as 0
        if self.extras:
            inputs, *frame = self.relative(x, m, s)
        else:
            inputs = [2 * x.to(self.head.weight.dtype) / self.K - 1, m.to(self.head.weight.dtype)]
        if self.stages > 1:
            stage = F.one_hot(s - 1, self.stages)[..., None].to(inputs[0].dtype)
            inputs.append(stage.expand(-1, -1, x.shape[2]))
        h = self.first(torch.cat(inputs, dim=1))           # (B, dim, D)
        if self.embed is not None:
            h = torch.cat((h, self.embed(x[:, 0]).mT), dim=1)
        out = self.body(F.relu(h), None if self.time is None else self.time(t, s))
        if self.mixture and self.extras:
            out = self.around(out, *frame)
        elif self.mixture:
            out = self.spread(out)
        return out.mT

    def body(self, h, time):
        """The gated blocks, and the sum of what they say. (B, dim, D) -> (B, num_outputs, D)"""
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
        scale = (width - math.log(n)).clamp(-7, 7) + math.log(self.K / 2)
        anchor = torch.full_like(weight[:, :1], self.K // 2)
        return torch.cat((anchor, weight, (place + start[:, None]) * self.K / 2, scale), dim=1)

    def around(self, out, anchor, centre, reach):
        """Not in the paper: logistics around what is known, as wide as the sound is loud, or as the
        interval that the digits so far leave. In proportion to that no number is large: machines
        agree, and a scale that is to be without bounds stays in those of float32."""
        weight, place, width = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(3, dim=1)
        start = torch.linspace(-2, 0, self.num_outputs // 3, device=out.device, dtype=weight.dtype)
        scale = reach.log() + (start[:, None] + width).clamp(-STEEPEST, STEEPEST)
        scale = scale.clamp(min=NARROWEST)
        return torch.cat((anchor, weight, centre + reach * place, scale), dim=1)

    def relative(self, x, m, s):
        """Not in the paper: all in proportion to the local amplitude, so that loud and soft sound
        look alike. -> [inputs], and for `around` the anchor, centre and reach, (B, 1, D) each.

        A value of which the first digits are known stands at the end of its interval that is
        nearest to zero: at its middle a quiet place would look loud. It weighs 2% of a known one.
        """
        s, dtype = s[:, None, None], self.head.weight.dtype
        unit = self.b ** (self.stages - s + 1 - m.long())  # how many values the digits so far leave
        v = nearest_to_zero(x - self.K // 2, unit).to(dtype)
        weight = torch.where(m, 1.0, 0.02 * (s > 1)).to(dtype)
        seen = (weight > 0).to(dtype)
        power = v ** 2 + (unit.to(dtype) / 64) ** 2        # and what the missing digits may hold
        powers, amounts = local_means(power, weight, LOUDNESS, first=(self.K / 64) ** 2)
        loud = (powers + FLOOR ** 2).sqrt()                # (windows, B, 1, D)
        means, counts = local_means(v, weight)
        amplitude, near = loud[-1], means[-1]
        inputs = [(v - near) / amplitude * seen, v / amplitude * seen, near / amplitude,
                  m.to(dtype), (unit / amplitude).log() / 5, amplitude.log() / 5,
                  *(means[:-1] - near) / amplitude, *(loud[:-1] / amplitude).log(), *counts,
                  *amounts]
        anchor = self.K // 2 + torch.where(seen > 0, v, 0.0)
        return inputs, anchor, torch.where(seen > 0, 0.0, near), torch.minimum(amplitude, unit)


def nearest_to_zero(low, unit):
    """Of the integers low, low + 1, .. low + unit - 1 that which is nearest to zero, (...) each."""
    return torch.maximum(low, (low + unit - 1).clamp(max=0))


class GatedBlock(nn.Module):
    """tanh(a) * sigmoid(b) of a dilated convolution -> the next block's input, and a skip."""

    def __init__(self, dim, dilation, time=0):
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
    """Order-agnostic ARDM of audio, whose K no softmax can hold: net gives what `log_mass` takes.

    A value is chosen digit by digit from one prediction: `choose` is asked `draws` times a call,
    with log_p (n, 16), and its s counts the digits. There is no `log_probs`, and no (B, D, K).
    """

    def __init__(self, net, D, K):
        super().__init__(net, D, K)
        self.base = min(16, K)
        self.draws = num_stages(K, self.base)

    def symbol(self, x, s):
        """The digit number s of x, (B, D) in 0..15."""
        return x // self.base ** (self.draws - s) % self.base

    def predict(self, x, m, t, s):
        """The parameters of every variable's mixture, (B, D, outputs)."""
        return self.logits(x, m, t, s, self.net.num_outputs)

    def true_log_p(self, x, m, t, s):
        """log p of the values that x has, (B, D) nats."""
        return log_mass(self.predict(x, m, t, s), x, x + 1, self.K)

    def decide(self, mixture, where, s, choose):
        """Values (n,) of the variables in `where`, digit by digit from their mixtures (n, ...)."""
        value = torch.zeros(len(mixture), dtype=torch.long, device=mixture.device)
        for digit in range(1, self.draws + 1):
            unit = self.base ** (self.draws - digit)
            log_p = digit_log_p(mixture, value, unit, self.base, self.K)
            value = value + unit * choose(log_p, where, digit)
        return value


class UpscaleMixture(UpscaleARDM):
    """Upscale ARDM of audio: a digit has the mass of its interval, divided by that of the interval
    that the digits before it leave (the data parametrisation of a K that no softmax can hold)."""

    def log_probs(self, x, m, t, s):
        """log p of every digit of stage s: (B, D, b) nats, normalised over b."""
        mixture, before = self.logits(x, m, t, s, self.net.num_outputs), self.coarsen(x, s - 1)
        return digit_log_p(mixture, before, self.unit(s), self.A, self.K)

    def true_log_p(self, x, m, t, s):
        """log p of the digits that x has, (B, D) nats: of two masses, not b."""
        mixture = self.logits(x, m, t, s, self.net.num_outputs)
        digit, before = self.coarsen(x, s), self.coarsen(x, s - 1)
        return (log_mass(mixture, digit, digit + self.unit(s), self.K)
                - log_mass(mixture, before, before + self.unit(s - 1), self.K))


def log_mass(mixture, low, high, K):
    """log of the mass that a mixture of logistics puts on the values low..high - 1 of 0..K-1.

    mixture (..., 1 + 3n): the anchor, a whole number from which centres are counted; logits of the
    n weights, the centres, logarithms of the scales. low and high (...) integers. The first value
    owns all below it, the last all above: the K masses sum to 1.
    With a and b = (boundary - centre) / scale, and w = b - a, the mass between is

        sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^-w)

    as a product, of which no digit is lost, however far out the interval lies.
    """
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


def digit_log_p(mixture, low, unit, b, K):
    """log p (..., b) of the digit that comes next after those that gave low (...): of the masses of
    the b intervals of `unit` values from low on, normalised."""
    unit = torch.as_tensor(unit, device=low.device)[..., None]
    low = low[..., None] + torch.arange(b, device=low.device) * unit
    log_p = log_mass(mixture[..., None, :], low, low + unit, K)
    return log_p.masked_fill(low >= K, -torch.inf).log_softmax(dim=-1)


# -- From settings or a checkpoint to a model ------------------------------------------------------

ENGLISH = Path(__file__).parent / "results" / "english.pt"  # taken where no checkpoint is named
SETTINGS = {                         # what those of a run are called: of others nobody knows here
    "kind", "K", "shape", "rate", "sha256", "data", "size", "recipe", "branch", "parametrization",
    "bits", "length", "dim", "depth", "heads", "batch", "lr", "steps", "minutes", "passes",
    "compile", "device", "seed", "out"}


def build(c):
    """An untrained ARDM from plain settings c: a dict with kind, K, shape, recipe, branch,
    parametrization, dim, depth and heads."""
    keep_freed_memory()
    dim, heads, kind, way = c["dim"], c["heads"], c["kind"], c["parametrization"]
    if dim < 4 or heads < (kind in ("text", "bytes")) or dim % (2 * max(1, heads)):
        raise ValueError(f"--dim {dim} must be 4 or more, and a multiple of 2 * --heads = "
                         f"{2 * heads}; --heads may not be 0 for text")
    if way not in (("mixture", "direct") if kind == "audio" else ("data", "direct")):
        raise ValueError(f"--parametrization {way} is not for {kind}")
    K, shape, b = c["K"], tuple(c["shape"]), c["branch"] or None
    S, D = 1 if b is None else num_stages(K, b), math.prod(shape)
    values = b is None or way != "direct"
    extras = c["recipe"] == "ours"
    same = dict(num_outputs=K if values else S * b, dim=dim, depth=c["depth"], stages=S,
                extras=extras)
    if kind == "audio":
        if values:                                         # an anchor, and 3 or 30 logistics
            same["num_outputs"] = 10 if extras else 91
        net = WaveNet(K, D, b=b, mixture=values, **same)
    elif kind == "image":
        net = UNet(K, shape, b=b, values=values, heads=heads, **same)
    else:
        net = Transformer(K, D, heads=heads, **same)
    if b is None:
        return MixtureARDM(net, D, K) if kind == "audio" else ARDM(net, D, K)
    return UpscaleMixture(net, D, K, b) if way == "mixture" else UpscaleARDM(net, D, K, b, way)


def load(path, device=None):
    """(model with the averaged weights, checkpoint): tensors and plain values alone are read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        odd = checkpoint["settings"].keys() ^ SETTINGS
        if odd:
            raise ValueError(f"its settings are of another version: {', '.join(sorted(odd))}")
        model = build(checkpoint["settings"])
        model.load_state_dict(checkpoint["ema"])
        if "digest" in checkpoint and checkpoint["digest"] != digest(model):
            raise ValueError("its weights are not those that were saved")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; python train.py writes one")
    except Exception as error:                             # what a torn or foreign file brings up
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, KeyError):
            reason = f"there is no {error} in it"
        if "Weights only" in reason:                       # torch's words for it are many
            reason = "it holds something else than tensors and plain values"
        raise ValueError(f"{path} is no checkpoint of this program, or a damaged one "
                         f"({reason[:80]})")
    model = model.eval().to(pick_device(device))
    model.rows = rows_at_once(model)
    return model, checkpoint


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def pick_device(name=None):
    """The device of that name; without one the fastest kind there is."""
    best = ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name or best).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name or best}: {str(error).splitlines()[0]}")
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: choose cuda, mps or cpu")
    return device


def has_bf16(device):
    """True if the processor multiplies bfloat16 itself: elsewhere it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def rows_at_once(model):
    """Datapoints that suit one network call without gradients: on a CPU 2^12 variables, as more are
    slower; on a GPU as many as a quarter of its free memory holds, by a rough count."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return max(1, (1 << 12) // model.D)
    widest = max(layer.weight.shape[0] for layer in model.modules()
                 if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)))
    outputs = getattr(model.net, "num_outputs", model.K)
    each = model.D * (64 * widest + 64 * outputs + 8 * model.D)          # bytes of a datapoint
    return max(1, torch.cuda.mem_get_info(device)[0] // 4 // each)


def keep_freed_memory():
    """Lets the C library keep freed memory for the next network call: glibc would give large blocks
    back and fetch them again, zeroed page by page. Saves 10 to 30% of the time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                                # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)                      # M_TRIM_THRESHOLD
