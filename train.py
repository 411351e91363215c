"""Training, evaluation and checkpoints.

    python train.py                                     about three minutes, no download
    python train.py --data FILE --minutes 10            any text, images (.npy, idx), sound (.wav)
    python train.py --data cifar10 --branch 4           an upscale model of images
    python train.py --resume --out out/pydoc            goes on with an interrupted run
    python train.py --evaluate out/pydoc/ckpt.pt        the number, its standard error, the protocol
    torchrun --nproc_per_node=2 train.py                on two GPUs, each with half of every batch

A run writes ckpt.pt, log.csv, results.json, samples, and a piece of the test split.
"""
import argparse
import collections
import copy
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from importlib.util import find_spec
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

DEFAULTS = dict(data="pydoc", recipe="ours", size=None, branch=0, bits=8, length=None, parts=1,
                lr=None, steps=None, minutes=None, passes=None, seed=0, edition=nets.EDITION)
WAYS = {"ours": dict(text="data", image="direct", audio="mixture"),      # of upscale models
        "paper": dict(text="data", image="data", audio="direct")}
SIZES = {                            # of network, batch and run
    "text": {
        "tiny": dict(length=64, dim=128, depth=4, heads=2, batch=48, minutes=2.75),
        "small": dict(length=250, dim=512, depth=8, heads=8, batch=256, minutes=2.5),
        "paper": dict(length=250, dim=768, depth=12, heads=12, batch=512, steps=3_000_000)},
    "image": {
        "tiny": dict(dim=64, depth=2, heads=0, batch=8, minutes=2.75),
        "small": dict(dim=128, depth=4, heads=4, batch=128, minutes=2.5),
        "paper": dict(dim=256, depth=32, heads=1, batch=128, steps=1_170_000)},
    "audio": {
        "tiny": dict(dim=48, depth=9, heads=1, batch=8, minutes=2.75, branch=256),
        "small": dict(dim=128, depth=20, heads=1, batch=128, minutes=2.5, branch=256),
        "paper": dict(dim=256, depth=36, heads=1, batch=256, steps=1_000_000, branch=16)}}
PAPER = {                            # App. D; where the paper is silent, the released code's values
    "text": dict(lr=5e-4, betas=(0.9, 0.99), weight_decay=1e-3, warmup=5000, clip=0.25, ema=0.995),
    "image": dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=1, clip=100.0, ema=0.9999),
    "audio": dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0, warmup=15000, clip=1000, ema=0.995)}
OURS = {                             # muon_lr and muon_decay are for the matrices of the blocks
    "tiny": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.03, muon_decay=0.1,
                 warmup=50, clip=1.0, ema=0.99),
    "small": dict(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, muon_lr=0.02, muon_decay=0.02,
                  warmup=200, clip=1.0, ema=0.998)}
OURS["paper"] = OURS["small"]
EPOCHS = 150                         # passes over the data, at most, without --steps or --minutes
REPORT = 100                         # steps between rows of log.csv
SAVE = 120                           # seconds between checkpoints
PLAIN = ("step", "seconds", "L", "counts", "log")          # of a Run: stored as it is


# -- A run: model, optimiser, loop -----------------------------------------------------------------

class Run:
    """What training changes: the weights, their average, the optimisers, the random numbers."""

    def __init__(self, c, data):
        torch.manual_seed(c["seed"])
        self.c = c
        self.model = nets.build(c).to(c["device"])
        self.ema = copy.deepcopy(self.model).eval()
        self.hyper = PAPER[data.kind] if c["recipe"] == "paper" else OURS[c["size"]]
        self.optimizers = make_optimizers(self.model.net, c, self.hyper)
        self.loss = self.model.loss
        if c["compile"]:                                   # dynamic shapes are slower
            self.loss = torch.compile(self.model.loss, dynamic=False)
        self.generator = torch.Generator(c["device"]).manual_seed(c["seed"])
        self.rank, self.processes = 0, 1                   # this one; how many torchrun has started
        if distributed.is_initialized():
            self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.step, self.seconds = 0, 0.0
        self.L = self.counts = None                        # measured at the end
        self.log = ["step,seconds,train_bits_per_dim,valid_bits_per_dim"]    # lines of log.csv
        self.losses = collections.deque(maxlen=50)         # of the latest steps, tensors

    @property
    def progress(self):
        """The part of the run that is done, 0..1, by its steps or its time, whichever is more."""
        return max(self.step / (self.c["steps"] or math.inf),
                   self.seconds / (60 * (self.c["minutes"] or math.inf)))

    def draw(self, data):
        """This process's part of a batch, (B, D). Seed, process and step alone decide what a step
        draws, so a resumed run goes on as if it had never stopped."""
        self.generator.manual_seed(hash((self.c["seed"], self.rank, self.step)))
        return data.batch(self.c["batch"] // self.processes, generator=self.generator)


def train(run, data, folder):
    """Trains until the run is over, or is told to stop. True if the run is completed."""
    stop, ends = [], (signal.SIGINT, signal.SIGTERM)
    old = {end: signal.signal(end, lambda *_: stop.append(1)) for end in ends}
    saved = time.perf_counter()
    begin = saved - run.seconds
    bar = tqdm(total=1.0, initial=min(run.progress, 1.0), mininterval=0.5,
               disable=True if run.rank else None, postfix="compiling" * run.c["compile"],
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    try:
        for i in itertools.count():
            now = torch.tensor([time.perf_counter() - begin, len(stop)], dtype=torch.float64)
            run.seconds, stopping = synced(now).tolist()
            if run.progress >= 1 or stopping:
                break
            train_step(run, run.draw(data))
            if i == 0:                                     # compiling is not counted
                begin = time.perf_counter() - run.seconds
            if run.rank == 0:                              # the first process tells and saves
                report(run, data, folder, bar)
                if time.perf_counter() - saved > SAVE:
                    save(run, folder)
                    saved = time.perf_counter()
    finally:                                               # whatever happened, nothing is lost
        if run.rank == 0 and run.step:
            save(run, folder)
        bar.close()
        for end, handler in old.items():
            signal.signal(end, handler)
    return run.progress >= 1


def train_step(run, x):
    """Algorithm 2 on x (B, D) and one step of the optimisers. -> the loss in bits/dim, a tensor."""
    B, D = x.shape
    rate = learning_rate(run.c, run.hyper, run.step, run.progress)
    for group in itertools.chain(*(optimizer.param_groups for optimizer in run.optimizers)):
        group["lr"] = rate * group["full_lr"]
    draw = dict(device=x.device, generator=run.generator)  # a compiled loss cannot draw these
    t, s = stratified_steps(B, run.model.S, D, **draw)
    sigma = sample_sigma(B, D, **draw)
    loss = torch.zeros((), device=x.device)
    run.model.zero_grad()
    for part in zip(*(each.chunk(run.c["parts"]) for each in (x, t, s, sigma))):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=nets.has_bf16(run.c["device"])):
            of_part = bits_per_dim(run.loss(*part), D).sum() / B
        of_part.backward()
        loss += of_part.detach()
    for p in run.model.parameters():
        synced(p.grad)
    nn.utils.clip_grad_norm_(run.model.parameters(), run.hyper["clip"])
    for optimizer in run.optimizers:
        optimizer.step()
    run.losses.append(loss)
    run.step += 1
    decay = min(run.hyper["ema"], 1 - 1 / (1 + 0.02 * run.step))   # forgets the beginning
    get_ema_multi_avg_fn(decay)([*run.ema.parameters()], [*run.model.parameters()], run.step)
    return loss


def learning_rate(c, hyper, step, progress):
    """The factor on the full rate: a warm-up of hyper["warmup"] steps or a tenth of the run,
    whichever is less. Then it is 1 in the paper. Ours is never above 1 - progress."""
    up = min(1.0, max((step + 1) / hyper["warmup"], 10 * progress))
    return up if c["recipe"] == "paper" else min(up, max(1 - progress, 0.0))


def make_optimizers(net, c, hyper):
    """Adam. In our recipe Muon for the matrices of the blocks, and Adam for the rest."""
    matrices = {p: None for name, p in net.named_parameters() if p.ndim > 1 and p.shape[1] > 1
                and c["recipe"] == "ours" and re.match("blocks|down|middle|up", name)}
    rest = [p for p in net.parameters() if p not in matrices]
    optimizers = [torch.optim.AdamW(rest, lr=c["lr"] or hyper["lr"], betas=hyper["betas"],
                                    weight_decay=hyper["weight_decay"],
                                    fused=not c["device"].startswith("mps"))]
    if matrices:
        optimizers.append(Muon(matrices, hyper["muon_lr"], hyper["muon_decay"],
                               torch.bfloat16 if nets.has_bf16(c["device"]) else torch.float32))
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["full_lr"] = group["lr"]
    return optimizers


# -- Evaluation ------------------------------------------------------------------------------------

def some(chunks, most):
    """At most so many of the chunks (N, D), evenly taken from all of them."""
    n = min(len(chunks), most)
    return chunks[torch.arange(n) * len(chunks) // n]


@torch.no_grad()
def bound(model, chunks, passes=None):
    """The bound of Eq. 2 on chunks (N, D): one step t per chunk and pass, t and s stratified over
    all of them. Without passes: 2^19 variables a stage, or as many as 25 seconds allow.
    -> dict: bits (per dim), passes, chunks, speed (variables a second), and stderr over chunks.
    Steps are spread evenly, so what the losses at about one step have in common is no error."""
    (N, D), S, device = chunks.shape, model.S, chunks.device
    n = passes or -(-(S << 19) // (N * D))
    generator = torch.Generator(device).manual_seed(1)
    row = torch.rand(N, device=device, generator=generator).argsort().repeat(n)
    t, s = stratified_steps(N * n, S, D, device, generator)
    losses, begin = [], time.perf_counter()
    rows = nets.rows_per_call(device.type, D)
    for i, *step in zip(*(each.split(rows) for each in (row, t, s))):
        losses.append(model.loss(chunks[i].long(), *step, generator=generator))
        if not passes and time.perf_counter() - begin > 25:
            break
    nats = torch.cat(losses).cpu().double()                # waits for a GPU
    row, step = row[:len(nats)].cpu(), (s * D + t)[:len(nats)].cpu()
    bits = bits_per_dim(nats.mean().item(), D)
    order = step.argsort()                                 # the mean of 33 neighbours in step:
    nats[order] -= nn.functional.avg_pool1d(nats[order][None], 33, stride=1, padding=16,
                                            count_include_pad=False)[0]
    own = (row.bincount(nats) / row.bincount())[row.unique()]            # each chunk's surplus
    return mean_and_error(own, D) | dict(bits=bits, passes=-(-len(nats) // N), chunks=len(own),
                                         speed=len(nats) * D / (time.perf_counter() - begin))


@torch.no_grad()
def components(model, chunks, seconds=10):
    """L_t of chunks (N, D), for plans: (S, D) bits. counts (S, D): the number of variables in each
    mean, 0 where nothing was measured. Some chunks are harder than others. So all measured steps
    see the same chunks in the same orders: 1,024 chunks, or as many as the seconds allow."""
    S, D, end = model.S, model.D, time.perf_counter() + seconds
    generator = torch.Generator(chunks.device).manual_seed(2)
    x = chunks[torch.rand(len(chunks), device=chunks.device, generator=generator).argsort()[:1024]]
    steps = np.geomspace(1, D, min(32, max(12, 128 // S))).round().astype(int)
    nats, counts = torch.zeros(2, S, D, dtype=torch.float64)
    for x in x.long().split(nets.rows_per_call(x.device.type, D)):
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
    """(N,) nats per datapoint -> dict: bits, their mean per dim; stderr of it, None if N = 1."""
    bits = bits_per_dim(nats.cpu().double(), D)
    stderr = bits.std().item() / len(bits) ** 0.5 if len(bits) > 1 else None
    return dict(bits=bits.mean().item(), stderr=stderr)


def in_digits(stderr):
    return "unknown" if stderr is None else f"{stderr:.3f}"


def evaluate(model, data, passes=None):
    """Prints and returns what a run reports. L_t, for plans, comes from validation data."""
    test, D, unit = data.chunks("test"), model.D, data.unit
    r = bound(model, test, passes)
    print(f"test: {r['bits']:.3f} bits/{unit}, standard error {in_digits(r['stderr'])}, "
          f"on {data.name}: the bound of Eq. 2,\n  {r['chunks']:,} datapoints of "
          f"{' x '.join(map(str, data.shape))} without context, {r['passes']} random orders and "
          "stratified steps t each")
    others = datasets.references(data.splits["test"].cpu().numpy().reshape(-1), data.K)
    print(f"for comparison, bits/{unit}:",
          ", ".join(f"{name} {bits:.2f}" for name, bits in others.items()))
    L_t, counts = components(model, data.chunks("valid"))
    L = planner.smooth(L_t, counts)
    print_components(L, int(counts[0, 0]) // D)            # at t = 1 all D are unknown
    budgets = (5, 10, 20, 50) if data.kind == "text" else (20, 50, 100, 200)
    plans = [planner.plan(L, n) for n in budgets if model.S <= n < L.size]
    print(f"network calls   bits/{unit} predicted from L_t   measured (exact)")
    calls = [price(model, test, plan, L, r) for plan in (*plans, planner.full_plan(model.S, D))]
    return r | dict(data=data.name, bits_per_dim=r["bits"], L=L_t, counts=counts,
                    L_smooth=L.tolist(), calls=calls, references=others)


def price(model, test, plan, L, r):
    """Prints and returns what a plan is predicted to cost, and what it costs:

    prediction = bound on test data + (cost of the plan - cost of the full plan), both costs by L_t.
    Exact bits/dim is the mean over some chunks, each in one random order, if there is time."""
    more = (planner.plan_cost(L, plan) - L.sum()) / model.D
    row, words = dict(calls=len(plan), predicted=r["bits"] + more), "too many calls"
    in_seconds = int(3 * r["speed"]) // (len(plan) * model.D)
    in_memory = nets.LOG_PROBS // (model.A * max(k for _, _, k in plan))
    x = some(test, min(500, in_seconds, in_memory))
    if len(x) >= min(3, len(test)):
        nats = model.nll(x.long(), plan, generator=torch.Generator(x.device).manual_seed(1))
        row |= mean_and_error(nats, model.D) | dict(chunks=len(x))
        words = f"{row['bits']:.3f} +- {in_digits(row['stderr'])}, {len(x)} datapoints"
    print(f"  {len(plan):>11}   {row['predicted']:>27.3f}   {words}")
    return row


# -- Skip on a first reading: optimiser, checkpoints, several processes, the command ---------------

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


def report(run, data, folder, bar):
    """Shows progress: the bar every 10 steps, since reading a loss waits for a GPU; log.csv
    every REPORT steps, with the bound on 64 validation chunks."""
    if run.step % 10:
        return
    loss = torch.stack([*run.losses]).mean().item()
    bar.set_postfix_str(f"step {run.step}, {loss:.3f} bits/{data.unit}", refresh=False)
    bar.update(min(run.progress, 1.0) - bar.n)
    if run.step % REPORT == 0:
        valid = bound(run.ema, some(data.chunks("valid"), 64), passes=1)["bits"]
        run.log.append(f"{run.step},{run.seconds:.3f},{loss:.6f},{valid:.6f}")
        datasets.write(folder / "log.csv", "\n".join(run.log).encode() + b"\n")


def save(run, folder):
    """Writes ckpt.pt. ValueError, and the old one stays, if the weights are no numbers."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise ValueError(f"step {run.step}: the weights are not numbers; take a smaller --lr")
    state = {name: getattr(run, name) for name in PLAIN} | dict(
        settings=run.c, model=run.model.state_dict(), ema=run.ema.state_dict(),
        optimizer=[optimizer.state_dict() for optimizer in run.optimizers],
        losses=[loss.item() for loss in run.losses])
    buffer = io.BytesIO()                                  # torch hides what a full disk says
    torch.save(state, buffer)
    datasets.write(folder / "ckpt.pt", buffer.getbuffer())


def restore(run, checkpoint):
    """Sets the run to the state that was saved in this checkpoint."""
    run.model.load_state_dict(checkpoint["model"])
    run.ema.load_state_dict(checkpoint["ema"])
    for optimizer, state in zip(run.optimizers, checkpoint["optimizer"], strict=True):
        optimizer.load_state_dict(state)
    vars(run).update({name: checkpoint[name] for name in PLAIN})
    run.losses.extend(torch.tensor(checkpoint["losses"], device=run.c["device"]))


def join():
    """Joins torchrun's processes, each on a GPU of its own. -> the rank of this one, else 0."""
    if not distributed.is_torchelastic_launched():
        return 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_rank()


def synced(numbers):
    """The mean of a tensor over all processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(numbers)
        numbers /= distributed.get_world_size()
    return numbers


def print_components(L, n):
    """A bar chart of each stage's L_t (S, D), in one line, from n datapoints."""
    rough = ", which is few: plans will be rough" * (n < 64)
    print(f"loss components L_t in bits, t = 1..{L.shape[1]}, of {n} datapoints{rough}:")
    for row in L:
        steps = np.array_split(row / max(row[0], 1e-9), min(48, len(row)))
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * part.mean())] for part in steps)
        print(f"  {row[0]:.2f} {bars} {row[-1]:.2f}")


def parse():
    """The command line: {flag: value} of what was given."""
    parser = datasets.Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    begin, end = (parser.add_mutually_exclusive_group() for _ in range(2))
    begin.add_argument("--resume", action="store_true", help="go on with the run in --out")
    begin.add_argument("--evaluate", metavar="CKPT", help="only evaluate this checkpoint")
    add = parser.add_argument
    add("--data", help=f"{', '.join(datasets.NAMES)}, a file or a folder (default pydoc)")
    add("--size", choices=SIZES["text"], help="network and run (default small on CUDA, else tiny)")
    add("--recipe", choices=["paper", "ours"], help="ours learns more in minutes (default ours)")
    add("--branch", type=int, help="b of an upscale model, 0 for none (default: audio 256, else 0)")
    add("--parametrization", choices=["data", "direct", "mixture"], help="of an upscale model")
    add("--bits", type=int, choices=range(1, 9), help="bits kept of 8 in a pixel (default 8)")
    add("--length", type=int, help="D of text or audio: characters or samples in a datapoint")
    add("--dim", type=int, help="width of the network")
    add("--depth", type=int, help="blocks of the network (images: on each side of the U-Net)")
    add("--heads", type=int, help="attention heads (images: in the middle; 0: no attention)")
    add("--batch", type=int, help="datapoints in a training step")
    add("--parts", type=int, help="parts that a batch is split into, to save memory (default 1)")
    add("--lr", type=float, help="learning rate of Adam; Muon's is the recipe's own")
    end.add_argument("--steps", type=int, help="length of the run in training steps")
    end.add_argument("--minutes", type=float, help="length in minutes (default: the size's own)")
    add("--passes", type=int, help="passes over the test split in the evaluation")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default on CUDA)")
    add("--device", help="cuda, mps or cpu (default: the first that is there)")
    add("--seed", type=int, help="seed of the weights and of every draw (default 0)")
    add("--out", help="folder for the results (default out/<data>)")
    return vars(parser.parse_args())


def complete(given, data=None):
    """(settings of a run, its data). The size's values replace DEFAULTS, `given` replaces both."""
    given = given | dict(device=str(nets.pick_device(given.get("device"))))
    c = DEFAULTS | given
    cuda = c["device"].startswith("cuda")
    c["size"] = c["size"] or ("small" if cuda else "tiny")
    data = data or load_data(c)
    compiles = cuda and shutil.which(os.environ.get("CC", "cc")) and find_spec("triton")
    preset = SIZES[data.kind][c["size"]] | dict(compile=bool(compiles),
                                                parametrization=WAYS[c["recipe"]][data.kind])
    if data.kind == "image" and c["size"] == "tiny" and data.D < 1024:
        preset["batch"] *= 4                               # of small images more
    if given.keys() & {"steps", "minutes"}:
        preset |= dict(steps=None, minutes=None)
    elif "minutes" in preset:                              # few passes over little data
        values, batch = data.splits["train"].numel(), given.get("batch", preset["batch"])
        preset["steps"] = max(100, EPOCHS * values // (data.D * batch))
    c |= preset | given
    for name, fits, words in (("bits", data.kind == "image", "images"),
                              ("length", data.kind != "image", "text and audio"),
                              ("parametrization", c["branch"], "upscale models (--branch)")):
        if name in given and not fits:
            raise ValueError(f"--{name} is for {words}")
    return c | dict(kind=data.kind, K=data.K, shape=list(data.shape), length=data.D,
                    rate=data.rate, sha256=data.digest), data


def load_data(c):
    """The data of these settings, on their device. --size decides the length of chunks of text."""
    data = datasets.load(c["data"], c["length"], c["bits"], c["device"],
                         SIZES["text"][c["size"]]["length"])
    data.turns = data.flips and c["recipe"] == "paper"
    return data


def reopen(path, given, changeable, others=False):
    """(model, checkpoint, settings updated by `given`, data) of a run. ValueError for a flag that
    may not change, and for data that the run was not trained on. others: such data will do."""
    foreign = given.keys() - changeable
    if foreign:
        raise ValueError(f"the settings come from the checkpoint: leave out --{foreign.pop()}")
    model, checkpoint = nets.load(path, given.get("device"))
    old = checkpoint["settings"]
    c = old | given | dict(device=str(next(model.parameters()).device))
    if given.keys() & {"steps", "minutes"}:                # replaces both old ones
        c |= dict(steps=given.get("steps"), minutes=given.get("minutes"))
    data = load_data(c)
    if data.digest != old["sha256"]:
        words = f"{data.name} is not the data that {path} was trained on ({old['data']!r})"
        fits = (data.kind, data.K, list(data.shape)) == (old["kind"], old["K"], old["shape"])
        if not (others and fits and "data" in given):
            raise ValueError(f"{words}: name the old data, unchanged, by --data")
        print(words)
    return model, checkpoint, c, data


def go_on(folder, given):
    """(run, data) of the run in a folder, as it was saved. ValueError if nothing is left to do."""
    path = folder / "ckpt.pt"
    _, checkpoint, c, data = reopen(path, given, {"data", "steps", "minutes", "passes", "compile",
                                                  "device", "parts"})
    run = Run(c, data)
    try:
        restore(run, checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the whole state of a run: {error}")
    if run.progress >= 1 and (folder / "results.json").exists():
        raise ValueError(f"step {run.step} is the run's end: give it more --steps or --minutes")
    return run, data


def prepare_folder(folder, c, going_on):
    """Makes the folder of a run, and sets an earlier run aside. ValueError if the run would replace
    its own data. ValueError if the folder has files with a run's names, but no checkpoint."""
    ckpt, log, results = (folder / name for name in ("ckpt.pt", "log.csv", "results.json"))
    mine = [results, folder / datasets.PIECES[c["kind"]], *folder.glob("samples.???")]
    if os.path.realpath(c["data"]) in map(os.path.realpath, (ckpt, log, *mine)):
        raise ValueError(f"a run in {folder} would replace its data: choose another --out")
    if not any(folder.glob("ckpt.*pt")) and any(map(Path.exists, mine)):
        raise ValueError(f"{folder} has files like a run's, but no run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if ckpt.exists() and (results.exists() or not going_on):
        number = next(n for n in itertools.count(1) if not (folder / f"ckpt.{n}.pt").exists())
        for path in (ckpt, log, *mine):
            if path.exists():
                os.replace(path, path.with_suffix(f".{number}{path.suffix}"))
        print(f"the run that was in {folder} is kept, as ckpt.{number}.pt and so on")
    datasets.write(results, None)                          # before all work


def finish(run, data, folder):
    """Evaluates a completed run, writes what it found, and says what to run next."""
    results = evaluate(run.ema, data, run.c["passes"])
    run.L, run.counts = results.pop("L"), results.pop("counts")
    save(run, folder)
    n, most, blanks = dict(audio=(4, 64, "--inpaint ends"), image=(16, 100, "--inpaint top"),
                           text=(2, 20, '--prompt "the ____ of"'))[data.kind]
    calls = min(most, np.size(results["L_smooth"]))
    generator = run.generator.manual_seed(run.c["seed"])   # whether the run was resumed or not
    x = run.ema.sample(n, planner.plan(results["L_smooth"], calls), generator=generator).cpu()
    if data.kind == "text":
        print("samples:", *(datasets.show(row, data.K) for row in x), sep="\n  ")
    results = run.c | results | dict(steps=run.step, seconds=run.seconds,
                                     params=sum(p.numel() for p in run.model.parameters()),
                                     versions=[sys.version, torch.__version__, np.__version__])
    files = datasets.test_piece(data) | datasets.exhibit(x.numpy(), run.c) | {
        "results.json": json.dumps(results, indent=1).encode()}
    for name, content in files.items():
        datasets.write(folder / name, content)
    ckpt, piece, packed = (shlex.quote((folder / name).as_posix())
                           for name in ("ckpt.pt", datasets.PIECES[data.kind], "test.ardm"))
    print(f"{', '.join(files)} written to {folder}; what to run next:",
          f"python sample.py --ckpt {ckpt} --calls {calls} --frames",
          f"python sample.py --ckpt {ckpt} {blanks}",
          f"python compress.py encode --ckpt {ckpt} {piece} {packed}", sep="\n  ")


def main():
    """A new run, one that goes on, or a checkpoint evaluated."""
    given = parse()
    rank = join()
    if rank:                                               # one process talks
        sys.stdout = open(os.devnull, "w")
    if "evaluate" in given:                                # nothing is written
        path, may_change = given.pop("evaluate"), {"data", "device", "passes"}
        model, _, _, data = reopen(path, given, may_change, others=True)
        evaluate(model, data, given.get("passes"))
        return
    going_on = given.pop("resume", False)
    name = Path(given.get("data", DEFAULTS["data"])).absolute().stem.partition(".")[0]
    folder = Path(given.pop("out", f"out/{name or 'data'}"))
    if going_on:
        run, data = go_on(folder, given)
    else:
        c, data = complete(given)
        run = Run(c, data)
    synced(torch.zeros(1))                                # all have read the checkpoint
    if rank == 0:
        prepare_folder(folder, run.c, going_on)
    print(f"{data.name}: {data.kind} {' x '.join(map(str, data.shape))}, K = {data.K}; "
          f"{', '.join(f'{name} {len(part):,}' for name, part in data.splits.items())}; "
          f"{sum(p.numel() for p in run.model.parameters()):,} weights on {run.c['device']}; "
          f"results go to {folder}")
    try:
        if train(run, data, folder):
            if rank == 0:
                finish(run, data, folder)
            if run.processes > 1:                          # gloo's threads may abort another exit
                sys.stdout.flush()
                os._exit(0)
            return
    except KeyboardInterrupt:                              # in the evaluation
        pass
    command = f"torchrun --nproc_per_node={run.processes}" if run.processes > 1 else "python"
    print(f"stopped at step {run.step} and saved; go on with: {command} train.py --resume --out "
          f"{shlex.quote(folder.as_posix())}")
    sys.exit(130)


if __name__ == "__main__":
    datasets.run(main)
