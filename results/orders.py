"""What orders, plans and stages cost."""
import collections
import itertools
import statistics
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

import data as datasets
import nets
import planner
import train
from ardm import ARDM, bits_per_dim, draw, known_first, pick
from results import recipes
from results.common import CIFAR, RUNS, text8_prefix, trained


def bench_plans(args):
    """Plans of few network calls, bits of test data: predicted from the L_t of validation data, and
    exact for the same data in the same random orders; last, structured orders (`spaced:G`, an even
    plan), which keep apart what one call generates. The standard errors are those of differences to
    the planned one."""
    for name, count, budgets in (("text8-ours", 200, (5, 10, 20, 50)),
                                 ("mnist", 100, (20, 50, 100)),
                                 ("cifar10-order-agnostic", 16, (20, 50))):
        model, checkpoint = nets.load(RUNS / name / "ckpt.pt")
        shape, D = checkpoint["settings"]["shape"], model.D
        data = text8_prefix() if name == "text8-ours" else datasets.load(
            "mnist" if name == "mnist" else str(CIFAR))
        (L,) = planner.smooth(*train.components(model, data.chunks("valid"), seconds=30))
        x = train.some(data.chunks("test"), count).long()
        for calls in budgets:
            even, planned = planner.uniform_plan(1, D, calls), planner.plan(L, calls)
            ways = {"planned": (planned, None), "even": (even, None),
                    "cosine": (planner.cosine_plan(1, D, calls), None)}
            rule = f"spaced:{-(-D // calls)}"
            ways[rule] = even, torch.from_numpy(planner.order(rule, shape)).expand(x.shape)
            best = None
            for way, (plan, sigma) in ways.items():
                generator = torch.Generator().manual_seed(0)
                bits = bits_per_dim(model.nll(x, plan, sigma, generator), D)
                best = bits if best is None else best
                predicted = planner.plan_cost(L, plan) / D if sigma is None else ""
                yield dict(model=name, calls=calls, plan=way, predicted=predicted,
                           exact=bits.mean().item(),
                           stderr=((bits - best).std() / len(x) ** 0.5).item())


def bench_orders(args):
    """Orders of images at 100 network calls, even plans, exact bits/dim of validation images."""
    for name, count in (("mnist", 100), ("cifar10-order-agnostic", 24)):
        model, checkpoint = nets.load(RUNS / name / "ckpt.pt")
        shape = checkpoint["settings"]["shape"]
        data = datasets.load("mnist" if name == "mnist" else str(CIFAR))
        x = train.some(data.chunks("valid"), count).long()
        plan = planner.uniform_plan(model.S, model.D, 100)
        for rule in ("random:1", "random:2", "random:3", "forward", f"spaced:{-(-model.D // 100)}"):
            sigma = torch.from_numpy(planner.order(rule, shape)).expand(x.shape)
            nats = model.nll(x, plan, sigma)
            yield dict(model=name, order=rule) | train.mean_and_error(nats, model.D)


def bench_absorbing(args):
    """The paper's Table 1 from one network, the model of section text8: bits/char by the L_t of
    its validation chunks. Absorbing diffusion with T steps, a linear and a cosine part q(u) that
    is absorbed, how many of its steps write anything, and the ARDM. (In the paper, by a network for
    each: absorbing 1.45 with 1,000 steps, 1.47 with 256, 1.56 with 20; OA-ARDM 1.43 with 250, 1.51
    with 20.)"""
    model, _ = nets.load(RUNS / "text8-ours" / "ckpt.pt")
    L, counts = train.components(model, text8_prefix().chunks("valid"), seconds=60)
    (L,), D = planner.smooth(L, counts), model.D
    schedules = {"linear": lambda u: u, "cosine": lambda u: 1 - np.cos(np.pi / 2 * u)}
    for T in (1000, 256, 64, 20):
        for name, q in schedules.items():
            parts = np.diff(q(np.arange(T + 1) / T))
            yield {"": f"absorbing diffusion, {name}", "steps": T,
                   "steps that write": float(sum(1 - (1 - parts) ** D)),
                   "bits": planner.absorbing_bound(L, T, q)}
    for calls in (D, 64, 20):
        yield {"": "ARDM, planned", "steps": calls, "steps that write": float(calls),
               "bits": planner.plan_cost(L, planner.plan(L, calls)) / D}


@torch.no_grad()
def generate_surest(model, x, plan, choose):
    """Each call generates those k variables of which the network is surest, as many text-diffusion
    models do. It is not the model's distribution. x: (B, D), for its shape. -> x, and the order
    in which its variables were generated, (S, B, D)."""
    B, D = x.shape
    sigma = torch.full((model.S, B, D), D + 1)
    for s, t, k in plan:
        m, ones = sigma[s - 1] < t, torch.ones_like(x[:, 0])
        log_p = model.log_probs(x, m, t * ones, s * ones)
        sure = log_p.amax(dim=-1).masked_fill(m, -torch.inf)
        where = torch.zeros_like(m).scatter(1, sure.topk(k).indices, True)
        a = torch.zeros_like(x)
        a[where] = choose(log_p[where], where, s)
        x = torch.where(where, model.refine(x, a, s), x)
        sigma[s - 1][where] = t
    return x, known_first(sigma, sigma == 0)               # in one call from left to right


def bench_samples(args):
    """Words in samples of the model of section text8: the share that is in its training text, and
    how many are distinct, of the whole words in 64 samples of 250 characters, mean of the seeds.
    The order by confidence is no longer the model's distribution."""
    model, checkpoint = nets.load(RUNS / "text8-ours" / "ckpt.pt")
    L = planner.smooth(checkpoint["L"], checkpoint["counts"])
    known = set(datasets.to_bytes(text8_prefix().splits["train"], 27).split())
    D = model.D

    def words(calls, way, temperature, seed):
        generator = torch.Generator().manual_seed(seed)
        even = planner.uniform_plan(1, D, calls)
        plan = planner.plan(L, calls) if way == "planned" else even
        x, sigma = torch.zeros(64, D, dtype=torch.long), None
        if way == "spaced":
            sigma = torch.from_numpy(planner.order(f"spaced:{-(-D // calls)}", D)).expand(64, D)
        if way == "confident":
            x, _ = generate_surest(model, x, plan, lambda log_p, where, s: draw(
                log_p, temperature, generator))
        else:
            x = model.sample(64, plan, sigma, generator=generator, temperature=temperature)
        return [word for row in x for word in datasets.to_bytes(row, 27).split()[1:-1]]

    for temperature in (1.0, 0.8):
        for calls in (5, 10, 20, 64):
            for way in ("random", "planned", "spaced", "confident"):
                drawn = [words(calls, way, temperature, seed) for seed in range(args.seeds)]
                shares = [sum(word in known for word in each) / len(each) for each in drawn]
                yield {"temperature": temperature, "calls": calls, "order": way,
                       "share of known words": statistics.mean(shares),
                       "+-": statistics.stdev(shares) if len(shares) > 1 else 0.0,
                       "distinct": round(statistics.mean(len(set(each)) for each in drawn)),
                       "of": round(statistics.mean(map(len, drawn)))}


class LeftToRight(ARDM):
    """A Transformer that sees the past alone (with the patches PAST): the loss is exact."""

    def loss(self, x, *drawn, **how):
        before = F.pad(x, (1, -1), value=self.K)           # K, the absorbing state, comes first
        ones = torch.ones_like(x[:, 0])
        log_p = self.logits(before, before >= 0, ones, ones).log_softmax(dim=-1)
        return -pick(log_p, x).sum(dim=1)


def attention_to_the_past(q, k, v):
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def convolution_of_the_past(self, h):
    past = F.pad(h, (0, 0, nets.CONV - 1, 0))
    return sum((past[:, i:i + h.shape[1]] * w for i, w in enumerate(self.weight)), self.bias)


PAST = [mock.patch.object(nets, "ARDM", LeftToRight),
        mock.patch.object(nets, "attention", attention_to_the_past),
        mock.patch.object(nets.NeighbourConv, "forward", convolution_of_the_past)]


def bench_prices(args):
    """The price of any order: the model of section text8 on 32 test chunks, exact bits/char in one
    order for all, in random orders, and the bound of Eq. 2 tightened by R orders, -log of the mean
    of p(x | sigma_r). Last, a Transformer of the same size that sees the past alone, trained for as
    many steps, on the same chunks and on all of them. The standard errors are over chunks.
    (In the paper, on the test data of text8: left to right 1.35, OA-ARDM 1.43.)"""
    model, checkpoint = nets.load(RUNS / "text8-ours" / "ckpt.pt")
    data, D = text8_prefix(), model.D
    x = train.some(data.chunks("test"), 32).long()

    def row(words, nats):
        return {"": words} | train.mean_and_error(nats, D)

    for rule in ("forward", "backward", "spaced:4", "spaced:63"):
        sigma = torch.from_numpy(planner.order(rule, D)).expand(x.shape)
        yield row(rule, model.nll(x, sigma=sigma))
    generator = torch.Generator().manual_seed(0)
    nats = torch.stack([model.nll(x, generator=generator) for _ in range(16)])
    for R in (1, 4, 16):
        parts = nats.view(-1, R, len(x))                   # 16 / R bounds, their mean
        yield row(f"the bound by R = {R} orders",
                  (np.log(R) - (-parts).logsumexp(dim=1)).mean(dim=0))
    with PAST[0], PAST[1], PAST[2]:
        run, _ = trained(data=data, length=250, batch=12, steps=checkpoint["step"])
        with torch.no_grad():
            yield row(f"left to right alone, {run.step:,} steps", run.ema.loss(x))
            yield row("the same, all chunks", torch.cat([
                run.ema.loss(part.long()) for part in data.chunks("test").split(16)]))


def bench_upscaling(args):
    """Branching factors and parametrisations of MNIST, and of the text of the default run, each for
    its minutes, bits/dim of 2,000 validation images or of the validation split. The output head is
    a softmax in every row: by default our models of values of images have a logistic distribution
    beside it. (The paper finds no meaningful difference between data and direct on CIFAR-10, Table
    6, and that upscaling did not help on text.)"""
    found = collections.defaultdict(list)
    softmax = recipes.WITHOUT_IMAGES["the logistic distribution"]
    ways = (("mnist", 4, "direct"), ("mnist", 4, "data"), ("mnist", 2, "direct"),
            ("mnist", 16, "direct"), ("mnist", 0, None), ("pydoc", 3, "data"), ("pydoc", 0, None))
    for seed, (name, b, way) in itertools.product(range(args.seeds), ways):
        data = datasets.load(name, 64)
        given = dict(parametrization=way) if way else {}
        run, _ = trained(data=data, patches=[softmax], seed=seed, branch=b,
                         minutes=args.minutes or 2.75, **given)
        with softmax:
            bits = train.bound(run.ema, train.some(data.chunks("valid"), 2000))["bits"]
        found[name, b or "order-agnostic", way or "", run.model.S].append(bits)
        print(" ", name, b, way, seed, run.step, bits, flush=True)
    return [dict(zip(("data", "b", "parametrization", "stages"), key)) | {
        "bits": statistics.mean(bits), "seeds": len(bits),
        "+-": statistics.stdev(bits) if len(bits) > 1 else ""} for key, bits in found.items()]
