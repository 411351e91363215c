"""Audio: spoken digits."""
import collections
import itertools
import json
import statistics
import subprocess
import zlib

import torch

import data as datasets
import nets
import planner
import train
from ardm import bits_per_dim
from results.common import (REAL, RUNS, SOUND_PACKERS, by_stage, codec_of, duration,
                            result, round_trip, sound_references, trained)

BRANCHES = (2, 4, 16, 64, 256)
FSDD = next(REAL.rglob("free-spoken-digit-dataset*.gz"), None)
SC09 = REAL / "sc09" / "speech_commands_v0.02_digits_subset.tar.gz"


def digits():
    """Spoken digits (FSDD)."""
    return datasets.load(str(FSDD))


def beside_packers(run, data, most=128):
    """Rows of a run: its bound on windows of the test clips, and what others need for them."""
    windows = train.some(data.chunks("test"), most)
    others = sound_references(windows.numpy().flatten(), data.rate)
    return [result(f"upscale-{run.c['branch']}", run, windows, passes=16),
            *(dict(run=name, bits=bits) for name, bits in others.items())]


def bench_tones(args):
    """The sounds that are made here, bits a sample: the bound on all windows of 2,048 of the test
    clips; others take the clips as one file. 2,056 steps are 2.75 minutes of two cores with
    bfloat16."""
    run, data = trained("tones", data=datasets.load("tones"), **duration(args, 2056))
    return beside_packers(run, data, most=10 ** 9)


def bench_fsdd(args):
    """Spoken digits (FSDD, 8 kHz), bits a sample: the bound on 128 windows of the test clips;
    others take these windows as one file. The speakers of the test clips are also heard in the
    training clips. One of the six recorded with 8 bits: his samples are multiples of 256."""
    return beside_packers(*trained("fsdd", data=digits(), **duration(args, 6000)))


def bench_sc09(args):
    """The paper's spoken digits, SC09 (16 kHz), like FSDD; 62 clips of 39,000 are for training."""
    data = datasets.load(str(SC09), datasets.WINDOW)
    return beside_packers(*trained("sc09", data=data, **duration(args, 1000)))


def bench_clips(args):
    """The first test clips by name, bits a sample: each file, its header included, is coded by
    itself by the model of section fsdd or sc09 as compress.py does by default (order random:1, 64
    network calls, an even plan), and decoded, byte for byte; the same files by FLAC and WavPack.
    Seconds of this machine for a second of sound."""
    clips = datasets.tenths(sorted(datasets.members(FSDD, r"\.wav$")))[2]
    yield as_files("fsdd", [content for _, content in clips[:100]])
    found = dict(datasets.members(SC09, r"\.wav$|testing_list\.txt$"))
    names = found["testing_list.txt"].decode().split()
    yield as_files("sc09", [found[name] for name in sorted(names)[:2]])


def as_files(name, clips):
    """A row of section clips."""
    model, checkpoint = nets.load(RUNS / name / "ckpt.pt")
    settings, clip, total = checkpoint["settings"], RUNS / name / "clip.wav", collections.Counter()
    codec = codec_of(model, settings, "random:1", planner.uniform_plan(model.S, model.D, 64), 8)
    for content in clips:
        clip.write_bytes(content)
        n, bits, archive, encode, decode = round_trip(clip, model, codec, settings)
        total.update(n=n, exact=bits, archive=8 * len(archive), encode=encode, decode=decode)
        for packer, command in SOUND_PACKERS.items():
            done = subprocess.run(command, input=content, capture_output=True)
            total[packer] += 8 * len(done.stdout)
    return {"data": name, "clips": len(clips)} | {
        each: total[each] / total["n"] for each in ("exact", "archive", *SOUND_PACKERS)} | {
        f"{way}, s/s": total[way] * settings["rate"] / total["n"] for way in ("encode", "decode")}


def bench_branches(args):
    """FSDD with other branching factors b, bits a sample of validation windows: the bound on 256,
    and exact on 64 in 64 network calls, in halves. 1,000 steps and each seed in turn for all, then
    2,500 steps and two seeds for the best two; a step takes as long with each b. A run goes on from
    the rows that are there. (In the paper on SC09, after a week: 6.29, 6.29, 6.30, 6.36 for b = 2,
    4, 16, 256.)"""
    data, rows, steps = digits(), [], 2 if args.quick else 1000
    for seed, b in itertools.product(range(args.seeds), BRANCHES):
        rows.append(branch(data, b, steps, seed, args.kept))
        yield rows[-1]
    means = {b: statistics.mean(row["exact"] for row in rows if row["b"] == b) for b in BRANCHES}
    for seed, b in itertools.product(range(min(2, args.seeds)), sorted(means, key=means.get)[:2]):
        yield branch(data, b, 5 * steps // 2, seed, args.kept)


def branch(data, b, steps, seed, kept):
    """A row of section branches, from those that are kept, or measured."""
    named = {"b": b, "steps": steps, "seed": seed}
    for row in kept:
        if named.items() <= row.items():
            return row
    run, _ = trained(data=data, steps=steps, branch=b, seed=seed)
    windows = data.chunks("valid")
    found = train.bound(run.ema, train.some(windows, 256), passes=4)
    x, plan = train.some(windows, 64).long(), planner.uniform_plan(run.ema.S, data.D, 64)
    sigma = torch.from_numpy(planner.order("halves", data.D)).expand(x.shape)
    exact = bits_per_dim(run.ema.nll(x, plan, sigma), data.D).mean().item()
    return named | dict(stages=run.model.S, bits=found["bits"], stderr=found["stderr"], exact=exact)


def bench_calls(args):
    """The model of section fsdd by network calls, bits a sample: predicted from L_t for the planned
    and the even split over the stages, and exact on 32 validation windows. "random" is random:1,
    "planned" the cheapest plan by L_t, and "split" has the calls of each stage from it, spread
    evenly. A planned plan costs more in an archive's header: its bytes, packed."""
    model, _ = nets.load(RUNS / "fsdd" / "ckpt.pt")
    S, D, windows = model.S, model.D, digits().chunks("valid")
    L = planner.smooth(*train.components(model, windows, seconds=60))
    x = train.some(windows, 32).long()
    orders = {rule: torch.from_numpy(planner.order(rule, D)).expand(x.shape)
              for rule in ("random:1", "halves")}
    for calls in (16, 32, 64, S * D):
        planned, even = planner.plan(L, calls), planner.uniform_plan(S, D, calls)
        shares = [len(ks) for ks in by_stage(planned, S)]
        split = [(s, t, k) for s, n in enumerate(shares, start=1)
                 for _, t, k in planner.uniform_plan(1, D, n)]
        plans = dict(planned=planned, split=split, even=even) if calls < S * D else {}
        row = dict(calls=calls, planned=planner.plan_cost(L, planned) / D,
                   even=planner.plan_cost(L, even) / D)
        row["calls of each stage"] = ", ".join(map(str, shares))
        for (rule, sigma), way in itertools.product(orders.items(), plans):
            nats = model.nll(x, plans[way], sigma)
            row[f"{rule.removesuffix(':1')}, {way}"] = bits_per_dim(nats, D).mean().item()
        for way, plan in plans.items():
            row[f"bytes, {way}"] = len(zlib.compress(json.dumps(by_stage(plan, S)).encode(), 9))
        yield row
