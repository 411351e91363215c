"""Training, evaluation and checkpoints.

    python train.py                                     about three minutes, no download
    python train.py --data FILE --minutes 10            any text or bytes, images (.npy, idx), .wav
    python train.py --data cifar10 --branch 4           an upscale model of images
    python train.py --resume                            goes on with an interrupted run
    python train.py --evaluate out/pydoc/ckpt.pt        the number, its standard error, the protocol
    torchrun --nproc_per_node=2 train.py                on two GPUs, each with half of every batch

A run writes ckpt.pt, log.csv, a piece of the test split, results.json, and samples of images (.png)
or audio (.png, .wav).
"""
import argparse
import atexit
import collections
import copy
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
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
        "small": dict(dim=128, depth=4, heads=4, batch=128, minutes=2.5),
        "paper": dict(dim=256, depth=32, heads=1, batch=128, steps=1_170_000)},
    "audio": {
        "tiny": dict(dim=48, depth=9, heads=1, batch=8, minutes=2.75),
        "small": dict(dim=128, depth=20, heads=1, batch=128, minutes=2.5),
        "paper": dict(dim=256, depth=36, heads=1, batch=256, steps=1_000_000)}}
PAPER = {                            # App. D; where the paper is silent, the released code's values
    "text": dict(lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-3, warmup=5000, clip=0.25, ema=0.995),
    "image": dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=1, clip=100.0, ema=0.9999),
    "audio": dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=15000, clip=1000.0,
                  ema=0.995)}
OURS = {                             # muon_lr and muon_decay are for the matrices of the blocks
    "tiny": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.03, muon_decay=0.1,
                 warmup=50, clip=1.0, ema=0.99),
    "small": dict(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.02, muon_decay=0.02,
                  warmup=200, clip=1.0, ema=0.998)}
OURS["paper"] = OURS["small"]
EPOCHS = 150                         # at most, where no length of the run is given
REPORT = 100                         # steps between rows of log.csv
PLAIN = ("settings", "step", "seconds", "L", "counts", "log")          # stored as it is
MOST = 1 << 22                       # variables of the test split that a CPU evaluates by default


def setting(default, help, **how):
    return dataclasses.field(default=default, metadata=dict(help=help, **how))


@dataclasses.dataclass
class Settings:
    """All that decides a run; every field is a flag. None: `complete` fills it in, by --size."""
    data: str = setting("pydoc", f"{', '.join(datasets.NAMES)}, or a file or folder "
                        "(default pydoc)")
    size: str = setting(None, "of network, batch and run; default: small on CUDA, else tiny",
                        choices=list(SIZES["text"]))
    recipe: str = setting("ours", "the paper's, or what learns more in minutes (default ours)",
                          choices=["paper", "ours"])
    branch: int = setting(None, "b of an upscale model; 0, the default but for audio (16): "
                          "order-agnostic")
    parametrization: str = setting(None, "of an upscale model; default in our recipe: data for "
                                   "text, direct for images, mixture for audio",
                                   choices=["data", "direct", "mixture"])
    bits: int = setting(8, "kept of each 8-bit value of an image (default 8)", choices=range(1, 9))
    length: int = setting(None, "D of text or audio: characters or samples in a datapoint")
    dim: int = setting(None, "width of the network")
    depth: int = setting(None, "blocks of the network; of images: on each side")
    heads: int = setting(None, "attention heads; of images: in the middle, 0: no attention")
    batch: int = setting(None, "datapoints in a training step")
    lr: float = setting(None, "learning rate of Adam; Muon's is the recipe's own")
    steps: int = setting(None, "length of the run in training steps")
    minutes: float = setting(None, "length of the run in minutes; without --steps and --minutes "
                             f"the size's own, and at most {EPOCHS} passes over the data, or 100 "
                             "steps")
    passes: int = setting(None, "passes over each split in the evaluation")
    compile: bool = setting(None, "torch.compile; default: yes on CUDA with Triton",
                            action=argparse.BooleanOptionalAction)
    device: str = setting(None, "cuda, mps or cpu; default: the first that is there")
    seed: int = setting(0, "seed of the weights and of every draw (default 0)")
    out: str = setting(None, "folder for the results; default: out/<data>")

    def __post_init__(self):
        for name in ("length", "dim", "depth", "batch", "steps", "minutes", "passes", "lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: must be more than 0")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: choose 0 to 2^63 - 1")
        self.device = str(nets.pick_device(self.device))
        self.size = self.size or ("small" if self.device.startswith("cuda") else "tiny")
        self.out = self.out or f"out/{Path(self.data).name.split('.')[0] or 'run'}"
        if self.compile is None:
            has_triton = importlib.util.find_spec("triton") is not None
            self.compile = self.device.startswith("cuda") and has_triton


# -- A run: model, optimiser, loop -----------------------------------------------------------------

class Run:
    """What training changes: the weights, their average, the optimisers, the random numbers."""

    def __init__(self, c, data):
        torch.manual_seed(c.seed)
        self.c = c
        self.settings = vars(c) | dict(kind=data.kind, K=data.K, shape=list(data.shape),
                                       sha256=data.digest, rate=getattr(data, "rate", None))
        self.model = nets.build(self.settings).to(c.device)
        self.ema = copy.deepcopy(self.model).eval()
        self.ema.rows = nets.rows_at_once(self.ema)
        kind = "text" if data.kind == "bytes" else data.kind
        self.hyper = PAPER[kind] if c.recipe == "paper" else OURS[c.size]
        self.optimizers = make_optimizers(self.model.net, c, self.hyper)
        self.loss = self.model.loss
        if c.compile:                                      # dynamic shapes are slower
            self.loss = torch.compile(self.model.loss, dynamic=False)
        self.generator = torch.Generator(c.device).manual_seed(c.seed)
        self.rank, self.processes = 0, 1                   # of those that torchrun has started
        if distributed.is_initialized():
            self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        if c.batch % self.processes:
            raise ValueError(f"--batch {c.batch}: take a multiple of {self.processes} processes")
        self.parts = 1                                     # of a batch, for want of memory
        self.step = 0
        self.seconds = 0.0
        self.L = self.counts = None                        # measured at the end
        self.log = []                                      # rows of log.csv
        self.losses = collections.deque(maxlen=50)         # of the latest steps, tensors

    @property
    def progress(self):
        """The part of the run that is done, 0..1, of its steps or time, whichever ends first."""
        return max(self.step / (self.c.steps or math.inf),
                   self.seconds / (60 * (self.c.minutes or math.inf)))

    def draw(self, data):
        """This process's part of a batch, (B, D). Seed, process and step alone decide what a step
        draws: a resumed run goes on as if it had never stopped."""
        self.generator.manual_seed(hash((self.c.seed, self.rank, self.step)))
        return data.batch(self.c.batch // self.processes, generator=self.generator)

    def save(self, folder):
        """Writes ckpt.pt; ValueError, and the old one stays, if the weights are no numbers."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ValueError(f"step {self.step}: the weights are not numbers any more; begin anew "
                             "with a smaller --lr")
        state = {name: getattr(self, name) for name in PLAIN} | dict(
            model=self.model.state_dict(), ema=self.ema.state_dict(), digest=nets.digest(self.ema),
            optimizer=[optimizer.state_dict() for optimizer in self.optimizers],
            losses=[loss.item() for loss in self.losses])
        buffer = io.BytesIO()                              # torch hides what a full disk says
        torch.save(state, buffer)
        with datasets.write(folder / "ckpt.pt") as file:
            file.write(buffer.getbuffer())

    def restore(self, checkpoint):
        """Goes on where the run of this checkpoint was saved."""
        if "optimizer" not in checkpoint:
            raise ValueError("this checkpoint holds weights alone: it cannot be resumed")
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        if checkpoint["settings"]["device"][:3] != self.c.device[:3]:
            print("another device has other random numbers: this is not the run that was never "
                  "stopped")
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        vars(self).update({name: checkpoint[name] for name in PLAIN if name != "settings"})
        self.losses.clear()
        self.losses.extend(torch.tensor(checkpoint.get("losses", []), device=self.c.device))


def train(run, data, folder):
    """Steps until the run is over, or Ctrl-C. True if it was completed."""
    stop = []
    old = {one: signal.signal(one, lambda *_: stop.append(1)) for one in signals_to_stop()}
    saved = said = time.perf_counter()
    begin = saved - run.seconds
    bar = tqdm(total=1.0, initial=min(run.progress, 1.0), mininterval=0.5,
               disable=True if run.rank else None,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    bar.set_postfix_str("compiling" if run.c.compile else "")            # half a minute or more
    for i in itertools.count():
        now = torch.tensor([time.perf_counter() - begin, len(stop)], dtype=torch.float64)
        run.seconds, stopping = share(now).tolist()
        if run.progress >= 1 or stopping:
            break
        try_step(run, data)
        if i == 0:                                         # it compiles: no time of the run
            begin = time.perf_counter() - run.seconds
        if run.rank:                                       # the first process tells and saves
            continue
        if run.step % 10 == 0:                             # seldom: reading the loss waits for it
            loss = torch.stack([*run.losses]).mean().item()
            bar.set_postfix_str(f"step {run.step}, {loss:.3f} bits/{datasets.UNITS[data.kind]}",
                                refresh=False)
            bar.update(min(run.progress, 1.0) - bar.n)
        if run.step % REPORT == 0:
            valid = bound(run.ema, spread(data.chunks("valid"), 64), passes=1)["bits"]
            run.log.append([run.step, round(run.seconds, 3), round(loss, 6), round(valid, 6)])
            write_log(folder, run.log)
            if bar.disable and time.perf_counter() - said > 30:          # no terminal
                said = time.perf_counter()
                print(f"step {run.step}, {run.progress:.0%}, {loss:.3f} bits", file=sys.stderr)
        if time.perf_counter() - saved > 120:
            run.save(folder)
            saved = time.perf_counter()
    bar.close()
    if run.rank == 0:
        run.save(folder)
    for one, handler in old.items():
        signal.signal(one, handler)
    return run.progress >= 1


def try_step(run, data):
    """The next step of a run. One that cannot be compiled is made without, and so are all later."""
    try:
        train_step(run, run.draw(data))
    except Exception as error:                             # whatever a missing compiler brings up
        if run.loss == run.model.loss:
            raise
        print(f"going on without torch.compile ({type(error).__name__})", file=sys.stderr)
        run.loss = run.model.loss
        train_step(run, run.draw(data))


def signals_to_stop():
    """Ctrl-C, and the end of a job's time or of its terminal, but where nohup has that ignored."""
    found = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [one for one in found
            if one.name != "SIGHUP" or signal.getsignal(one) != signal.SIG_IGN]


def write_log(folder, rows):
    """log.csv; a disk that is full for it does not stop the run."""
    try:
        with datasets.write(folder / "log.csv", mode="w") as file:
            csv.writer(file).writerows([
                ("step", "seconds", "train_bits_per_dim", "valid_bits_per_dim"), *rows])
    except ValueError as error:
        print(error, file=sys.stderr)


def train_step(run, x):
    """Algorithm 2 on x (B, D) and one step of the optimisers: the loss in bits/dim, a tensor."""
    B, D = x.shape
    rate = learning_rate(run.c, run.hyper, run.step, run.progress)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["full_lr"]
    draw = dict(device=x.device, generator=run.generator)  # here: a compiled loss cannot draw
    t, s = stratified_steps(B, run.model.S, D, **draw)
    sigma = sample_sigma(B, D, **draw)
    loss = None
    while loss is None:
        loss = backward(run, x, t, s, sigma)
    for p in run.model.parameters():
        share(p.grad, mean=True)
    nn.utils.clip_grad_norm_(run.model.parameters(), run.hyper["clip"])
    for optimizer in run.optimizers:
        optimizer.step()
    run.losses.append(loss)
    run.step += 1
    decay = min(run.hyper["ema"], 1 - 1 / (1 + 0.02 * run.step))   # forgets the beginning
    get_ema_multi_avg_fn(decay)([*run.ema.parameters()], [*run.model.parameters()], run.step)
    return loss


def backward(run, x, t, s, sigma):
    """The gradient of the mean loss, as a sum over run.parts equal parts of the batch. Returns the
    loss; None where memory is too short, and from then on there are more parts."""
    B, D = x.shape
    total = torch.zeros((), device=x.device)
    run.model.zero_grad()
    try:
        for part in zip(*(each.chunk(run.parts) for each in (x, t, s, sigma))):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=nets.has_bf16(run.c.device)):
                loss = bits_per_dim(run.loss(*part), D).sum() / B
            loss.backward()
            total += loss.detach()
    except (MemoryError, RuntimeError) as error:
        if run.parts == B or not datasets.out_of_memory(error):
            raise
        run.parts = next(n for n in range(run.parts + 1, B + 1) if B % n == 0)
        return None
    return total


def join():
    """Joins the processes that torchrun has started, each on a GPU of its own. The rank of this
    one: 0 without torchrun, whatever is left of it in the environment."""
    if not distributed.is_torchelastic_launched():
        return 0
    if torch.cuda.is_available():
        card = int(os.environ["LOCAL_RANK"])
        if card >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(card)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(distributed.destroy_process_group)     # its threads may else abort the exit
    return distributed.get_rank()


def share(numbers, mean=False):
    """A tensor, in place: for every process what the first one has, or the mean of all."""
    try:
        if distributed.is_initialized() and mean:
            distributed.all_reduce(numbers)
            numbers /= distributed.get_world_size()
        elif distributed.is_initialized():
            distributed.broadcast(numbers, 0)
    except RuntimeError as error:
        raise ValueError(f"another process of this run has ended: {str(error).splitlines()[0]}")
    return numbers


def learning_rate(c, hyper, step, progress):
    """The factor on the full rate: a warm-up of hyper["warmup"] steps or a tenth of the run,
    whichever is less; then constant in the paper, falling to 0 in ours."""
    up = min(1.0, max((step + 1) / hyper["warmup"], 10 * progress))
    return up if c.recipe == "paper" else min(up, max(1 - progress, 0.0))


def make_optimizers(net, c, hyper):
    """Adam for everything; in our recipe Muon for the matrices of the blocks."""
    matrices = {p: None for name, p in net.named_parameters() if p.ndim > 1 and p.shape[1] > 1
                and c.recipe == "ours" and re.match("blocks|down|middle|up", name)}
    rest = [p for p in net.parameters() if p not in matrices]
    optimizers = [torch.optim.AdamW(rest, lr=hyper["lr"] if c.lr is None else c.lr,
                                    betas=hyper["betas"], weight_decay=hyper["weight_decay"],
                                    fused=not c.device.startswith("mps"))]
    if matrices:
        optimizers.append(Muon(matrices, hyper["muon_lr"], hyper["muon_decay"],
                               torch.bfloat16 if nets.has_bf16(c.device) else torch.float32))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


class Muon(torch.optim.Optimizer):
    """Not in the paper: momentum whose steps are made orthogonal, so that every direction of a
    matrix is learnt at one rate. A convolution is the matrix of its outputs and all its inputs.
    torch.optim.Muon takes matrices alone, one by one, and rounds to bfloat16 on any machine."""

    def __init__(self, matrices, lr, decay, dtype=torch.float32):
        self.dtype = dtype
        super().__init__(matrices, dict(lr=lr, decay=decay, momentum=0.95))

    @torch.no_grad()
    def step(self):
        """One step on every matrix, by its gradient; all of one shape in one product."""
        group, by_shape = self.param_groups[0], collections.defaultdict(list)
        for p in group["params"]:
            by_shape[p.shape].append(p)
            if p not in self.state:
                self.state[p]["mean"] = torch.zeros_like(p)
        for (rows, *columns), same in by_shape.items():
            gradients, means = [p.grad for p in same], [self.state[p]["mean"] for p in same]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, means, group["momentum"])    # Nesterov's: a step ahead
            steps = orthogonal(torch.stack([p.flatten(1) for p in gradients]).to(self.dtype))
            steps = [step.view_as(p).to(p.dtype) for p, step in zip(same, steps)]
            torch._foreach_mul_(same, 1 - group["lr"] * group["decay"])
            size = group["lr"] * max(1, rows / math.prod(columns)) ** 0.5
            torch._foreach_add_(same, steps, alpha=-size)


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


# -- Evaluation ------------------------------------------------------------------------------------

def spread(chunks, most):
    """At most that many of the chunks (N, D), evenly spread over all of them."""
    n = min(len(chunks), most)
    return chunks[torch.arange(n) * len(chunks) // n]


@torch.no_grad()
def bound(model, chunks, passes=None, seconds=25):
    """The bound of Eq. 2 on chunks (N, D): one step t per chunk and pass, t and s stratified over
    all of them. Without passes: half a million variables a stage, or what these seconds allow.

    -> dict: bits (per dim), stderr (over chunks), passes, chunks, speed (variables a second).
    """
    (N, D), S, device = chunks.shape, model.S, chunks.device
    end = float("inf") if passes else time.perf_counter() + seconds
    passes = passes or -(-(S << 19) // (N * D))
    generator = torch.Generator(device).manual_seed(1)
    row = torch.rand(N, device=device, generator=generator).argsort().repeat(passes)
    t, s = stratified_steps(N * passes, S, D, device, generator)
    nats, met = torch.zeros(2, N, device=device)
    begin, done = time.perf_counter(), 0
    for i, t, s in zip(*(each.split(model.rows) for each in (row, t, s))):
        loss = model.loss(chunks[i].long(), t, s, generator=generator)
        nats.index_add_(0, i, loss)
        met.index_add_(0, i, torch.ones_like(loss))
        done += len(i)
        if time.perf_counter() > end:
            break
    found = mean_and_error((nats / met)[met > 0], D)       # waits for a GPU
    return found | dict(passes=-(-done // N), speed=done * D / (time.perf_counter() - begin),
                        chunks=int((met > 0).sum()))


@torch.no_grad()
def components(model, chunks, seconds=10):
    """L_t of chunks (N, D) for plans: (S, D) bits, and of how many variables each is the mean.

    Chunks differ by more than steps do. So all steps of a grid are met by the same chunks, each in
    one order: by 1,024, or as many as these seconds allow. `planner.smooth` fills in the others.
    """
    S, D, end = model.S, model.D, time.perf_counter() + seconds
    generator = torch.Generator(chunks.device).manual_seed(2)
    x = spread(chunks, 1024)
    x = x[torch.rand(len(x), device=x.device, generator=generator).argsort()].long()
    steps = np.geomspace(1, D, min(32, max(12, 128 // S))).round().astype(int)
    nats, counts = torch.zeros(2, S, D, dtype=torch.float64)
    for x in x.split(model.rows):
        sigma = sample_sigma(len(x), D, x.device, generator)
        for s, t in itertools.product(range(1, S + 1), np.unique(steps).tolist()):
            ones = torch.ones_like(sigma[:, 0])
            left = D - t + 1                               # each row's loss is a mean over these
            nats[s - 1, t - 1] += left * model.loss(x, t * ones, s * ones, sigma).sum().item()
            counts[s - 1, t - 1] += left * len(x)
        if time.perf_counter() > end:
            break
    return bits_per_dim(nats, S * D) / counts, counts


def mean_and_error(nats, D):
    """(N,) nats per datapoint -> dict: bits, their mean per dim, and stderr."""
    bits = bits_per_dim(nats.cpu().double(), D)
    stderr = bits.std(correction=min(1, len(bits) - 1)).item() / len(bits) ** 0.5
    return dict(bits=bits.mean().item(), stderr=stderr)


def measure_plan(model, chunks, plan, most):
    """Exact bits/dim under a plan, each chunk in a random order, by at most 500 chunks. most: how
    many variables the network may predict for it. A dict, empty if that is less than 3 chunks."""
    x = spread(chunks, min(500, most // (len(plan) * model.D)))
    if len(x) < min(3, len(chunks)):
        return {}
    generator = torch.Generator(x.device).manual_seed(1)
    nats = model.nll(x.long(), plan, generator=generator)
    return mean_and_error(nats, model.D) | dict(chunks=len(x))


def evaluate(model, data, passes=None):
    """All that a run reports, put into words by `describe`. L_t, for plans, is from validation: a
    plan is predicted to cost the bound, and what its sum of L_t has above that of all steps.

    Without passes it takes about a minute, by fewer datapoints if there are many.
    """
    test, D = data.chunks("test"), model.D
    if passes is None and not test.is_cuda:
        test = spread(test, max(64, MOST // D))
    result = bound(model, test, passes)
    if not np.isfinite(result["bits"]):
        raise ValueError("the network gives no numbers: its weights are damaged")
    L_t, counts = components(model, data.chunks("valid"))
    L = planner.smooth(L_t, counts)
    budgets = (20, 50, 100, 200) if data.kind in ("image", "audio") else (5, 10, 20, 50)
    plans = [planner.plan(L, n) for n in budgets if model.S <= n < L.size]
    plans.append(planner.full_plan(model.S, D))
    least = D * result["bits"] - L.sum()
    calls = [dict(calls=len(plan), predicted=(least + planner.plan_cost(L, plan)) / D)
             | measure_plan(model, test, plan, int(3 * result["speed"])) for plan in plans]
    symbols = data.splits["test"].cpu().numpy().reshape(-1)
    return dict(data=data.name, kind=data.kind, shape=list(data.shape), chunks=result["chunks"],
                bits_per_dim=result["bits"], stderr=result["stderr"], passes=result["passes"],
                L=L_t, counts=counts, L_smooth=L.tolist(), calls=calls,
                references=datasets.references(symbols, data.K, getattr(data, "rate", None)))


def describe(r):
    """The results of `evaluate` in words and tables, for a terminal."""
    unit = datasets.UNITS[r["kind"]]
    others = ", ".join(f"{name} {bits:.2f}" for name, bits in r["references"].items())
    lines = [f"test: {r['bits_per_dim']:.3f} bits/{unit}, standard error {r['stderr']:.3f}, on "
             f"{r['data']}: the bound of Eq. 2,",
             f"  {r['chunks']:,} datapoints of {' x '.join(map(str, r['shape']))} without context, "
             f"{r['passes']} random orders and stratified steps t each",
             f"for comparison, bits/{unit}: {others}",
             f"loss components L_t in bits, t = 1..{len(r['L_smooth'][0])}:"]
    for row in r["L_smooth"]:
        parts = np.array_split(np.array(row) / max(row[0], 1e-9), min(48, len(row)))
        heights = [part.mean() for part in parts]
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * min(max(part, 0), 1))] for part in heights)
        lines.append(f"  {row[0]:.2f} {bars} {row[-1]:.2f}")
    lines.append(f"network calls   bits/{unit} predicted from L_t   measured (exact)")
    for row in r["calls"]:
        measured = "too many calls for this evaluation"
        if "bits" in row:
            measured = f"{row['bits']:.3f} +- {row['stderr']:.3f}, {row['chunks']} datapoints"
        lines.append(f"  {row['calls']:>11}   {row['predicted']:>27.3f}   {measured}")
    return "\n".join(lines)


def plot(folder, results, log):
    """folder/results.png: loss over time, L_t, and the price of few calls (the paper's Fig. 3)."""
    from matplotlib import pyplot
    L = np.array(results["L_smooth"])
    budgets = np.unique(np.geomspace(len(L), L.size, 30).round().astype(int)).tolist()
    costs = [cost / L.shape[1] for cost in planner.costs(L, budgets).values()]
    exact = [row for row in results["calls"] if "bits" in row]
    _, seconds, training, validation = zip(*log) if log else [()] * 4
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4))
    left.plot(seconds, training, label="training")
    left.plot(seconds, validation, label="validation")
    left.set(xlabel="seconds", ylabel="bits per dimension")
    for s, row in enumerate(L, start=1):
        middle.plot(range(1, len(row) + 1), row, label=f"stage {s}")
    middle.set(xlabel="t", ylabel="loss component $L_t$, bits", ylim=0)
    right.plot(budgets, costs, label="predicted from $L_t$")
    right.plot([row["calls"] for row in exact], [row["bits"] for row in exact], "o",
               label="measured")
    right.set(xlabel="network calls", ylabel="bits per dimension", xscale="log")
    for part in (left, middle, right):
        part.legend()
    with datasets.write(folder / "results.png") as file:
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight")


# -- The command -----------------------------------------------------------------------------------

def parse():
    """The command line: a dict of the settings that were given, and the other flags."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on with the run in --out (default: "
                      "out/<data>)")
    what.add_argument("--evaluate", metavar="CKPT", help="only evaluate this checkpoint")
    parser.add_argument("--plot", action="store_true", help="also draw results.png (matplotlib)")
    for field in dataclasses.fields(Settings):
        how = dict(field.metadata) if "action" in field.metadata else dict(
            field.metadata, type=field.type)
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args())
    if given.keys() >= {"steps", "minutes"}:
        raise ValueError("give --steps or --minutes, not both")
    return given, given.pop("resume"), given.pop("evaluate"), given.pop("plot")


def load_data(c):
    """The data of these settings, on the device; --size decides the length of chunks of text."""
    data = datasets.load(c.data, c.length, c.bits, c.device, SIZES["text"][c.size]["length"])
    data.turns = data.flips and c.recipe == "paper"
    return data


def complete(c, data):
    """Settings in which what was not given comes from the size."""
    kind = "text" if data.kind == "bytes" else data.kind
    image, preset = kind == "image", dict(SIZES[kind][c.size])
    if kind == "audio":
        preset |= dict(length=data.D, branch=16)
    if image and c.size == "tiny" and data.D < 1024:
        preset["batch"] *= 4                               # of small images more
    upscale = c.branch or preset.get("branch") and c.branch is None
    for words, is_so in (("--bits is for images", c.bits < 8 and not image),
                         ("--length is for text and audio", c.length and image),
                         ("--parametrization is for an upscale model: give --branch, too",
                          c.parametrization and not upscale)):
        if is_so:
            raise ValueError(words)
    if c.steps or c.minutes:
        preset = preset | dict(steps=None, minutes=None)
    elif "minutes" in preset:                              # little data is learnt by heart
        values = data.splits["train"].numel()
        preset["steps"] = max(100, EPOCHS * values // (data.D * (c.batch or preset["batch"])))
    ours = dict(text="data", image="direct", audio="mixture")
    papers = dict(text="data", image="data", audio="direct")
    preset["parametrization"] = (ours if c.recipe == "ours" else papers)[kind]
    missing = {name: value for name, value in preset.items() if getattr(c, name) is None}
    return dataclasses.replace(c, **missing)


def reopen(path, given, changeable):
    """A model, its checkpoint, the settings of its run with what is given, and the data; ValueError
    for a flag that may not change, and for data of another form."""
    foreign = given.keys() - changeable
    if foreign:
        raise ValueError(f"the settings come from the checkpoint: leave out --{foreign.pop()}")
    model, checkpoint = nets.load(path, given.get("device"))
    old = checkpoint["settings"]
    anew = dict.fromkeys(["device", "compile"])
    if "steps" in given or "minutes" in given:
        anew |= dict(steps=None, minutes=None)
    c = Settings(**{field.name: old[field.name] for field in dataclasses.fields(Settings)}
                 | anew | given)
    data = load_data(c)
    found = (data.kind, data.K, list(data.shape))
    wanted = (old["kind"], old["K"], list(old["shape"]))
    if found != wanted:
        raise ValueError(f"{data.name} has kind, K and shape {found}, the checkpoint was trained "
                         f"on {wanted}")
    if data.digest != old.get("sha256", data.digest):
        words = f"{data.name} is not the data that {path} was trained on ({old['data']})"
        if "data" not in given or "steps" in changeable:
            raise ValueError(f"{words}: name it by --data")
        print(words)
    return model, checkpoint, c, data


def prepare_folder(c, going_on):
    """Sets aside checkpoint, log and results of an earlier run. ValueError if the run would write
    over its own data, or over files that no run has written."""
    folder = Path(c.out)
    names = {*datasets.PIECES.values(), "log.csv", "results.json", "samples.png", "samples.wav",
             "results.png"}
    of_a_run = (folder / ".lock").exists() or list(folder.glob("ckpt*.pt"))
    if not of_a_run and any((folder / name).exists() for name in names):
        raise ValueError(f"{c.out} has files of the names that a run writes, and no checkpoint: "
                         "choose another --out")
    place, inside = Path(c.data).resolve(), folder.resolve()
    if (place.is_file() and inside == place.parent
            or place.is_dir() and inside.is_relative_to(place)):
        raise ValueError(f"--data {c.data}: a run in {c.out} might write over it or into it; "
                         "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is at work in {folder}: choose another --out")
    except (ImportError, OSError) as error:
        print(f"{folder} cannot be locked ({error}): start no second run in it")
    finished = (folder / "results.json").exists()
    if (folder / "ckpt.pt").exists() and (finished or not going_on):
        number = next(n for n in itertools.count(1) if not (folder / f"ckpt.{n}.pt").exists())
        for path in (folder / "ckpt.pt", folder / "log.csv", folder / "results.json"):
            if path.exists():
                os.replace(path, path.with_suffix(f".{number}{path.suffix}"))
        print(f"the run that was in {folder} is kept as ckpt.{number}.pt")
    return folder, lock                                    # held as long as it is kept


def finish(run, data, folder, with_plot):
    """Evaluates a completed run, writes and shows what it found, and says what to run next."""
    results = evaluate(run.ema, data, run.c.passes)
    run.L, run.counts = results.pop("L"), results.pop("counts")
    run.save(folder)
    if with_plot:
        plot(folder, results, run.log)
    print(describe(results))
    L = np.array(results["L_smooth"])
    n, few, blanks = dict(image=(16, 100, "--inpaint top"), audio=(4, 64, "--inpaint ends")).get(
        data.kind, (2, 20, '--prompt "the ____ of"'))
    few = min(few, L.size)
    x = run.ema.sample(n, planner.plan(L, few), generator=run.generator).cpu()
    results = run.settings | results | dict(
        steps=run.step, seconds=run.seconds,
        params=sum(p.numel() for p in run.model.parameters()),
        versions=[platform.python_version(), torch.__version__, np.__version__])
    files = datasets.exhibits(data, x) | {"results.json": json.dumps(results, indent=1).encode()}
    for name, content in files.items():
        with datasets.write(folder / name) as file:
            file.write(content)
    ckpt, piece, packed = (shlex.quote((folder / name).as_posix()) for name in (
        "ckpt.pt", datasets.PIECES[data.kind], "test.ardm"))
    print(f"{', '.join(files)} written to {folder}; what to run next:",
          f"python sample.py --ckpt {ckpt} --calls {few} --frames",
          f"python sample.py --ckpt {ckpt} {blanks}",
          f"python compress.py encode --ckpt {ckpt} {piece} {packed}",
          f"python compress.py bench --ckpt {ckpt}", sep="\n  ")


def main():
    """A new run, one that goes on, or a checkpoint evaluated."""
    given, going_on, path, with_plot = parse()
    rank = join()
    if rank:                                               # one process talks
        sys.stdout = open(os.devnull, "w")
    if with_plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if path:                                               # nothing is written but the picture
        model, checkpoint, c, data = reopen(path, given, {"data", "device", "passes"})
        results = evaluate(model, data, given.get("passes"))
        if with_plot:
            plot(Path(path).parent, results, checkpoint.get("log", []))
        return print(f"{path} on {data.name}", describe(results), sep="\n")
    c = Settings(**given)
    if going_on:
        _, checkpoint, c, data = reopen(f"{c.out}/ckpt.pt", given | dict(out=c.out), {
            "data", "steps", "minutes", "passes", "out", "compile", "device"})
    else:
        data = load_data(c)
        c = complete(c, data)
    run = Run(c, data)
    if going_on:
        run.restore(checkpoint)
        finished = (Path(c.out) / "results.json").exists() or run.step > (c.steps or run.step)
        if run.progress >= 1 and finished:
            raise ValueError(f"the run is at step {run.step}, its end: give it more --steps or "
                             "--minutes")
    share(torch.zeros(1), mean=True)                       # all have read the checkpoint
    folder, lock = prepare_folder(c, going_on) if rank == 0 else (Path(c.out), None)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in data.splits.items())
    shape = " x ".join(map(str, data.shape))
    top = max(int(part.cpu().numpy().max()) for part in data.splits.values())
    weights = sum(p.numel() for p in run.model.parameters())
    print(f"{data.name}: {data.kind} {shape}, K = {data.K}, values up to {top}; {sizes}; "
          f"{weights:,} weights on {c.device}; results go to {folder}")
    try:
        if train(run, data, folder):
            return finish(run, data, folder, with_plot) if rank == 0 else None
    except KeyboardInterrupt:                              # in the evaluation
        pass
    command = "python"
    if run.processes > 1:
        command = f"torchrun --nproc_per_node={run.processes}"
    print(f"stopped at step {run.step} and saved; go on with: {command} train.py --resume --out "
          f"{shlex.quote(folder.as_posix())}")
    sys.exit(130)


if __name__ == "__main__":
    datasets.run(main)
