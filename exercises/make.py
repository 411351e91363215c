"""An assignment: python -m exercises.make DIR writes a copy of the project without the solutions.

    python -m exercises.make DIR               all nine exercises blank
    python -m exercises.make DIR --only 2      exercise 2 blank, the others solved

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
EXERCISES = {                        # number -> file, and the functions that a student writes
    1: ("ardm.py", "sample_sigma", "known_first"),
    2: ("ardm.py", "ARDM.loss"),
    3: ("ardm.py", "ARDM.generate", "ARDM.nll"),
    4: ("planner.py", "plan_cost", "isotonic", "smooth"),
    5: ("planner.py", "one_more_call", "one_more_call_fast", "best_path"),
    6: ("ardm.py", "UpscaleARDM.coarsen", "UpscaleARDM.symbol", "UpscaleARDM.refine"),
    7: ("ardm.py", "UpscaleARDM.sum_values"),
    8: ("coder.py", "quantize", "encode", "Decoder.pop"),
    9: ("compress.py", "Codec.encode", "Codec.decode")}
SOLUTIONS = {Path("exercises", "prove.py"), Path("results", "index.html")}     # they show some
LEFT_OUT = {".git", ".venv", "venv", "out", "data", "__pycache__", ".pytest_cache"}


def files(root):
    """The files of the project, relative: those that git tracks, or in a download all."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True,
                                check=True).stdout
        return [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
    found = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return [path for path in found if not LEFT_OUT & set(path.parts)]


def blank(source, names, number):
    """Python source in which the bodies of these functions raise NotImplementedError."""
    lines, found = source.split("\n"), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body
                      if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, node)
    for name in sorted(names, key=lambda name: -found[name].lineno):     # from below
        node = found[name]
        text = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        lines[text:node.end_lineno] = [" " * (node.col_offset + 4) + "raise NotImplementedError("
                                       f'"exercise {number:02}: {name} is yours to write")']
    return "\n".join(lines)


def make(folder, numbers=EXERCISES, root=ROOT):
    """Writes the copy in which these exercises are blank."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    for path in files(root):
        if path in SOLUTIONS:
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, folder / path)
    (folder / MARK).parent.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("".join(f"{number}\n" for number in numbers), "utf-8")
    for number in numbers:
        name, *functions = EXERCISES[number]
        source = (folder / name).read_text("utf-8")
        (folder / name).write_text(blank(source, functions, number), "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", type=int, choices=EXERCISES, help="blank this exercise alone")
    args = parser.parse_args()
    numbers = [args.only] if args.only else list(EXERCISES)
    try:
        make(args.folder, numbers)
    except (ValueError, OSError) as error:
        print(f"exercises.make: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(numbers)} of {len(EXERCISES)} exercises are blank in {args.folder}; there:\n"
          f"  exercises/README.md\n  python -m exercises.check")


if __name__ == "__main__":
    main()
