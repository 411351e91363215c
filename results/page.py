"""One page beside the paper: python -m results.page writes results/index.html and text.svg.

It is made of results/page.html, of the sources, from which the lines beside the boxes are cut, of
results/bench.json, of results/page.json, which `python -m results.bench page` records (what a few
trained models did, call by call), and of the weights of results/english.pt in 8 bits each. So
nothing on it is drawn by hand, and it needs no network. text.svg, for README.md, is a text that
fills in. --without-solutions leaves out what solves exercises: the boxes' code, plans, the coder.
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
import train
from ardm import UpscaleARDM, sample_sigma
from results.common import REAL, RUNS

HERE = Path(__file__).parent
NUMERAL = 30                         # of the test images of MNIST
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


def box(functions, more, steps):
    """A list of steps, each with a piece of its line, and the lines of these functions; what
    belongs together gets one name. more: a function that is folded away, or None."""
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
    fold = "" if more is None else (
        f"<details><summary>the same, faster: <code>{more}</code></summary><pre tabindex=0>"
        f'{html.escape(chr(10).join(source_of(more)))}</pre></details>')
    return (f'<ol>{left}</ol><div><p class="where"><code>{functions}</code></p><pre tabindex="0" '
            f'role="region" aria-label="its code">{"".join(right)}</pre>{fold}</div>')


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


def written(model, L, calls, D):
    """A text of D bytes that the model writes in a random order by the cheapest plan: x, as it is
    shown, the step of each byte, and the plan [(t, k)]."""
    generator = torch.Generator().manual_seed(1)
    plan, sigma = planner.plan(L[:D], calls), sample_sigma(1, D, generator=generator)
    x = model.sample(1, plan, sigma, generator=generator)[0]
    return dict(x=visible(x), sigma=sigma[0].tolist(), plan=[[t, k] for _, t, k in plan])


def visible(symbols):
    """(n,) bytes -> n characters, each of which can be seen."""
    return "".join("↵" if i == 10 else chr(i) if 32 <= i < 127 else "·"
                   for i in symbols.tolist())


def process(model, settings, x=None):
    """How a datapoint of an upscale model is generated in 160 calls: x (1, D), or half a second of
    sound that the model draws."""
    generator, rate = torch.Generator().manual_seed(3), settings["rate"]
    D = rate // 2 if rate else model.D
    sigma = sample_sigma(model.S, D, generator=generator)
    plan = planner.uniform_plan(model.S, D, 160)
    if x is None:
        x = model.sample(1, plan, sigma[:, None], torch.zeros(1, D).long(), generator=generator)
    return dict(x=packed(x, np.uint16), sigma=packed(sigma, np.uint16), plan=plan, rate=rate,
                shape=settings["shape"], K=model.K, b=model.A, S=model.S)


def record(models, numeral):
    """All that the page shows of models, for page.json. models: name -> (model, checkpoint) of
    english (bytes), text8, mnist, fsdd; numeral (1, D): an image of MNIST."""
    L = {name: planner.smooth(checkpoint["L"], checkpoint["counts"])[0]
         for name, (_, checkpoint) in models.items() if name != "fsdd"}
    (english, _), (speech, checkpoint) = models["english"], models["fsdd"]
    digits = UpscaleARDM(None, numeral.shape[1], 256, 4)
    return dict(L={name: values.round(5).tolist() for name, values in L.items()},
                film=written(english, L["english"], 64, english.D),
                digit=process(digits, dict(rate=None, shape=[1, 28, 28]), numeral),
                speech=process(speech, checkpoint["settings"]))


def bench_page(args):
    """What results/index.html shows of models (`python -m results.page` makes it): the model in
    results/english.pt, those of sections text8, mnist and fsdd, and an image of MNIST. Below, what
    the model of English costs with 8 bits a weight, as the page has it, and with 16, in bits a byte
    of the same 64 windows of its test text, in the same steps and orders."""
    paths = dict(english=nets.ENGLISH, text8=RUNS / "text8-ours" / "ckpt.pt",
                 mnist=RUNS / "mnist" / "ckpt.pt", fsdd=RUNS / "fsdd" / "ckpt.pt")
    if all(path.exists() for path in paths.values()) and not args.quick:
        numeral = datasets.load("mnist").chunks("test")[NUMERAL:][:1]
        found = record({name: nets.load(path) for name, path in paths.items()}, numeral)
        datasets.write(HERE / "page.json", json.dumps(found, separators=(",", ":")).encode())
    model, _ = nets.load(nets.ENGLISH)
    text = datasets.load(str(REAL / "prose" / "english.zip"), model.D).chunks("test")
    for bits in (16, 8):
        if bits == 8:
            in_eight_bits(model)
        found = train.bound(model, train.some(text, 64), passes=4)
        yield {"bits of a weight": bits, "bits a byte": found["bits"], "stderr": found["stderr"]}


# -- The weights -----------------------------------------------------------------------------------

def in_eight_bits(model):
    """Rounds the matrices of a model of text to 255 values for each row, in place. -> [(name,
    shape)], the scales and what is no matrix (float32), and the values (int8), as the page has
    them."""
    shapes, floats, integers = [], [], []
    for name, p in model.net.named_parameters():
        w = p.detach().numpy()                             # shares its memory
        shapes.append([name, *(w.shape if w.ndim == 2 else [w.size])])
        if w.ndim == 2:
            scale = np.maximum(abs(w).max(axis=1), np.float32(1e-9)) / np.float32(127)
            integers.append(np.rint(w / scale[:, None]).astype(np.int8))
            w[:] = integers[-1] * scale[:, None]
        floats.append((scale if w.ndim == 2 else w).flatten())
    return shapes, np.concatenate(floats), np.concatenate([each.flatten() for each in integers])


def weights():
    """The model of English for the page."""
    model, checkpoint = nets.load(nets.ENGLISH, "cpu")
    shapes, floats, integers = in_eight_bits(model)
    return {name: checkpoint["settings"][name] for name in ("dim", "heads", "depth")} | dict(
        shapes=shapes, floats=packed(floats, "<f4"), integers=packed(integers, np.int8))


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


def build(solutions=True):
    """The page, one str."""
    recording = json.loads((HERE / "page.json").read_text("utf-8"))
    bench = json.loads((HERE / "bench.json").read_text("utf-8"))
    rows = {name: bench[name]["rows"] for name in ("plans", "absorbing", "calls", "packers")}
    recording["plans"] = rows["plans"]
    recording["absorbing"] = [{"name": row[""], "steps": row["steps"], "bits": row["bits"]}
                              for row in rows["absorbing"]]
    recording["audio"] = [{"calls": row["calls"], "exact": row["random, planned"]}
                          for row in rows["calls"] if "random, planned" in row]
    recording["others"] = {row["data"]: row for row in rows["packers"]}
    page = (HERE / "page.html").read_text("utf-8")
    if not solutions:
        L = np.array(recording["L"]["text8"])
        recording["planned"] = {n: [[t, k] for _, t, k in planner.plan(L, n)]
                                for n in {round(250 ** (i / 80)) for i in range(81)}}
        recording["coded"] = coded("abacabab")
    page = re.sub(r"( *)/\* solution \*/\n(.*?) */\* (?:end|instead:\n(.*?)) *\*/\n",
                  lambda found: found[2] if solutions else found[3] or "", page, flags=re.DOTALL)
    page = re.sub(r"<!-- solution -->\n(.*?)<!-- end -->\n", r"\1" if solutions else "", page,
                  flags=re.DOTALL)
    page = re.sub(r'<ol data-of="(.*?)"(?: data-more="(.*?)")?>(.*?)</ol>',
                  lambda found: box(found[1], found[2], found[3]) if solutions else plain(found[3]),
                  page, flags=re.DOTALL)
    for key, (letter, _) in NAMES.items():                 # those in formulas light up, too
        page = page.replace(f"<mi>{letter}</mi>", f'<mi data-k="{key}">{letter}</mi>')
    for name, content in (("recording", recording), ("weights", weights())):
        text = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
        page = page.replace("{{%s}}" % name, text)
    return page


def plain(steps):
    """The steps of a box without the lines of the code."""
    steps = re.sub(r"{(\w+)}", lambda one: mark(one[1], NAMES[one[1]][0]), steps)
    return "<ol>" + re.sub(' data-line=".*?"', "", steps) + "</ol>"


def coded(message):
    """What part 6 computes of its message: the states, and the symbols that are popped."""
    own, states = dict(a=(0, 4), b=(4, 3), c=(7, 1)), [77]
    for start, f in (own[symbol] for symbol in reversed(message)):
        states.append(states[-1] // f * 8 + start + states[-1] % f)
    return dict(states=states + states[-2::-1], popped=[*message])


def main():
    """Writes index.html and text.svg."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--without-solutions", action="store_true", help="for an assignment")
    datasets.write(HERE / "index.html", build(not parser.parse_args().without_solutions).encode())
    recording = json.loads((HERE / "page.json").read_text("utf-8"))
    datasets.write(HERE / "text.svg", film(**recording["film"]).encode())
    print(f"{HERE / 'index.html'} written: open it in a browser")


if __name__ == "__main__":
    datasets.run(main)
