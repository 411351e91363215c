"""Seconds: of the planner, the coder, a training step; of one CUDA GPU."""
import multiprocessing
import statistics
import time

import numpy as np
import torch
from torch.utils import flop_counter

import coder
import data as datasets
import planner
import train
from results.common import CIFAR, median_seconds


def bench_planner(args):
    """Seconds of the cheapest plan."""
    for S, D, calls in ((1, 250, 20), (1, 3072, 50), (1, 16000, 50), (8, 16000, 400)):
        L = np.sort(np.random.default_rng(0).random((S, D)), axis=1)[:, ::-1]
        seconds, = median_seconds(lambda: planner.plan(L, calls), repeats=5)
        yield dict(stages=S, D=D, calls=calls, seconds=seconds)


def bench_coder(args):
    """Million symbols a second of the coder alone, from log-probabilities to bytes and back."""
    for K in (4, 27, 256):
        logits = 2 * np.random.default_rng(0).normal(size=(1024, K))
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        symbols = np.random.default_rng(1).integers(K, size=1024)

        def encode():
            return coder.encode(*coder.intervals(coder.quantize(log_p), symbols))

        encoded = encode()
        there, back = median_seconds(
            encode, lambda: coder.Decoder(encoded).pop(coder.quantize(log_p)), repeats=500)
        yield {"K": K, "encode": 1024e-6 / there, "decode": 1024e-6 / back}


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
            run = train.Run(*train.complete(given | dict(size="tiny", recipe=recipe, steps=1),
                                            data))
            x = data.batch(given["batch"])
            seconds, = median_seconds(lambda: train.train_step(run, x).item(), repeats=7)
            yield {"training step": name, "recipe": recipe, "seconds": seconds,
                   "datapoints a second": given["batch"] / seconds}


def gpu_data(words, device):
    """Data of the size that `gpu` measures, for what it is called."""
    if "text" in words:
        return datasets.load("pydoc", 250, device=device)
    if "audio" in words:
        return datasets.load("tones", 16000 if "paper" in words else None, device=device)
    noise = np.random.default_rng(0).integers(256, size=(600, 3, 32, 32), dtype=np.uint8)
    data = datasets.images("noise", noise[:500], noise[500:])
    data.splits = {split: part.to(device) for split, part in data.splits.items()}
    return data


def step_of(work):
    """A row of `gpu`: one size, compiled beside the others, but measured alone."""
    words, device, all_compiled, lock, most = work
    data, size = gpu_data(words, device), words.split(", ")[1]
    given = dict(recipe="paper", branch=0) if size == "paper" else dict(
        branch=4) if "upscale" in words else {}
    if words in ("text, paper", "audio, paper"):           # as all are in memory at once
        given["parts"] = 4
    run = train.Run(*train.complete(given | dict(size=size, device=device, steps=10 ** 9), data))
    weights, x = sum(p.numel() for p in run.model.parameters()), data.batch(2)
    with flop_counter.FlopCounterMode(display=False) as counter:
        run.model.loss(x).sum().backward()
    operations = counter.get_total_flops() / 2 * run.c["batch"]

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
    return dict(step=words, weights=weights, batch=run.c["batch"], parts=run.c["parts"],
                first_step=first, milliseconds=1000 * seconds,
                datapoints_a_second=round(run.c["batch"] / seconds),
                variables_a_second=round(run.c["batch"] * data.D / seconds),
                of_the_product=operations / seconds / most, busy=busy / seconds,
                gigabytes=torch.cuda.max_memory_allocated() / 1e9)


def bench_gpu(args):
    """A training step of every size on one CUDA GPU: seconds of the first one, which compiles;
    milliseconds of the others; the part of the card's own bfloat16 matrix product (8,192 x 8,192)
    that the counted operations of forward and backward reach, and the part of the time in which the
    GPU is busy. The second table is of runs of `python train.py --data DATA --minutes 2` and their
    archives. The paper's datapoint of audio has 16,000 samples, those of our sizes 2,048."""
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
