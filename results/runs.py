"""Runs as a reader would start them; the test split is looked at once."""
import bz2
import io
import lzma
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data as datasets
import nets
import train
from results.common import (CIFAR, HERE, REAL, RUNS, result, sound_references, text8_prefix,
                            trained)


def bench_text8(args):
    """text8 (its first 6.9 million characters, the last 200,000 for the test), chunks of 250,
    bits/char; single letters have 4.1. The paper's recipe warms up for a tenth of the run."""
    for recipe in ("ours", "paper"):
        run, data = trained(f"text8-{recipe}", data=text8_prefix(), recipe=recipe, length=250,
                            batch=12, minutes=args.minutes or 10)
        yield result(f"recipe {recipe}, 4 blocks of 128", run, data)
    others = datasets.references(data.splits["test"].numpy(), data.K)
    for name in ("bz2", "xz"):
        yield dict(run=f"{name}, the whole test text", bits=others[name])


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
    run, data = trained("tones", data=datasets.load("tones"), minutes=args.minutes or 2.75)
    others = sound_references(data.splits["test"].numpy(), data.rate)
    return [result("upscale-16", run, data),
            *(dict(run=name, bits=bits) for name, bits in others.items())]


def shrink(run, path):
    """The checkpoint of a run as weights alone, in 16-bit floats."""
    _, checkpoint = nets.load(run, "cpu")
    small = {name: checkpoint[name] for name in ("settings", "L", "counts", "step", "seconds")}
    model = nets.build(checkpoint["settings"])
    small["ema"] = checkpoint["ema"] | {name: checkpoint["ema"][name].half()
                                        for name, _ in model.named_parameters()}
    file = io.BytesIO()
    torch.save(small, file)
    datasets.write(path, file.getvalue())


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
    files["a PNG picture"] = np.frombuffer(datasets.read(HERE / "glyphs.png"), np.uint8)
    files["random bytes"] = np.random.default_rng(0).integers(256, size=4_000, dtype=np.uint8)
    packers = {"bzip2 -9": bz2.compress, "xz -9": lambda x: lzma.compress(x, preset=9)}
    yield {"file": f"the whole, bound of Eq. 2, after {checkpoint['step']:,} steps in "
           f"{checkpoint['seconds'] / 60:.0f} minutes",
           "bytes": len(text), "ours": found["bits"], "stderr": found["stderr"]} | {
        name: 8 * len(pack(text.tobytes())) / len(text) for name, pack in packers.items()}
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
