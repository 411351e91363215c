"""Sampling in any order and under any budget of network calls, and filling in blanks (Algorithm 1).

    python sample.py --ckpt out/pydoc/ckpt.pt --n 8 --calls 20
    python sample.py --ckpt out/pydoc/ckpt.pt --calls 20 --frames         the process, step by step
    python sample.py --ckpt out/pydoc/ckpt.pt --prompt "the ____ of"      underscores are the blanks
    python sample.py --ckpt out/glyphs/ckpt.pt --inpaint top              test images from their top

Text is printed and written to samples.txt (and frames.txt) beside the checkpoint, images to
samples.png (frames.png, process.png, which moves, and inpaint.png).
"""
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data as datasets
import planner
from ardm import rerank
from data import UserError
from train import Parser, command_line, load_data, load_model, replacing, spread

COMPLETIONS = 4                      # of each image that is filled in


def read_prompt(prompt, model):
    """A prompt -> x, known, absent (D,): underscores are unknown, all behind its end is absent."""
    n, D = len(stream := os.fsencode(prompt)), model.D
    if n > D:
        raise UserError(f"the prompt has {n} characters, the model takes {D}")
    if b"_" not in stream:
        raise UserError("the prompt has no blank: write _ for each character that is to be "
                        "filled in")
    blanks = torch.tensor([byte == ord("_") for byte in stream] + [False] * (D - n))
    filler = b" " if model.K == 27 else b"\0"             # what is unknown: the symbol 0
    symbols = datasets.to_symbols(stream.replace(b"_", filler).ljust(D, filler), model.K)
    absent = torch.arange(D) >= n
    return torch.from_numpy(symbols).long(), ~blanks & ~absent, absent


def read_inpaint(rule, n, model, checkpoint):
    """--inpaint -> x (n * COMPLETIONS, D), n test images, and which of their variables are known,
    (D,): the top or left half, or each pixel with that probability."""
    C, H, W = checkpoint["shape"]
    row, column, part = torch.arange(H)[:, None], torch.arange(W), rule.removeprefix("random:")
    if rule in ("top", "left"):
        known = (row < H // 2) & (column >= 0) if rule == "top" else (column < W // 2) & (row >= 0)
    elif rule != part and part.replace(".", "", 1).isdecimal() and 0 < float(part) < 1:
        known = torch.rand(H, W, generator=torch.Generator().manual_seed(0)) < float(part)
    else:
        raise UserError(f"--inpaint {rule}: choose top, left or random:P, 0 < P < 1, which says "
                        "what is known")
    if known.all() or not known.any():
        raise UserError(f"--inpaint {rule}: of these small images all or nothing would be known")
    data = load_data(checkpoint["settings"], "cpu", checkpoint)
    x = spread(data.chunks("test")[0], n).long()
    return x.repeat_interleave(COMPLETIONS, dim=0), known.expand(C, H, W).flatten()


def make_plan(model, L, calls, known, absent):
    """The best plan of `calls` network calls (None: one a variable) for the steps left to do."""
    first, last = int(known.sum()) + 1, model.D - int(absent.sum())
    left = model.S * (last - first + 1)
    if calls is not None and not model.S <= calls <= left:
        raise UserError(f"--calls {calls}: choose {model.S} to {left}, one for each variable "
                        "to write at most")
    if L is None and calls is not None:
        raise UserError("this checkpoint has no L_t yet, which --calls needs: "
                        "let train.py --resume finish the run")
    return planner.plan(L, calls, first, last) if calls else [
        entry for entry in planner.full_plan(model.S, model.D) if first <= entry[1] <= last]


def make_sigma(rule, B, model, shape, generator):
    """(S, B, D): a fresh random order for each sample and stage, or the same for all by name."""
    if rule == "random":
        return model.orders(B, model.D, generator.device, generator)
    try:
        sigma = torch.from_numpy(planner.order(rule, shape)).to(generator.device)
        return sigma.expand(model.S, B, model.D)
    except ValueError as error:
        raise UserError(f"--order: {error}, or random for a new one each time")


def frames(model, x, sigma, plan, most=12):
    """[(s, t, state (B, D), known (B, D))]: the process that led to x, at up to `most` points.

    x and sigma tell all that went before: at step t of stage s, x^(s) is known where sigma < t.
    """
    points = [plan[0][:2]] + [(s, t + k) for s, t, k in plan]
    n = min(most, len(points))
    shown = [points[i * (len(points) - 1) // (n - 1)] for i in range(n)]
    return [(s, t, model.state(x, sigma[s - 1] < t, torch.tensor([s])), sigma[s - 1] < t)
            for s, t in shown]


def arguments():
    """The command line, checked as far as can be without the model."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    parser.add_argument("--n", type=int, default=8, help="how many samples (default 8)")
    parser.add_argument("--calls", type=int,
                        help="network calls in all (default: one for each variable)")
    parser.add_argument("--order", default="random",
                        help="random, forward, backward, random:SEED, spaced:G, coarse")
    parser.add_argument("--prompt",
                        help="text to keep, with _ for every character that is to be filled in")
    parser.add_argument("--inpaint", metavar="top|left|random:P",
                        help="complete test images of which that part is known")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="below 1: likelier, less varied; above: the reverse (default 1)")
    parser.add_argument("--frames", action="store_true",
                        help="also show what is known at up to 12 points of the process, "
                             "_ or grey for what is not")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    parser.add_argument("--device", help="cuda, mps or cpu")
    parser.add_argument("--out", help="folder for the files; the default is the checkpoint's")
    args = parser.parse_args()
    if args.n < 1 or not 1e-6 <= args.temperature <= 1e6 or not 0 <= args.seed < 1 << 63:
        raise UserError("--n must be at least 1, --temperature 1e-6 to 1e6 and --seed 0 to "
                        "2^63 - 1")
    return args


def main():
    """The command line: samples, blanks, completions, frames."""
    args = arguments()
    model, checkpoint = load_model(args.ckpt, args.device)
    image, (device, D) = checkpoint["kind"] == "image", (next(model.parameters()).device, model.D)
    if args.prompt is not None and image or args.inpaint and not image:
        raise UserError("--prompt is for text and --inpaint for images: this is a model of "
                        f"{'images' if image else 'text'}")
    if args.inpaint:
        x, known = read_inpaint(args.inpaint, args.n, model, checkpoint)
        absent = torch.zeros_like(known)
    else:
        x, known, absent = read_prompt("_" * D if args.prompt is None else args.prompt, model)
        x = x.expand(args.n, D)
    plan = make_plan(model, checkpoint["L"], args.calls, known, absent)
    generator = torch.Generator(device).manual_seed(args.seed)
    sigma = rerank(make_sigma(args.order, len(x), model, checkpoint["shape"], generator),
                   known.to(device), absent.to(device))
    with tqdm(plan, desc="sampling", unit="call", leave=False) as calls:
        drawn = model.sample(len(x), calls, sigma, x.to(device), temperature=args.temperature,
                             generator=generator)
    steps = frames(model, drawn.cpu(), sigma.cpu(), plan) if args.frames else []
    files = (pictures(x, known, drawn.cpu(), steps, checkpoint) if image else
             lines(drawn.cpu(), steps, D - int(absent.sum()), model))
    folder = Path(args.out or Path(args.ckpt).parent)
    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write(content)
    print(f"{len(x)} sample{'s' * (len(x) > 1)}, {len(plan)} network calls; "
          f"written to {' and '.join(str(folder / n) for n in files)}")


def lines(x, steps, length, model):
    """Prints samples of text, or the frames; returns the files to write: {name: bytes}."""
    shown = "".join(datasets.show(row[:length], model.K) + "\n" for row in x)
    files = {"samples.txt": b"".join(datasets.to_bytes(row[:length], model.K) + b"\n"
                                     for row in x)}
    if steps:
        shown = "\n".join(
            "".join(f"{f's = {s}  ' if model.S > 1 else ''}t = {t:4d}  "
                    f"{datasets.show(state[i, :length], model.K, m[i, :length].numpy())}\n"
                    for s, t, state, m in steps) for i in range(len(x)))
        files["frames.txt"] = shown.encode()
    print(shown, end="")
    return files


def pictures(given, known, x, steps, checkpoint):
    """The files to write, {name: bytes}: a grid of the samples x; with frames a row for each sample
    and the same as a film; for completions of given images a row of the image, what was known of
    it, and all completions. What is not known is grey."""
    def images(x, known=True):
        x = torch.where(torch.as_tensor(known), x, checkpoint["K"] // 2)
        return datasets.to_images(x, checkpoint["shape"], checkpoint["K"])

    if known.any():
        rows = [images(given[::COMPLETIONS]), images(given[::COMPLETIONS], known)]
        rows += [images(x[i::COMPLETIONS]) for i in range(COMPLETIONS)]
        files = {"inpaint.png": datasets.png(side_by_side(rows))}
    else:
        files = {"samples.png": datasets.png(datasets.grid(images(x), columns=min(8, len(x))))}
    if steps:                                            # a later stage refines what is there
        films = [images(state, m | (s > 1)) for s, t, state, m in steps]
        files["frames.png"] = datasets.png(side_by_side(films))
        files["process.png"] = datasets.png(*(datasets.grid(film, min(8, len(x)))
                                              for film in films))
    return files


def side_by_side(columns):
    """[(N, H, W, C)] -> a picture with a row for each of the N."""
    return datasets.grid(np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:]),
                         columns=len(columns))


if __name__ == "__main__":
    command_line(main)
