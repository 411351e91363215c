"""Training, evaluation and checkpoints.

    python train.py                                     about three minutes on a laptop, no download
    python train.py --data text8                        the paper's text, for one CUDA GPU
    python train.py --data FILE --minutes 10            any text, any bytes, or a .npy of images
    python train.py --data cifar10 --branch 4           an upscale model of images
    python train.py --resume                            goes on where an interrupted run stopped
    python train.py --evaluate out/pydoc/ckpt.pt        the number, its standard error, the protocol

A run writes OUT/ckpt.pt, log.csv, test.txt (test.bin, test.npy: a piece of the test split, for
compress.py), results.png where --plot asks for it, of images samples.png and, last, results.json.
"""
import argparse
import bz2
import collections
import copy
import csv
import ctypes
import dataclasses
import importlib.util
import io
import json
import lzma
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data as datasets
import planner
from ardm import (ARDM, UpscaleARDM, bits_per_dim, late_steps, num_stages, stratified_steps)
from data import UserError
from nets import Transformer, UNet


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Settings:
    """All that decides a run; every field is a flag. What --size leaves open is None here."""
    data: str = setting("pydoc", f"{', '.join(datasets.NAMES)}, or a file")
    data_dir: str = setting("data", "where downloaded data sets are looked for and kept")
    size: str = setting(None, "tiny, small or paper; the default is small on CUDA, else tiny")
    length: int = setting(None, "D of text: characters in a datapoint")
    bits: int = setting(8, "of the 8 of each value in an image, from the most significant on")
    flips: bool = setting(None, "mirror training images at random; the default is yes for cifar10")
    turns: bool = setting(False, "turn training images by quarters at random")
    branch: int = setting(None, "b of an upscale model, which writes base-b digits in stages; "
                                "without it the model is order-agnostic")
    parametrization: str = setting("data", "of an upscale model: data or direct; of images direct "
                                           "but in size paper")
    dim: int = setting(None, "width of the network")
    depth: int = setting(None, "blocks of the network; of images: on each side of each level")
    levels: int = setting(None, "of images: resolutions, each half of the one before")
    heads: int = setting(None, "attention heads; of images: in the middle, 0: no attention there")
    mlp: int = setting(None, "of text: width of the hidden layer in each block")
    neighbours: bool = setting(True, "of images: show means of the known values near by too")
    logistic: bool = setting(True, "of images, where the network gives logits of values: they are "
                                   "a logistic distribution and a correction")
    positions: str = setting("rotary", "rotary or sinusoidal")
    pairs: bool = setting(True, "embed pairs of neighbours too")
    conv: int = setting(5, "width of the depthwise convolutions in text blocks, odd; 0: none")
    every: int = setting(2, "blocks of text from one with attention to the next, counted "
                            "back from the last; 1: all have it")
    zero_init: bool = setting(True, "the softmax begins as the uniform distribution, blocks of "
                                    "text as the identity, but for a constant")
    time: bool = setting(False, "show the step t to the network")
    late: bool = setting(True, "draw late steps t more often, "
                               "with a weight that keeps the loss unbiased")
    batch: int = setting(None, "datapoints in a training step")
    short: float = setting(None, "part of the run, at its start, "
                                 "that trains on more but shorter windows")
    short_length: int = setting(64, "characters in those windows")
    steps: int = setting(None, "length of the run in training steps")
    minutes: float = setting(None, "length of the run in minutes of training, "
                                   "where --steps is not given")
    optimizer: str = setting("muon", "muon (AdamW for all but the matrices of the blocks) or adam")
    lr: float = setting(None, "learning rate of Adam")
    muon_lr: float = setting(0.02, "learning rate of Muon")
    weight_decay: float = setting(0.02, "of the matrices under Muon")
    warmup: int = setting(None, "steps of linear warm-up")
    decay: float = setting(1.0, "part of the run, at its end, "
                                "over which the rate falls to 0 in a line")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.99, "decay of the average of the weights; "
                               "early on it looks back over a fiftieth of the steps")
    bf16: bool = setting(None, "bfloat16 where it is safe; "
                               "the default is yes where the processor has it")
    compile: bool = setting(None, "torch.compile (needs a compiler); the default is yes on "
                                  "CUDA where Triton is installed")
    device: str = setting(None, "cuda, mps or cpu; the default is the first of them that is there")
    seed: int = setting(0, "of the weights and of every draw")
    passes: int = setting(None, "passes over each split in the evaluation; "
                                "the default makes half a million variables at least")
    report: int = setting(100, "training steps between rows of log.csv")
    out: str = setting(None, "folder for the results; the default is out/<data>")


SIZES = {
    "text": {
        "tiny": dict(length=64, dim=128, depth=4, heads=2, mlp=512, batch=48, minutes=2.75, lr=6e-3,
                     muon_lr=0.03, weight_decay=0.1, warmup=50, short=0.7, short_length=32),
        "small": dict(length=250, dim=512, depth=8, heads=8, mlp=2048, batch=64, minutes=30.0,
                      lr=2e-3, warmup=200, ema=0.998, short=0.0),
        "paper": dict(length=250, dim=768, depth=12, heads=12, mlp=3072, positions="sinusoidal",
                      pairs=False, conv=0, every=1, zero_init=False, late=False, batch=512,
                      steps=3_000_000, optimizer="adam", lr=5e-4, warmup=5000, decay=0.0, clip=0.25,
                      ema=0.995, short=0.0)},
    "image": {
        "tiny": dict(dim=32, depth=2, levels=3, heads=0, batch=8, minutes=2.75, lr=6e-3,
                     muon_lr=0.03, warmup=50, short=0.0, parametrization="direct"),
        "small": dict(dim=128, depth=3, levels=3, heads=4, batch=64, minutes=30.0, lr=2e-3,
                      warmup=200, ema=0.998, short=0.0, parametrization="direct"),
        "paper": dict(dim=256, depth=32, levels=1, heads=1, neighbours=False, logistic=False,
                      zero_init=False, late=False, time=True, batch=128, steps=1_170_000,
                      optimizer="adam", lr=1e-4, warmup=0, decay=0.0, clip=100.0, ema=0.9999,
                      short=0.0)}}
TEXT_ONLY = {"length", "mlp", "positions", "pairs", "conv", "every", "short", "short_length"}
IMAGE_ONLY = {"bits", "flips", "turns", "levels", "neighbours", "logistic"}
AFFORDABLE = 1 << 24                 # variables that the network may predict to measure a plan
AT_ONCE = 1 << 13                    # of them together: more take memory and gain no time on a CPU
WRITTEN = ("ckpt.pt", "log.csv", "test.txt", "test.bin", "test.npy", "results.png", "samples.png",
           "results.json")           # in its folder by a run
RESUMABLE = {"steps", "minutes", "passes", "report", "out", "data_dir", "compile"}


# -- Settings, models, checkpoints -----------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, as all others are."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists everything)\n")


def command_line(main):
    """Runs a script; what the user can mend is one line on stderr and exit code 2."""
    name = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")         # a terminal that lacks a character
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:         # of CUDA, of NumPy, of torch on a CPU
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "can't allocate memory" in str(error)):
            raise
        print(f"{name}: the device has too little memory for this: a smaller --batch or --size "
              "takes less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                              # as in: python sample.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:                             # a full disk, a folder that is a file
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def default_words(field):
    """The default of a setting, and of the sizes that have one of their own."""
    words = [] if field.default is None else [str(field.default)]
    for kind, sizes in SIZES.items():
        own = [f"{size} {preset[field.name]}" for size, preset in sizes.items()
               if preset.get(field.name) is not None]
        words += [f"{kind}: {', '.join(own)}"] if own else []
    return "; ".join(words)


def add_settings(parser):
    """One flag for each field of Settings; those that are not given stay out of the result."""
    for field in dataclasses.fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if defaults := default_words(field):
            text += f" (default {defaults})"
        kind = (dict(action=argparse.BooleanOptionalAction) if field.type is bool
                else dict(type=field.type))
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def complete(given):
    """Settings from the flags that were given: what they leave open comes from the size."""
    device = pick_device(given.get("device"))
    size = given.get("size") or ("small" if device.type == "cuda" else "tiny")
    sizes = SIZES[datasets.kind_of(given.get("data", Settings.data))]
    if size not in sizes:
        raise UserError(f"--size {size}: choose {', '.join(sizes)}")
    foreign = TEXT_ONLY if datasets.kind_of(given.get("data", Settings.data)) == "image" else (
        IMAGE_ONLY)
    if wrong := sorted(foreign & given.keys()):
        raise UserError(f"--{wrong[0].replace('_', '-')} is for "
                        f"{'text' if foreign is TEXT_ONLY else 'images'}: leave it out")
    preset = dict(sizes[size])
    if size == "tiny" and given.get("data") in ("glyphs", "mnist"):
        preset |= dict(batch=32, heads=4)                # small images: more of them, and attention
    if "minutes" in given:
        preset.pop("steps", None)
    c = Settings(**{**preset, **given, "size": size, "device": str(device)})
    c.bf16 = has_bf16(device) if c.bf16 is None else c.bf16
    if c.compile is None:
        c.compile = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    c.flips = "cifar" in Path(c.data).name if c.flips is None else c.flips
    c.out = c.out or f"out/{run_name(c.data)}"
    return check(c)


def run_name(data):
    """What the folder of a run is called: the name of its data, or of its file up to a dot."""
    return Path(data).name.split(".")[0] or "run"


def check(c):
    """The settings, or a UserError that says which of them cannot be."""
    checks = [(c.positions in ("rotary", "sinusoidal"), "--positions: choose rotary or sinusoidal"),
              (c.parametrization in ("data", "direct"), "--parametrization: choose data or direct"),
              (c.optimizer in ("muon", "adam"), "--optimizer: choose muon or adam"),
              (all(value is None or value > 0 for value in (
                  c.length, c.dim, c.depth, c.levels, c.mlp, c.every, c.batch, c.report)),
               "--length, --dim, --depth, --levels, --mlp, --every, --batch and --report must be "
               "positive"),
              (1 <= c.bits <= 8, "--bits: choose 1 to 8"),
              (c.levels is None or c.dim >= 4, "--dim must be at least 4 for images"),
              (c.heads > 0 or c.heads == 0 and c.levels is not None, "--heads must be positive"),
              (not c.time or c.dim % 2 == 0, "--dim must be even where the network is shown t"),
              (c.heads == 0 or c.dim % (2 * c.heads) == 0,
               f"--dim {c.dim} must be a multiple of 2 * heads = {2 * c.heads}"),
              (all(value > 0 for value in (c.lr, c.muon_lr, c.clip))     # nan: False
               and c.warmup >= 0 and c.weight_decay >= 0,
               "--lr, --muon-lr and --clip must be positive, --warmup and --weight-decay not "
               "negative"),
              (0 <= c.ema < 1 and 0 <= c.decay <= 1, "--ema must be 0 to below 1, --decay 0 to 1"),
              (0 <= c.seed < 1 << 63, "--seed must be 0 to 2^63 - 1"),
              (c.conv == 0 or c.conv > 0 and c.conv % 2 == 1, "--conv must be odd, or 0"),
              (0 <= c.short <= 1 and c.short_length > 0,
               "--short must be 0 to 1 and --short-length positive"),
              (c.passes is None or c.passes > 0, "--passes must be at least 1"),
              (c.steps > 0 if c.steps is not None else (c.minutes or 0) > 0,
               "--steps or --minutes must be positive")]
    for holds, message in checks:
        if not holds:
            raise UserError(message)
    return c


def pick_device(name=None):
    """The device of that name; where none is given, the fastest kind there is."""
    found = ("cuda" if torch.cuda.is_available() else
             "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name or found).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}")
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: choose cuda, mps or cpu")
    return device


def has_bf16(device):
    """True where the processor multiplies bfloat16 itself: elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def keep_freed_memory():
    """Lets the C library keep what is freed for the next network call.

    Otherwise glibc hands large blocks back to the system and fetches them again, zeroed page by
    page, in every call: a tenth to a third of the time on a CPU. Does nothing with another C
    library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, M_MMAP_MAX, M_TRIM_THRESHOLD = ctypes.CDLL(None), -4, -1   # as in malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def build_model(c, K, shape):
    """An untrained model with the network of these settings, for data of that shape."""
    try:
        S = num_stages(K, c.branch) if c.branch is not None else 1
    except ValueError as error:
        raise UserError(f"--branch: {error}")
    outputs = S * c.branch if c.branch and c.parametrization == "direct" else K
    if len(shape) == 1:
        net = Transformer(K, shape[0], outputs, dim=c.dim, depth=c.depth, heads=c.heads,
                          mlp=c.mlp, positions=c.positions, pairs=c.pairs, conv=c.conv,
                          every=c.every, zero_init=c.zero_init, time=c.time, stages=S)
    else:
        values = c.branch is None or c.parametrization == "data"         # what the logits are of
        net = UNet(K, shape, outputs, dim=c.dim, depth=c.depth, levels=c.levels, heads=c.heads,
                   neighbours=c.neighbours, logistic=c.logistic and values, time=c.time,
                   zero_init=c.zero_init, stages=S)
    D = math.prod(shape)
    if c.branch is None:
        return ARDM(net, D, K)
    return UpscaleARDM(net, D, K, c.branch, c.parametrization)


def load_data(c, device, checkpoint=None, fetch=True):
    """The data of these settings; where there is a checkpoint, it must fit that."""
    if checkpoint and (datasets.kind_of(c.data) == "image") != (checkpoint["kind"] == "image"):
        raise UserError(f"--data {c.data}: the checkpoint is of a model of {checkpoint['kind']}, "
                        "this is not")
    data = datasets.load(c.data, c.length, c.data_dir, device, fetch, c.bits,
                         flips=c.flips, turns=c.turns)
    if checkpoint and (data.K, [*data.shape]) != (checkpoint["K"], [*checkpoint["shape"]]):
        raise UserError(f"{data.name} has K = {data.K} and shape {tuple(data.shape)}, the "
                        f"checkpoint was trained on K = {checkpoint['K']} and "
                        f"{tuple(checkpoint['shape'])}")
    return data


def read_checkpoint(path):
    """The dict that `Run.save` wrote: tensors and plain values alone, nothing is unpickled."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != "ardm checkpoint 3":
            raise ValueError("of another format")
        checkpoint["settings"] = Settings(**checkpoint["settings"])
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; python train.py writes one")
    except Exception as error:                           # what a damaged or foreign file brings up
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no checkpoint of train.py, or a damaged one ({reason[:80]})")


def load_model(path, device=None):
    """(model with the averaged weights, its checkpoint), ready to sample, to score and to code."""
    keep_freed_memory()
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint["settings"], checkpoint["K"], checkpoint["shape"])
    try:
        model.load_state_dict(checkpoint["ema"])
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the settings "
                        f"({str(error).splitlines()[0]})")
    return model.eval().to(pick_device(device)), checkpoint


@contextmanager
def replacing(path, mode="wb"):
    """A file that appears under its name only once it is complete; until then, and after an error,
    the old one stays as it was."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no file'}")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode) as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}")
    finally:
        part.unlink(missing_ok=True)


class Run:
    """Everything that training changes, and nothing else: what a checkpoint holds."""

    def __init__(self, c, K, kind, shape):
        keep_freed_memory()
        torch.manual_seed(c.seed)
        self.c, self.K, self.kind, self.shape = c, K, kind, tuple(shape)
        self.device = torch.device(c.device)
        self.model = build_model(c, K, shape).to(self.device)
        self.ema = copy.deepcopy(self.model).eval()
        self.optimizers = make_optimizers(self.model.net, c)
        self.generator = torch.Generator(self.device).manual_seed(c.seed)
        self.step, self.seconds, self.L = 0, 0.0, None
        if c.compile:                            # what `at` calls; the rest has no fixed shape
            self.model.net.body = torch.compile(self.model.net.body)

    @property
    def progress(self):
        """The part of the run that is done, 0..1: of its steps, or of its time."""
        return self.step / self.c.steps if self.c.steps else self.seconds / (60 * self.c.minutes)

    def save(self, path):
        state = dict(format="ardm checkpoint 3", settings=dataclasses.asdict(self.c),
                     K=self.K, kind=self.kind, shape=list(self.shape),
                     model=self.model.state_dict(), ema=self.ema.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
                     step=self.step, seconds=self.seconds, generator=self.generator.get_state(),
                     L=None if self.L is None else torch.from_numpy(self.L))
        with replacing(path) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:        # what torch makes of a disk that is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error

    def restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.generator.set_state(checkpoint["generator"])
        self.L = None if checkpoint["L"] is None else checkpoint["L"].numpy()


# -- Training --------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: every direction of a matrix is learnt at one rate.

    What `torch.optim.Muon` does, but bfloat16, to which it always rounds, only where it is asked
    for (a CPU without it takes several times as long: bench.py speed), and all matrices of one
    shape in one product. A parameter in a group with parts = 3 is three matrices on top of each
    other, as the queries, keys and values are. A convolution is the matrix of its outputs and all
    its inputs.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95, parts=1, bf16=False):
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                        parts=parts))

    @torch.no_grad()
    def step(self):
        """One step on every matrix, by its gradient."""
        for group in self.param_groups:
            lr, momentum, by_shape = group["lr"], group["momentum"], collections.defaultdict(list)
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
                step = p.grad.lerp(mean, momentum)       # Nesterov's: one step ahead
                for part, step in zip(p.chunk(group["parts"]), step.chunk(group["parts"])):
                    step = step.reshape(len(part), -1)
                    by_shape[step.shape].append((part, step))
            for (rows, columns), pairs in by_shape.items():
                parts, steps = zip(*pairs)
                size = lr * max(1, rows / columns) ** 0.5
                for part, step in zip(parts, orthogonal(torch.stack(steps).to(self.dtype))):
                    part.mul_(1 - lr * group["weight_decay"]).sub_(step.view_as(part), alpha=size)


def orthogonal(X):
    """(n, rows, columns) -> nearly U V^T of each U S V^T, by five Newton-Schulz steps.

    p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5, five times over, takes every singular value s of
    0.01..1 to about 0.7..1.2: near enough to 1, and nothing but matrix products.
    """
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT                       # X X^T is to be the small one
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)    # so that no singular value is above 1
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X


def make_optimizers(net, c):
    """Muon for the matrices of the blocks and AdamW for all the rest, or Adam for everything."""
    matrices = net.matrices() if c.optimizer == "muon" else {}
    chosen = {id(p) for group in matrices.values() for p in group}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.95 if matrices else 0.999),
                                    weight_decay=0.0, fused=c.device.split(":")[0] != "mps")]
    if matrices:
        groups = [dict(params=group, parts=parts) for parts, group in matrices.items()]
        optimizers.append(Muon(groups, lr=c.muon_lr, weight_decay=c.weight_decay, bf16=c.bf16))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def learning_rate(c, step, progress):
    """The factor on the full rate: up in a line, flat, and down to zero over the last part."""
    up = (step + 1) / c.warmup if c.warmup else 1.0
    down = (1 - progress) / c.decay if c.decay else 1.0
    return min(1.0, up, max(down, 0.0))


def window(c, progress, D):
    """(B, length) of a training batch: in the first part of the run, --short, short windows, and
    as many more of them.

    They teach more at first: near letters tell most of what can be learnt, and attention to few
    of them costs less.
    """
    length = min(D, c.short_length) if progress < c.short else D
    return c.batch * D // length, length


def train_step(run, x):
    """Algorithm 2 on x (B, D), one step of the optimisers, the average.

    Returns the loss, bits/dim, a tensor.
    """
    c, net = run.c, run.model.net
    rate = learning_rate(c, run.step, run.progress)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["full_lr"]
        optimizer.zero_grad(set_to_none=True)
    (B, D), draw = x.shape, dict(device=x.device, generator=run.generator)
    t, s, weight = (late_steps(B, run.model.S, D, **draw) if c.late
                    else (*stratified_steps(B, run.model.S, D, **draw), 1.0))
    with torch.autocast(run.device.type, torch.bfloat16, enabled=c.bf16):
        loss = (weight * bits_per_dim(run.model.loss(x, t, s, generator=run.generator), D)).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), c.clip)
    for optimizer in run.optimizers:
        optimizer.step()
    run.step += 1
    decay = min(c.ema, 1 - 1 / (1 + 0.02 * run.step))    # early on, the beginning is soon forgotten
    get_ema_multi_avg_fn(decay)([*run.ema.parameters()], [*run.model.parameters()], run.step)
    return loss.detach()


def train(run, data, folder):
    """Steps until the run is over or Ctrl-C; saves as it goes. True where the run was completed."""
    c, saved, losses, recent = run.c, time.perf_counter(), [], collections.deque(maxlen=50)
    begin, mark, unit = saved - run.seconds, (run.step, run.seconds), datasets.UNITS[data.kind]
    log, some = Log(folder / "log.csv", run.step), spread(data.chunks("valid")[0], 64)
    bar = tqdm(total=1.0, initial=min(run.progress, 1.0), mininterval=0.5,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    with bar, caught_signals() as stop:
        while run.progress < 1 and not stop:
            x = data.batch(*window(c, run.progress, data.D), generator=run.generator)
            losses.append(train_step(run, x))
            recent.append(losses[-1])
            run.seconds = time.perf_counter() - begin
            speed = (run.step - mark[0]) * c.batch * data.D / (run.seconds - mark[1])
            if run.step % 10 == 0:                       # seldom: the loss waits for the device
                loss = trusted(recent, run.step)
                bar.set_postfix_str(f"step {run.step}, {loss:.3f} bits/{unit}, "
                                    f"{speed:,.0f} {unit}s/s", refresh=False)
                bar.update(min(run.progress, 1.0) - bar.n)
            if run.step % c.report == 0:
                valid = bound(run.ema, some, passes=1)["bits"]
                log.add(run.step, run.seconds, torch.stack(losses).mean().item(), valid, speed)
                losses, mark = [], (run.step, time.perf_counter() - begin)
            if time.perf_counter() - saved > 120:
                trusted(recent, run.step)
                run.save(folder / "ckpt.pt")
                saved = time.perf_counter()
    trusted(recent, run.step)
    run.save(folder / "ckpt.pt")
    return run.progress >= 1


def trusted(losses, step):
    """The mean of the last few losses; UserError where it is no number: not to be saved."""
    loss = torch.stack([*losses]).mean().item() if losses else 0.0
    if not math.isfinite(loss):
        raise UserError(f"step {step}: the loss is not a number any more; begin anew with a "
                        "smaller --lr or --muon-lr")
    return loss


@contextmanager
def caught_signals():
    """Ctrl-C, or the end of a job's time, lets the loop finish its step: yields a list that is
    empty until then. A second one stops at once."""
    asked, old = [], {}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Log:
    """log.csv, one row a report; rows behind the step that a run is resumed from are cut off."""
    COLUMNS = ("step", "seconds", "train_bits_per_dim", "valid_bits_per_dim", "dims_per_second")

    def __init__(self, path, step):
        self.path = path
        rows = [row for row in read_log(path) if row["step"] <= step] if step else []
        with replacing(path, "w") as file:
            file.write("".join(",".join(row) + "\n" for row in [self.COLUMNS] + [
                [str(row[name]) for name in self.COLUMNS] for row in rows]))

    def add(self, step, *numbers):
        with open(self.path, "a") as file:
            file.write(",".join([str(step)] + [f"{number:.6g}" for number in numbers]) + "\n")


def read_log(path):
    """log.csv -> a list of dicts of numbers; empty where there is none."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) if name != "step" else int(value)
                 for name, value in row.items()} for row in csv.DictReader(file)]


# -- Evaluation ------------------------------------------------------------------------------------

def spread(chunks, most):
    """At most that many of the chunks (N, D), evenly spread over all of them."""
    n = min(len(chunks), most)
    return chunks[torch.arange(n) * len(chunks) // n]


@torch.no_grad()
def bound(model, chunks, rest=(), passes=None, seed=1, progress=False):
    """The bound of Eq. 2 on chunks (N, D) and a shorter rest, by one step t per chunk and pass.

    t and s are stratified over each batch. passes None: as many as make half a million variables a
    stage, and of few datapoints up to 8, so that the steps drawn matter little.
    Returns a dict: bits (per dim), stderr (over chunks), L (S, D) in bits, each (N,) in bits (per
    dim), passes, chunks, rest.
    """
    (N, D), device = chunks.shape, chunks.device
    passes = passes or max(-(-(model.S << 19) // (N * D)), min(8, -(-4096 // N)))
    generator = torch.Generator(device).manual_seed(seed)
    nats, rest_nats = torch.zeros(N, device=device), 0.0
    sums, counts = torch.zeros(2, model.S * D, device=device)
    for _ in tqdm(range(passes), desc="bound", unit="pass", disable=not progress, leave=False):
        for rows in torch.arange(N, device=device).split(max(1, AT_ONCE // D)):
            t, s = stratified_steps(len(rows), model.S, D, device, generator)
            loss = model.loss(chunks[rows].long(), t, s, generator=generator)            # (B,)
            nats[rows] += loss / passes
            sums.index_add_(0, (s - 1) * D + t - 1, loss / (model.S * D))
            counts.index_add_(0, (s - 1) * D + t - 1, torch.ones_like(loss))
        if len(rest):
            rest_nats += model.loss(rest[None].long(), generator=generator).item() / passes
    nats = nats.cpu().double()                           # cpu: MPS has no float64
    total = nats.sum().item() + rest_nats
    return dict(bits=bits_per_dim(total, N * D + len(rest)), L=components(sums, counts, model.S),
                stderr=bits_per_dim(nats, D).std(correction=min(1, N - 1)).item() / N ** 0.5,
                each=bits_per_dim(nats, D), passes=passes, chunks=N, rest=len(rest))


def components(sums, counts, S):
    """Sums of samples of L_t in nats, (S*D,), and their counts -> L (S, D) float64 in bits.

    A step that no datapoint has met takes the value between its neighbours, a stage without any
    the mean of all.
    """
    sums, counts = sums.cpu().double().numpy().reshape(S, -1), counts.cpu().numpy().reshape(S, -1)
    L = np.empty_like(sums)
    for row, total, count in zip(L, sums, counts):
        met = np.flatnonzero(count)
        row[:] = (np.interp(np.arange(len(row)), met, total[met] / count[met])
                  if len(met) else sums.sum() / counts.sum())
    return bits_per_dim(L, 1)


def measure_plans(model, chunks, plans, passes=None, seed=1, affordable=AFFORDABLE):
    """Exact bits/dim of chunks (N, D) under each plan, every chunk in its own random order: [dict].

    The prediction beside it is the plan's cost by the L_t of the same chunks. A plan for which the
    network would predict more variables than is affordable is not measured: None.
    """
    (N, D), generator = chunks.shape, torch.Generator(chunks.device).manual_seed(seed)
    sigma = model.orders(N, D, chunks.device, generator)
    L = planner.smooth(bound(model, chunks, passes=passes, progress=True)["L"])
    rows = []
    for plan in tqdm(plans, desc="exact nll under each plan", unit="plan", leave=False):
        row = dict(calls=len(plan), predicted=planner.plan_cost(L, plan) / D, measured=None)
        rows.append(row)
        if len(plan) * N * D > affordable:
            continue
        parts = zip(chunks.split(max(1, AT_ONCE // D)), sigma.split(max(1, AT_ONCE // D), dim=1))
        bits = bits_per_dim(torch.cat([model.nll(x.long(), plan, order) for x, order in parts]), D)
        row |= dict(measured=bits.mean().item(), chunks=N,
                    stderr=bits.std(correction=min(1, N - 1)).item() / N ** 0.5)
    return rows


def references(symbols, kind, K, shape):
    """What simple means reach on these symbols (n,), in bits/dim: {name: number}."""
    share = np.bincount(symbols) / len(symbols)
    share = share[share > 0]
    single = "single values" if kind == "image" else "single letters"
    found = {"uniform": math.log2(K), single: float(-(share * np.log2(share)).sum())}
    if kind != "image":
        return found | text_references(datasets.to_bytes(symbols, K), shape[0])
    images = datasets.to_images(symbols, shape)[:1000]
    return found | {name: 8 * sum(sizes) / images.size
                    for name, sizes in image_sizes(images).items()}


def text_references(stream, D):
    """General-purpose compressors see the whole text, or each chunk of D by itself as the model
    does (the first 1000 chunks)."""
    packers = {"bz2": bz2.compress, "lzma": lzma.compress,
               "zlib": lambda part: zlib.compress(part, 9)} | optional_packers()
    chunks = [stream[i:i + D] for i in range(0, min(len(stream), 1000 * D), D)]
    return {name: 8 * len(pack(stream)) / len(stream) for name, pack in packers.items()} | {
        f"{name} in chunks": 8 * sum(len(pack(part)) for part in chunks) / sum(map(len, chunks))
        for name, pack in packers.items()}


def optional_packers():
    """zstd and brotli at their strongest, where Python has them or they are installed."""
    found = {}
    try:
        from compression import zstd                     # Python 3.14
        found["zstd"] = lambda part: zstd.compress(part, level=22)
    except ImportError:
        with suppress(ImportError):
            import zstandard
            found["zstd"] = zstandard.ZstdCompressor(level=22).compress
    with suppress(ImportError):
        import brotli
        found["brotli"] = brotli.compress
    return found


def image_sizes(images):
    """Bytes of each image, (N, H, W, C), as PNG, and as WebP where Pillow is installed: {name:
    list}."""
    if images.shape[-1] not in (1, 3):
        return {}
    images = images if images.shape[-1] == 3 else images[..., 0]
    try:
        from PIL import Image                            # optional: no dependency

        def size(image, name, **how):
            Image.fromarray(image).save(file := io.BytesIO(), name, **how)
            return file.tell()
        return {"PNG of each image": [size(x, "PNG", optimize=True) for x in images],
                "WebP of each image": [size(x, "WebP", lossless=True, quality=100, method=6)
                                       for x in images]}
    except ImportError:
        return {"PNG of each image (filters, then zlib)": [len(datasets.png(x)) for x in images]}


def evaluate(model, data, passes=None):
    """All that a run reports, in words by `describe`. L (S, D), for plans, is from validation."""
    D, calls = model.D, model.S * model.D
    begin = time.perf_counter()
    valid, rest = data.chunks("valid")
    L = bound(model, spread(valid, max(64, (1 << 21) // D)), rest, passes, progress=True)["L"]
    if not np.isfinite(L).all():
        raise UserError("the network gives no numbers: its weights are damaged")
    test = bound(model, *data.chunks("test"), passes, progress=True)
    budgets = (5, 10, 20, 50) if data.kind != "image" else (20, 50, 100, 200)
    plans = [planner.plan(L, budget) for budget in budgets if model.S <= budget < calls]
    plans.append(planner.full_plan(model.S, D))
    some = spread(data.chunks("test")[0], max(16, 10000 // D))
    return dict(data=data.name, kind=data.kind, bits_per_dim=test["bits"], stderr=test["stderr"],
                passes=test["passes"], chunks=test["chunks"], shape=[*data.shape],
                rest=test["rest"], L_valid=L.tolist(), L_test=test["L"].tolist(),
                calls=measure_plans(model, some, plans, passes), references=references(
                    data.splits["test"].cpu().numpy().reshape(-1), data.kind, data.K, data.shape),
                evaluation_seconds=time.perf_counter() - begin)


def describe(results):
    """The results of `evaluate` in words and tables, to be read on a terminal."""
    r, L = results, np.array(results["L_test"]).sum(axis=0)              # over the stages
    unit, image = datasets.UNITS[r["kind"]], r["kind"] == "image"
    things = "images" if image else "chunks"
    rest = f" and the last {r['rest']} characters" if r["rest"] else ""
    known = r["references"].items()
    whole = ", ".join(f"{name} {bits:.2f}" for name, bits in known if "chunks" not in name)
    parts = ", ".join(f"{name.split()[0]} {bits:.2f}" for name, bits in known if "chunks" in name)
    stages = f", the sum of {len(r['L_test'])} stages" if len(r["L_test"]) > 1 else ""
    lines = [f"test: {r['bits_per_dim']:.3f} bits/{unit}, "
             f"standard error {r['stderr']:.3f} over {things}, on {r['data']}",
             "  the bound of Eq. 2 with averaged weights: "
             f"{r['passes']} passes over {r['chunks']:,} {things} of "
             f"{' x '.join(map(str, r['shape']))}{rest},",
             f"  {'' if image else 'without context; '}in each pass every {things[:-1]} has a new "
             "random order and one step t, stratified",
             f"for comparison, bits/{unit}: {whole}" + (";" if parts else ""),
             f"  in the same chunks: {parts}",
             f"loss components L_t, bits a {'character' if unit == 'char' else 'variable'}"
             f"{stages}, t = 1..{len(L)}:",
             f"  {L[0]:.2f} {bars(L)} {L[-1]:.2f}",
             f"network calls -> bits/{unit}   predicted from L_t   measured"]
    for row in r["calls"]:
        lines.append(f"  {row['calls']:>22}   {row['predicted']:>18.3f}   "
                     + (f"{row['measured']:.3f}" if row["measured"] else "too many calls"))
    for row in [row for row in r["calls"] if row["measured"]][-1:]:
        lines.append(f"  (exact, on {row['chunks']} test {things}, each in one random order; "
                     f"standard error {row['stderr']:.3f};\n  L_t of the same {things}, but the "
                     "plans are from the validation split)")
    return "\n".join(line for line in lines if parts or "same chunks:" not in line)


def bars(numbers, width=48):
    """Numbers as a line of little bars from 0 to the largest."""
    means = [part.mean() for part in np.array_split(numbers, min(width, len(numbers)))]
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * max(0.0, mean) / max(*means, 1e-9))] for mean in means)


def plot(folder, results):
    """folder/results.png: loss over time, L_t, and the price of few calls (the paper's Fig. 3)."""
    from matplotlib import pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4))
    unit = datasets.UNITS[results["kind"]]
    log = read_log(folder / "log.csv")
    for name in ("train", "valid"):
        left.plot([row["seconds"] for row in log], [row[f"{name}_bits_per_dim"] for row in log],
                  label=name)
    left.set(title="loss", xlabel="seconds", ylabel=f"bits/{unit}")
    left.legend()
    L = np.array(results["L_test"])
    for s, (row, smooth) in enumerate(zip(L, planner.smooth(L)), start=1):
        steps = np.arange(1, len(row) + 1)
        middle.plot(steps, row, ".", alpha=0.4, label=f"$L_t$, stage {s}")
        middle.plot(steps, smooth, label="smoothed")
    plan = planner.plan(results["L_valid"], min(20, L.size))
    height = [planner.smooth(L)[s - 1, t - 1] for s, t, k in plan if s == 1]
    middle.stairs(height, [t for s, t, k in plan if s == 1] + [L.shape[1] + 1], color="black",
                  label=f"plan of {len(plan)} calls")
    middle.set(title="loss components and a plan", xlabel="t", ylabel="bits", ylim=0)
    middle.legend()
    budgets = np.unique(np.geomspace(len(L), L.size, 30).round().astype(int)).tolist()
    right.plot(budgets, [planner.plan_cost(L, planner.plan(results["L_valid"], n)) / L.shape[1]
                         for n in budgets], label="predicted")
    right.plot(*zip(*((row["calls"], row["measured"]) for row in results["calls"]
                      if row["measured"])), "o",
               label="measured")
    right.set(title="bits under a budget", xlabel="network calls", ylabel=f"bits/{unit}",
              xscale="log")
    right.legend()
    figure.tight_layout()
    with replacing(folder / "results.png") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


# -- The command -----------------------------------------------------------------------------------

def machine(device):
    """What a speed depends on, in words: the processor, and how many threads of it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")                         # Linux; elsewhere Python knows the name
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def conditions(c):
    """What a figure depends on beside the settings."""
    return dict(device=c.device, machine=machine(c.device), versions=dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))


def finish(run, data, folder, with_plot):
    """Evaluates a completed run, writes what it found, and says what to type next."""
    c, checkpoint = run.c, folder / "ckpt.pt"
    try:
        results = evaluate(run.ema, data, c.passes)
    except KeyboardInterrupt:
        stopped("the training is complete and saved; evaluate it", folder)
    run.L = np.array(results["L_valid"])
    run.save(checkpoint)
    results |= dict(seed=c.seed, steps=run.step, seconds=run.seconds,
                    params=sum(p.numel() for p in run.model.parameters()),
                    settings=dataclasses.asdict(c), **conditions(c))
    piece, content = datasets.piece(data)
    with replacing(folder / piece) as file:
        file.write(content)
    if with_plot:
        plot(folder, results)
    print(describe(results))
    show_samples(run, folder)
    with replacing(folder / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    suggest(run, checkpoint, folder / piece)


def show_samples(run, folder):
    """Two samples of text on the terminal, or a grid of images in a file."""
    image, calls = run.kind == "image", min(100 if run.kind == "image" else 50, run.L.size)
    x = run.ema.sample(16 if image else 2, planner.plan(run.L, calls), generator=run.generator)
    if image:
        pictures = datasets.grid(datasets.to_images(x.cpu(), run.shape, run.K), columns=8)
        with replacing(folder / "samples.png") as file:
            file.write(datasets.png(pictures))
        print(f"samples, {calls} network calls: {folder / 'samples.png'}")
    else:
        print("samples:", *(f"  {datasets.show(row.cpu(), run.K)}" for row in x), sep="\n")


def suggest(run, checkpoint, piece):
    """Prints the commands that come next."""
    image, size = run.kind == "image", run.L.size
    calls, few = min(100, size) if image else -(-size // 4), min(50 if image else 20, size)
    ckpt, source, packed = map(typed, (checkpoint, piece, piece.with_suffix(".ardm")))
    blanks = ([f"python sample.py --ckpt {ckpt} --calls {few} --inpaint top"] if image else
              [f'python sample.py --ckpt {ckpt} --prompt "the ____ of"']
              if run.kind == "text" and run.model.D > 10 else [])
    print("what to run next:", f"python sample.py --ckpt {ckpt} --calls {few} --frames", *blanks,
          f"python compress.py encode --ckpt {ckpt} --calls {calls} {source} {packed}",
          f"python compress.py bench --ckpt {ckpt} --calls {calls}", sep="\n  ")


def typed(path):
    """A path as it is typed on a command line; with slashes, which Windows takes too."""
    return shlex.quote(Path(path).as_posix())


def stopped(what, folder):
    print(f"{what}; go on with: python train.py --resume --out {typed(folder)}")
    sys.exit(130)


def resumed(given):
    """(settings, checkpoint) of the run to go on with; flags may lengthen it, not change it."""
    folder = given.get("out") or f"out/{run_name(given.get('data', 'pydoc'))}"
    checkpoint = read_checkpoint(Path(folder) / "ckpt.pt")
    c = checkpoint["settings"]
    if "device" in given:
        given["device"] = str(pick_device(given["device"]))
    for name, value in given.items():
        if name not in RESUMABLE and getattr(c, name) != value:
            raise UserError(f"--{name.replace('_', '-')} {value}: the run in {folder} has "
                            f"{getattr(c, name)}, and cannot be resumed with another")
    if "minutes" in given and "steps" not in given:
        c.steps = None
    return check(dataclasses.replace(c, **{**given, "out": folder})), checkpoint


def check_folder(c):
    """UserError where the run would write over its own data."""
    for name in WRITTEN:
        path = Path(c.out) / name
        if Path(c.data).is_file() and path.exists() and os.path.samefile(c.data, path):
            raise UserError(f"--data {c.data}: a run in {c.out} writes its own {name}; choose "
                            "another --out")


def set_aside(folder):
    """Renames what a run that is in the way has trained, and its log and results."""
    number = 1
    while (folder / f"ckpt.{number}.pt").exists():
        number += 1
    for name in ("ckpt.pt", "log.csv", "results.json"):
        if (path := folder / name).exists():
            os.replace(path, path.with_suffix(f".{number}{path.suffix}"))
    print(f"the run that was in {folder} is kept as ckpt.{number}.pt")


def main():
    """The command line: a new run, one that goes on, or a checkpoint evaluated."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--evaluate", metavar="CKPT", help="only evaluate this checkpoint")
    parser.add_argument("--plot", action="store_true",
                        help="also draw results.png (needs matplotlib)")
    add_settings(parser)
    given = vars(parser.parse_args())
    resume, path, with_plot = given.pop("resume"), given.pop("evaluate"), given.pop("plot")
    if with_plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    if path:
        return evaluate_only(Path(path), given, with_plot)
    c, checkpoint = resumed(given) if resume else (complete(given), None)
    check_folder(c)
    data, folder = load_data(c, pick_device(c.device), checkpoint), Path(c.out)
    run = Run(c, data.K, data.kind, data.shape)
    if resume:
        run.restore(checkpoint)
    elif (folder / "ckpt.pt").exists():
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in data.splits.items())
    print(f"{data.name}: K = {data.K}, D = {data.D}, {sizes} "
          f"{'images' if data.kind == 'image' else 'characters'}; "
          f"{sum(p.numel() for p in run.model.parameters()):,} weights on {c.device}"
          f"{', bfloat16' if c.bf16 else ''}; results go to {folder}")
    if train(run, data, folder):
        finish(run, data, folder, with_plot)
    else:
        stopped(f"stopped at step {run.step} and saved", folder)


def evaluate_only(path, given, with_plot):
    """--evaluate: prints, and writes nothing but the picture that --plot asks for."""
    if foreign := given.keys() - {"data", "data_dir", "device", "passes"}:
        raise UserError(f"--evaluate takes its settings from the checkpoint: leave out "
                        f"--{foreign.pop().replace('_', '-')}")
    model, checkpoint = load_model(path, given.get("device"))
    c = check(dataclasses.replace(checkpoint["settings"], **given))
    data = load_data(c, next(model.parameters()).device, checkpoint)
    results = evaluate(model, data, c.passes)
    if with_plot:
        plot(path.parent, results)
    print(f"{path} on {data.name}, step {checkpoint['step']}", describe(results), sep="\n")


if __name__ == "__main__":
    command_line(main)
