"""The measurements: python -m results.bench SECTION [SECTION ...]

    text images weights     our recipe without each of its ingredients, in equal time; other losses
    epochs                  how many passes over little data pay
    text8 paper mnist cifar10 glyphs tones    as a reader would run them, test data looked at once
    fsdd clips branches calls    audio: spoken digits, beside FLAC; stages; few network calls
    orders compress single packers     orders of images; archives of text; single images, PNG, WebP
    plans absorbing samples    planned, even and cosine; absorbing diffusion; words in samples
    prices upscaling        orders of text, and left to right alone; branching factors
    english page            the model in the repository: makes it of a run; what index.html shows
    planner coder speed     seconds
    portable                how far another machine's numbers differ
    gpu sizes               training steps on one CUDA GPU, and with --minutes what they learn;
                            what `small` might be instead

Each keeps its rows in results/bench.json, with the machine and the day, and results/README.md is
written anew. Real data is looked for in the folder ARDM_DATA. Run it alone on the machine.
"""
import argparse
import bz2
import collections
import contextlib
import datetime
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils import flop_counter

import coder
import compress
import data as datasets
import nets
import planner
import train
from ardm import ARDM, bits_per_dim, drawing, pick
from results import page

HERE = Path(__file__).parent
RUNS = Path("out/bench")             # what one section leaves for others
REAL = Path(os.environ.get("ARDM_DATA", "data"))
CIFAR = REAL / "cifar10" / "cifar-10-binary.partial.tar.gz"


def machine():
    """The processor, and how many threads of it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        names or [platform.processor()])[0]
    return (f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch "
            f"{torch.__version__}")


@contextlib.contextmanager
def patched(patches):
    """With all of these patches."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def trained(name=None, patches=(), data=None, **given):
    """(run, data) after a training with these settings; patches take parts of the recipe away.
    name: the checkpoint stays in that folder of RUNS."""
    silent = mock.patch.object(train, "REPORT", 10 ** 9)
    with patched([*patches, silent]), tempfile.TemporaryDirectory() as folder:
        c = train.Settings(**dict(size="tiny") | given)
        data = data or train.load_data(c)
        run = train.Run(train.complete(c, data), data)
        if not train.train(run, data, Path(folder)):       # it was told to stop
            raise KeyboardInterrupt
    if name:
        run.L, run.counts = train.components(run.ema, data.chunks("valid"))
        (RUNS / name).mkdir(parents=True, exist_ok=True)
        run.save(RUNS / name)
    return run, data


def median_seconds(*functions, repeats=15):
    """Of each function, timed in turns, so that a slow spell of the machine is everybody's."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):                           # the first one warms up
        for function, times in zip(functions, seconds):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]


def round_trip(path, model, codec):
    """A file coded and decoded, byte for byte: its symbols, -log2 p, archive, seconds there (with
    the proof), and back."""
    source, file, back = datasets.Source(path, codec.settings), io.BytesIO(), RUNS / "back"
    times = [time.perf_counter()]
    bits = compress.encode_file(file, model, codec, source)
    times.append(time.perf_counter())
    file.seek(0)
    header = compress.read_header(file, "archive")
    parts = (part for _, part in compress.decode_file(file, codec, source.n))
    with datasets.write(back) as out:
        datasets.write_back(out, header, codec.settings, parts)
    times.append(time.perf_counter())
    assert back.read_bytes() == Path(path).read_bytes()
    return source.n, bits, file.getvalue(), *np.diff(times).tolist()


# -- Recipes: validation data, three seeds ---------------------------------------------------------

def adam_alone(net, c, hyper, make=train.make_optimizers):
    plain = train.dataclasses.replace(c, recipe="paper")
    return make(net, plain, dict(hyper, lr=2e-3))


def constant_rate(c, hyper, step, progress):
    return min(1.0, (step + 1) / hyper["warmup"])


WITHOUT = {                          # in the code: every ingredient, and how it is taken away
    "Muon, Adam alone": mock.patch.object(train, "make_optimizers", adam_alone),
    "the rate that falls": mock.patch.object(train, "learning_rate", constant_rate),
    "the average of the weights": mock.patch.dict(train.OURS["tiny"], ema=0.0)}
WITHOUT_TEXT = WITHOUT | {
    "neighbour convolutions": mock.patch.object(nets, "CONV", 1),
    "blocks without attention": mock.patch.object(nets, "EVERY", 1)}
WITHOUT_IMAGES = WITHOUT | {
    "zero initialisation": mock.patch.object(
        nets.nn.init, "zeros_", lambda x: x if x.ndim > 1 else x.detach().zero_()),    # biases stay
    "the logistic distribution": mock.patch.object(nets, "logistic", lambda place, width, K: 0),
    "means of neighbours": mock.patch.object(
        nets, "local_means", lambda v, seen: torch.zeros(2, 4, *v.shape))}


def steps_in(minutes, variants, data):
    """Training steps that each variant does in these minutes; a step is timed in turns."""
    def stepper(patch):
        with patch:
            run = train.Run(train.complete(train.Settings(size="tiny", steps=1), data), data)

        def step():
            with patch:
                train.train_step(run, data.batch(run.c.batch))
        return step

    seconds = median_seconds(*map(stepper, variants.values()), repeats=100)
    return {name: int(60 * minutes / each) for name, each in zip(variants, seconds)}


def without(ingredients, args, data, minutes, steps=None):
    """Bits of validation data with the recipe, and without each of its ingredients. steps: of every
    run; if not given, as many as it makes in these minutes."""
    variants, bits = {"nothing": contextlib.nullcontext(), **ingredients}, {}
    steps = dict.fromkeys(variants, steps) if steps else steps_in(minutes, variants, data)
    for seed in range(args.seeds):
        for name, patch in variants.items():
            run, _ = trained(patches=[patch], seed=seed, data=data, steps=steps[name])
            with patch:
                found = train.bound(run.ema, data.chunks("valid"), passes=args.passes)
            bits.setdefault(name, []).append(found["bits"])
            print(f"  seed {seed} without {name}: {found['bits']:.4f}", flush=True)
    for name, each in bits.items():
        gains = [a - b for a, b in zip(each, bits["nothing"])]
        yield {"without": name, "steps": steps[name], "seeds": len(each),
               "bits": statistics.mean(each), "it gains": statistics.mean(gains),
               "+-": statistics.stdev(gains) if len(gains) > 1 else 0.0}


def bench_text(args):
    """Default text run, in equal time, bits/char of its validation split."""
    return without(WITHOUT_TEXT, args, datasets.load("pydoc"), args.minutes or 2.75)


def bench_images(args):
    """CIFAR-10 (20,000 images), in equal time, bits/dim of the last tenth of them."""
    return without(WITHOUT_IMAGES, args, datasets.load(str(CIFAR)), args.minutes or 5)


def weighted(factor):
    """A patch of training alone: the loss of a datapoint times factor(the share of its variables
    that is unknown)."""
    plain = train.backward

    def backward(run, x, t, s, sigma):
        def loss(x, t, s, sigma):
            return factor((run.model.D - t + 1) / run.model.D) * run.model.loss(x, t, s, sigma)

        with mock.patch.object(run, "loss", loss):
            return plain(run, x, t, s, sigma)

    return mock.patch.object(train, "backward", backward)


def bench_weights(args):
    """Other losses than Eq. 2's for the default text run, bits/char of its validation split after
    as many steps (a step takes the same time with each): the sum over the unknown variables
    without the weight 1/(D-t+1), as BERT has it (times 2, so that it is as large), and Eq. 2's with
    1e-4 of this sum, as the paper's runs had it (App. D: no substantial difference)."""
    losses = {"the sum without a weight": weighted(lambda unknown: 2 * unknown),
              "Eq. 2 and 1e-4 of the sum": weighted(lambda unknown: 1 + 1e-4 * unknown)}
    for row in without(losses, args, datasets.load("pydoc"), None, 10 if args.minutes else 3600):
        name = row.pop("without")
        yield {"loss": "Eq. 2" if name == "nothing" else name} | row


def bench_epochs(args):
    """How many passes over little data pay (train.EPOCHS): the default network on a few bytes of
    English prose, bits/byte of 40,000 bytes from elsewhere in it."""
    text = datasets.load(str(REAL / "prose" / "english.zip"), 64).splits["train"]
    x = text[300_000:340_000].long().view(-1, 64)
    for n, epochs in itertools.product((5_000, 20_000), (50, 100, 150, 300)):
        data = datasets.Text("prose", text[100_000:100_000 + n].numpy().copy(), 64)
        steps, bits = epochs * len(data.splits["train"]) // (48 * 64), []
        for seed in range(args.seeds):
            run, _ = trained(data=data, seed=seed, steps=steps)
            bits.append(train.bound(run.ema, x, passes=2)["bits"])
        yield {"bytes": n, "passes": epochs, "steps": steps, "seeds": len(bits),
               "bits": statistics.mean(bits), "+-": statistics.stdev(bits) if bits[1:] else 0.0}


# -- Runs: the test split, looked at once ----------------------------------------------------------

def result(name, run, data, **more):
    found = train.bound(run.ema, data.chunks("test"))
    return dict(run=name, **more, bits=found["bits"], stderr=found["stderr"], steps=run.step,
                weights=sum(p.numel() for p in run.model.parameters()), minutes=run.seconds / 60)


def text8_prefix(length=250, device="cpu"):
    """The first 6,877,825 characters of text8, the last 200,000 of them for the test."""
    data = datasets.load(str(REAL / "text8" / "text8_prefix.zip"), length, device=device)
    stream = torch.cat(list(data.splits.values()))[:6_877_825]
    data.splits = dict(train=stream[:-220_000], valid=stream[-220_000:-200_000],
                       test=stream[-200_000:])
    return data


def bench_text8(args, recipe="ours"):
    """text8 (its first 6.9 million characters, the last 200,000 for the test), chunks of 250,
    bits/char; single letters have 4.1."""
    run, data = trained(f"text8-{recipe}", data=text8_prefix(), recipe=recipe, length=250,
                        batch=12, minutes=args.minutes or 10)
    return [result(f"recipe {recipe}, 4 blocks of 128", run, data)]


def bench_paper(args):
    """The same with the paper's recipe: Xavier initialisation as released, warm-up a tenth of the
    run."""
    return bench_text8(args, "paper")


def bench_mnist(args):
    """MNIST, bits/dim of its test images."""
    run, data = trained("mnist", data=datasets.load("mnist"), minutes=args.minutes or 10)
    return [result("order-agnostic", run, data)]


def bench_cifar10(args):
    """CIFAR-10 (20,000 training images, 1,017 test images), bits/dim."""
    for name, branch in (("order-agnostic", None), ("upscale-4", 4), ("upscale-2", 2)):
        given = dict(branch=branch) if branch else {}
        run, data = trained(f"cifar10-{name}", data=datasets.load(str(CIFAR)),
                            minutes=args.minutes or 20, **given)
        yield result(name, run, data)


def bench_glyphs(args):
    """The pictures of digits that are drawn here, bits/dim of the test images."""
    run, data = trained("glyphs", data=datasets.load("glyphs"), minutes=args.minutes or 2.75)
    return [result("order-agnostic", run, data)]


def bench_tones(args):
    """The sounds that are made here, bits a sample of the test clips."""
    data = datasets.load("tones")
    run, data = trained("tones", data=data, minutes=args.minutes or 2.75)
    others = datasets.references(data.splits["test"].numpy(), data.K, data.rate)
    return [result("upscale-16", run, data),
            *(dict(run=name, bits=bits) for name, bits in others.items())]


# -- Audio: spoken digits --------------------------------------------------------------------------

def bench_fsdd(args):
    """Spoken digits (FSDD, 8 kHz, takes 0 to 4 for the test), bits a sample: the bound on 128
    windows of 2,048 of the test clips; others take the windows as one file."""
    run, data = trained("fsdd", data=datasets.load("fsdd"), minutes=args.minutes or 20)
    windows = train.spread(data.chunks("test"), 128)
    found = train.bound(run.ema, windows, passes=16)
    others = datasets.references(windows.numpy().flatten(), data.K, data.rate)
    return [dict(run="upscale-16", bits=found["bits"], stderr=found["stderr"], steps=run.step,
                 minutes=run.seconds / 60), *(dict(run=name, bits=others[name]) for name in others)]


def bench_clips(args):
    """The first 100 test clips of FSDD by name, bits a sample: each file, its header included, is
    coded by itself in 64 network calls by the model of section fsdd, and decoded, byte for byte;
    the same files by FLAC and WavPack. Seconds of this machine for a second of sound."""
    model, checkpoint = nets.load(RUNS / "fsdd" / "ckpt.pt")
    settings, clip = checkpoint["settings"], RUNS / "fsdd" / "clip.wav"
    codec = compress.Codec(model, settings, "halves", [[model.D // 16] * 16] * model.S, 8)
    total, (tar, *_) = collections.Counter(), REAL.rglob("free-spoken-digit-dataset*.gz")
    clips = sorted((name, content.tobytes())
                   for name, content in datasets.members(tar, r"_[0-4]\.wav$"))
    for _, content in clips[:100]:
        clip.write_bytes(content)
        n, bits, archive, encode, decode = round_trip(clip, model, codec)
        total.update(n=n, exact=bits, archive=8 * len(archive), encode=encode, decode=decode)
        for name, command in datasets.SOUND_PACKERS.items():
            done = subprocess.run(command, input=content, capture_output=True)
            total[name] += 8 * len(done.stdout)
    sizes = {name: total[name] / total["n"] for name in ("exact", "archive", "FLAC -8",
                                                         "WavPack -hhx6")}
    seconds = total["n"] / settings["rate"]
    return [{"": name, "bits": bits} for name, bits in sizes.items()] + [
        {"": f"seconds to {way}", "for a second of sound": total[way] / seconds}
        for way in ("encode", "decode")]


def bench_branches(args):
    """FSDD with other numbers of stages, two minutes each, one seed, bits a sample of 256
    validation windows (in the paper on SC09: 6.29, 6.29, 6.30, 6.36, order-agnostic 7.93)."""
    data = datasets.load("fsdd")
    for branch in (2, 4, 16, 256, 0):
        run, _ = trained(data=data, minutes=args.minutes or 2, branch=branch)
        found = train.bound(run.ema, train.spread(data.chunks("valid"), 256), passes=8)
        yield dict(b=branch or "order-agnostic", stages=run.model.S, bits=found["bits"],
                   stderr=found["stderr"], steps=run.step)


def bench_calls(args):
    """The model of section fsdd by network calls, bits a sample: predicted from L_t for the planned
    and the even split over the stages, and exact on 32 test windows, in random orders and in halves
    (evenly)."""
    model, checkpoint = nets.load(RUNS / "fsdd" / "ckpt.pt")
    L, S, D = planner.smooth(checkpoint["L"], checkpoint["counts"]), model.S, model.D
    x = train.spread(datasets.load("fsdd").chunks("test"), 32).long()
    halves = torch.from_numpy(planner.order("halves", D)).expand(x.shape)

    def exact(plan, sigma=None):
        nats = model.nll(x, plan, sigma, generator=torch.Generator().manual_seed(0))
        return bits_per_dim(nats, D).mean().item()

    for calls in (16, 32, 64, 128, S * D):
        plan, even = planner.plan(L, calls), planner.uniform_plan(S, D, calls)
        row = dict(calls=calls, planned=planner.plan_cost(L, plan) / D,
                   even=planner.plan_cost(L, even) / D)
        row["calls of each stage"] = ", ".join(str(sum(s == stage for stage, _, _ in plan))
                                               for s in range(1, S + 1))
        if calls <= 128:
            row |= {"exact, planned": exact(plan), "exact, even": exact(even),
                    "exact, halves": exact(even, halves)}
        yield row


# -- Orders and archives ---------------------------------------------------------------------------

class LeftToRight(ARDM):
    """A Transformer that sees the past alone (with the patches PAST): the loss is exact."""

    def loss(self, x, *drawn, **how):
        before = F.pad(x, (1, -1), value=self.K)           # K, the absorbing state, comes first
        ones = torch.ones_like(x[:, 0])
        log_p = self.logits(before, before >= 0, ones, ones, self.K).log_softmax(dim=-1)
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
    x = train.spread(data.chunks("test"), 32).long()

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
    with patched(PAST):
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
    if not args.quick:
        draw_stages()                                      # first: what it reads may not be there
    softmax, found = [WITHOUT_IMAGES["the logistic distribution"]], collections.defaultdict(list)
    ways = (("mnist", 4, "direct"), ("mnist", 4, "data"), ("mnist", 2, "direct"),
            ("mnist", 16, "direct"), ("mnist", 0, None), ("pydoc", 3, "data"), ("pydoc", 0, None))
    for seed, (name, b, way) in itertools.product(range(args.seeds), ways):
        data = datasets.load(name, 64)
        run, _ = trained(data=data, patches=softmax, seed=seed, branch=b, parametrization=way,
                         minutes=args.minutes or 2.75)
        with patched(softmax):
            bits = train.bound(run.ema, train.spread(data.chunks("valid"), 2000))["bits"]
        found[name, b or "order-agnostic", way or "", run.model.S].append(bits)
        print(" ", name, b, way, seed, run.step, bits, flush=True)
    return [dict(zip(("data", "b", "parametrization", "stages"), key)) | {
        "bits": statistics.mean(bits), "seeds": len(bits),
        "+-": statistics.stdev(bits) if len(bits) > 1 else ""} for key, bits in found.items()]


def draw_stages():
    """results/stages.png: L_t of the stages of upscale-4 models side by side (Fig. 6)."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for axis, name in zip(axes, ("cifar10", "mnist")):
        checkpoint = torch.load(RUNS / f"{name}-upscale-4" / "ckpt.pt", weights_only=True)
        for s, L in enumerate(planner.smooth(checkpoint["L"], checkpoint["counts"])):
            axis.plot(s + np.arange(len(L)) / len(L), L)
        axis.set(title=name, xlabel="stage", ylabel="$L_t$, bits", xticks=np.arange(4) + 0.5,
                 xticklabels=[1, 2, 3, 4], ylim=0)
    with datasets.write(HERE / "stages.png") as file:
        figure.savefig(file, format="png", dpi=80)


def lattice(shape):
    """The pixels of a coarse grid first, then those between them, one colour after the other."""
    C, H, W = shape
    i = np.indices((H, W))
    i[i == 0] = 1 << 30
    powers = np.log2(i & -i).astype(int).min(axis=0).reshape(-1)         # how often 2 divides both
    turn = np.argsort(np.tile(-powers, C), kind="stable")
    sigma = np.empty(len(turn), dtype=np.int64)
    sigma[turn] = np.arange(1, len(turn) + 1)
    return sigma


def bench_orders(args):
    """Orders of images at 100 network calls, even plans, exact bits/dim of validation images."""
    for name, count in (("mnist", 100), ("cifar10-order-agnostic", 24)):
        model, checkpoint = nets.load(RUNS / name / "ckpt.pt")
        shape = checkpoint["settings"]["shape"]
        data = datasets.load("mnist" if name == "mnist" else str(CIFAR))
        x = train.spread(data.chunks("valid"), count).long()
        plan = planner.uniform_plan(model.S, model.D, 100)
        orders = {rule: planner.order(rule, shape) for rule in (
            "random:1", "random:2", "random:3", "forward", f"spaced:{-(-model.D // 100)}")}
        for rule, sigma in (orders | {"lattice": lattice(shape)}).items():
            nats = model.nll(x, plan, torch.from_numpy(sigma).expand(x.shape))
            yield dict(model=name, order=rule) | train.mean_and_error(nats, model.D)


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
        x = train.spread(data.chunks("test"), count).long()
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


def bench_samples(args):
    """Words in samples of the model of section text8: the share that is in its training text, and
    how many are distinct, of the whole words in 64 samples of 250 characters, mean of the seeds.
    The order by confidence is no longer the model's distribution."""
    model, checkpoint = nets.load(RUNS / "text8-ours" / "ckpt.pt")
    L = planner.smooth(checkpoint["L"], checkpoint["counts"])
    known = set(datasets.to_bytes(text8_prefix().splits["train"], 27).split())
    D, nothing = model.D, torch.zeros(model.D).bool()

    def words(calls, way, temperature, seed):
        generator = torch.Generator().manual_seed(seed)
        plan = (planner.plan if way == "planned" else planner.uniform_plan)(
            *((L, calls) if way == "planned" else (1, D, calls)))
        x, sigma = torch.zeros(64, D, dtype=torch.long), None
        choose = drawing(torch.rand(1, 64, D, generator=generator), temperature)
        if way == "confident":
            x, _ = model.generate_surest(x, plan, nothing, choose)
        else:
            if way == "spaced":
                sigma = torch.from_numpy(planner.order(f"spaced:{-(-D // calls)}", D)).expand(64, D)
            _, sigma = model.defaults(x, plan, sigma, generator)
            x = model.generate(x, plan, sigma, choose)
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


def shrink(run, path):
    """The checkpoint of a run as weights alone, in 16-bit floats."""
    _, checkpoint = nets.load(run, "cpu")
    small = {name: checkpoint[name] for name in ("settings", "L", "counts", "step", "seconds")}
    model = nets.build(checkpoint["settings"])
    small["ema"] = checkpoint["ema"] | {name: checkpoint["ema"][name].half()
                                        for name, _ in model.named_parameters()}
    model.load_state_dict(small["ema"])
    with datasets.write(path) as file:
        torch.save(small | dict(digest=nets.digest(model)), file)


def bench_english(args):
    """The model in results/english.pt: files that it has not seen (the last twentieth of its data:
    Chesterton's The Ball and the Cross, and addresses), a picture and random bytes, bits a byte of
    their archives, beside bzip2 -9 and xz -9."""
    if (RUNS / "english" / "ckpt.pt").exists() and not args.quick:
        shrink(RUNS / "english" / "ckpt.pt", nets.ENGLISH)
    model, checkpoint = nets.load(nets.ENGLISH)
    data = datasets.load(str(REAL / "prose" / "english.zip"), model.D)
    text, found = data.splits["test"].numpy(), train.bound(model, data.chunks("test"))
    sizes = (10_000, 13_000, 17_000)
    files = {f"English, part {i + 1}": text[i * len(text) // 3:][:n] for i, n in enumerate(sizes)}
    files["a PNG picture"] = datasets.read(HERE / "glyphs.png")
    files["random bytes"] = np.random.default_rng(0).integers(256, size=4_000, dtype=np.uint8)
    yield {"file": f"the whole, bound of Eq. 2, standard error {found['stderr']:.3f}, after "
           f"{checkpoint['step']:,} steps in {checkpoint['seconds'] / 60:.0f} minutes",
           "bytes": len(text), "ours": found["bits"]}
    packers = {"bzip2 -9": bz2.compress, "xz -9": lambda x: lzma.compress(x, preset=9)}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "file", Path(folder) / "archive"
        for name, content in files.items():
            content.tofile(path)
            times = [time.perf_counter()]
            for command in (("encode", path, out), ("decode", out, path)):
                subprocess.run([sys.executable, "compress.py", *command], check=True,
                               capture_output=True)
                times.append(time.perf_counter())
            assert path.read_bytes() == content.tobytes()
            bits = 8 / len(content)
            others = {packer: bits * len(pack(content.tobytes()))
                      for packer, pack in packers.items()}
            yield {"file": name, "bytes": len(content), "ours": bits * out.stat().st_size,
                   **others, "encode, s": times[1] - times[0], "decode, s": times[2] - times[1]}


def bench_page(args):
    """What results/index.html shows of models (`python -m results.page` makes it): the model in
    results/english.pt, those of sections text8 and fsdd, and an upscale-4 model of MNIST (trained
    here, five minutes). Below, what the first one wrote, and what that cost it in bits."""
    if not (RUNS / "mnist-upscale-4" / "ckpt.pt").exists():
        trained("mnist-upscale-4", data=datasets.load("mnist"), branch=4, minutes=args.minutes or 5)
    models = [nets.load(path) for path in (nets.ENGLISH, *(RUNS / name / "ckpt.pt" for name in (
        "text8-ours", "mnist-upscale-4", "fsdd")))]
    letters = datasets.references(text8_prefix().splits["test"].numpy(), 27)
    kept = json.loads((HERE / "bench.json").read_text())
    pictures = {row["data"]: row for row in kept["packers"]["rows"]}
    sounds = {row["run"]: row["bits"] for row in kept["fsdd"]["rows"]}
    others = dict(text8={name: letters[name] for name in ("bz2", "xz")},
                  fsdd={name: sounds[name] for name in ("FLAC -8", "WavPack -hhx6", "xz")})
    for name, row in (("mnist", "mnist"), ("cifar10", "cifar-10-binary")):
        others[name] = {coder: pictures[row][coder] for coder in ("PNG", "WebP")}
    found = page.record(*models, others)
    if not args.quick:
        with datasets.write(HERE / "page.json", mode="w") as file:
            json.dump(found, file, separators=(",", ":"))
    return [{"order": run["order"], "calls": run["calls"], "bits": run["bits"][-1],
             "text": f"`{run['x']}`"} for run in found["sentences"]]


def bench_compress(args):
    """The first 20,000 characters of the test text of text8 against network calls: bits/char of the
    archive, beside the exact nll and general packers, and seconds."""
    path = RUNS / "text8-ours" / "test.txt"
    path.write_bytes(datasets.to_bytes(text8_prefix().splits["test"][:20000], 27))
    model, checkpoint = nets.load(path.with_name("ckpt.pt"))
    for calls in (16, 32, 63, 125):
        order = f"spaced:{-(-250 // calls)}"
        ks = [k for _, _, k in planner.uniform_plan(1, 250, calls)]
        codec = compress.Codec(model, checkpoint["settings"], order, [ks], 65)
        n, bits, archive, encode, decode = round_trip(path, model, codec)
        yield {"": f"{calls} calls, {order}", "exact nll": bits / n,
               "archive": 8 * len(archive) / n, "encode with its proof, s": encode,
               "decode, s": decode}
    others = datasets.references(datasets.to_symbols(path.read_bytes(), 27), 27)
    for command in ("zstd -19 -c", "brotli -c"):           # where they are installed
        if shutil.which(command.split()[0]):
            done = subprocess.run(command.split(), input=path.read_bytes(), capture_output=True)
            others[command.removesuffix(" -c")] = 8 * len(done.stdout) / n
    yield from ({"": name, "archive": bits} for name, bits in others.items())


def bench_single(args):
    """Single images (the paper's Table 3), the models of section cifar10: the first 100 test
    images, each a block of its own, coded in a random order by the best plan of so many network
    calls, bits/dim; ten of them are decoded, and priced by exact nll alone, last with one variable
    a call. (In the paper, with 500 and 100 calls: OA-ARDM 2.73, 2.75; Upscale-4 2.71, 2.76. Others:
    section packers.)"""
    x = datasets.load(str(CIFAR)).chunks("test")[:100]
    for name in ("order-agnostic", "upscale-4"):
        model, checkpoint = nets.load(RUNS / f"cifar10-{name}" / "ckpt.pt")
        L, S, D = planner.smooth(checkpoint["L"], checkpoint["counts"]), model.S, model.D
        for calls in (20, 50, 100):
            plan = planner.plan(L, calls)
            ks = [[k for stage, _, k in plan if stage == s] for s in range(1, S + 1)]
            codec = compress.Codec(model, checkpoint["settings"], "random:1", ks, 1)
            blocks, bits = zip(*codec.encode(x[:, None], 0))
            back = torch.cat(list(codec.decode(blocks[:10], 1, D, 0)))
            assert torch.equal(back, x[:10].flatten())
            yield dict(model=name, calls=calls, images=100, exact=sum(bits) / x.numel(),
                       archive=8 * len(b"".join(blocks)) / x.numel())
        sigma = torch.from_numpy(planner.order("random:1", (3, 32, 32))).expand(10, -1)
        for calls in (100, 500, L.size):
            nats = model.nll(x[:10].long(), planner.plan(L, calls), sigma)
            yield dict(model=name, calls=calls, images=10,
                       exact=bits_per_dim(nats, D).mean().item())


def bench_packers(args):
    """PNG and WebP (by Pillow) and JPEG XL (cjxl -e 9, where it is installed) of the first 1,000
    test images, each by itself, bits/dim."""
    from PIL import Image
    for name in ("mnist", str(CIFAR)):
        data = datasets.load(name)
        images = datasets.to_images(data.chunks("test")[:1000], data.shape)
        row = dict(data=Path(name).name.split(".")[0])
        for kind, how in (("PNG", dict(optimize=True)), ("WebP", dict(lossless=True, method=6))):
            file = io.BytesIO()
            for image in images:
                Image.fromarray(image.squeeze()).save(file, kind, **how)
            row[kind] = 8 * file.tell() / images.size
        if shutil.which("cjxl"):
            total, paths = 0, [RUNS / "image.png", RUNS / "image.jxl"]
            for image in images:
                Image.fromarray(image.squeeze()).save(paths[0])
                subprocess.run(["cjxl", *paths, "-d", "0", "-e", "9", "--quiet"], check=True)
                total += paths[1].stat().st_size
            row["JPEG XL"] = 8 * total / images.size
        yield row


def bench_portable(args):
    """How far float32 and float64 differ on a simulated older machine (no AVX, one thread), in
    nats; coder.MARGIN is 1e-10. Less than e^-18 is all alike to the coder."""
    code = ("import sys, torch, nets\nmodel, _ = nets.load(sys.argv[1], 'cpu')\n"
            "x = torch.arange(8 * model.D).view(8, -1) % model.K\n"
            "t, s = torch.full((8,), 5), torch.arange(8) % model.S + 1\n"
            "g = torch.Generator().manual_seed(0)\nm = torch.rand(x.shape, generator=g) < 0.3\n"
            "with torch.no_grad():\n"
            "    torch.save([model.log_probs(x, m, t, s), model.double().log_probs(x, m, t, s)], "
            "sys.argv[2])")
    old = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41",
               OMP_NUM_THREADS="1")
    for name in ("text8-ours", "mnist", "cifar10-order-agnostic", "fsdd"):
        found = []
        for i, change in enumerate(({}, old)):
            out = RUNS / f"portable{i}.pt"
            subprocess.run([sys.executable, "-c", code, RUNS / name / "ckpt.pt", out], check=True,
                           env={**os.environ, **change, "PYTHONPATH": "."})
            found.append(torch.load(out))
        found = [[log_p.clamp(min=-18) for log_p in each] for each in found]     # deeper: alike
        differs = [(a - b).abs().max().item() for a, b in zip(*found)]
        yield {"model": name, "float32": differs[0], "float64": differs[1]}


# -- Seconds ---------------------------------------------------------------------------------------

def bench_planner(args):
    """Seconds of the cheapest plan."""
    for S, D, calls in ((1, 250, 20), (1, 3072, 50), (1, 16000, 50), (8, 16000, 400)):
        L = np.sort(np.random.default_rng(0).random((S, D)), axis=1)[:, ::-1]
        seconds, = median_seconds(lambda: planner.plan(L, calls), repeats=5)
        yield dict(stages=S, D=D, calls=calls, seconds=seconds)


def bench_coder(args):
    """Million symbols a second of the coder alone, from log-probabilities to bytes and back."""
    for K in (4, 27, 256):
        n = 102_400
        logits = 2 * np.random.default_rng(0).normal(size=(n, K))
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        symbols = np.random.default_rng(1).integers(K, size=n)

        def encode():
            starts, freqs = [], []
            for part, a in zip(np.split(log_p, 100), np.split(symbols, 100)):
                start, f = coder.intervals(coder.quantize(part), a)
                starts.append(start)
                freqs.append(f)
            return coder.encode(np.concatenate(starts), np.concatenate(freqs))

        def decode(data=encode()):
            decoder = coder.Decoder(data)
            for part in np.split(log_p, 100):
                decoder.pop(coder.quantize(part))
            assert decoder.end == 0

        there, back = median_seconds(encode, decode, repeats=5)
        yield {"K": K, "encode": n / there / 1e6, "decode": n / back / 1e6}


def bench_speed(args):
    """Whole training steps a second, on data of the released code's sizes; it makes 30.9 (text),
    12.6 (images) and 14.0 (audio) datapoints a second on such a machine, in float32."""
    text = dict(length=250, dim=256, depth=4, heads=4, batch=32)
    image = dict(dim=64, depth=4, heads=1, batch=16)
    sound = dict(length=4000, dim=64, depth=10, batch=4)
    for name, data, given in (("text, 4 blocks of 256", datasets.load("pydoc", 250), text),
                              ("images, 4 + 4 blocks of 64", datasets.load(str(CIFAR)), image),
                              ("audio, 10 blocks of 64", datasets.load("tones", 4000), sound)):
        for recipe in ("ours", "paper"):
            c = train.Settings(**given, size="tiny", recipe=recipe, steps=1)
            run = train.Run(train.complete(c, data), data)
            x = data.batch(given["batch"])
            seconds, = median_seconds(lambda: train.train_step(run, x).item(), repeats=7)
            yield {"training step": name, "recipe": recipe, "seconds": seconds,
                   "datapoints a second": given["batch"] / seconds}


# -- One CUDA GPU ----------------------------------------------------------------------------------

def gpu_data(words, device):
    """Data of the size that `gpu` measures, for what it is called."""
    if "text" in words:
        return datasets.load("pydoc", 250, device=device)
    if "audio" in words:
        return datasets.load("tones", device=device)
    noise = np.random.default_rng(0).integers(256, size=(600, 3, 32, 32), dtype=np.uint8)
    return datasets.Images("noise", noise[:500], noise[500:], device=device)


def step_of(work):
    """A row of `gpu`: one size, compiled beside the others, but measured alone."""
    words, device, all_compiled, lock, most = work
    data, size = gpu_data(words, device), words.split(", ")[1]
    given = dict(recipe="paper", branch=0) if size == "paper" else dict(
        branch=4 if "upscale" in words else None)
    run = train.Run(train.complete(train.Settings(size=size, device=device, steps=10 ** 9, **given),
                                   data), data)
    in_parts = words in ("text, paper", "audio, paper")    # as all are in memory at once
    run.parts = 4 if in_parts else 1
    weights, x = sum(p.numel() for p in run.model.parameters()), data.batch(2)
    with flop_counter.FlopCounterMode(display=False) as counter:
        run.model.loss(x).sum().backward()
    operations = counter.get_total_flops() / 2 * run.c.batch

    def steps(n):
        """Seconds of one step, of n."""
        begin = time.perf_counter()
        for _ in range(n):
            loss = train.train_step(run, run.draw(data))
        loss.item()                                        # waits for a GPU
        return (time.perf_counter() - begin) / n

    kinds = torch.profiler.ProfilerActivity
    n = 1 if device == "cpu" else 3 if size == "paper" else 10
    first = steps(1)
    torch.cuda.empty_cache()
    all_compiled.wait(timeout=600)                         # else one of them has failed
    with lock:
        steps(4)
        seconds = statistics.median(steps(n) for _ in range(5))
        with torch.profiler.profile(activities=[kinds.CUDA if n > 1 else kinds.CPU]) as watch:
            steps(n)
    torch.cuda.empty_cache()
    busy = sum(event.self_device_time_total for event in watch.key_averages()) / n / 1e6
    return dict(step=words, weights=weights, batch=run.c.batch, parts=run.parts, first_step=first,
                milliseconds=1000 * seconds, datapoints_a_second=round(run.c.batch / seconds),
                variables_a_second=round(run.c.batch * data.D / seconds),
                of_the_product=operations / seconds / most, busy=busy / seconds,
                gigabytes=torch.cuda.max_memory_allocated() / 1e9)


def bench_gpu(args):
    """A training step of every size on one CUDA GPU: seconds of the first one, which compiles;
    milliseconds of the others; the part of the card's own bfloat16 matrix product (8,192 x 8,192)
    that the counted operations of forward and backward reach, and the part of the time in which the
    GPU is busy. With --minutes, what `small` learns in so many on text8 and CIFAR-10, too; seconds
    of the evaluation; datapoints a second of compress.py with the default calls, encoding with its
    proof."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.randn(2, *[8192 if device == "cuda" else 512] * 2, device=device).bfloat16()
    product, = median_seconds(lambda: (square[0] @ square[1])[0, 0].item())
    most = 2 * square.shape[1] ** 3 / product
    sizes = ("images, paper", "text, paper", "images, small", "text, small",
             "images, small, upscale-4", "audio, small", "audio, paper")
    if device == "cpu":                                    # to try the code
        sizes = [name.replace("small", "tiny") for name in sizes if "paper" not in name]
    process = multiprocessing.get_context("spawn")
    with process.Manager() as manager, process.Pool(len(sizes)) as pool:
        how = device, manager.Barrier(len(sizes)), manager.Lock(), most
        yield from pool.imap_unordered(step_of, [(name, *how) for name in sizes])
    if args.minutes:
        yield from learns("small" if device == "cuda" else "tiny", device, args.minutes)


def real_data(words, device):
    """text8 prefix in chunks of 250, or CIFAR-10."""
    if "CIFAR" in words:
        return datasets.load(str(CIFAR), device=device)
    return text8_prefix(device=device)


def learns(size, device, minutes):
    """Rows of what `gpu` trains: text8 prefix in chunks of 250, its last 200,000 characters, and
    CIFAR-10, order-agnostic and upscale-4, its test images; with the seconds of the evaluation."""
    for words, branch in (("text8", 0), ("CIFAR-10", 0), ("CIFAR-10, upscale-4", 4)):
        data = real_data(words, device)
        name = f"gpu-{words.replace(', ', '-')}"
        run, _ = trained(name, data=data, size=size, device=device, minutes=minutes, branch=branch)
        begin = time.perf_counter()
        train.evaluate(run.ema, data)
        seconds = time.perf_counter() - begin
        yield result(words, run, data, seconds_of_evaluation=seconds, **coding(RUNS / name, data))


def bench_sizes(args):
    """What the size `small` might be instead, two minutes each on one CUDA GPU, one seed: bits per
    dim of 2,000 validation chunks (text8 in chunks of 250, CIFAR-10 order-agnostic)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = dict(size="small" if device == "cuda" else "tiny", device=device,
                 minutes=args.minutes or 2)
    for words, flags in (
            ("text8", dict(dim=(384, 768), depth=(4, 12), batch=(128, 512), lr=(1e-3, 4e-3))),
            ("CIFAR-10", dict(dim=(96, 192, 288), depth=(2, 8), batch=(64, 256), lr=(1e-3, 4e-3)))):
        ways = {"": {}} | {f"{name} {value}": {name: value}
                           for name, values in flags.items() for value in values}
        data = real_data(words, device)
        for way, change in ways.items():
            run, _ = trained(data=data, **given, **change)
            found = train.bound(run.ema, train.spread(data.chunks("valid"), 2000))
            yield {"data": words, "small, but": way, "bits": found["bits"],
                   "stderr": found["stderr"], "steps": run.step,
                   "weights": sum(p.numel() for p in run.model.parameters())}


def coding(folder, data):
    """Datapoints a second of compress.py: the test split's first 20,000 letters, or 20 images."""
    path = folder / datasets.PIECES[data.kind]
    if data.kind == "image":
        np.save(path, data.chunks("test")[:20].view(-1, *data.shape).cpu().numpy())
    else:
        path.write_bytes(datasets.to_bytes(data.splits["test"][:20000].cpu(), data.K))
    model, codec, _ = compress.settle(argparse.Namespace(
        ckpt=folder / "ckpt.pt", device=data.splits["test"].device.type, input=path, calls=None,
        order=None, block=None))
    n, _, archive, encode, decode = round_trip(path, model, codec)
    return dict(archive=8 * len(archive) / n, encoded_a_second=n / data.D / encode,
                decoded_a_second=n / data.D / decode)


# -- What was measured -----------------------------------------------------------------------------

def markdown(rows):
    """Tables of these rows, one for all that begin alike."""
    groups = itertools.groupby(rows, key=lambda row: next(iter(row)))
    return "\n\n".join(table([*group]) for _, group in groups)


def table(rows):
    """A table of these rows; numbers with four digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value):
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(
            value, int) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(kept):
    """results/README.md from results/bench.json and results/head.md."""
    parts = [(HERE / "head.md").read_text("utf-8")]
    for name in SECTIONS:
        if name in kept:
            section = kept[name]
            words = " ".join(SECTIONS[name].__doc__.split())
            parts.append(f"## {name}\n\n{words}\n\n{markdown(section['rows'])}\n\n*`python -m "
                         f"results.bench {name}`; {section['machine']}; {section['day']}*\n")
    with datasets.write(HERE / "README.md", mode="w") as file:
        file.write("\n".join(parts))


SECTIONS = {name.removeprefix("bench_"): function for name, function in list(globals().items())
            if name.startswith("bench_")}


def main():
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--minutes", type=float, help="of training, where it is not the default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="seconds only, and nothing is kept")
    args = parser.parse_args()
    args.passes = 16 if "text" in args.sections else 2
    if args.quick:
        args.minutes, args.seeds, args.passes = 0.02, 1, 1
    path = HERE / "bench.json"
    for name in args.sections:
        print(name)
        rows = []
        for row in SECTIONS[name](args):
            print(" ", row, flush=True)
            rows.append(row)
        print(markdown(rows))
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept[name] = dict(rows=rows, machine=machine(), day=str(datetime.date.today()))
        if not args.quick:
            with datasets.write(path, mode="w") as file:
                json.dump(kept, file, indent=1)
            write(kept)


if __name__ == "__main__":
    datasets.run(main)
