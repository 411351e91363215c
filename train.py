"""Training, evaluation and checkpoints.

    python train.py                                     about three minutes, no download
    python train.py --data text8                        the paper's text
    python train.py --data FILE --minutes 10            any text, any bytes, or a .npy of images
    python train.py --data cifar10 --branch 4           an upscale model of images
    python train.py --resume                            goes on where an interrupted run stopped
    python train.py --evaluate out/pydoc/ckpt.pt        the number, its standard error, the protocol

A run writes OUT/ckpt.pt, log.csv, test.txt (test.bin, test.npy: a piece of the test split, for
compress.py), samples.png of images, results.png where --plot asks for it and, last, results.json.
"""
import argparse
import collections
import copy
import csv
import dataclasses
import importlib.util
import json
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data as datasets
import nets
import planner
from ardm import bits_per_dim, sample_sigma, stratified_steps

SIZES = {
    "text": {
        "tiny": dict(length=64, dim=128, depth=4, heads=2, batch=48, minutes=2.75),
        "small": dict(length=250, dim=512, depth=8, heads=8, batch=256, minutes=2.5),
        "paper": dict(length=250, dim=768, depth=12, heads=12, batch=512, steps=3_000_000)},
    "image": {
        "tiny": dict(dim=64, depth=2, heads=0, batch=8, minutes=2.75),
        "small": dict(dim=128, depth=4, heads=4, batch=64, minutes=2.5),
        "paper": dict(dim=256, depth=32, heads=1, batch=128, steps=1_170_000)}}
PAPER = {                            # App. D; where the paper is silent, the released code's values
    "text": dict(lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-3, warmup=5000, clip=0.25, ema=0.995),
    "image": dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=1, clip=100.0, ema=0.9999)}
OURS = {                             # muon_lr and muon_decay are for the matrices of the blocks
    "tiny": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.03, muon_decay=0.1,
                 warmup=50, clip=1.0, ema=0.99),
    "small": dict(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.02, muon_decay=0.02,
                  warmup=200, clip=1.0, ema=0.998)}
OURS["paper"] = OURS["small"]
REPORT = 100                         # steps between rows of log.csv
COLUMNS = ("step", "seconds", "train_bits_per_dim", "valid_bits_per_dim")
PLAIN = ("step", "seconds", "L", "counts", "log")          # what a run keeps as it is
RESUMABLE = {"data", "steps", "minutes", "passes", "out", "compile", "device"}
MOST = 1 << 22                       # variables of the test split that a CPU evaluates by default


def positive(text):
    """An integer of 1 or more, from a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def setting(default, help, **how):
    return dataclasses.field(default=default, metadata=dict(help=help, **how))


@dataclasses.dataclass
class Settings:
    """All that decides a run; every field is a flag. None: `complete` fills it in, by --size."""
    data: str = setting("pydoc", f"{', '.join(datasets.NAMES)}, or a file (default pydoc)")
    size: str = setting(None, "default: small on CUDA, else tiny", choices=list(SIZES["text"]))
    recipe: str = setting("ours", "the paper's network and optimiser, or what learns more in "
                          "minutes (default ours)", choices=["paper", "ours"])
    branch: int = setting(None, "b of an upscale model (without it: order-agnostic)")
    parametrization: str = setting(None, "of an upscale model; default: direct for images in our "
                                   "recipe, else data", choices=["data", "direct"])
    bits: int = setting(8, "kept of the 8 of each value in an image, the highest ones",
                        choices=range(1, 9))
    length: positive = setting(None, "D of text: characters in a datapoint")
    dim: positive = setting(None, "width of the network")
    depth: positive = setting(None, "blocks of the network; of images: on each side")
    heads: int = setting(None, "attention heads; of images: in the middle, 0: no attention")
    batch: positive = setting(None, "datapoints in a training step")
    lr: float = setting(None, "learning rate of Adam")
    steps: positive = setting(None, "length of the run in training steps")
    minutes: float = setting(None, "length of the run in minutes, where --steps is not given")
    passes: positive = setting(None, "passes over each split in the evaluation")
    compile: bool = setting(None, "torch.compile; default: yes on CUDA with Triton",
                            action=argparse.BooleanOptionalAction)
    device: str = setting(None, "cuda, mps or cpu; default: the first that is there")
    seed: int = setting(0, "of the weights and of every draw (default 0)")
    out: str = setting(None, "folder for the results; default: out/<data>")


# -- A run: model, optimiser, loop -----------------------------------------------------------------

class Run:
    """What training changes: the weights, their average, the optimisers, the random numbers."""

    def __init__(self, c, data):
        torch.manual_seed(c.seed)
        self.c = c
        self.settings = dataclasses.asdict(c) | dict(kind=data.kind, K=data.K,
                                                     shape=list(data.shape))
        self.model = nets.build(self.settings).to(c.device)
        self.ema = copy.deepcopy(self.model).eval()
        kind = "image" if data.kind == "image" else "text"
        self.hyper = PAPER[kind] if c.recipe == "paper" else OURS[c.size]
        self.optimizers = make_optimizers(self.model.net, c, self.hyper)
        self.loss = torch.compile(self.model.loss) if c.compile else self.model.loss
        self.generator = torch.Generator(c.device).manual_seed(c.seed)
        self.step = 0
        self.seconds = 0.0
        self.L = self.counts = None                        # measured at the end
        self.log = []                                      # rows of log.csv

    @property
    def progress(self):
        """The part of the run that is done, 0..1: of its steps, or of its time."""
        return self.step / self.c.steps if self.c.steps else self.seconds / (60 * self.c.minutes)

    def save(self, folder):
        """Writes ckpt.pt; ValueError, and the old one stays, where the weights are no numbers."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ValueError(f"step {self.step}: the weights are not numbers any more; begin anew "
                             "with a smaller --lr")
        state = dict(settings=self.settings, model=self.model.state_dict(),
                     ema=self.ema.state_dict(), generator=self.generator.get_state(),
                     optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
                     **{name: getattr(self, name) for name in PLAIN})
        with datasets.write(folder / "ckpt.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:                  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error

    def restore(self, checkpoint):
        if "optimizer" not in checkpoint:
            raise ValueError("this checkpoint holds weights alone: it cannot be resumed")
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.generator.set_state(checkpoint["generator"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        for name in PLAIN:
            setattr(self, name, checkpoint[name])


def train(run, data, folder):
    """Steps until the run is over, or Ctrl-C. True where it was completed."""
    saved = time.perf_counter()
    begin = saved - run.seconds
    losses = collections.deque(maxlen=50)
    bar = tqdm(total=1.0, initial=min(run.progress, 1.0), mininterval=0.5,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    with bar, caught_signals() as stop:
        while run.progress < 1 and not stop:
            x = data.batch(run.c.batch, generator=run.generator)
            losses.append(train_step(run, x))
            run.seconds = time.perf_counter() - begin
            if run.step % 10 == 0:                         # seldom: reading the loss waits for it
                loss = torch.stack([*losses]).mean().item()
                bar.set_postfix_str(f"step {run.step}, {loss:.3f} bits/{datasets.UNITS[data.kind]}",
                                    refresh=False)
                bar.update(min(run.progress, 1.0) - bar.n)
            if run.step % REPORT == 0:
                write_log(run, data, loss, folder)
            if time.perf_counter() - saved > 120:
                run.save(folder)
                saved = time.perf_counter()
    run.save(folder)
    return run.progress >= 1


def train_step(run, x):
    """Algorithm 2 on x (B, D) and one step of the optimisers: the loss in bits/dim, a tensor."""
    B, D = x.shape
    rate = learning_rate(run.c, run.hyper, run.step, run.progress)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["full_lr"]
        optimizer.zero_grad()
    draw = dict(device=x.device, generator=run.generator)  # here: a compiled loss cannot draw
    t, s = stratified_steps(B, run.model.S, D, **draw)
    sigma = sample_sigma(B, D, **draw)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=has_bf16(run.c.device)):
        loss = bits_per_dim(run.loss(x, t, s, sigma), D).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), run.hyper["clip"])
    for optimizer in run.optimizers:
        optimizer.step()
    run.step += 1
    decay = min(run.hyper["ema"], 1 - 1 / (1 + 0.02 * run.step))   # forgets the beginning
    get_ema_multi_avg_fn(decay)([*run.ema.parameters()], [*run.model.parameters()], run.step)
    return loss.detach()


def learning_rate(c, hyper, step, progress):
    """The factor on the full rate: a warm-up of hyper["warmup"] steps or a tenth of the run,
    whichever is less; then constant in the paper, falling to 0 in ours."""
    up = min(1.0, max((step + 1) / hyper["warmup"], 10 * progress))
    return up if c.recipe == "paper" else min(up, max(1 - progress, 0.0))


def make_optimizers(net, c, hyper):
    """Adam for everything; in our recipe Muon for the matrices of the blocks."""
    blocks = ("blocks", "down", "middle", "up")
    matrices = {p: None for name, p in net.named_parameters()
                if c.recipe == "ours" and name.split(".")[0] in blocks and p.ndim in (2, 4)}
    rest = [p for p in net.parameters() if p not in matrices]
    optimizers = [torch.optim.AdamW(rest, lr=hyper["lr"] if c.lr is None else c.lr,
                                    betas=hyper["betas"], weight_decay=hyper["weight_decay"],
                                    fused=not c.device.startswith("mps"))]
    if matrices:
        optimizers.append(Muon(matrices, hyper["muon_lr"], hyper["muon_decay"],
                               torch.bfloat16 if has_bf16(c.device) else torch.float32))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Not in the paper: momentum whose steps are made orthogonal, so that every direction of a
    matrix is learnt at one rate. A convolution is the matrix of its outputs and all its inputs.

    torch.optim.Muon takes only matrices and always rounds to bfloat16, which is slow on a CPU
    without it; here all matrices of one shape go through one product.
    """

    def __init__(self, matrices, lr, decay, dtype=torch.float32, momentum=0.95):
        self.dtype = dtype
        super().__init__(matrices, dict(lr=lr, decay=decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One step on every matrix, by its gradient."""
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
                step = p.grad.lerp(mean, group["momentum"])              # Nesterov's: a step ahead
                by_shape[p.shape].append((p, step.flatten(1)))
            for pairs in by_shape.values():
                weights, steps = zip(*pairs)
                steps = orthogonal(torch.stack(steps).to(self.dtype))
                size = group["lr"] * max(1, steps.shape[1] / steps.shape[2]) ** 0.5
                for p, step in zip(weights, steps):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.sub_(step.view_as(p), alpha=size)


def orthogonal(X):
    """(n, rows, columns) -> nearly U V^T of each U S V^T, by five Newton-Schulz steps: the
    polynomial takes every singular value of 0.01..1 to about 0.7..1.2, by products alone."""
    if X.shape[1] > X.shape[2]:
        return orthogonal(X.mT).mT                         # X X^T is to be the small one
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)      # no singular value above 1
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X


def has_bf16(device):
    """True where the processor multiplies bfloat16 itself: elsewhere it is slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextmanager
def caught_signals():
    """Ctrl-C, or the end of a job's time, lets the loop finish its step: yields a list that is
    empty until then. A second one stops at once."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, old[number])

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def write_log(run, data, loss, folder):
    """A new row of log.csv, which is written anew: a run that goes on forgets later rows."""
    valid = bound(run.ema, spread(data.chunks("valid")[0], 64), passes=1)["bits"]
    run.log.append([run.step, round(run.seconds, 3), round(loss, 6), round(valid, 6)])
    with datasets.write(folder / "log.csv", "w") as file:
        csv.writer(file).writerows([COLUMNS, *run.log])


# -- Evaluation ------------------------------------------------------------------------------------

def spread(chunks, most):
    """At most that many of the chunks (N, D), evenly spread over all of them."""
    n = min(len(chunks), most)
    return chunks[torch.arange(n) * len(chunks) // n]


@torch.no_grad()
def bound(model, chunks, rest=(), passes=None):
    """The bound of Eq. 2 on chunks (N, D) and a shorter rest: one step t per chunk and pass, t and
    s stratified over the whole pass. Without passes: half a million variables a stage at least.

    -> dict: bits (per dim), stderr (over chunks), L and counts (S, D), L in bits, passes.
    """
    (N, D), S, device = chunks.shape, model.S, chunks.device
    passes = passes or -(-(S << 19) // (N * D))
    generator = torch.Generator(device).manual_seed(1)
    nats, rest_nats = torch.zeros(N, device=device), 0.0
    L, counts = torch.zeros(2, S * D, device=device)
    for _ in range(passes):
        t, s = stratified_steps(N, S, D, device, generator)
        for rows in torch.arange(N, device=device).split(nets.rows_at_once(model)):
            loss = model.loss(chunks[rows].long(), t[rows], s[rows], generator=generator)
            nats[rows] += loss / passes
            step = (s[rows] - 1) * D + t[rows] - 1
            L.index_add_(0, step, loss / (S * D))
            counts.index_add_(0, step, torch.ones_like(loss))
        if len(rest):
            rest_nats += model.loss(rest[None].long(), generator=generator).item() / passes
    nats, counts = nats.cpu().double(), counts.cpu()       # cpu: MPS has no float64
    L = bits_per_dim(L.cpu().double(), 1) / counts         # NaN where a step was never met
    return dict(bits=bits_per_dim(nats.sum().item() + rest_nats, N * D + len(rest)),
                stderr=standard_error(bits_per_dim(nats, D)), passes=passes,
                L=L.view(S, D), counts=counts.view(S, D))


def standard_error(bits):
    return bits.std(correction=min(1, len(bits) - 1)).item() / len(bits) ** 0.5


def measure_plan(model, chunks, plan, most):
    """Exact bits/dim under a plan, each chunk in a random order: a dict. most: how many variables
    the network may predict for it; empty where that is less than three chunks."""
    n = min(len(chunks), most // (len(plan) * model.D))
    if n < min(3, len(chunks)):
        return {}
    generator = torch.Generator(chunks.device).manual_seed(1)
    nats = torch.cat([model.nll(x.long(), plan, generator=generator)
                      for x in spread(chunks, n).split(nets.rows_at_once(model))])
    bits = bits_per_dim(nats.cpu(), model.D)
    return dict(measured=bits.mean().item(), stderr=standard_error(bits), chunks=n)


def evaluate(model, data, passes=None):
    """All that a run reports, put into words by `describe`. L, for plans, is from validation.

    Without passes it takes about a minute, by fewer datapoints where there are many.
    """
    S, D = model.S, model.D
    (valid, rest), (chunks, test_rest) = data.chunks("valid"), data.chunks("test")
    if passes is None and chunks.device.type == "cpu":
        valid, chunks = spread(valid, max(64, MOST // 4 // D)), spread(chunks, max(64, MOST // D))
    found = bound(model, valid, rest, passes)
    if not np.isfinite(found["bits"]):
        raise ValueError("the network gives no numbers: its weights are damaged")
    begin = time.perf_counter()
    test = bound(model, chunks, test_rest, passes)
    speed = test["passes"] * chunks.numel() / (time.perf_counter() - begin)
    L, L_test = (planner.smooth(part["L"], part["counts"]) for part in (found, test))
    budgets = (5, 10, 20, 50) if len(data.shape) == 1 else (20, 50, 100, 200)
    plans = [planner.plan(L, n) for n in budgets if S <= n < S * D] + [planner.full_plan(S, D)]
    most = int(20 * speed / len(plans))                    # 20 seconds for all of them
    symbols = data.splits["test"].cpu().numpy().reshape(-1)
    return dict(data=data.name, kind=data.kind, shape=list(data.shape), bits_per_dim=test["bits"],
                stderr=test["stderr"], passes=test["passes"], chunks=len(chunks),
                rest=len(test_rest), L=found["L"], counts=found["counts"], L_smooth=L.tolist(),
                calls=[dict(calls=len(plan), predicted=planner.plan_cost(L_test, plan) / D,
                            **measure_plan(model, chunks, plan, most)) for plan in plans],
                references=datasets.references(symbols, data.kind, data.K, data.shape))


def describe(r):
    """The results of `evaluate` in words and tables, for a terminal."""
    unit = datasets.UNITS[r["kind"]]
    others = ", ".join(f"{name} {bits:.2f}" for name, bits in r["references"].items())
    lines = [f"test: {r['bits_per_dim']:.3f} bits/{unit}, standard error {r['stderr']:.3f}, on "
             f"{r['data']}",
             f"  the bound of Eq. 2 with averaged weights, on {r['chunks']:,} datapoints of "
             f"{' x '.join(map(str, r['shape']))} and a rest of {r['rest']}, without context,",
             f"  in {r['passes']} passes; in each, every datapoint has a random order and one step "
             "t, stratified over the pass",
             f"for comparison, bits/{unit}: {others}",
             f"loss components L_t in bits, t = 1..{len(r['L_smooth'][0])}:"]
    for row in r["L_smooth"]:
        heights = [part.mean() / row[0] for part in np.array_split(row, min(48, len(row)))]
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * min(max(one, 0), 1))] for one in heights)
        lines.append(f"  {row[0]:.2f} {bars} {row[-1]:.2f}")
    lines.append(f"network calls   bits/{unit} predicted from L_t   measured (exact)")
    for row in r["calls"]:
        measured = "too many calls for this evaluation"
        if "measured" in row:
            measured = f"{row['measured']:.3f} +- {row['stderr']:.3f}, {row['chunks']} datapoints"
        lines.append(f"  {row['calls']:>11}   {row['predicted']:>27.3f}   {measured}")
    return "\n".join(lines)


def plot(folder, results, log):
    """folder/results.png: loss over time, L_t, and the price of few calls (the paper's Fig. 3)."""
    from matplotlib import pyplot
    L = np.array(results["L_smooth"])
    budgets = np.unique(np.geomspace(len(L), L.size, 30).round().astype(int)).tolist()
    costs = [cost / L.shape[1] for cost in planner.costs(L, budgets).values()]
    exact = [(row["calls"], row["measured"]) for row in results["calls"] if "measured" in row]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4))
    for name, column in (("training", 2), ("validation", 3)):
        left.plot([row[1] for row in log], [row[column] for row in log], label=name)
    for s, row in enumerate(L, start=1):
        middle.plot(range(1, len(row) + 1), row, label=f"stage {s}")
    right.plot(budgets, costs, label="predicted from $L_t$")
    right.plot(*zip(*exact), "o", label="measured")
    left.set(xlabel="seconds", ylabel="bits per dimension")
    middle.set(xlabel="t", ylabel="loss component $L_t$, bits", ylim=0)
    right.set(xlabel="network calls", ylabel="bits per dimension", xscale="log")
    for part in (left, middle, right):
        part.legend()
    with datasets.write(folder / "results.png") as file:
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight")


# -- The command -----------------------------------------------------------------------------------

def parse():
    """The command line: a dict of the settings that were given, and the other flags."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--evaluate", metavar="CKPT", help="only evaluate this checkpoint")
    parser.add_argument("--plot", action="store_true", help="also draw results.png (matplotlib)")
    for field in dataclasses.fields(Settings):
        how = dict(field.metadata)
        if "action" not in how:
            how["type"] = field.type
        if not how.keys() & {"action", "choices"}:
            how["metavar"] = field.name.upper()
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args())
    return given, given.pop("resume"), given.pop("evaluate"), given.pop("plot")


def load_data(given):
    """The data of these flags, on the device; the size of the run decides the length of chunks."""
    device = nets.pick_device(given.get("device"))
    given.setdefault("size", "small" if device.type == "cuda" else "tiny")
    length = given.get("length") or SIZES["text"][given["size"]]["length"]
    data = datasets.load(given.get("data", "pydoc"), length, given.get("bits", 8), device)
    data.turns = data.flips and given.get("recipe") == "paper"
    return data


def complete(given, data):
    """Settings from the flags that were given: what they leave open comes from the size."""
    image = data.kind == "image"
    preset = dict(SIZES["image" if image else "text"][given["size"]])
    if image and given["size"] == "tiny" and data.D < 1024:
        preset["batch"] *= 4                               # of small images more
    if "minutes" in given:
        preset.pop("steps", None)
    c = Settings(**preset | given)
    c.device = str(nets.pick_device(c.device))
    c.out = c.out or default_folder(c.data)
    if c.compile is None:
        c.compile = c.device.startswith("cuda") and importlib.util.find_spec("triton") is not None
    if c.parametrization is None:
        c.parametrization = "direct" if image and c.recipe == "ours" else "data"
    if c.heads < 0 or c.dim % (2 * (c.heads or 1)) or c.dim < 4 or c.heads == 0 and not image:
        raise ValueError(f"--dim {c.dim} must be 4 or more, and a multiple of 2 * --heads = "
                         f"{2 * c.heads}; --heads may be 0 for images alone")
    if not (c.steps or (c.minutes or 0) > 0):
        raise ValueError("--minutes must be positive")
    return c


def default_folder(data):
    return f"out/{Path(data).name.split('.')[0] or 'run'}"


def reopen(path, given, changeable):
    """A model, its checkpoint, the run's settings as flags with what is given, and the data;
    ValueError for a flag that may not change, and for data of another form."""
    foreign = given.keys() - changeable
    if foreign:
        raise ValueError(f"the settings come from the checkpoint: leave out --{foreign.pop()}")
    model, checkpoint = nets.load(path, given.get("device"))
    settings = checkpoint["settings"]
    flags = {field.name: settings[field.name] for field in dataclasses.fields(Settings)}
    flags |= dict(device=None, compile=None)               # where a run happens is not what it is
    if "minutes" in given:
        flags["steps"] = None
    flags |= given
    flags = {name: value for name, value in flags.items() if value is not None}
    data = load_data(flags)
    found = (data.kind, data.K, list(data.shape))
    wanted = (settings["kind"], settings["K"], list(settings["shape"]))
    if found != wanted:
        raise ValueError(f"{data.name} has kind, K and shape {found}, the checkpoint was trained "
                         f"on {wanted}")
    return model, checkpoint, flags, data


def prepare_folder(c, going_on):
    """Keeps what a finished run left in the way; ValueError where a run would overwrite its data.
    """
    folder = Path(c.out)
    if os.path.isfile(c.data) and Path(c.data).resolve().parent == folder.resolve():
        raise ValueError(f"--data {c.data}: a run in {c.out} might write over it; choose another "
                         "--out")
    folder.mkdir(parents=True, exist_ok=True)
    finished = (folder / "results.json").exists()
    if (folder / "ckpt.pt").exists() and (finished or not going_on):
        number = 1
        while (folder / f"ckpt.{number}.pt").exists():
            number += 1
        for path in (folder / "ckpt.pt", folder / "log.csv", folder / "results.json"):
            if path.exists():
                os.replace(path, path.with_suffix(f".{number}{path.suffix}"))
        print(f"the run that was in {folder} is kept as ckpt.{number}.pt")
    return folder


def finish(run, data, folder, with_plot):
    """Evaluates a completed run, writes and shows what it found, and says what to run next."""
    results = evaluate(run.ema, data, run.c.passes)
    run.L, run.counts = results.pop("L"), results.pop("counts")
    run.save(folder)
    if with_plot:
        plot(folder, results, run.log)
    print(describe(results))
    results |= dict(seed=run.c.seed, steps=run.step, seconds=run.seconds, device=run.c.device,
                    params=sum(p.numel() for p in run.model.parameters()), settings=run.settings,
                    versions=dict(python=platform.python_version(), torch=torch.__version__,
                                  numpy=np.__version__))
    piece, blanks = folder / datasets.PIECES[data.kind], '--prompt "the ____ of"'
    L, n, few = np.array(results["L_smooth"]), 2, 20
    if data.kind == "image":
        n, few, blanks = 16, 100, "--inpaint top"
    few = min(few, L.size)
    x = run.ema.sample(n, planner.plan(L, few), generator=run.generator).cpu()
    for path, content in datasets.exhibits(data, x, folder).items():
        with datasets.write(path) as file:
            file.write(content)
    with datasets.write(folder / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    ckpt, source, packed = (shlex.quote(path.as_posix()) for path in (
        folder / "ckpt.pt", piece, folder / "test.ardm"))
    print("what to run next:", f"python sample.py --ckpt {ckpt} --calls {few} --frames",
          f"python sample.py --ckpt {ckpt} {blanks}",
          f"python compress.py encode --ckpt {ckpt} {source} {packed}",
          f"python compress.py bench --ckpt {ckpt}", sep="\n  ")


def main():
    """A new run, one that goes on, or a checkpoint evaluated."""
    given, going_on, path, with_plot = parse()
    if with_plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if path:                                               # nothing is written but the picture
        model, checkpoint, _, data = reopen(path, given, {"data", "device", "passes"})
        results = evaluate(model, data, given.get("passes"))
        if with_plot:
            plot(Path(path).parent, results, checkpoint.get("log", []))
        return print(f"{path} on {data.name}", describe(results), sep="\n")
    if going_on:
        out = given.get("out") or default_folder(given.get("data", "pydoc"))
        _, checkpoint, given, data = reopen(f"{out}/ckpt.pt", given, RESUMABLE)
        given["out"] = out
    else:
        data = load_data(given)
    c = complete(given, data)
    run = Run(c, data)
    if going_on:
        run.restore(checkpoint)
    folder = prepare_folder(c, going_on)
    print(f"{data.name}: K = {data.K}, D = {data.D}; "
          + ", ".join(f"{name} {len(part):,}" for name, part in data.splits.items())
          + f"; {sum(p.numel() for p in run.model.parameters()):,} weights on {c.device}; results "
          f"go to {folder}")
    again = f"go on with: python train.py --resume --out {shlex.quote(folder.as_posix())}"
    try:
        if train(run, data, folder):
            return finish(run, data, folder, with_plot)
        print(f"stopped at step {run.step} and saved; {again}")
    except KeyboardInterrupt:
        print(f"stopped; what was saved is in {folder}; {again}")
    sys.exit(130)


if __name__ == "__main__":
    datasets.run(main)
