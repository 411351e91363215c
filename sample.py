"""Sampling in any order under any budget of network calls, and filling in blanks (Algorithm 1).

    python sample.py --n 2 --calls 64                      the newest run in out/, or English
    python sample.py --n 1 --length 1000                   window after window
    python sample.py --prompt "the ____ of" --frames       underscores are the blanks
    python sample.py --ckpt out/glyphs/ckpt.pt --inpaint top              test images from their top
    python sample.py --ckpt out/tones/ckpt.pt --inpaint ends              test sounds: the middle

It writes samples.txt and frames.txt, or samples.png, frames.png, inpaint.png and process.png, which
moves, beside the checkpoint; of audio also samples.wav, one sound after the other.
"""
import argparse
import io
import math
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
import nets
import planner
from ardm import drawing, known_first

COMPLETIONS = 4                      # of each image or sound that is filled in
FRAMED = 64                          # samples whose frames are shown: more would be no picture
AUDIO_CALLS = 64


def read_prompt(prompt, K, length=None):
    r"""A prompt, made `length` long by blanks -> x and known, (n,): _ is a blank, \_ an underscore.
    """
    stream, known = b"", []
    for part in re.split(r"(\\_|_)", prompt):
        content = b" " if part == "_" else os.fsencode(part.replace("\\_", "_"))
        stream += content
        known += [part != "_"] * len(content)
    more = length - len(known) if length else 0
    if more < 0:
        raise ValueError(f"--length {length}: the prompt alone has {len(known)}")
    known += [False] * more
    if all(known):
        raise ValueError("the prompt has no blank: write _ for each character to be filled in, or "
                         "go on by --length")
    x = datasets.to_symbols(stream + b" " * more, K)
    return torch.from_numpy(x).long(), torch.tensor(known)


def inpaint_mask(rule, settings):
    """What a rule of --inpaint says is known, (D,) bool."""
    shape = settings["shape"]
    D, at = math.prod(shape), torch.arange(shape[-1])
    halves = {"left": (at < shape[-1] // 2).expand(shape)}
    if settings["kind"] == "image":
        halves["top"] = (torch.arange(shape[1])[:, None] < shape[1] // 2).expand(shape)
    else:
        halves["ends"] = (at < D // 4) | (at >= D - D // 4)
    if rule not in halves:
        raise ValueError(f"--inpaint {rule}: choose {' or '.join(halves)}, which is what is known")
    if not halves[rule].any():
        raise ValueError(f"--inpaint {rule}: there is nothing of shape {shape} to keep")
    return halves[rule].flatten()


def read_mask(path, shape):
    """What the .npy file at path says is known, (D,) bool: (C, H, W), or (H, W) for all colours."""
    try:
        mask = np.lib.format.read_array(io.BytesIO(datasets.read(path)), allow_pickle=False)
    except Exception as error:                             # whatever a damaged header brings up
        raise ValueError(f"--mask {path} is no .npy file of an array ({error})")
    wanted = tuple(shape), tuple(shape[-2:])
    if mask.dtype != bool or mask.shape not in wanted:
        raise ValueError(f"--mask {path} holds {mask.dtype} of shape {mask.shape}, bool of shape "
                         f"{' or '.join(map(str, dict.fromkeys(wanted)))} is wanted")
    if mask.all() or not mask.any():
        raise ValueError(f"--mask {path}: True is what is known, neither nothing nor all")
    return torch.from_numpy(mask).expand(shape).flatten()


def read_pictures(n, settings, path):
    """n test images or sounds, or those of the file at path, each COMPLETIONS times: (N, D)."""
    D = math.prod(settings["shape"])
    if path:
        source = datasets.Source(path, settings)
        found = source.read(0, source.n // D * D).view(-1, D)
    else:
        data = datasets.load(settings["data"], settings["length"], settings["bits"])
        if data.digest != settings["sha256"] or list(data.shape) != list(settings["shape"]):
            raise ValueError(f"--inpaint: {data.name} is not what this model was trained on")
        found = data.chunks("test")
    if len(found) == 0:
        raise ValueError(f"{path} holds less than the model's {D} symbols")
    rows = np.arange(n) * len(found) // n                  # PyTorch 2.9 has no index into uint16
    x = torch.from_numpy(found.numpy()[rows]).long()
    return x.repeat_interleave(COMPLETIONS, dim=0)


def read_known(args, model, settings):
    """x (n, T) to begin with, and what of it is known, (T,) bool."""
    kind, D = settings["kind"], model.D
    text, given = kind in ("text", "bytes"), args.inpaint or args.mask
    for words, is_so in (
            ("--prompt is for text, --inpaint, --mask and --from for images and audio: this is a "
             f"model of {kind}", (given or args.source) if text else args.prompt is not None),
            ("--from needs --inpaint or --mask, which say what is kept of the file",
             args.source and not given),
            ("choose --inpaint or --mask", args.inpaint and args.mask),
            ("--length is for text and sound that is not given",
             args.length and (given or kind == "image"))):
        if is_so:
            raise ValueError(words)
    if given:
        known = (inpaint_mask(args.inpaint, settings) if args.inpaint else
                 read_mask(args.mask, settings["shape"]))
        return read_pictures(args.n, settings, args.source), known
    x = torch.zeros(args.length or D, dtype=torch.long)
    known = x > 0
    if args.prompt is not None:
        x, known = read_prompt(args.prompt, model.K, args.length)
    if len(x) > D:
        print(f"{len(x)} are more than the {D} that the model sees at once: window after window, "
              "each with the first blank in its middle")
    return x.expand(args.n, -1), known                     # takes no memory


def make_plan(S, L, calls, n_known, D):
    """The cheapest plan of so many network calls for what is unknown; without calls one variable
    per call, and without L an even one."""
    left = D - n_known
    if calls in (None, S * left):
        plan = planner.full_plan(S, left)
    elif L is None:
        plan = planner.uniform_plan(S, left, calls)
    else:
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


def texts(steps, model):
    """The files to write of frames of text, {name: bytes}, which are printed, too."""
    if not steps:
        return {}
    lines = [f"s = {s}  " * (model.S > 1) + f"t = {t:4d}  "
             + datasets.show(state[i], model.K, known[i].numpy())
             for i in range(len(steps[0][2])) for s, t, state, known in steps]
    print(*lines, sep="\n")
    return {"frames.txt": "\n".join(lines).encode() + b"\n"}


def windows(model, checkpoint, known, args):
    """[(slice, known in it, plan, order)] of the windows that cover what is unknown (T,): each has
    the first unknown variable in its middle, or as near to it as the ends allow."""
    found, (T,), D, shape = [], known.shape, model.D, checkpoint["settings"]["shape"]
    known, L = known.clone(), None
    if args.calls is not None and checkpoint.get("L") is not None:
        L = planner.smooth(checkpoint["L"], checkpoint.get("counts"))
    elif args.calls is not None:
        print("this checkpoint has no measured L_t: the plan is an even one")
    while not known.all():
        begin = max(0, min(int(known.int().argmin()) - D // 2, T - D))
        part = slice(begin, min(begin + D, T))
        m, order = known[part].clone(), None
        if args.order not in ("random", "confident"):
            order = planner.order(args.order, shape if len(shape) == 3 else len(m))
            order = torch.from_numpy(order)
        calls = args.calls
        if calls is not None and (T > D or calls <= model.S * len(m)):
            calls = min(calls, model.S * int((~m).sum()))  # of what is unknown
        plan = make_plan(model.S, L, calls, int(m.sum()), len(m))
        found.append((part, m, plan, order))
        known[part] = True
    if args.frames and len(found) > 1:
        raise ValueError(f"--frames shows one window: --length {D} at most")
    return found


def draw(model, x, todo, args):
    """Yields (samples, sigma) of the rows of x (n, T), batch by batch; todo: of `windows`. Every
    sample has random numbers of its own, and all batches have one size: sample i does not depend
    on --n."""
    n, device = len(x), next(model.parameters()).device
    rows = min(model.rows, max(2, 1024 // model.D) if device.type == "cpu" else 256)
    for first in range(0, n, rows):
        samples = x[torch.arange(first, first + rows).clamp(max=n - 1)].to(device)
        for part, known, plan, order in todo:
            size = model.S + model.draws, len(known)
            numbers = np.stack([
                np.random.default_rng([args.seed, part.start, i]).random(size, np.float32)
                for i in range(first, first + rows)], axis=1)            # (S + draws, rows, D)
            sigma = torch.from_numpy(numbers[:model.S].argsort(axis=-1) + 1)
            sigma = sigma if order is None else order.expand(sigma.shape)
            choose = drawing(torch.from_numpy(numbers[model.S:]).to(device), args.temperature)
            known, erase = known.to(device), ""
            if args.watch:
                choose, erase = watched(choose, model, samples[:n - first, part], known)
            with tqdm(plan, desc=f"sample {first + 1} of {n}", unit="call", leave=False,
                      disable=args.watch or None) as calls:
                if args.order == "confident":
                    samples[:, part], sigma = model.generate_surest(samples[:, part], calls, known,
                                                                    choose)
                else:
                    sigma = known_first(sigma.to(device), known)
                    samples[:, part] = model.generate(samples[:, part], calls, sigma, choose)
            print(erase, end="")                           # what follows stands in its place
        yield samples[:n - first].cpu(), sigma[:, :n - first].cpu()


def draw_all(model, x, todo, args, file):
    """All samples (n, T), and the orders of the first ones. Text goes to the open file and to the
    terminal as it comes, and no more than the first samples are kept of it: many may come."""
    kept, orders = [], []
    for batch, sigma in draw(model, x, todo, args):
        if len(orders) < FRAMED:
            orders.append(sigma)
        if file is None or len(kept) < FRAMED:
            kept.append(batch.to(torch.uint8 if model.K <= 256 else torch.int32))
        if file is not None:
            file.write(b"".join(datasets.to_bytes(row, model.K) + b"\n" for row in batch))
            if not args.frames:
                print(*(datasets.show(row, model.K) for row in batch), sep="\n")
    return torch.cat(kept), torch.cat(orders, dim=1)


def watched(choose, model, x, known):
    """`choose` that shows in a terminal how the first rows of text, x (n, D), fill in: blanks as
    dots, the newest characters bold; the terminal breaks the lines. Also what erases all that."""
    columns, lines = shutil.get_terminal_size()
    with suppress(OSError):                                # rather than what COLUMNS says
        columns, lines = os.get_terminal_size(1)
    height = -(-x.shape[1] // max(1, columns))             # no byte takes more than a column
    n = min(len(x), (lines - 1) // height)
    if n < 1:                                              # the window is too small
        return choose, ""
    state, m = x[:n].clone(), known.expand(n, -1).clone()
    bold, plain = ("", "") if "NO_COLOR" in os.environ else ("\x1b[1m", "\x1b[0m")
    print("\n" * n * height + f"\x1b[{n * height}A\x1b7", end="")       # makes room, and notes it

    def show(log_p, where, s):
        chosen = choose(log_p, where, s)
        a, new = torch.zeros_like(where, dtype=torch.long), where[:n]
        a[where] = chosen
        state.copy_(torch.where(new, model.refine(state, a[:n], s), state))
        m.logical_or_(new & (s == model.S))                # earlier stages know a part of it
        text = "\n".join("".join(f"{bold}{char}{plain}" if is_new else char
                                 for char, is_new in characters(*row, model.K))
                         for row in zip(state, m, new))
        print(f"\x1b8\x1b[J{text}", end="", flush=True)
        time.sleep(0.05)
        return chosen

    return show, "\x1b8\x1b[J"


def characters(x, known, new, K):
    """Yields (character, whether it is new) of text x (D,), a dot where a byte of it is missing."""
    stream, i = np.frombuffer(datasets.to_bytes(x.cpu(), K), np.uint8), 0
    stream = np.where(known.cpu(), stream, 0xFF).astype(np.uint8)        # no byte of UTF-8
    for char in stream.tobytes().decode("utf-8", "surrogateescape"):
        n = len(char.encode("utf-8", "surrogateescape"))
        if "\udc80" <= char <= "\udcff":                   # a byte that makes no character
            char = "\u00b7"
        yield char if char.isprintable() else " ", bool(new[i:i + n].any())
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
    if not known.any():
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
    waves = datasets.waveforms(x.numpy().astype(int) - half, known.expand(x.shape).numpy())
    name = "inpaint" if known.any() else "samples"
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
    add("--ckpt", help="a checkpoint of train.py (default: the newest in out/*/, or "
        "results/english.pt)")
    add("--n", type=int, default=8, help="how many samples (default 8)")
    add("--length", type=int, help="of text or audio, if not the model's own: what is longer is "
        "drawn window by window, each with the first blank in its middle")
    add("--calls", type=int, help="network calls (default: one for each unknown variable; of audio "
        f"{AUDIO_CALLS}) for each window; no more than it has unknown")
    add("--order", default="random", help="random: a new order for each sample (default); forward, "
        "backward, random:SEED, spaced:G, halves; or confident: first what the network is surest "
        "of, which is no longer the model's distribution")
    add("--watch", action=argparse.BooleanOptionalAction, help="show how text fills in (default: "
        "in a terminal)")
    add("--prompt", help="text to keep, with _ for each blank (in a model of bytes for each byte), "
        "\\_ for an underscore")
    add("--inpaint", metavar="top|left|ends", help="keep this part of n test images (top, left) or "
        f"sounds (left, ends) and fill in the other, {COMPLETIONS} times each")
    add("--mask", metavar="FILE", help="likewise what is True in this .npy of bool: (H, W), (C, H, "
        "W), or of audio (D,)")
    add("--from", metavar="FILE", dest="source", help="with these: of this file's instead")
    add("--temperature", type=float, default=1.0, help="below 1: likelier and less varied; 0: the "
        "most probable (default 1)")
    add("--frames", action="store_true", help="also show what is known at up to 12 points of the "
        "process, _ or grey for the rest")
    add("--seed", type=int, default=0, help="seed of every draw (default 0)")
    add("--device", help="cuda, mps or cpu")
    add("--out", help="folder for the files (default: the checkpoint's; of English out/english)")
    args = parser.parse_args()
    if not all(1 <= n <= 10 ** 7 for n in (args.n, args.length) if n is not None):
        raise ValueError("--n and --length must be 1 to 10,000,000")
    if not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 1 << 63:
        raise ValueError("--temperature must be 0 or more, --seed 0 to 2^63 - 1")
    return args


def main():
    """Samples, blanks, completions and frames."""
    args = parse()
    path = args.ckpt or max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime,
                            default=nets.ENGLISH)          # of the newest run, or English
    if args.ckpt is None:
        print(f"by {path}")
    model, checkpoint = nets.load(path, args.device)
    settings = checkpoint["settings"]
    image, audio = settings["kind"] == "image", settings["kind"] == "audio"
    text = not image and not audio
    x, known = read_known(args, model, settings)
    if args.watch is None:
        args.watch = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    args.watch &= text and not args.frames
    if audio and args.calls is None:
        args.calls = min(AUDIO_CALLS, model.S * x.shape[1])
    if args.order == "confident" and audio:
        raise ValueError("--order confident is for text and images")
    todo = windows(model, checkpoint, known, args)
    english = Path(path).resolve() == nets.ENGLISH.resolve()
    folder = Path(args.out or ("out/english" if english else Path(path).parent))
    folder.mkdir(parents=True, exist_ok=True)
    with datasets.write(folder / "samples.txt") if text else nullcontext() as file:
        drawn, sigma = draw_all(model, x, todo, args, file)
    steps = []
    if args.frames:
        steps = frames(model, drawn[:FRAMED].long(), sigma[:, :FRAMED], todo[0][2])
    if image:
        files = pictures(x, known, drawn, steps, settings)
    elif audio:
        files = sounds(known, drawn, steps, model, settings["rate"])
    else:
        files = texts(steps, model)
    for name, content in files.items():
        with datasets.write(folder / name) as file:
            file.write(content)
    names = ["samples.txt"] * text + [*files]
    print(f"{len(x)} samples, {sum(len(plan) for _, _, plan, _ in todo)} network calls; "
          f"{', '.join(names)} written to {folder}")


if __name__ == "__main__":
    datasets.run(main)
