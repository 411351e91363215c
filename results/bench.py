"""The measurements: python -m results.bench SECTION [SECTION ...]

SECTIONS says in which file the function bench_SECTION stands. Each keeps its rows in
results/bench.json, with the machine and the day, and results/README.md is written anew. Real data
is looked for in the folder ARDM_DATA. Run it alone on the machine. `readme` only writes
results/README.md, and `check` compares the figures of README.md with the rows.
"""
import datetime
import importlib
import itertools
import json

import data as datasets
from results.check import check
from results.common import HERE, machine

# In the order of results/README.md: first what a reader wants.
SECTIONS = {name: module for module, names in (
    ("orders", "plans orders"), ("audio", "calls"), ("orders", "absorbing prices samples"),
    ("runs", "text8 mnist cifar10 glyphs english"), ("audio", "tones fsdd sc09 clips branches"),
    ("orders", "upscaling"), ("coding", "compress kilobyte single packers portable"),
    ("recipes", "text images weights"), ("speed", "planner coder speed gpu"),
    ("page", "page")) for name in names.split()}
CONCLUSIONS = {                      # one sentence each, for a reader in a hurry
    "plans": "Orders save more than plans: at 20 calls of text8 the planned and the even split cost"
             " the same bits, and `spaced` costs 2.7% less.",
    "orders": "Of the orders that were tried for images, random ones cost least at 100 calls.",
    "calls": "Sound needs few network calls: by L_t, 64 cost 0.5% more bits than all 4,096. A "
             "random order with the cheapest plan costs least.",
    "absorbing": "A thousand steps of absorbing diffusion come within 0.1% of the bits of an ARDM "
                 "in 250 calls, with the same network.",
    "prices": "A model of any order costs 0.64 bits a character more than one of the same size that"
              " goes left to right alone, after as many steps."}


def markdown(rows):
    """Tables of these rows, one for all that begin alike."""
    groups = itertools.groupby(rows, key=lambda row: next(iter(row)))
    return "\n\n".join(table([*group]) for _, group in groups)


def table(rows):
    """A table of these rows; numbers with four digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    forms = {float: ".4g", int: ","}
    lines = [columns, ["---"] * len(columns)]
    lines += [[format(row.get(name, ""), forms.get(type(row.get(name)), "")) for name in columns]
              for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(name):
    """The function of a section."""
    return getattr(importlib.import_module(f"results.{SECTIONS[name]}"), f"bench_{name}")


def write(kept):
    """results/README.md from results/bench.json and results/head.md."""
    parts = [(HERE / "head.md").read_text("utf-8")]
    for name in SECTIONS:
        if "rows" in kept.get(name, ()):
            words = " ".join(section(name).__doc__.split())
            first = f"**{CONCLUSIONS[name]}**\n\n" if name in CONCLUSIONS else ""
            rows, where, day = (kept[name][key] for key in ("rows", "machine", "day"))
            parts.append(f"## {name}\n\n{first}{words}\n\n{markdown(rows)}\n\n*`python -m "
                         f"results.bench {name}`; {where}; {day}*\n")
    datasets.write(HERE / "README.md", "\n".join(parts).encode())


def main():
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="+", metavar="SECTION",
                        choices=[*SECTIONS, "readme", "check"])
    parser.add_argument("--minutes", type=float, help="of training, where it is not the default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="seconds only, and nothing is kept")
    args = parser.parse_args()
    args.passes = 16 if "text" in args.sections else 2
    if args.quick:
        args.minutes, args.seeds, args.passes = 0.02, 1, 1
    path = HERE / "bench.json"
    for name in args.sections:
        kept = json.loads(path.read_text()) if path.exists() else {}
        if name == "readme":                               # only writes it anew
            write(kept)
            continue
        if name == "check":
            check(kept, " ".join(CONCLUSIONS.values()))
            continue
        print(name)
        rows, old = [], kept.get(name, {})
        args.kept = old.get("rows", []) + old.get("begun", [])
        for row in section(name)(args):
            print(" ", row, flush=True)
            rows.append(row)
            kept[name] = old | dict(begun=rows)            # each row is safe at once
            if not args.quick:
                datasets.write(path, json.dumps(kept, indent=1).encode())
        print(markdown(rows))
        kept[name] = dict(rows=rows, machine=machine(), day=str(datetime.date.today()))
        if not args.quick:
            datasets.write(path, json.dumps(kept, indent=1).encode())
            write(kept)


if __name__ == "__main__":
    datasets.run(main)
