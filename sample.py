"""Sampling in any order under any budget of network calls, and filling in blanks (Algorithm 1).

    python sample.py --ckpt out/pydoc/ckpt.pt --n 8 --calls 20
    python sample.py --ckpt out/pydoc/ckpt.pt --calls 20 --frames         the process, step by step
    python sample.py --ckpt out/pydoc/ckpt.pt --prompt "the ____ of"      underscores are the blanks
    python sample.py --ckpt out/glyphs/ckpt.pt --inpaint top              test images from their top
    python sample.py --ckpt out/tones/ckpt.pt --inpaint ends              test sounds: the middle

It writes samples.txt and frames.txt, or samples.png, frames.png, inpaint.png and process.png, which
moves, beside the checkpoint; of audio also samples.wav, one sound after the other.
"""
import argparse
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
import nets
import planner
from ardm import drawing, known_first

COMPLETIONS = 4                      # of each image or sound that is filled in
AUDIO_CALLS = 64


def read_prompt(prompt, model):
    r"""A prompt -> x and known, (n,): _ is a blank, \_ an underscore."""
    stream, known = b"", []
    for part in re.split(r"(\\_|_)", prompt):
        content = b" " if part == "_" else os.fsencode(part.replace("\\_", "_"))
        stream += content
        known += [part != "_"] * len(content)
    if len(stream) > model.D:
        typed = len(prompt.replace("\\_", "_"))
        also = f" ({len(stream)} bytes)" if typed != len(stream) else ""
        raise ValueError(f"the prompt has {typed} characters{also}, the model takes {model.D}")
    if all(known):
        raise ValueError("the prompt has no blank: write _ for each character to be filled in")
    return torch.from_numpy(datasets.to_symbols(stream, model.K)).long(), torch.tensor(known)


def read_inpaint(rule, n, settings, path):
    """--inpaint -> x (n * COMPLETIONS, D), n test images or sounds (or those of the file at path),
    and what is known of them, (D,)."""
    shape = settings["shape"]
    D, at = math.prod(shape), torch.arange(shape[-1])
    halves = {"left": (at < shape[-1] // 2).expand(shape)}
    if settings["kind"] == "image":
        halves["top"] = (torch.arange(shape[1])[:, None] < shape[1] // 2).expand(shape)
    else:
        halves["ends"] = (at < D // 4) | (at >= D - D // 4)
    if rule not in halves:
        raise ValueError(f"--inpaint {rule}: choose {' or '.join(halves)}, which is what is known")
    if path:
        source = datasets.Source(path, settings)
        found = source.read(0, source.n // D * D).view(-1, D)
    else:
        data = datasets.load(settings["data"], settings["length"], settings["bits"])
        if data.digest != settings.get("sha256", data.digest) or list(data.shape) != list(shape):
            raise ValueError(f"--inpaint: {data.name} is not what this model was trained on")
        found = data.chunks("test")
    if len(found) == 0:
        raise ValueError(f"{path} holds less than the model's {D} symbols")
    x = found[torch.arange(n) * len(found) // n].long()
    return x.repeat_interleave(COMPLETIONS, dim=0), halves[rule].flatten()


def read_known(args, model, settings):
    """x (n, D) to begin with, and what of it is known: (D,), or None for nothing."""
    text = settings["kind"] not in ("image", "audio")
    if args.prompt is not None and not text or (args.inpaint or args.source) and text:
        raise ValueError("--prompt is for text, --inpaint and --from for images and audio: this is "
                         f"a model of {settings['kind']}")
    if args.source and not args.inpaint:
        raise ValueError("--from needs --inpaint, which says what is kept of the file")
    if args.inpaint:
        return read_inpaint(args.inpaint, args.n, settings, args.source)
    x, known = torch.zeros(1, model.D, dtype=torch.long), None
    if args.prompt is not None:
        x, known = read_prompt(args.prompt, model)
    return x.expand(args.n, -1), known                     # takes no memory


def make_plan(model, checkpoint, calls, n_known, D):
    """The cheapest plan of so many network calls for what is unknown; without calls one variable
    per call, and without a measured L_t an even one."""
    S, left = model.S, D - n_known
    if calls is None:
        plan = planner.full_plan(S, left)
    elif checkpoint.get("L") is None:
        print("this checkpoint has no measured L_t: the plan is an even one")
        plan = planner.uniform_plan(S, left, calls)
    else:
        L = planner.smooth(checkpoint["L"], checkpoint["counts"])
        plan = planner.plan(L[:, n_known:D], calls)
    return [(s, t + n_known, k) for s, t, k in plan]


def frames(model, x, sigma, plan, most=12):
    """[(s, t, state (B, D), known (B, D))]: the process that led to x, at up to `most` points.

    x and sigma tell all that went before: at step t of stage s, x^(s) is known where sigma < t.
    """
    points = [plan[0][:2]] + [(s, t + k) for s, t, k in plan]
    n = min(most, len(points))
    shown = [points[i * (len(points) - 1) // (n - 1)] for i in range(n)]
    return [(s, t, model.net_input(x, sigma[s - 1] < t, s), sigma[s - 1] < t) for s, t in shown]


def texts(x, steps, model):
    """Prints samples of text, or the frames; returns the lines."""
    lines = [datasets.show(row, model.K) for row in x]
    if steps:
        lines = [(f"s = {s}  " if model.S > 1 else "") + f"t = {t:4d}  "
                 + datasets.show(state[i], model.K, known[i].numpy())
                 for i in range(len(x)) for s, t, state, known in steps]
    print(*lines, sep="\n")
    return lines


def draw(model, x, known, plan, order, args):
    """Yields (samples, sigma) of the rows of x (n, D), batch by batch. Every sample has random
    numbers of its own, and all batches have one size: sample i does not depend on --n."""
    (n, D), S, device = x.shape, model.S, next(model.parameters()).device
    rows = min(model.rows, 16 if device.type == "cpu" else 256)
    known = torch.zeros(D) > 0 if known is None else known
    known = known.to(device)
    for first in range(0, n, rows):
        size = S + model.draws, D
        numbers = np.stack([np.random.default_rng([args.seed, i]).random(size, np.float32)
                            for i in range(first, first + rows)], axis=1)
        u = torch.from_numpy(numbers[S:]).to(device)       # (draws, rows, D)
        sigma = torch.from_numpy(numbers[:S].argsort(axis=-1) + 1) if order is None else order
        sigma = known_first(sigma.to(device).expand(S, rows, D), known)
        batch = x[torch.arange(first, first + rows).clamp(max=n - 1)].to(device)
        choose, shown = drawing(u, args.temperature), min(rows, n - first)
        if args.watch:
            shown = max(1, min(shown, shutil.get_terminal_size().lines - 2))
            choose = watched(choose, model, batch[:shown], known)
        with tqdm(plan, desc=f"sample {first + 1} of {n}", unit="call", leave=False,
                  disable=args.watch or None) as calls:
            if args.order == "confident":
                batch, sigma = model.generate_surest(batch, calls, known, choose)
            else:
                batch = model.generate(batch, calls, sigma, choose)
        if args.watch:
            print(f"\x1b[{shown}A\x1b[J", end="")          # what follows stands in its place
        yield batch[:n - first].cpu(), sigma[:, :n - first].cpu()


def watched(choose, model, x, known):
    """`choose` that shows in a terminal how the first rows of text, x (n, D), fill in: blanks as
    dots, the newest characters bold. A line ends at the edge of the window."""
    n, state, m = len(x), x.clone(), known.expand(x.shape).clone()
    print("\n" * (n - 1))

    def show(log_p, where, s):
        chosen = choose(log_p, where, s)
        a, new = torch.zeros_like(where, dtype=torch.long), where[:n]
        a[where] = chosen
        state.copy_(torch.where(new, model.refine(state, a[:n], s), state))
        m.logical_or_(new & (s == model.S))                # earlier stages know a part of it
        lines = [line(characters(*row, model.K)) for row in zip(state, m, new)]
        print(f"\x1b[{n}A" + "".join(f"\x1b[2K{text}\n" for text in lines), end="", flush=True)
        time.sleep(0.05)
        return chosen

    return show


def line(parts):
    """(character, whether it is new) each -> a line no wider than the window, the new ones bold."""
    bold, plain = ("", "") if "NO_COLOR" in os.environ else ("\x1b[1m", "\x1b[0m")
    text, room = "", shutil.get_terminal_size().columns - 1
    for part, is_new in parts:
        room -= 2 if unicodedata.east_asian_width(part) in "WF" else 1
        if room >= 0:
            text += f"{bold}{part}{plain}" if is_new else part
    return text


def characters(x, known, new, K):
    """Yields (character, whether it is new) of text x (D,), a dot where a byte of it is missing."""
    stream, i = datasets.to_bytes(x.cpu(), K), 0
    while i < len(stream):
        n, text = 1, "\u00b7"
        for end in range(i + 1, i + 5):
            with suppress(UnicodeDecodeError):
                if known[i:end].all():
                    n, text = end - i, stream[i:end].decode()
                    break
        yield text if text.isprintable() else " ", bool(new[i:i + n].any())
        i += n


def pictures(given, known, x, steps, settings):
    """The files to write of images, {name: bytes}. Samples: a grid. Completions: a row for each,
    with what was known of it, grey elsewhere. Frames: a row for each sample, and the same as a
    film."""
    def images(x, known=torch.tensor(True)):
        seen = datasets.to_images(known.expand(x.shape), settings["shape"], 2)
        return np.where(seen, datasets.to_images(x, settings["shape"], settings["K"]), 128)

    def side_by_side(columns):
        rows = np.stack(columns, axis=1)                   # (N, columns, H, W, C)
        return datasets.grid(rows.reshape(-1, *rows.shape[2:]), len(columns))

    files, across = {}, min(8, len(x))
    if known is None:
        files["samples.png"] = datasets.png(datasets.grid(images(x), across))
    else:
        columns = [images(given[::COMPLETIONS]), images(given[::COMPLETIONS], known)]
        columns += [images(x[i::COMPLETIONS]) for i in range(COMPLETIONS)]
        files["inpaint.png"] = datasets.png(side_by_side(columns))
    if steps:
        films = [images(state, m | (s > 1)) for s, t, state, m in steps]
        files["frames.png"] = datasets.png(side_by_side(films))
        files["process.png"] = datasets.png(*(datasets.grid(film, across) for film in films))
    return files


def sounds(known, x, steps, model, rate):
    """The files to write of audio, {name: bytes}: all sounds in one, after each a tenth of a
    second's silence; waveforms, with what was known in light grey; the frames of the first one."""
    half = model.K // 2
    pause = torch.full((len(x), rate // 10), half, dtype=torch.int32)
    whole = torch.cat((x.int(), pause), dim=1).flatten()
    shown = known.expand(x.shape).numpy() if known is not None else None
    waves = datasets.waveforms(x.numpy().astype(int) - half, shown)
    name = "samples" if known is None else "inpaint"
    files = {f"{name}.wav": datasets.wav(whole.numpy(), rate),
             f"{name}.png": datasets.png(datasets.grid(waves, 1))}
    if steps:
        states = []
        for s, t, state, m in steps:
            unit = torch.where(m, model.unit(s), model.unit(s - 1))      # what the digits leave
            states.append(nets.nearest_to_zero(state - half, unit)[0])
        waves = datasets.waveforms(torch.stack(states).numpy())
        files["frames.png"] = datasets.png(datasets.grid(waves, 1))
    return files


def parse():
    """The command line, checked as far as can be without the model."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint of train.py")
    add("--n", type=int, default=8, help="how many samples (default 8)")
    add("--calls", type=int, help="network calls (default: one for each unknown variable; of audio "
        f"{AUDIO_CALLS})")
    add("--order", default="random", help="random: a new order for each sample (default); forward, "
        "backward, random:SEED, spaced:G, halves; or confident: first what the network is surest "
        "of, which is no longer the model's distribution")
    add("--watch", action=argparse.BooleanOptionalAction, help="show how text fills in (default: "
        "in a terminal)")
    add("--prompt", help="text to keep, with _ for each blank (in a model of bytes for each byte), "
        "\\_ for an underscore")
    add("--inpaint", metavar="top|left|ends", help="keep this part of n test images (top, left) or "
        f"sounds (left, ends) and fill in the other, {COMPLETIONS} times each")
    add("--from", metavar="FILE", dest="source", help="with --inpaint: of this file's instead")
    add("--temperature", type=float, default=1.0, help="below 1: likelier and less varied; 0: the "
        "most probable (default 1)")
    add("--frames", action="store_true", help="also show what is known at up to 12 points of the "
        "process, _ or grey for the rest")
    add("--seed", type=int, default=0, help="seed of every draw (default 0)")
    add("--device", help="cuda, mps or cpu")
    add("--out", help="folder for the files; the default is the checkpoint's")
    args = parser.parse_args()
    if args.n < 1 or not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 1 << 63:
        raise ValueError("--n must be at least 1, --temperature 0 or more, --seed 0 to 2^63 - 1")
    return args


def main():
    """Samples, blanks, completions and frames."""
    args = parse()
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings = checkpoint["settings"]
    image, audio = settings["kind"] == "image", settings["kind"] == "audio"
    text = not image and not audio
    x, known = read_known(args, model, settings)
    n, D = x.shape
    if args.watch is None:
        args.watch = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    args.watch &= text and not args.frames
    if audio and args.calls is None:
        args.calls = AUDIO_CALLS
    order = None
    if args.order == "confident" and audio:
        raise ValueError("--order confident is for text and images")
    if args.order not in ("random", "confident"):
        order = torch.from_numpy(planner.order(args.order, settings["shape"] if image else D))
    plan = make_plan(model, checkpoint, args.calls, 0 if known is None else int(known.sum()), D)
    folder = Path(args.out or Path(args.ckpt).parent)
    folder.mkdir(parents=True, exist_ok=True)
    drawn, steps, shown = [], [], []
    for batch, sigma in draw(model, x, known, plan, order, args):
        if args.frames and (text or len(drawn) * len(batch) < 64):       # more would be no picture
            new = frames(model, batch, sigma, plan)
            steps = new if text or not steps else [
                (s, t, torch.cat((x1, x2)), torch.cat((m1, m2)))
                for (s, t, x1, m1), (_, _, x2, m2) in zip(steps, new)]
        drawn.append(batch.to(torch.int32))
        if text:
            shown += texts(batch, steps, model)
    drawn = torch.cat(drawn)
    if image:
        files = pictures(x, known, drawn, steps, settings)
    elif audio:
        files = sounds(known, drawn, steps, model, settings["rate"])
    else:
        files = {"samples.txt": b"".join(datasets.to_bytes(row, model.K) + b"\n" for row in drawn)}
    if steps and text:
        files["frames.txt"] = "\n".join(shown).encode() + b"\n"
    for name, content in files.items():
        with datasets.write(folder / name) as file:
            file.write(content)
    print(f"{n} samples, {len(plan)} network calls; {', '.join(files)} written to {folder}")


if __name__ == "__main__":
    datasets.run(main)
