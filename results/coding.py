"""Archives, beside other packers and on other machines."""
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import torch

import data as datasets
import nets
import planner
import train
from ardm import bits_per_dim
from results.audio import digits
from results.common import (CIFAR, REAL, RUNS, codec_of, round_trip, sound_references, text8_prefix)


def archives(text, model, checkpoint, budgets, block):
    """Rows of a text, coded in so many network calls: `spaced`, an even plan, like compress.py."""
    path, D = RUNS / "text.txt", model.D
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_bytes(datasets.to_bytes(text, model.K))
    for calls in budgets:
        order = f"spaced:{-(-D // calls)}"
        plan = planner.uniform_plan(1, D, calls)
        codec = codec_of(model, checkpoint["settings"], order, plan, block)
        n, bits, archive, encode, decode = round_trip(path, model, codec, checkpoint["settings"])
        yield {"": f"{calls} calls, {order}", "exact nll": bits / n,
               "archive": 8 * len(archive) / n, "encode with its proof, s/KB": 1024 * encode / n,
               "decode, s/KB": 1024 * decode / n}


def bench_compress(args):
    """The first 20,000 characters of the test text of text8 against network calls: bits/char of the
    archive, beside the exact nll and general packers, and seconds a kilobyte of this machine."""
    text = text8_prefix().splits["test"][:20000]
    yield from archives(text, *nets.load(RUNS / "text8-ours" / "ckpt.pt"), (16, 32, 63, 125), 65)
    others, content = datasets.references(text.numpy(), 27), datasets.to_bytes(text, 27)
    for command in ("zstd -19 -c", "brotli -c"):           # where they are installed
        if shutil.which(command.split()[0]):
            done = subprocess.run(command.split(), input=content, capture_output=True)
            others[command.removesuffix(" -c")] = 8 * len(done.stdout) / len(text)
    yield from ({"": name, "archive": bits} for name, bits in others.items())


def bench_kilobyte(args):
    """What network calls buy in an archive: the model of English, the first 8 KB of its validation
    text, D/32, D/16, D/8 and D/4 calls. Bits a byte, and seconds a kilobyte of this machine."""
    model, checkpoint = nets.load(nets.ENGLISH)
    text = datasets.load(str(REAL / "prose" / "english.zip"), model.D).splits["valid"][:8192]
    return archives(text, model, checkpoint, [model.D // n for n in (32, 16, 8, 4)], 64)


def bench_single(args):
    """Single images (the paper's Table 3), the models of section cifar10: the first 100 test
    images, each a block of its own, coded in a random order by the best plan of so many network
    calls, bits/dim; ten of them are decoded, and priced by exact nll alone, last with one variable
    a call. (In the paper, with 500 and 100 calls: OA-ARDM 2.73, 2.75; Upscale-4 2.71, 2.76. Others:
    section packers.)"""
    x = datasets.load(str(CIFAR)).chunks("test")[:100]
    for name in ("order-agnostic", "upscale-4"):
        model, checkpoint = nets.load(RUNS / f"cifar10-{name}" / "ckpt.pt")
        L, D = planner.smooth(checkpoint["L"], checkpoint["counts"]), model.D
        for calls in (20, 50, 100):
            plan = planner.plan(L, calls)
            codec = codec_of(model, checkpoint["settings"], "random:1", plan, 1)
            blocks, bits = zip(*(codec.encode(row[None].numpy(), i) for i, row in enumerate(x)))
            for i in range(10):
                assert np.array_equal(codec.decode(blocks[i], 1, D, i), x[i:i + 1])
            yield dict(model=name, calls=calls, images=100, exact=sum(bits) / x.numel(),
                       archive=8 * len(b"".join(blocks)) / x.numel())
        sigma = torch.from_numpy(planner.order("random:1", (3, 32, 32))).expand(10, -1)
        for calls in (100, 500, L.size):
            nats = model.nll(x[:10].long(), planner.plan(L, calls), sigma)
            yield dict(model=name, calls=calls, images=10,
                       exact=bits_per_dim(nats, D).mean().item())


def bench_packers(args):
    """What other programs need, bits per dimension. PNG and WebP (by Pillow) and JPEG XL (cjxl -e
    9): each image by itself. bz2, xz, FLAC and WavPack: the chunks or windows as one file. The
    first two rows are for README.md, the others for the charts of index.html, on the same items as
    the models in them."""
    for name, path, count in (("mnist", "mnist", 100), ("cifar10", str(CIFAR), 16)):
        data = datasets.load(path)
        images = data.chunks("test")
        yield dict(data=name, items="the first 1,000 test images") | packed_images(
            images[:1000], data)
        yield dict(data=name, items=f"{count} test images, evenly spread") | packed_images(
            train.some(images, count), data)
    letters = train.some(text8_prefix().chunks("test"), 200).numpy().flatten()
    others = datasets.references(letters, 27)
    yield dict(data="text8", items="200 chunks of 250 letters, evenly spread",
               bz2=others["bz2"], xz=others["xz"])
    data = digits()
    others = sound_references(train.some(data.chunks("valid"), 32).numpy().flatten(), data.rate)
    yield dict(data="fsdd", items="32 validation windows of 2,048 samples, evenly spread") | {
        name: others[name] for name in ("FLAC -8", "WavPack -hhx6", "xz") if name in others}


def packed_images(x, data):
    """{program: bits/dim} of images x (N, D), each by itself."""
    from PIL import Image
    images, bits, file = datasets.to_pictures(x, data.shape), {}, RUNS / "image.png"
    for kind, how in (("PNG", dict(optimize=True)), ("WebP", dict(lossless=True, method=6))):
        content = io.BytesIO()
        for image in images:
            Image.fromarray(image.squeeze()).save(content, kind, **how)
        bits[kind] = 8 * content.tell() / images.size
    if shutil.which("cjxl"):
        total, out = 0, RUNS / "image.jxl"
        RUNS.mkdir(parents=True, exist_ok=True)
        for image in images:
            Image.fromarray(image.squeeze()).save(file)
            subprocess.run(["cjxl", file, out, "-d", "0", "-e", "9", "--quiet"], check=True,
                           capture_output=True)
            total += out.stat().st_size
        bits["JPEG XL"] = 8 * total / images.size
    return bits


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
