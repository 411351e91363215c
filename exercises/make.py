"""An assignment: python -m exercises.make DIR writes a copy of the project without the solutions.

    python -m exercises.make DIR                   all nine exercises blank
    python -m exercises.make DIR --only 2 5 8      these are blank, the others solved

The copy has what git tracks, but no .git, in whose history the solutions would be. In it the bodies
of the functions below are `raise NotImplementedError`; names, signatures and docstrings stay.
"""
import argparse
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = Path("exercises", "assignment")                     # stands in a copy
EXERCISES = {                        # number -> file, and the points of what a student writes
    1: ("ardm.py", {"sample_sigma": 4, "known_first": 6}),
    2: ("ardm.py", {"ARDM.loss": 10}),
    3: ("ardm.py", {"ARDM.generate": 6, "ARDM.nll": 4}),
    4: ("planner.py", {"plan_cost": 2, "isotonic": 4, "smooth": 4}),
    5: ("planner.py", {"one_more_call": 4, "one_more_call_fast": 2, "best_path": 4}),
    6: ("ardm.py", {"UpscaleARDM.coarsen": 4, "UpscaleARDM.symbol": 3, "UpscaleARDM.refine": 3}),
    7: ("ardm.py", {"UpscaleARDM.sum_values": 10}),
    8: ("coder.py", {"quantize": 3, "encode": 4, "Decoder.pop": 3}),
    9: ("compress.py", {"Codec.encode": 5, "Codec.decode": 5})}
NEEDS = {2: [1], 3: [1], 5: [4], 7: [6], 9: [1, 3, 6, 8]}     # what the tests of an exercise use
LEFT_OUT = {Path("exercises", name) for name in ("prove.py", "mistakes.json", "TEACHER.md")} | {
    Path("results", name) for name in ("page.html", "index.html")}       # they show solutions
NO_SOURCES = {".git", ".venv", "venv", "out", "data", "__pycache__", ".pytest_cache"}


def files(root):
    """The files of the project, relative: those that git tracks, or in a download all."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True,
                                check=True).stdout
        return [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
    found = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return [path for path in found if not NO_SOURCES & set(path.parts)]


def functions(source):
    """{name: node} of the functions of a module, and of the methods of its classes."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body
                      if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def blank(source, names, number):
    """Python source in which the bodies of these functions raise NotImplementedError."""
    lines, found = source.split("\n"), functions(source)
    for name in sorted(names, key=lambda name: -found[name].lineno):     # from below
        node = found[name]
        text = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        lines[text:node.end_lineno] = [" " * (node.col_offset + 4) + "raise NotImplementedError("
                                       f'"exercise {number:02}: {name} is yours to write")']
    return "\n".join(lines)


def make(folder, numbers=EXERCISES, root=ROOT, page=False):
    """Writes the copy in which these exercises are blank. page: with index.html."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    for path in files(root):
        if path not in LEFT_OUT:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, folder / path)
    (folder / MARK).parent.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("".join(f"{number}\n" for number in numbers), "utf-8")
    for number in numbers:
        name, parts = EXERCISES[number]
        source = (folder / name).read_text("utf-8")
        (folder / name).write_text(blank(source, parts, number), "utf-8")
    if page:
        from results.page import build                     # takes a moment: it imports torch
        (folder / "results" / "index.html").write_text(build(solutions=False), "utf-8")


def graph(numbers):
    """Which of these exercises want which others first."""
    return "".join(f"  {number:02} needs {', '.join(f'{n:02}' for n in NEEDS[number])}\n"
                   for number in numbers if number in NEEDS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", type=int, choices=EXERCISES, nargs="+", metavar="N",
                        help="blank these exercises alone")
    args = parser.parse_args()
    numbers = sorted(set(args.only or EXERCISES))
    try:
        make(args.folder, numbers, page=True)
    except (ValueError, OSError) as error:
        print(f"exercises.make: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"blank in {args.folder}: {', '.join(f'{n:02}' for n in numbers)}\n{graph(numbers)}"
          "there:\n  exercises/README.md\n  python -m exercises.check")


if __name__ == "__main__":
    main()
