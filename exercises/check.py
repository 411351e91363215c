"""Which exercises are solved: python -m exercises.check, in an assignment or in the project.

    python -m exercises.check              in an assignment: a line for each exercise
    python -m exercises.check FOLDER       in the project: grades FOLDER by the project's own tests
    python -m exercises.check [--quick]    in the project: the proof that the tests tell right from
                                           wrong; --quick: with fewer of the other tests
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from exercises.make import EXERCISES, MARK, ROOT, make

SECONDS = 120                        # for the tests of one exercise

def failures(folder, expression=None):
    """{test: its message and text} of the tests of a folder that fail; of one named * if pytest
    itself does not come to an end."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
                   f"--junitxml={report}", *(["-k", expression] if expression else [])]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                  encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
                                  timeout=SECONDS if expression else 10 * SECONDS)
        except subprocess.TimeoutExpired:
            return {"*": (f"not done after {SECONDS} seconds: does a loop never end?", "")}
        if done.returncode not in (0, 1) or not report.exists():
            lines = [line[1:].strip() for line in done.stdout.split("\n") if line[:1] == "E"]
            return {"*": ((lines or ["no tests were found"])[-1], done.stdout)}
        found = {}
        for case in xml.parse(report).iter("testcase"):
            for wrong in [*case.findall("failure"), *case.findall("error")]:
                words = wrong.get("message", "").removeprefix("AssertionError: ").split("\n")[0]
                text = wrong.get("message", "") + (wrong.text or "")
                blank = re.search(r"(exercise \d\d): (\S+) is yours to write", text)
                if blank:
                    words = f"waits for {blank[1]}, {blank[2]}"
                found[case.get("name")] = (words, text)
        return found


def grade(folder, broken=()):
    """Prints a line for each exercise, by the tests in the folder. True if all are passed. broken:
    {file: what is wrong with it as a whole}."""
    passed = True
    for number, (name, *_) in EXERCISES.items():
        wrong = {name: (broken[name], "")} if name in broken else failures(
            folder, f"exercise_{number:02}")
        words = next(iter(wrong.values()))[0] if wrong else "passed"
        passed = passed and not wrong
        print(f"exercise {number:02}: {words}", flush=True)
    return passed


def grade_by_own_tests(folder):
    """The same by the project's tests and files, with the student's functions."""
    broken = {}
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [])
        for name in {name for name, *_ in EXERCISES.values()}:
            try:
                ast.parse((folder / name).read_text("utf-8"))
                shutil.copy(folder / name, copy / name)
            except (SyntaxError, ValueError, OSError) as error:
                broken[name] = f"{name} cannot be read: {error}"
        return grade(copy, broken)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="an assignment to be graded")
    parser.add_argument("--quick", action="store_true", help="a shorter proof")
    args = parser.parse_args()
    if args.folder:
        if not (args.folder / "ardm.py").is_file():
            print(f"exercises.check: {args.folder} is no assignment: it has no ardm.py",
                  file=sys.stderr)
            sys.exit(2)
        good = grade_by_own_tests(args.folder)
    else:
        if (ROOT / MARK).exists():
            good = grade(ROOT)
        else:
            from exercises.prove import prove              # not in an assignment: it has solutions
            good = prove(args.quick)
    sys.exit(not good)


if __name__ == "__main__":
    main()
