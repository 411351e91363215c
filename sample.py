"""Sampling in any order under any budget of network calls, and filling in blanks (Algorithm 1).

    python sample.py                                       the newest run in out/, or English
    python sample.py --n 1 --length 1000                   window after window
    python sample.py --prompt "the ____ of" --frames       underscores are the blanks
    python sample.py --ckpt out/glyphs/ckpt.pt --inpaint top              test images from their top

It writes samples, completions (inpaint) and frames beside the checkpoint: .txt, .png or .wav.
"""
import io
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
import nets
import planner
from ardm import draw, known_first, sample_sigma

CALLS = {"text": 64, "image": 100, "audio": 64}            # at most, by default
COMPLETIONS = 4                      # of each image or sound that is filled in
FRAMES = 12                          # at most, of a process
FRAMED = 64                          # samples in a picture of frames, at most
PAUSE = 0.05                         # seconds between the frames of a text in the terminal


# -- What is known beforehand ----------------------------------------------------------------------

def read_prompt(prompt, K, length=None):
    r"""A prompt, made `length` long -> x and known, (n,): _ is a blank, \_ is an underscore."""
    stream, known = b"", []
    for piece in re.split(r"(\\_|_)", prompt):
        content = b" " if piece == "_" else os.fsencode(piece.replace("\\_", "_"))
        stream += content
        known += [piece != "_"] * len(content)
    more = length - len(known) if length else 0
    if more < 0:
        raise ValueError(f"--length {length}: the prompt alone has {len(known)}")
    known += [False] * more
    if all(known):
        raise ValueError("the prompt has no blank: write _ for each, or make it longer by --length")
    x = datasets.to_symbols(stream + b" " * more, K)
    return torch.from_numpy(x).long(), torch.tensor(known)


def inpaint_mask(rule, kind, shape):
    """The mask (D,) bool that a rule of --inpaint, or a .npy file of bool, stands for."""
    at = torch.arange(shape[-1])
    rules = {"left": at < shape[-1] // 2}
    if kind == "image":
        rules["top"] = (torch.arange(shape[1])[:, None] < shape[1] // 2).expand(shape[1:])
    else:
        rules["ends"] = (at < shape[0] // 4) | (at >= shape[0] - shape[0] // 4)
    try:
        known = rules[rule] if rule in rules else torch.from_numpy(
            np.load(io.BytesIO(datasets.read(rule))))
    except Exception:                                      # whatever a damaged header raises
        raise ValueError(f"--inpaint {rule}: choose {' or '.join(rules)}, the part to keep, or a "
                         ".npy file of bool, True where to keep")
    if rule not in rules and (known.dtype != torch.bool
                              or list(known.shape) not in (shape, shape[-2:])):
        raise ValueError(f"--inpaint {rule} holds {known.dtype} {[*known.shape]}, bool {shape} or "
                         f"{shape[-2:]} is wanted")
    if known.all() or not known.any():
        raise ValueError(f"--inpaint {rule}: of {shape}, some must be known and some unknown")
    return known.expand(*shape).flatten()


def read_pieces(args, settings):
    """args.n datapoints of --from, or of the test piece, each COMPLETIONS times: (N, D)."""
    D = math.prod(settings["shape"])
    path = args.source or Path(args.ckpt).parent / datasets.PIECES[settings["kind"]]
    symbols, found = datasets.open_symbols(path, settings)
    settings["rate"] = found.rate                          # what is written has it, too
    if len(symbols) < D:
        raise ValueError(f"{path} holds less than the model's {D} symbols")
    pieces = symbols[:len(symbols) // D * D].reshape(-1, D)
    x = pieces[np.arange(args.n) * len(pieces) // args.n].astype(np.int64)
    return torch.from_numpy(x).repeat_interleave(COMPLETIONS, dim=0)


def read_known(args, model, settings):
    """x (rows, T) to start from, T variables long, and which of them are known, (T,) bool."""
    kind, D = settings["kind"], model.D
    if kind != "text" and args.prompt is not None:
        raise ValueError("--prompt is for text")
    if kind == "text" and (args.inpaint or args.source) or args.source and not args.inpaint:
        raise ValueError("--inpaint and --from are for images and audio; --from needs --inpaint")
    if args.length and (args.inpaint or kind == "image"):
        raise ValueError("--length is for text, and for sound without --inpaint")
    if args.inpaint:
        return read_pieces(args, settings), inpaint_mask(args.inpaint, kind, settings["shape"])
    x = torch.zeros(args.length or D, dtype=torch.long)
    known = torch.zeros_like(x, dtype=torch.bool)
    if args.prompt is not None:
        x, known = read_prompt(args.prompt, model.K, args.length)
    return x.expand(args.n, -1), known                     # takes no memory


# -- Sampling --------------------------------------------------------------------------------------

def windows(model, checkpoint, known, args):
    """[(slice, known in it, plan)] of the windows that cover what is unknown (T,). Each has the
    first unknown variable in its middle, or as near to it as the ends allow."""
    result, (T,), S, D = [], known.shape, model.S, model.D
    known, L = known.clone(), checkpoint.get("L")
    L = L if L is None else planner.smooth(L, checkpoint.get("counts"))
    while not known.all():
        begin = max(0, min(int(known.int().argmin()) - D // 2, T - D))
        window = slice(begin, min(begin + D, T))
        first, last = int(known[window].sum()), len(known[window])
        most = S * (last - first)
        calls = args.calls or min(max(S, CALLS[checkpoint["settings"]["kind"]]), most)
        if T > D:                                          # no window takes more than it can
            calls = min(calls, most)
        plan = planner.uniform_plan(S, last - first, calls)
        if L is not None and args.order == "random" and calls < most:
            share = np.arange(first, last) * D // last     # t - 1 where the same part of D is known
            plan = planner.plan(L[:, share], calls)
        plan = [(s, t + first, k) for s, t, k in plan]
        result.append((window, known[window].clone(), plan))
        known[window] = True
    return result


def draw_rows(model, x, todo, args, settings, generator):
    """Samples (B, T) that keep what is known of x (B, T), and the orders of the last window."""
    x, calls = x.clone(), sum(len(plan) for _, _, plan in todo)
    bar = tqdm(total=calls, unit="call", leave=False, disable=None)

    def choose(log_p, where, s):
        bar.update()
        return draw(log_p, args.temperature, generator)

    for window, known, plan in todo:
        sigma = sample_sigma(model.S * len(x), len(known), x.device, generator)
        sigma = sigma.view(model.S, len(x), -1)
        if args.order != "random":
            shape = settings["shape"] if len(settings["shape"]) == 3 else len(known)
            sigma = torch.from_numpy(planner.order(args.order, shape)).to(x.device).expand_as(sigma)
        sigma = known_first(sigma, known.to(x.device))
        x[:, window] = model.generate(x[:, window], plan, sigma, choose)
    bar.close()
    return x, sigma


def frames(model, x, sigma, plan):
    """The process that led to x (n, D), at up to FRAMES points: states (n, frames, D), the mask m
    of each, and its stage s (frames, 1)."""
    points = [plan[0][:2]] + [(s, t + k) for s, t, k in plan]
    shown = np.linspace(0, len(points) - 1, min(FRAMES, len(points))).astype(int)
    points = [points[i] for i in shown]
    m = torch.stack([sigma[s - 1] < t for s, t in points], dim=1)
    states = [model.net_input(x, m[:, i], s) for i, (s, _) in enumerate(points)]
    return torch.stack(states, dim=1), m, torch.tensor([[s] for s, _ in points])


# -- Skip on a first reading: pictures, the terminal, the command ----------------------------------

def play(model, x, sigma, plan):
    """Shows in a terminal how the text x (D,) filled in, call by call, if it fits on the screen."""
    columns, lines = shutil.get_terminal_size()
    height = -(-len(x) // columns)
    if height >= lines:
        return
    print("\n" * height, end="")
    for s, t in [(s, t + k) for s, t, k in plan]:
        known = (sigma[s - 1] < t) & (s == model.S)        # earlier stages know a part of a letter
        print(f"\x1b[{height}A\x1b[J" + datasets.show(x, model.K, known.numpy()), flush=True)
        time.sleep(PAUSE)
    print(f"\x1b[{height}A\x1b[J", end="")                 # what follows stands in its place


def show_frames(model, states, m, s, settings):
    """{name: bytes} of `frames`, a row for each sample; of sound the first sample alone. A text is
    printed, too."""
    if settings["kind"] == "audio":                        # of possible values those nearest to 0
        left = model.A ** (model.S - s + 1 - m[0].long())  # so many values are possible
        nearest = nets.nearest_to_zero(states[0] - model.K // 2, left)
        return {"frames.png": datasets.png(datasets.grid(datasets.waveforms(nearest.numpy()), 1))}
    if settings["kind"] == "image":
        m = m | (s > 1)                                    # a pixel of which something is known
    files = datasets.exhibit(states.flatten(0, 1).numpy(), settings, "frames",
                             m.flatten(0, 1).numpy(), len(s))
    if settings["kind"] == "text":
        print(files["frames.txt"].decode(), end="")
    return files


def completions(given, known, drawn, settings):
    """{name: bytes} of images that were filled in: whole, what was known, and the completions."""
    whole = given[::COMPLETIONS]
    rows = torch.stack([whole, whole, *drawn.unflatten(0, (-1, COMPLETIONS)).unbind(1)], dim=1)
    shown = torch.ones_like(rows, dtype=torch.bool)
    shown[:, 1] = known
    return datasets.exhibit(rows.flatten(0, 1).numpy(), settings, "inpaint",
                            shown.flatten(0, 1).numpy(), rows.shape[1])


def parse():
    """The command line."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", help="a checkpoint (default: the newest in out/*/, or results/english.pt)")
    add("--n", type=int, default=8, help="how many samples (default 8)")
    add("--length", type=int, help="of text or audio; longer ones are drawn window by window")
    add("--calls", type=int, help="network calls for each window (default: one for each unknown "
        f"variable, at most {CALLS['text']} for text and audio, {CALLS['image']} for images)")
    add("--order", default="random", help="random: a new order for each sample (default); forward, "
        "backward, random:SEED, spaced:G, halves")
    add("--prompt", help="text to keep, with _ for each blank (or byte), \\_ for an underscore")
    add("--inpaint", metavar="top|left|ends|FILE.npy", help="keep this part of n test images (top, "
        f"left) or sounds (left, ends), or what is True in a file; {COMPLETIONS} completions each")
    add("--from", metavar="FILE", dest="source", help="what --inpaint completes (default: the test "
        "piece beside the checkpoint)")
    add("--temperature", type=float, default=1.0, help="below 1: likelier, less varied (default 1)")
    add("--frames", action="store_true", help=f"also show what is known at {FRAMES} points")
    add("--seed", type=int, default=0, help="seed of every draw (default 0)")
    add("--device", help="cuda, mps or cpu")
    add("--out", help="folder for the files; older ones are replaced (default: the checkpoint's; "
        "of English out/english)")
    return parser.parse_args()


def main():
    """Samples, blanks, completions and frames."""
    args = parse()
    if args.ckpt is None:
        args.ckpt = max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=nets.ENGLISH)
        print(f"by {args.ckpt}")
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings, device = checkpoint["settings"], next(model.parameters()).device
    x, known = read_known(args, model, settings)
    todo = windows(model, checkpoint, known, args)
    if args.frames and len(todo) > 1:
        raise ValueError(f"--frames shows one window: --length {model.D} at most")
    english = Path(args.ckpt).name == nets.ENGLISH.name
    folder = Path(args.out or ("out/english" if english else Path(args.ckpt).parent))
    folder.mkdir(parents=True, exist_ok=True)
    datasets.write(folder / "inpaint.wav", None, [args.source or args.ckpt])     # before all work
    generator = torch.Generator(device).manual_seed(args.seed)
    most = max(k for _, _, plan in todo for _, _, k in plan)
    most = max(1, min(256, nets.LOG_PROBS // (most * model.A)))
    kind, drawn, sigmas = settings["kind"], [], []
    shown = kind == "text" and not args.frames             # the first text alone, at once
    for rows in (x[:1], *x[1:].split(most)) if shown and len(x) > 1 else x.split(most):
        samples, sigma = draw_rows(model, rows.to(device), todo, args, settings, generator)
        drawn.append(samples.cpu())
        sigmas.append(sigma.cpu())
        if shown and len(drawn) == len(todo) == 1 and sys.stdout.isatty():
            play(model, drawn[0][0], sigmas[0][:, 0], todo[0][2])
        if shown:
            print(*(datasets.show(row, model.K) for row in drawn[-1]), sep="\n", flush=True)
    drawn = torch.cat(drawn)
    if kind == "image" and args.inpaint:
        files = completions(x, known, drawn, settings)
    else:
        files = datasets.exhibit(drawn.numpy(), settings, "inpaint" if args.inpaint else "samples",
                                 known.numpy() if kind == "audio" else None)
    if args.frames:
        sigma = torch.cat(sigmas, dim=1)[:, :FRAMED]
        files |= show_frames(model, *frames(model, drawn[:FRAMED], sigma, todo[0][2]), settings)
    for name, content in files.items():
        datasets.write(folder / name, content)
    print(f"{len(x)} samples, {sum(len(plan) for _, _, plan in todo)} network calls; "
          f"{', '.join(files)} written to {folder}")


if __name__ == "__main__":
    datasets.run(main)
