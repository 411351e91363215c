"""Runs as a reader would start them; the test split is looked at once."""
import bz2
import io
import lzma

import numpy as np
import torch

import data as datasets
import nets
import planner
import train
from results.common import (CIFAR, HERE, REAL, RUNS, codec_of, duration, result, round_trip,
                            text8_prefix, trained)


def bench_text8(args):
    """text8 (its first 6.9 million characters, the last 200,000 for the test), chunks of 250,
    bits/char; single letters have 4.1. The paper's recipe warms up for a tenth of the run."""
    for recipe, steps in (("ours", 11_500), ("paper", 13_300)):          # 10 minutes with bfloat16
        run, data = trained(f"text8-{recipe}", data=text8_prefix(), recipe=recipe, length=250,
                            batch=12, **duration(args, steps))
        yield result(f"recipe {recipe}, 4 blocks of 128", run, data.chunks("test"))
    others = datasets.references(data.splits["test"].numpy(), data.K)
    for name in ("bz2", "xz"):
        yield dict(run=f"{name}, the whole test text", bits=others[name])


def bench_mnist(args):
    """MNIST, bits/dim of its test images."""
    run, data = trained("mnist", data=datasets.load("mnist"), **duration(args, 2560))
    return [result("order-agnostic", run, data.chunks("test"))]


def bench_cifar10(args):
    """CIFAR-10 (20,000 training images, 1,017 test images), bits/dim."""
    for name, branch, steps in (("order-agnostic", 0, 11_200), ("upscale-4", 4, 17_800),
                                ("upscale-2", 2, 20_200)):               # 20 minutes with bfloat16
        run, data = trained(f"cifar10-{name}", data=datasets.load(str(CIFAR)), branch=branch,
                            **duration(args, steps))
        yield result(name, run, data.chunks("test"))


def bench_glyphs(args):
    """The pictures of digits that are drawn here, bits/dim of the test images."""
    run, data = trained("glyphs", data=datasets.load("glyphs"), **duration(args, 700))
    return [result("order-agnostic", run, data.chunks("test"))]


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
    settings, D, path = checkpoint["settings"], model.D, RUNS / "file"
    codec = codec_of(model, settings, "spaced:8", planner.uniform_plan(1, D, D // 8), 64)
    for name, content in files.items():
        RUNS.mkdir(parents=True, exist_ok=True)
        content.tofile(path)
        n, _, archive, encode, decode = round_trip(path, model, codec, settings)
        yield {"file": name, "bytes": n, "ours": 8 * len(archive) / n} | {
            packer: 8 * len(pack(content.tobytes())) / n for packer, pack in packers.items()} | {
            "encode with its proof, s": encode, "decode, s": decode}
