"""Every figure that the README quotes, measured: python bench.py SECTION ... [--quick]

    planner     seconds for a plan, with the plain O(D^2) programme beside it
    coder       million symbols a second, with constriction beside it where that is installed
    speed       training steps a second at the size for which the released code was timed
                (also: --size paper)
    ablation    each ingredient of the recipe taken away alone, in equal time, on pydoc
    run         `python train.py`, its peak memory and a sample in the making
    compress    archives of the test text of that run, under several budgets of network calls
    portable    how far the network's numbers differ between simulated machines, whether archives
                decode there, and what the portable mode costs (needs the runs of run and stages)
    archives    held-out text as archives, whole and in chunks, and by the usual tools (needs the
                runs of run and text8)
    blocks      what random access costs: datapoints in a block against bytes (needs those of run
                and stages, as ahead does)
    ahead       what the encoder gains, which need not wait for what it knows
    stream      memory for a file of 50 MB
    fuzz        10,000 mutated archives: how many are refused, none may decode wrongly
    text8       our recipe against the paper's at the same size, in equal time
                (downloads text8 where ARDM_DATA names no folder with the prefix of it)
    unet        training steps of the paper's kind of U-Net, small
    images      each ingredient of the recipe for images taken away alone, on CIFAR-10
    stages      calls against bits for four models of glyphs
    mnist, cifar10    ten and twenty minutes of training for both kinds of model, pictures,
                archives (they download what ARDM_DATA does not hold)

Prints tables, keeps the numbers with machine and versions in --out (assets/bench.json), and writes
them into the README. Run it alone: a rival on the same cores halves every speed. --quick shrinks
everything to seconds, to see that it runs, and writes nothing.
"""
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import coder
import compress
import data as datasets
import planner
import train
from ardm import ARDM


def median_seconds(*functions, repeats=5):
    """Median wall time of a call of each, after one that does not count; in turns, so that a slow
    spell of the machine is everybody's."""
    times = [[] for _ in functions]
    for turn in range(1 + repeats):
        for function, own in zip(functions, times):
            begin = time.perf_counter()
            function()
            own += [time.perf_counter() - begin] * (turn > 0)
    return [statistics.median(own) for own in times]


# -- planner ---------------------------------------------------------------------------------------

def plain_programme(L, budget):
    """The cheapest cost by O(D^2) work for each call: what a straightforward version does."""
    D = len(L)
    i, j = np.arange(D)[:, None], np.arange(1, D + 1)[None]
    edge = np.where(i < j, (j - i) * L[:, None], np.inf)
    E = np.r_[0.0, np.full(D, np.inf)]
    for _ in range(budget):
        E = np.r_[np.inf, (E[:-1, None] + edge).min(axis=0)]
    return E[-1]


def bench_planner(args):
    """Seconds for a plan, and the plain programme's where it is bearable."""
    rows = []
    for S, D, budget in [(1, 250, 20), (1, 1000, 50), (1, 3072, 50), (1, 16000, 50),
                         (8, 16000, 400)]:
        if args.quick and D > 1000:
            continue
        t = np.arange(1, D + 1)
        L = np.stack([8 / s * (1 - (t / (D + 1)) ** 0.5) for s in range(1, S + 1)])
        row = dict(stages=S, D=D, calls=budget,
                   seconds=median_seconds(lambda: planner.plan(L, budget), repeats=3)[0])
        if D in (1000, 3072):
            row["plain_seconds"], = median_seconds(
                lambda: plain_programme(L[0], budget), repeats=1)
            assert np.isclose(plain_programme(L[0], budget),
                              planner.plan_cost(L, planner.plan(L, budget)))
        rows.append(row)
        print("  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    return rows


# -- coder -----------------------------------------------------------------------------------------

CALL = 2048                          # symbols that one network call predicts


def coder_message(K, calls):
    """(CALL, K) probabilities, which serve every call, and symbols (calls * CALL,) of a message.

    The same tables again and again are in the cache, as those are that a network has just made.
    """
    rng = np.random.default_rng(0)
    weights = np.exp(rng.normal(size=(CALL, K)) * 2)
    probs = weights / weights.sum(axis=1, keepdims=True)
    draws = [(probs.cumsum(axis=1) < rng.random((CALL, 1))).sum(axis=1).clip(0, K - 1)
             for _ in range(calls)]
    return probs, np.concatenate(draws)


def one_stream(probs, symbols):
    """(message, encode, decode), quantisation included."""
    calls = symbols.reshape(-1, CALL)

    def push():
        pairs = zip(*(coder.intervals(coder.quantize(probs), call) for call in calls))
        return coder.encode(*map(np.concatenate, pairs))

    def pop():
        decoder = coder.Decoder(data)
        return np.concatenate([decoder.pop(coder.quantize(probs)) for _ in calls])
    return (data := push()), push, pop


def many_streams(probs, symbols, M=512):
    """The same in M streams, CALL / M symbols of each in a call."""
    calls, shape = symbols.reshape(-1, CALL), (CALL // M, M, probs.shape[1] + 1)

    def push():
        pairs = zip(*(coder.intervals(coder.quantize(probs), call) for call in calls))
        return coder.encode_streams(*(np.concatenate(part).reshape(-1, M) for part in pairs))

    def pop():
        decoder = coder.DecoderStreams(streams)
        return np.concatenate([decoder.pop(coder.quantize(probs).reshape(shape)) for _ in calls])
    return b"".join(streams := push()), push, pop


def with_constriction(probs, symbols):
    """The same with the package constriction: a coder in Rust."""
    import constriction                                                # optional: no dependency
    model, stack = constriction.stream.model, constriction.stream.stack
    family, calls = model.Categorical(perfect=False), symbols.astype(np.int32).reshape(-1, CALL)

    def push():
        ans = stack.AnsCoder()
        for call in calls[::-1]:
            ans.encode_reverse(call, family, probs)
        return ans.get_compressed()

    def pop():
        ans = stack.AnsCoder(words)
        return np.concatenate([ans.decode(family, probs) for _ in calls])
    return (words := push()).tobytes(), push, pop


def bench_coder(args):
    """Speed and length of each coder, for a small, a text's and a byte's alphabet."""
    train.keep_freed_memory()                                          # as compress.py does
    rows, coders = [], {"one stream": one_stream, "512 streams": many_streams}
    try:
        import constriction                                            # noqa: F401
        coders["constriction"] = with_constriction
    except ImportError:
        print("  (constriction is not installed)")
    for K in (4, 27, 256):
        probs, symbols = coder_message(K, calls=2 if args.quick else 50)
        p = np.tile(probs, (len(symbols) // CALL, 1))[np.arange(len(symbols)), symbols]
        ideal = -np.log2(p).sum() / 8
        made = [make(probs, symbols) for make in coders.values()]
        speeds = iter(len(symbols) / seconds / 1e6 for seconds in median_seconds(
            *(function for _, *both in made for function in both), repeats=3 if args.quick else 15))
        for name, (data, _, pop) in zip(coders, made):
            assert np.array_equal(np.asarray(pop()).reshape(-1), symbols)
            rows.append(dict(coder=name, K=K, encode=next(speeds), decode=next(speeds),
                             extra_bytes=len(data) - ideal))
            print("  {coder:12} K = {K:3}  encode {encode:6.2f}  decode {decode:6.2f} Msym/s  "
                  "{extra_bytes:+.1f} bytes over the ideal".format(**rows[-1]))
    return rows


# -- training --------------------------------------------------------------------------------------

def timed_training(source, /, keep=None, **given):
    """Trains with these settings: bits/char on the test split, steps, characters a second. keep:
    where the checkpoint stays."""
    c = train.complete(dict(given, report=10 ** 9))
    data = source(c) if callable(source) else source
    run = train.Run(c, data.K, data.kind, data.shape)
    with tempfile.TemporaryDirectory() as folder:
        train.train(run, data, Path(folder))
    if keep:
        run.save(keep)
    passes = 1 if data.kind == "image" else 4
    bits = train.bound(run.ema, *data.chunks("test"), passes=passes)["bits"]
    return dict(bits=bits, steps=run.step,
                chars_per_second=run.step * c.batch * data.D / run.seconds,
                params=sum(p.numel() for p in run.model.parameters()), minutes=run.seconds / 60)


TEXT8 = Path("out/text8-prefix/ckpt.pt")             # what bench_text8 leaves for bench_archives


def text8_prefix(c):
    """The first 6,877,825 characters of text8, the last 200,000 of them held out for the test."""
    folder = os.environ.get("ARDM_DATA")
    part = Path(folder or ".") / "text8" / "text8_prefix.zip"
    data = datasets.load(str(part) if folder and part.is_file() else "text8", c.length, c.data_dir)
    stream = torch.cat(list(data.splits.values()))[:6_877_825]
    data.splits = dict(train=stream[:-220_000], valid=stream[-220_000:-200_000],
                       test=stream[-200_000:])
    return data


def table(variants, source, minutes, /, **common):
    rows = []
    for name, change in list(variants.items())[:3 if minutes < 0.1 else None]:
        rows.append(dict(name=name,
                         **timed_training(source, minutes=minutes, **{**common, **change})))
        print("  {name:34} {bits:.3f} bits/dim  {steps:5} steps  "
              "{chars_per_second:8,.0f} dims/s".format(**rows[-1]))
    return rows


def bench_ablation(args):
    """The recipe without each of its ingredients."""
    variants = {"the recipe": {}, "the recipe, another seed": dict(seed=1),
                "sinusoidal positions": dict(positions="sinusoidal"),
                "no pairs of neighbours": dict(pairs=False),
                "no depthwise convolution": dict(conv=0),
                "attention in every block": dict(every=1), "t uniform": dict(late=False),
                "no zero initialisation": dict(zero_init=False),
                "Adam alone, no Muon": dict(optimizer="adam", lr=2e-3),
                "no decay of the rate": dict(decay=0.0),
                "long windows from the start": dict(short=0.0),
                "no average of the weights": dict(ema=0.0)}
    if train.has_bf16(torch.device("cpu")):
        variants["float32"] = dict(bf16=False)
    minutes = 0.02 if args.quick else args.minutes or 1.0
    return table(variants, lambda c: train.load_data(c, "cpu"), minutes, device="cpu")


PAPER = {name: value for name, value in train.SIZES["text"]["paper"].items()      # all but the size
         if name not in ("length", "dim", "depth", "heads", "mlp", "batch", "steps", "warmup")}


def bench_text8(args):
    """4 layers of 128 and chunks of 250 for all."""
    minutes = 0.02 if args.quick else args.minutes or 10.0
    ours = dict(length=250, batch=12, data="text8")
    variants = {"our tiny recipe": dict(ours, keep=None if args.quick else TEXT8),
                "the paper's recipe, the same size": {**ours, **PAPER, "warmup": 100},
                "the same, 2000 characters a step": {**ours, **PAPER, "warmup": 100, "batch": 8}}
    return table(variants, text8_prefix, minutes, size="tiny", device="cpu")


def bench_speed(args):
    """Full training steps on random symbols, the optimiser included."""
    given = dict(length=250, batch=32, dim=256, depth=4, heads=4, mlp=1024)
    variants = {"our network": {}, "the paper's network": PAPER}
    if train.complete({}).bf16:
        variants["the paper's network, float32"] = dict(PAPER, bf16=False)
    if args.size:
        given = dict(size=args.size, batch=args.batch or train.SIZES["text"][args.size]["batch"])
        variants = {args.size: {}}
    if args.quick:
        given |= dict(length=32, batch=4)
    rows = []
    for name, change in variants.items():
        c = train.complete(dict(given, steps=10 ** 6, **change))
        run = train.Run(c, 27, "text", (c.length,))
        x = torch.randint(27, (c.batch, c.length), device=c.device)
        seconds, = median_seconds(lambda: train.train_step(run, x).item(),
                                  repeats=3 if args.quick else 15)
        params = sum(p.numel() for p in run.model.parameters())
        row = dict(name=name, seconds=seconds, samples_per_second=c.batch / seconds,
                   chars_per_second=c.batch * c.length / seconds,
                   params=params, tflops=6 * params * c.batch * c.length / seconds / 1e12)
        if c.device.startswith("cuda"):
            row |= dict(share_of_bf16_peak=row["tflops"] / matmul_tflops(c.device),
                        gigabytes=torch.cuda.max_memory_allocated() / 1e9)
        rows.append(row)
        if c.optimizer == "muon":
            rows += muon_seconds(run)
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                               for k, v in row.items()))
    return rows


def muon_seconds(run):
    """A step of Muon on all the matrices of this run, ours and torch's."""
    ours = run.optimizers[1]
    theirs = torch.optim.Muon([p for group in ours.param_groups for p in group["params"]])
    return [dict(name=f"Muon alone, {whose}", seconds=seconds) for whose, seconds in zip(
        ("ours", "torch's"), median_seconds(ours.step, theirs.step))]


def matmul_tflops(device, n=8192):
    """What the device reaches on one large bfloat16 product: the peak that shares are given of."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)

    def product():
        a @ a
        torch.cuda.synchronize()
    return 2 * n ** 3 / median_seconds(product)[0] / 1e12


# -- the default run and its archives --------------------------------------------------------------

def bench_run(args):
    """`python train.py` as a newcomer types it, its peak memory, and one sample in the making."""
    if args.quick:                                                     # not where a real run may be
        args.ckpt = str(Path(args.scratch) / "ckpt.pt")
    import resource                                                    # not on Windows
    folder, plots = Path(args.ckpt).parent, importlib.util.find_spec("matplotlib") is not None
    options = flags(steps=30, report=10, passes=1) if args.quick else ["--plot"] if plots else []
    command([sys.executable, "train.py", "--out", str(folder), *options])
    if "--plot" in options:
        shutil.copy(folder / "results.png", Path(args.out).parent)
    frames = command([sys.executable, "sample.py", "--ckpt", args.ckpt, "--n", "1", "--calls", "20",
                      "--frames", "--out", str(folder)])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9       # Linux: kB
    print(f"  peak memory {peak:.2f} GB")
    return [dict(json.loads((folder / "results.json").read_text()), peak_gigabytes=peak,
                 frames=frames.splitlines()[:-1])]


def command(arguments):
    """What a script prints on stdout; its progress bars stay on the screen."""
    printed = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(printed)
    return printed


def bench_compress(args):
    """The test text of the default run, under several budgets of calls, beside the usual tools."""
    model, checkpoint = train.load_model(args.ckpt, "cpu")
    content, rows = compress.open_input("test", checkpoint), []
    content.length = min(content.length, 2000 if args.quick else 10000)
    for calls in (8,) if args.quick else (model.D // 8, model.D // 4, model.D // 2, model.D):
        pairs = compress.candidates(model, checkpoint["L"], calls)
        bits, facts = compress.compare(model, checkpoint, content,
                                       *compress.search(model, checkpoint, pairs))
        rows.append({**facts, "bits": bits})
        print("  {calls} calls  {percent_over_nll:+.3f}% over the nll".format(**facts))
        print("  " + "  ".join(f"{name} {value:.3f}" for name, value in bits.items()))
    return rows


def bench_archives(args):
    """Held-out text as our archives and as the usual tools': whole, and every chunk by itself."""
    rows = []
    for name, path in dict(pydoc=Path(args.ckpt), text8=TEXT8).items():
        if not path.is_file():
            print(f"  {path} is not there: left out")
            continue
        model, checkpoint = train.load_model(path, "cpu")
        source = text8_prefix if name == "text8" else lambda c: train.load_data(c, "cpu")
        symbols = source(checkpoint["settings"]).splits["test"][:2000 if args.quick else 20000]
        content = compress.Content.of(symbols, "text", 27, checkpoint["shape"])
        for every in (10,) if args.quick else (4, 1) if model.D <= 64 else (4,):     # 1: minutes
            rows.append(dict(text=name, tool=f"ardm, {-(-model.D // every)} calls", **our_archives(
                model, checkpoint, content, every)))
            print("  {text}, {tool}: {whole:.3f}, in chunks {chunks:.3f}".format(**rows[-1]))
        found = train.references(symbols.numpy(), "text", 27, checkpoint["shape"])
        rows += [dict(text=name, tool=tool, whole=bits, chunks=found[f"{tool} in chunks"])
                 for tool, bits in found.items() if f"{tool} in chunks" in found]
    return rows


def our_archives(model, checkpoint, content, every):
    """Every so many letters of a chunk together: bits of one archive, of one whose blocks are
    single chunks, and the seconds of the first."""
    calls = -(-model.D // every)
    plan = planner.uniform_plan(1, model.D, calls)
    order = "forward" if every == 1 else f"spaced:{every}"
    begin = time.perf_counter()
    archive, _ = compress.encode(model, content, order, plan, False)
    middle = time.perf_counter()
    assert torch.equal(compress.decode(model, checkpoint, archive, "archive"), content.symbols)
    end = time.perf_counter()
    alone, _ = compress.encode(model, content, order, plan, False, block=1)
    return dict(whole=8 * len(archive) / content.length, chunks=8 * len(alone) / content.length,
                encode=middle - begin, decode=end - middle,
                weights=4 * sum(p.numel() for p in model.parameters()))


# -- portable archives -----------------------------------------------------------------------------

OLDER = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41")
MACHINES = {"older instructions": OLDER, "one thread": dict(OMP_NUM_THREADS="1"),
            "both": {**OLDER, "OMP_NUM_THREADS": "1"}}
PROBE = """
import sys, numpy as np, torch, train
model = train.load_model(sys.argv[1], "cpu")[0]
generator = torch.Generator().manual_seed(0)
x = torch.randint(model.K, (16, model.D), generator=generator)
m = torch.rand(16, model.D, generator=generator) < 0.5
t = torch.full((16,), model.D // 2)
with torch.no_grad():
    both = [kind(model).log_probs(x, m, t, t // t).double() for kind in (
        torch.nn.Module.float, torch.nn.Module.double)]
np.save(sys.argv[2], torch.stack(both).numpy())
"""


def child(arguments, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], env={**os.environ, **environment},
                          stdout=subprocess.PIPE, check=True)


def bench_portable(args):
    """Differences between simulated machines, archives that decode there, and the price."""
    rows, scratch = [], Path(args.scratch)
    for (name, path), most in zip(trained(args), (1024, 64)):
        child(["-c", PROBE, path, scratch / "here.npy"])
        here = np.load(scratch / "here.npy")
        model, checkpoint = train.load_model(path, "cpu")
        content = compress.open_input("test", checkpoint)
        content.length = min(content.length, (8 if args.quick else most) * model.D)
        plan, cost = planner.uniform_plan(model.S, model.D, 16), {True: [], False: []}
        order = f"spaced:{model.D // 16}"
        for fast in (True, False) * (1 if args.quick else 3):
            begin = time.perf_counter()
            archive, _ = compress.encode(model, content, order, plan, False, fast)
            middle = time.perf_counter()
            compress.decode(model, checkpoint, archive, "archive")
            blocks = compress.unpack(io.BytesIO(archive), "archive")[1]
            cost[fast].append((middle - begin, time.perf_counter() - middle,
                               sum(size for size, _ in blocks)))
        encode, decode, size = np.median(cost[False], axis=0) / np.median(cost[True], axis=0)
        (scratch / "archive").write_bytes(archive)
        with open(scratch / "in", "wb") as file:
            compress.write_content(file, compress.unpack(io.BytesIO(archive), "archive")[0],
                                   [content.symbols])
        for machine, environment in MACHINES.items():
            child(["-c", PROBE, path, scratch / "there.npy"], **environment)
            there = np.load(scratch / "there.npy")
            known = np.isfinite(here)
            child(["compress.py", "decode", "--ckpt", path, "--device", "cpu", scratch / "archive",
                   scratch / "back"], **environment)
            single, double = (np.abs(a - b)[k].max() for a, b, k in zip(here, there, known))
            rows.append(dict(model=name, machine=machine, single=single, double=double,
                             same=(scratch / "back").read_bytes() == (
                                 scratch / "in").read_bytes(),
                             encode=encode, decode=decode, percent=100 * (size - 1)))
            print("  {model}, {machine}: float32 {single:.1e}, float64 {double:.1e}, decoded "
                  "{same}, {encode:.2f} and {decode:.2f} times the seconds, {percent:+.3f}% "
                  "payload".format(**rows[-1]))
    return rows


def trained(args):
    """(name, path) of the checkpoints of text and of glyphs that are there."""
    for name, path in dict(text=Path(args.ckpt),
                           glyphs=Path("out/glyphs-order-agnostic/ckpt.pt")).items():
        if path.is_file():
            yield name, path
        else:
            print(f"  {path} is not there: left out")


def bench_blocks(args):
    """What random access costs: blocks of 1, 4, 16 datapoints, or all of them in one."""
    rows = []
    for name, path in trained(args):
        model, checkpoint = train.load_model(path, "cpu")
        content = compress.open_input("test", checkpoint)
        number = min(content.length, 4096 if args.quick else compress.BLOCK) // model.D
        content.length = number * model.D
        plan, here = planner.uniform_plan(model.S, model.D, 16), []
        order = f"spaced:{model.D // 16}"
        for block in sorted({1, 4, 16, compress.DEFAULT_BLOCK // model.D, number}):
            if block <= number:
                begin = time.perf_counter()
                archive, _ = compress.encode(model, content, order, plan, False, block=block)
                middle = time.perf_counter()
                compress.decode(model, checkpoint, archive, "archive")
                here.append(dict(model=name, block=block, bytes=len(archive), encode=middle - begin,
                                 decode=time.perf_counter() - middle))
        rows += [dict(row, percent=100 * (row["bytes"] / here[-1]["bytes"] - 1)) for row in here]
        for row in rows[-len(here):]:
            print("  {model}, {block} in a block: {bytes} bytes, {percent:+.2f}%".format(**row))
    return rows


PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))    # kB, Linux
"""


def bench_stream(args):
    """Peak memory and seconds of a short file and of a long one, coded by a very small model."""
    folder, rows = Path(args.scratch), []
    command([sys.executable, "train.py", *flags(
        steps=20, report=10, passes=1, length=16, dim=8, heads=1, depth=1, mlp=8, batch=64,
        device="cpu", out=folder / "small")])
    ckpt, rng = flags(ckpt=folder / "small" / "ckpt.pt", device="cpu"), np.random.default_rng(0)
    letters = np.frombuffer(b" abcdefghijklmnopqrstuvwxyz", np.uint8)
    for size in (20_000, 100_000) if args.quick else (1_000_000, 50_000_000):
        (folder / "in").write_bytes(letters[rng.integers(0, 27, size)].tobytes())
        row = dict(bytes=size)
        for name, *options in (("encode", "--calls", "1", "--no-verify", "--order", "forward"),
                               ("decode",)):
            begin = time.perf_counter()
            printed = child(["-c", PEAK, "compress.py", name, *ckpt, *options, folder / "in",
                             folder / "out"]).stdout
            row |= {name: time.perf_counter() - begin,
                    f"{name}_megabytes": int(printed.split()[-1]) * 1024 / 1e6}
            os.replace(folder / "out", folder / "in")                  # decode reads the archive
        rows.append(row)
        print("  {bytes:,} bytes: encode {encode:.0f} s, {encode_megabytes:.0f} MB; decode "
              "{decode:.0f} s, {decode_megabytes:.0f} MB".format(**row))
    return rows


def bench_ahead(args):
    """One datapoint, every step a call: encoding it call by call, and with many calls together."""
    rows = []
    for name, path in trained(args):
        model, checkpoint = train.load_model(path, "cpu")
        content = compress.open_input("test", checkpoint)
        content.length = model.D
        plan, seconds = planner.full_plan(model.S, model.D), []
        for batch in (1, None):
            begin = time.perf_counter()
            archive, _ = compress.encode(model, content, "forward", plan, False, batch=batch)
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        compress.decode(model, checkpoint, archive, "archive")
        rows.append(dict(model=name, calls=len(plan), alone=seconds[0], ahead=seconds[1],
                         decode=time.perf_counter() - begin))
        print("  {model}, {calls} calls: {alone:.2f} s, together {ahead:.2f} s, decoding "
              "{decode:.2f} s".format(**rows[-1]))
    return rows


def mutated(archive, rng):
    """An archive with a few bytes changed, cut out, put in or moved."""
    b = bytearray(archive)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(rng.integers(0, len(b) + 1, 2))
        kind = rng.integers(5)
        if kind <= 1 and i < len(b):
            b[i] ^= int(rng.integers(1, 256))
        elif kind == 2:
            del b[i:j]
        elif kind == 3:
            b[i:i] = rng.bytes(int(rng.integers(1, 9)))
        else:
            b[i:j] = b[i:j][::-1]
    return bytes(b)


def bench_fuzz(args):
    """Mutated archives of a small model: how many are refused, and that none decodes wrongly."""
    c = train.complete(dict(size="tiny", length=16, dim=16, depth=1, mlp=16, device="cpu"))
    torch.manual_seed(0)
    model = train.build_model(c, 27, (16,)).eval()
    checkpoint = dict(kind="text", K=27, shape=[16])
    text = torch.from_numpy(datasets.to_symbols(b"what is written can be read again", 27))
    content = compress.Content.of(text, "text", 27, checkpoint["shape"])
    plan = planner.uniform_plan(1, 16, 4)
    archive, _ = compress.encode(model, content, "forward", plan, block=1)          # three blocks
    found, rng = dict.fromkeys(("refused", "the same", "WRONG", "TRACEBACK"), 0), (
        np.random.default_rng(0))
    for _ in range(100 if args.quick else 10_000):
        bad = mutated(archive, rng)
        try:
            with contextlib.redirect_stderr(io.StringIO()):              # no 10,000 progress bars
                back = compress.decode(model, checkpoint, bad, "archive")
            found["the same" if torch.equal(back, text) else "WRONG"] += 1
        except datasets.UserError:
            found["refused"] += 1
        except Exception as error:                                     # what must not happen
            found["TRACEBACK"] += 1
            print(f"  {error!r}")
    print(f"  {found}")
    return [dict(found, archives=sum(found.values()))]


# -- images ----------------------------------------------------------------------------------------

def real_data(name):
    """The flags of a data set: what ARDM_DATA holds of it, or the whole."""
    folder = os.environ.get("ARDM_DATA")
    part = Path(folder or ".") / "cifar10" / "cifar-10-python.partial.tar.gz"
    if name == "cifar10" and folder and part.is_file():
        return dict(data=str(part))
    return dict(data=name, **(dict(data_dir=folder) if folder else {}))


def some_images(name, folder):
    """The flags of a file that holds the first 60 test images of a data set."""
    given = real_data(name)
    data = datasets.load(given.pop("data"), **given)
    path = Path(folder) / f"{name}.npy"
    np.save(path, datasets.to_images(data.splits["test"][:60], data.shape))
    return dict(data=str(path))


def flags(**given):
    """Settings as they are typed."""
    return [word for name, value in given.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]


def bench_unet(args):
    """Full training steps of the paper's kind of U-Net, 64 channels and 4 + 4 ResBlocks."""
    given = dict(data="cifar10", device="cpu", size="paper", dim=64, depth=4, batch=16,
                 steps=10 ** 6)
    variants = {"order-agnostic": {}, "upscale-4, direct": dict(branch=4, parametrization="direct"),
                "upscale-4, data": dict(branch=4),
                "our tiny size, order-agnostic": dict(size="tiny")}
    if args.quick:
        given |= dict(dim=16, depth=1, batch=2)
    rows, x = [], torch.randint(256, (given["batch"], 3 * 32 * 32))
    for name, change in variants.items():
        own = {k: v for k, v in given.items() if k not in ("dim", "depth")}
        c = train.complete({**(own if "size" in change else given), **change})
        run = train.Run(c, 256, "image", (3, 32, 32))
        seconds, = median_seconds(lambda: train.train_step(run, x).item(),
                                  repeats=3 if args.quick else 9)
        rows.append(dict(name=name, seconds=seconds, samples_per_second=len(x) / seconds,
                         params=sum(p.numel() for p in run.model.parameters())))
        print("  {name}: {seconds:.3f} s, {samples_per_second:.1f} images/s".format(**rows[-1]))
    return rows


def bench_images(args):
    """The recipe for images without each of its ingredients, on CIFAR-10."""
    variants = {"the recipe": {}, "the recipe, another seed": dict(seed=1),
                "softmax alone, no logistic": dict(logistic=False),
                "no means of known neighbours": dict(neighbours=False),
                "one resolution": dict(levels=1), "t uniform": dict(late=False),
                "Adam alone, no Muon": dict(optimizer="adam", lr=2e-3),
                "no mirror images": dict(flips=False), "no average of the weights": dict(ema=0.0),
                "upscale-4, data": dict(branch=4, parametrization="data"),
                "upscale-4, direct": dict(branch=4), "upscale-16, direct": dict(branch=16)}
    given = real_data("cifar10")
    minutes = 0.02 if args.quick else args.minutes or 1.0
    return table(variants, lambda c: train.load_data(c, "cpu"), minutes, device="cpu", **given)


def equal_split(L, calls):
    """The paper's way: every stage by itself, each with the same number of calls."""
    return [(s, t, k) for s, row in enumerate(L, start=1)
            for _, t, k in planner.plan(row, calls // len(L))]


def keep_picture(path):
    """Copies a picture of a run to where the README shows it, if it does."""
    shown = f"assets/{path.parent.name}_{path.name}"
    if f"({shown})" in Path("README.md").read_text("utf-8"):
        shutil.copy(path, shown)


def bench_stages(args):
    """Calls against bits for the order-agnostic and three upscale models of glyphs."""
    rows = []
    for branch in (None, 4) if args.quick else (None, *args.branches):
        name = f"upscale-{branch}" if branch else "order-agnostic"
        folder = Path(args.scratch if args.quick else "out") / f"glyphs-{name}"
        length = (dict(steps=20, report=10, passes=1) if args.quick else
                  dict(minutes=args.minutes or 1.0))
        command([sys.executable, "train.py", *flags(data="glyphs", branch=branch, device="cpu",
                                                    out=folder, **length)])
        command([sys.executable, "sample.py", "--frames", *flags(ckpt=folder / "ckpt.pt", n=6,
                                                                 calls=100)])
        if not args.quick:
            keep_picture(folder / "frames.png")
        model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
        L, chunks = checkpoint["L"].numpy(), train.load_data(
            checkpoint["settings"], "cpu").chunks("test")[0]
        budgets = (50,) if args.quick else (50, 100, 200, L.size)
        plans = [planner.plan(L, n) for n in budgets] + [
            equal_split(L, n) for n in budgets if n < L.size]          # all calls: one plan alone
        found = train.measure_plans(model, train.spread(chunks, 39), plans, affordable=1e9)
        for n, best, equal in itertools.zip_longest(budgets, found[:len(budgets)],
                                                    found[len(budgets):]):
            equal = equal or best
            rows.append(dict(name=name, calls=n, predicted=best["predicted"],
                             measured=best["measured"], equal=equal["measured"]))
            print("  {name} {calls}: predicted {predicted:.3f}, measured {measured:.3f}, equal "
                  "split {equal:.3f}".format(**rows[-1]))
    return rows


def image_results(args, data, minutes, count, calls):
    """Trains both models for so long; then archives of `count` test images, one by one."""
    rows = []
    given = some_images(data, args.scratch) if args.quick else real_data(data)
    calls = 10 if args.quick else calls
    given |= (dict(steps=20, report=10, passes=1) if args.quick else
              dict(minutes=args.minutes or minutes))
    for branch in (4,) if args.quick else (None, 4):
        name = f"upscale-{branch}" if branch else "order-agnostic"
        folder = Path(args.scratch if args.quick else "out") / f"{data}-{name}"
        command([sys.executable, "train.py", *flags(**given, branch=branch, device="cpu",
                                                    out=folder)])
        command([sys.executable, "sample.py", "--frames", *flags(ckpt=folder / "ckpt.pt", n=6,
                                                                 calls=calls)])
        command([sys.executable, "sample.py", "--inpaint", "left", *flags(
            ckpt=folder / "ckpt.pt", n=6, calls=calls)])
        if not args.quick:
            for picture in ("frames", "inpaint"):
                keep_picture(folder / f"{picture}.png")
        results = json.loads((folder / "results.json").read_text())
        results["settings"] |= dict(data=data, data_dir="", out="")     # no paths of this machine
        model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
        content = compress.open_input("test", checkpoint)
        content.length = (2 if args.quick else count) * model.D
        pairs = compress.candidates(model, checkpoint["L"], calls)
        bits, facts = compress.compare(model, checkpoint, content,
                                       *compress.search(model, checkpoint, pairs), block=1)
        rows.append(dict({key: value for key, value in results.items() if key[0] != "L"},
                         name=name, archive=facts, bits=bits, images=count))
        print("  " + "  ".join(f"{key} {value:.3f}" for key, value in bits.items()))
    return rows


def bench_mnist(args):
    """MNIST, ten minutes each, archives of 100 images."""
    return image_results(args, "mnist", 10.0, 100, 50)


def bench_cifar10(args):
    """CIFAR-10, twenty minutes each, archives of 40 images."""
    return image_results(args, "cifar10", 20.0, 40, 100)


# -- the README ------------------------------------------------------------------------------------

TABLES = {                           # section -> {head of a column: format of a row}
    "planner": {"stages": "{stages}", "D": "{D:,}", "calls": "{calls}", "seconds": "{seconds:.3f}",
                "plain programme": "{plain_seconds:.2f}"},
    "coder": {"coder": "{coder}", "K": "{K}", "encode, Msym/s": "{encode:.1f}",
              "decode, Msym/s": "{decode:.1f}", "bytes over the ideal": "{extra_bytes:+.0f}"},
    "speed": {"training step": "{name}", "weights": "{params:,}", "seconds": "{seconds:.3f}",
              "samples/s": "{samples_per_second:.1f}", "share of bf16 peak":
              "{share_of_bf16_peak:.0%}"},
    "ablation": {"": "{name}", "bits/char": "{bits:.3f}", "steps": "{steps:,}"},
    "text8": {"": "{name}", "bits/char": "{bits:.3f}", "steps": "{steps:,}",
              "characters/s": "{chars_per_second:,.0f}"},
    "portable": {"model": "{model}", "simulated": "{machine}", "float32 differs by": "{single:.0e}",
                 "float64 differs by": "{double:.0e}", "decodes to the same": "{same}",
                 "encode time / fast mode's": "{encode:.1f}",
                 "decode time / fast mode's": "{decode:.1f}", "payload": "{percent:+.3f}%"},
    "archives": {"text": "{text}", "": "{tool}", "whole": "{whole:.2f}",
                 "every chunk alone": "{chunks:.2f}", "encode": "{encode:.0f} s",
                 "decode": "{decode:.0f} s", "weights beside it": "{weights:,} bytes"},
    "blocks": {"model": "{model}", "datapoints in a block": "{block}", "bytes": "{bytes:,}",
               "over one block": "{percent:+.2f}%", "encode": "{encode:.1f} s",
               "decode": "{decode:.1f} s"},
    "stream": {"file": "{bytes:,} bytes", "encode": "{encode:.0f} s",
               "memory of encode": "{encode_megabytes:.0f} MB", "decode": "{decode:.0f} s",
               "memory of decode": "{decode_megabytes:.0f} MB"},
    "ahead": {"model": "{model}", "calls": "{calls}", "encode, call by call": "{alone:.2f} s",
              "encode, calls together": "{ahead:.2f} s", "decode": "{decode:.2f} s"},
    "fuzz": {"mutated archives": "{archives:,}", "refused": "{refused:,}",
             "unchanged, decoded": "{the same}", "decoded wrongly": "{WRONG}",
             "crashed": "{TRACEBACK}"},
    "unet": {"training step": "{name}", "weights": "{params:,}", "seconds": "{seconds:.3f}",
             "images/s": "{samples_per_second:.1f}"},
    "images": {"": "{name}", "bits/dim": "{bits:.3f}", "steps": "{steps:,}"},
    "stages": {"": "{name}", "calls": "{calls:,}", "predicted": "{predicted:.3f}",
               "measured": "{measured:.3f}", "equal split, measured": "{equal:.3f}"},
    **dict.fromkeys(("mnist", "cifar10"), {
        "": "{name}", "bits/dim": "{bits_per_dim:.3f} ± {stderr:.3f}", "steps": "{steps:,}",
        "calls": "{archive[calls]}", "order": "{archive[order]}",
        "bound of these": "{bits[bound, mean over all orders]:.3f}",
        "exact nll": "{bits[exact nll of this order and plan]:.3f}",
        "payload": "{bits[archive, payload]:.3f}", "archive": "{bits[archive, whole file]:.3f}",
        "PNG": "{bits[PNG of each image]:.3f}", "WebP": "{bits[WebP of each image]:.3f}",
        "PNG (own)": "{bits[PNG of each image (filters, then zlib)]:.3f}"}),
    "compress": {"calls": "{calls}", "order": "{order}",
                 "exact nll": "{bits[exact nll of this order and plan]:.3f}",
                 "archive": "{bits[archive, whole file]:.3f}", "bz2": "{bits[bz2]:.3f}",
                 "lzma": "{bits[lzma]:.3f}", "zlib": "{bits[zlib]:.3f}",
                 "encode": "{encode_seconds:.0f} s",
                 "decode": "{decode_seconds:.0f} s"},
}


def markdown(rows, columns):
    """Rows as a table; a row without a column's key has that place empty, an empty column goes."""
    def cell(form, row):
        try:
            return form.format_map(row)
        except KeyError:
            return ""
    cells = [[cell(form, row) for row in rows] for form in columns.values()]
    kept = [[head, "---", *column] for head, column in zip(columns, cells) if any(column)]
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*kept))


def fill(readme, kept):
    """The README with every figure between <!-- NAME --> and <!-- /NAME --> as it was measured."""
    def block(match):
        if (section := kept.get(match[1].split()[0])) is None:         # not yet measured
            return match[0]
        if match[1] == "run printed":
            text = f"```\n{train.describe(section['rows'][0])}\n```\n"
        elif match[1] == "run frames":
            text = "```\n" + "\n".join(section["rows"][0]["frames"]) + "\n```\n"
        else:
            text = markdown(section["rows"], TABLES[match[1]])
        text += ("\n*{machine}; Python {versions[python]}, torch {versions[torch]}; seed 0; "
                 "{date}*\n".format_map(section))
        return f"<!-- {match[1]} -->\n{text}<!-- /{match[1]} -->"
    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- /\1 -->", block, readme, flags=re.S)


def update_readme(kept):
    readme = fill(Path("README.md").read_text(encoding="utf-8"), kept)
    with train.replacing("README.md") as file:
        file.write(readme.encode())


SECTIONS = {name[6:]: value for name, value in list(globals().items()) if name.startswith("bench_")}


def main():
    """The command line: sections measured, kept in --out and shown in the README."""
    parser = train.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=", ".join(SECTIONS) + "; none: only write the README's tables anew")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--minutes", type=float, help="of each training run")
    parser.add_argument("--size", choices=list(train.SIZES["text"]),
                        help="for speed: this size instead")
    parser.add_argument("--batch", type=int, help="for speed with --size")
    parser.add_argument("--branches", type=int, nargs="*", default=[2, 4, 16],
                        help="for stages: the upscale models (default 2 4 16)")
    parser.add_argument("--ckpt", default="out/pydoc/ckpt.pt",
                        help="for run, which makes it, and compress, which needs it")
    parser.add_argument("--out", default="assets/bench.json", help="where the numbers are kept")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"{name}: choose {', '.join(SECTIONS)}")
    path = Path(args.out)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    scratch = tempfile.TemporaryDirectory()
    args.scratch = scratch.name
    for name in args.sections:
        print(name)
        rows = SECTIONS[name](args)
        device = {} if name in ("run", "speed") else dict(device="cpu")
        kept[name] = dict(rows=rows, date=time.strftime("%Y-%m-%d"),
                          **train.conditions(train.complete(device)))
        if not args.quick:
            with train.replacing(path, "w") as file:
                json.dump(kept, file, indent=1)
            update_readme(kept)
    if not args.sections:
        update_readme(kept)


if __name__ == "__main__":
    train.command_line(main)
