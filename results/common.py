"""What the measurements share: runs, times, and the data that stands in for the whole sets."""
import contextlib
import os
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import compress
import data as datasets
import train

HERE = Path(__file__).parent
RUNS = Path("out/bench")             # what one section leaves for others
REAL = Path(os.environ.get("ARDM_DATA", "data"))
CIFAR = REAL / "cifar10" / "cifar-10-binary.partial.tar.gz"
SOUND_PACKERS = {                    # used where they are installed
    "FLAC -8": ("flac", "-8", "--no-padding", "--no-seektable", "--silent", "-c", "-"),
    "WavPack -hhx6": ("wavpack", "-hhx6", "-q", "-", "-o", "-")}


def machine():
    """The processor, its instruction set, and how many threads of it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        names or [platform.processor()])[0]
    simd, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return (f"{name}, {simd}, {threads} threads; Python {platform.python_version()}, torch "
            f"{torch.__version__}")


def trained(name=None, patches=(), data=None, **given):
    """(run, data) after a training with these settings; patches take parts of the recipe away.
    name: the checkpoint stays in that folder of RUNS."""
    silent = mock.patch.object(train, "REPORT", 10 ** 9)
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for patch in (*patches, silent):
            stack.enter_context(patch)
        c, data = train.complete(dict(size="tiny") | given, data)
        run = train.Run(c, data)
        if not train.train(run, data, Path(folder)):       # it was told to stop
            raise KeyboardInterrupt
    if name:
        run.L, run.counts = train.components(run.ema, data.chunks("valid"))
        (RUNS / name).mkdir(parents=True, exist_ok=True)
        train.save(run, RUNS / name)
    return run, data


def duration(args, steps):
    """Of a training: these steps, or --minutes."""
    return dict(minutes=args.minutes) if args.minutes else dict(steps=steps)


def median_seconds(*functions, repeats=15):
    """Of each function, timed in turns, so that a slow spell of the machine is everybody's."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):                           # the first one warms up
        for function, times in zip(functions, seconds):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times[1:]) for times in seconds]


def round_trip(path, model, codec, settings):
    """A file coded and decoded: its symbols, -log2 p, archive, seconds there (with the proof), and
    back."""
    times = [time.perf_counter()]
    archive, symbols, bits = compress.encode_file(path, model, codec, settings)
    times.append(time.perf_counter())
    _, _, at = compress.read_header(archive, "archive")
    parts = [x.reshape(-1) for _, x in compress.decode_file(archive, at, codec, len(symbols))]
    times.append(time.perf_counter())
    assert np.array_equal(np.concatenate(parts), symbols)
    return len(symbols), float(bits), archive, *np.diff(times).tolist()


def codec_of(model, settings, order, plan, block):
    """The codec of this plan [(s, t, k)]."""
    return compress.Codec(model, settings, order, by_stage(plan, model.S), block)


def by_stage(plan, S):
    """The k of each call of a plan, a list for every stage."""
    return [[k for stage, _, k in plan if stage == s] for s in range(1, S + 1)]


def result(name, run, chunks, passes=None):
    found = train.bound(run.ema, chunks, passes)
    return dict(run=name, bits=found["bits"], stderr=found["stderr"], steps=run.step,
                weights=sum(p.numel() for p in run.model.parameters()), minutes=run.seconds / 60)


def sound_references(samples, rate):
    """{name: bits a sample} of others on samples (n,) as one file, where they are installed."""
    file = datasets.file_of(samples, dict(kind="audio", K=datasets.AUDIO_K), [rate, 1])
    found = datasets.references(samples, datasets.AUDIO_K)
    for name, command in SOUND_PACKERS.items():
        if shutil.which(command[0]):
            done = subprocess.run(command, input=file, capture_output=True)
            found[name] = 8 * len(done.stdout) / len(samples)
    return found


def text8_prefix(length=250, device="cpu"):
    """The first 6,877,825 characters of text8, the last 200,000 of them for the test."""
    data = datasets.load(str(REAL / "text8" / "text8_prefix.zip"), length, device=device)
    stream = torch.cat(list(data.splits.values()))[:6_877_825]
    data.splits = dict(train=stream[:-220_000], valid=stream[-220_000:-200_000],
                       test=stream[-200_000:])
    return data
