"""Audio: spoken digits."""
import collections
import itertools
import statistics
import subprocess

import torch

import data as datasets
import nets
import planner
import train
from ardm import bits_per_dim
from results.common import (REAL, RUNS, SOUND_PACKERS, codec_of, round_trip, sound_references,
                            trained)

BRANCHES = (2, 4, 16, 64, 256)


def digits():
    """Spoken digits (FSDD): a folder or tar of them in ARDM_DATA."""
    (place, *_) = REAL.rglob("free-spoken-digit-dataset*.gz")
    return datasets.load(str(place))


def bench_fsdd(args):
    """Spoken digits (FSDD, 8 kHz), bits a sample: the bound on 128 windows of 2,048 of the test
    clips; others take the windows as one file. The speakers of the test clips are also heard in the
    training clips."""
    run, data = trained("fsdd", data=digits(), minutes=args.minutes or 20)
    windows = train.some(data.chunks("test"), 128)
    found = train.bound(run.ema, windows, passes=16)
    others = sound_references(windows.numpy().flatten(), data.rate)
    return [dict(run="upscale-16", bits=found["bits"], stderr=found["stderr"], steps=run.step,
                 minutes=run.seconds / 60), *(dict(run=name, bits=others[name]) for name in others)]


def bench_clips(args):
    """The first 100 test clips of FSDD by name, bits a sample: each file, its header included, is
    coded by itself in 64 network calls by the model of section fsdd, and decoded, byte for byte;
    the same files by FLAC and WavPack. Seconds of this machine for a second of sound."""
    model, checkpoint = nets.load(RUNS / "fsdd" / "ckpt.pt")
    settings, clip = checkpoint["settings"], RUNS / "fsdd" / "clip.wav"
    codec = codec_of(model, settings, "halves", planner.uniform_plan(model.S, model.D, 64), 8)
    total, (tar, *_) = collections.Counter(), REAL.rglob("free-spoken-digit-dataset*.gz")
    clips = datasets.tenths(sorted(datasets.members(tar, r"\.wav$")))[2]
    for _, content in clips[:100]:
        clip.write_bytes(content)
        n, bits, archive, encode, decode = round_trip(clip, model, codec, settings)
        total.update(n=n, exact=bits, archive=8 * len(archive), encode=encode, decode=decode)
        for name, command in SOUND_PACKERS.items():
            done = subprocess.run(command, input=content, capture_output=True)
            total[name] += 8 * len(done.stdout)
    sizes = {name: total[name] / total["n"] for name in ("exact", "archive", "FLAC -8",
                                                         "WavPack -hhx6")}
    seconds = total["n"] / settings["rate"]
    return [{"": name, "bits": bits} for name, bits in sizes.items()] + [
        {"": f"seconds to {way}", "for a second of sound": total[way] / seconds}
        for way in ("encode", "decode")]


def bench_branches(args):
    """FSDD with other branching factors b, bits a sample of 256 validation windows: 1,000 steps
    and each seed in turn for all, then 4,000 steps and two seeds for the best two; a step takes as
    long with each b. (In the paper on SC09, after a week: 6.29, 6.29, 6.30, 6.36 for b = 2, 4, 16,
    256.) Rows that are there are kept, so a run of this section goes on where the last one
    stopped."""
    data, rows, steps = digits(), [], 2 if args.quick else 1000
    for seed, b in itertools.product(range(args.seeds), BRANCHES):
        rows.append(branch(data, b, steps, seed, args.kept))
        yield rows[-1]
    means = {b: statistics.mean(row["bits"] for row in rows if row["b"] == b) for b in BRANCHES}
    for seed, b in itertools.product(range(min(2, args.seeds)), sorted(means, key=means.get)[:2]):
        yield branch(data, b, 4 * steps, seed, args.kept)


def branch(data, b, steps, seed, kept):
    """A row of section branches, from those that are kept, or measured."""
    named = {"b": b, "steps": steps, "seed": seed}
    for row in kept:
        if named.items() <= row.items():
            return row
    run, _ = trained(data=data, steps=steps, branch=b, seed=seed)
    found = train.bound(run.ema, train.some(data.chunks("valid"), 256), passes=4)
    return named | dict(stages=run.model.S, bits=found["bits"], stderr=found["stderr"])


def bench_calls(args):
    """The model of section fsdd by network calls, bits a sample: predicted from L_t for the planned
    and the even split over the stages, and exact on 32 test windows, in random orders and in halves
    (evenly)."""
    model, checkpoint = nets.load(RUNS / "fsdd" / "ckpt.pt")
    L, S, D = planner.smooth(checkpoint["L"], checkpoint["counts"]), model.S, model.D
    x = train.some(digits().chunks("test"), 32).long()
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
