"""One page beside the paper: python -m results.page writes results/index.html and text.svg.

It is made of results/page.html, of the sources, from which the lines beside the boxes are cut, of
results/bench.json, and of results/page.json, which `python -m results.bench page` records: what a
few trained models did, call by call. So nothing on it is drawn by hand, and it needs no network.
text.svg, for README.md, is a text that fills in.
"""
import ast
import base64
import html
import json
import re
from pathlib import Path

import numpy as np
import torch

import data as datasets
import nets
import planner
from ardm import draw, sample_sigma
from results.common import RUNS, text8_prefix, trained
from results.orders import generate_surest

HERE = Path(__file__).parent
LETTERS = 64                         # of the sentence
BUDGETS = (5, 10, 20, LETTERS)
ORDERS = ("random", "left to right", "spaced", "confident")
NAMES = {                            # a symbol: how it is written, and its name in the code
    "t": ("t", "t"), "sigma": ("σ", "sigma"), "m": ("m", "m"), "s": ("s", "s"), "k": ("k", "k"),
    "D": ("D", "D"), "x": ("x", "x"), "L": ("L<sub>t</sub>", "L"),
    "calL": ("ℒ<sub>t</sub>", "calL_t"),
    "xs": ("x<sup>(s)</sup>", "coarsen")}


# -- The boxes -------------------------------------------------------------------------------------

def source_of(name):
    """The lines of a function, file.Class.function, without docstring, decorators, comments."""
    file, *path = name.split(".")
    text = (HERE.parent / f"{file}.py").read_text("utf-8")
    node = ast.parse(text)
    for part in path:
        node = next(child for child in node.body if getattr(child, "name", "") == part)
    lines = [line.partition("#")[0].rstrip()               # the words stand on the left
             for line in text.split("\n")[node.lineno - 1:node.end_lineno]]
    if ast.get_docstring(node):
        begin, end = (at - node.lineno for at in (node.body[0].lineno, node.body[0].end_lineno))
        del lines[begin:end + 1]
    return [line[node.col_offset:] for line in lines if line]


def box(functions, steps):
    """A list of steps, each with a piece of its line, and the lines of these functions; what
    belongs together gets one name."""
    lines = [line for name in functions.split() for line in source_of(name)]
    keys = [""] * len(lines)

    def step(found):
        piece, words = html.unescape(found[1]), found[2]
        places = [at for at, line in enumerate(lines) if piece in line]
        if len(places) != 1:
            raise ValueError(f"{functions}: {len(places)} lines have {piece!r}, which a box names")
        end = places[0] + 1
        while not balanced(lines[places[0]:end]):          # a statement of several lines
            end += 1
        key = f"{functions.split()[0]}-{places[0]}"
        keys[places[0]:end] = [key] * (end - places[0])
        words = re.sub(r"{(\w+)}", lambda one: mark(one[1], NAMES[one[1]][0]), words)
        return f'<li data-k="{key}" tabindex="0">{words}</li>'

    left, right = re.sub(r'<li data-line="(.*?)">(.*?)</li>', step, steps, flags=re.DOTALL), []
    known = {name: key for key, (_, name) in NAMES.items() if f"{{{key}}}" in steps}
    for line, key in zip(lines, keys):
        code = re.sub(r"\b[A-Za-z_]+\b", lambda one: mark(known[one[0]], one[0])
                      if one[0] in known else one[0], html.escape(line, quote=False))
        right.append(f'<span class="line"{key and f" data-k={key}"}>{code}</span>')
    return (f'<ol>{left}</ol><div><p class="where"><code>{functions}</code></p>'
            f'<pre>{"".join(right)}</pre></div>')


def balanced(lines):
    """True if every bracket in these lines is closed."""
    text = "".join(lines)
    return all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))


def mark(key, text):
    """A symbol that lights up with all of its name."""
    return f'<i data-k="{key}">{text}</i>'


# -- The recording ---------------------------------------------------------------------------------

def packed(array, kind):
    """An array as base64 of little-endian numbers."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=kind)).decode()


@torch.no_grad()
def sentence(model, L, way, calls, D=LETTERS, seed=1):
    """How the model writes D bytes: at every call of the plan the five likeliest symbols of
    each unknown place with their probabilities in percent, that of the symbol which each place got,
    and what the text has cost so far."""
    generator = torch.Generator().manual_seed(seed)
    even = planner.uniform_plan(1, D, calls)
    plan = planner.plan(L[:D], calls) if way == "random" else even
    x, sigma = torch.zeros(1, D, dtype=torch.long), sample_sigma(1, D, generator=generator)[None]
    rules = {"left to right": "forward", "spaced": f"spaced:{-(-D // calls)}"}
    if way in rules:
        sigma = torch.from_numpy(planner.order(rules[way], D)).expand(1, 1, -1)
    def choose(log_p, where, s):
        return draw(log_p, generator=generator)

    if way == "confident":
        x, sigma = generate_surest(model, x, plan, choose)
    else:
        x = model.generate(x, plan, sigma, choose)
    bits, top, percent, sigma, drawn = [0.0], [], [], sigma[0], torch.zeros(D)
    for s, t, k in plan:
        m, one = sigma < t, torch.ones(1, dtype=torch.long)
        log_p = model.log_probs(x, m, t * one, s * one)[0]
        now = (~m & (sigma < t + k))[0]
        spent = -log_p[now].gather(1, x[0, now][:, None])[:, 0]
        bits.append(round(bits[-1] + spent.sum().item() / np.log(2), 2))
        drawn[now] = 100 * torch.exp(-spent)
        p, symbols = log_p[~m[0]].exp().topk(5)
        top.append(visible(symbols.flatten()))
        percent.append(packed((100 * p.flatten()).round(), np.uint8))
    return dict(order=way, calls=calls, x=visible(x[0]), sigma=sigma[0].tolist(), bits=bits,
                plan=[[t, k] for _, t, k in plan], top=top, percent=percent,
                drawn=packed(drawn.round(), np.uint8))


def visible(symbols):
    """(n,) bytes -> n characters, each of which can be seen."""
    return "".join("↵" if i == 10 else chr(i) if 32 <= i < 127 else "·"
                   for i in symbols.tolist())


def record(english, letters, digits, speech, others):
    """All that the page shows of models, for page.json. english (of bytes), letters (of
    text8), digits, speech: (model, checkpoint); others: what other programs need, by data set."""
    (model, checkpoint), (_, of_letters) = english, letters
    (L,) = planner.smooth(checkpoint["L"], checkpoint["counts"])
    found = dict(sentences=[sentence(model, L, way, calls) for way in ORDERS for calls in BUDGETS],
                 others=others)
    whole = sentence(model, L, "random", 64, model.D)
    (L,) = planner.smooth(of_letters["L"], of_letters["counts"])
    found["L"] = L.round(5).tolist()
    found["film"] = {name: whole[name] for name in ("x", "sigma", "plan")}
    for name, (model, checkpoint) in (("digit", digits), ("speech", speech)):
        generator, rate = torch.Generator().manual_seed(3), checkpoint["settings"]["rate"]
        D = rate // 2 if rate else model.D                 # half a second of sound
        sigma = sample_sigma(model.S, D, generator=generator)
        plan = planner.uniform_plan(model.S, D, 160)
        x = model.sample(1, plan, sigma[:, None], torch.zeros(1, D).long(), generator=generator)
        found[name] = dict(x=packed(x, np.uint16), sigma=packed(sigma, np.uint16), plan=plan,
                           shape=checkpoint["settings"]["shape"], rate=rate, K=model.K, b=model.A,
                           S=model.S)
    return found


def bench_page(args):
    """What results/index.html shows of models (`python -m results.page` makes it): the model in
    results/english.pt, those of sections text8 and fsdd, and an upscale-4 model of MNIST (trained
    here, five minutes). Below, what the first one wrote, and what that cost it in bits."""
    if not (RUNS / "mnist-upscale-4" / "ckpt.pt").exists():
        trained("mnist-upscale-4", data=datasets.load("mnist"), branch=4, minutes=args.minutes or 5)
    models = [nets.load(path) for path in (nets.ENGLISH, *(RUNS / name / "ckpt.pt" for name in (
        "text8-ours", "mnist-upscale-4", "fsdd")))]
    letters = datasets.references(text8_prefix().splits["test"].numpy(), 27)
    kept = json.loads((HERE / "bench.json").read_text())
    pictures = {row["data"]: row for row in kept["packers"]["rows"]}
    sounds = {row["run"]: row["bits"] for row in kept["fsdd"]["rows"]}
    others = dict(text8={name: letters[name] for name in ("bz2", "xz")},
                  fsdd={name: sounds[name] for name in ("FLAC -8", "WavPack -hhx6", "xz")})
    for name, row in (("mnist", "mnist"), ("cifar10", "cifar-10-binary")):
        others[name] = {coder: pictures[row][coder] for coder in ("PNG", "WebP")}
    found = record(*models, others)
    if not args.quick:
        datasets.write(HERE / "page.json", json.dumps(found, separators=(",", ":")).encode())
    return [{"order": run["order"], "calls": run["calls"], "bits": run["bits"][-1],
             "text": f"`{run['x']}`"} for run in found["sentences"]]


# -- The page and the film -------------------------------------------------------------------------

def film(x, sigma, plan, width=64, seconds=0.15):
    """A text that fills in, call after call, again and again: an SVG. The newest letters are blue;
    of each call one element has the letters, and one the dots that stand there before."""
    end, parts = seconds * (len(plan) + 20), []
    for i, (t, k) in enumerate(plan):
        at = [j for j, step in enumerate(sigma) if t <= step < t + k]
        columns = " ".join(str(10 + 12 * (j % width)) for j in at)
        place = f'x="{columns}" y="{" ".join(str(24 + 26 * (j // width)) for j in at)}"'
        begin = f'begin="film.begin+{seconds * i:.2f}s"'
        shown = html.escape("".join(x[j] for j in at).replace(" ", "\u00a0"))
        parts.append(f'<text {place} visibility="hidden">{shown}<set attributeName="visibility" '
                     f'to="visible" {begin} end="film.end"/><set attributeName="fill" to="#2b8cff" '
                     f'{begin} dur="{2 * seconds}s"/></text><text {place}>{"·" * len(at)}<set '
                     f'attributeName="visibility" to="hidden" {begin} end="film.end"/></text>')
    height = 26 * -(-len(sigma) // width) + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {12 * width + 20} {height}">'
            "<style>text { font: 18px monospace; fill: #222 } @media (prefers-color-scheme: dark) "
            "{ text { fill: #ddd } }</style>"
            f'<set id="film" attributeName="opacity" to="1" begin="0s;film.end" dur="{end:.2f}s"/>'
            f'{"".join(parts)}</svg>\n')


def build():
    """The page, one str."""
    recording = json.loads((HERE / "page.json").read_text("utf-8"))
    bench = json.loads((HERE / "bench.json").read_text("utf-8"))
    kept = ("model", "calls", "plan", "exact")
    recording["plans"] = [{name: row[name] for name in kept} for row in bench["plans"]["rows"]]
    recording["absorbing"] = [{"name": row[""], "steps": row["steps"], "bits": row["bits"]}
                              for row in bench["absorbing"]["rows"]]
    recording["audio"] = [{"calls": row["calls"], "exact": row["exact, planned"]}
                          for row in bench["calls"]["rows"] if "exact, planned" in row]
    content = json.dumps(recording, separators=(",", ":")).replace("</", "<\\/")
    page = (HERE / "page.html").read_text("utf-8")
    page = re.sub(r'<ol data-of="(.*?)">(.*?)</ol>', lambda found: box(found[1], found[2]), page,
                  flags=re.DOTALL)
    return page.replace("{{recording}}", content)


def main():
    """Writes index.html and text.svg."""
    datasets.Parser(description=__doc__.split("\n")[0]).parse_args()
    recording = json.loads((HERE / "page.json").read_text("utf-8"))
    for name, content in (("index.html", build()), ("text.svg", film(**recording["film"]))):
        datasets.write(HERE / name, content.encode())
    print(f"{HERE / 'index.html'} written: open it in a browser")


if __name__ == "__main__":
    datasets.run(main)
