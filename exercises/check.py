"""Which exercises are solved: python -m exercises.check, in an assignment or in the project.

    python -m exercises.check              in an assignment: a line for each exercise
    python -m exercises.check FOLDER       in the project: grades FOLDER, by the project's own tests
        --json FILE                        the points as Gradescope reads them
        --junit FILE                       the same as JUnit XML
    python -m exercises.check [--quick]    in the project: the proof that the tests tell right from
                                           wrong; --quick: by fewer tests and mistakes

What is submitted runs in processes of their own with a time limit, but it can do all that you can:
grade in a container.
"""
import argparse
import json
import re
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from exercises.make import EXERCISES, MARK, ROOT, functions, make
from exercises.run import first_wrong, names_of, run_tests

REPORT = re.compile(r"\|\s*(10|50|200)\s*\|\s*(\d+\.\d+)\s*\|\s*(\d+\.\d+)")     # of exercise 10


def merged(student, solution, part):
    """The student's file, in which all other blank functions are the solution's: a fault in one
    part does not hide the others. ValueError if a function is missing, or the file is no Python."""
    wanted = [name for _, parts in EXERCISES.values() for name in parts]
    right, found, lines = functions(solution), functions(student), student.split("\n")
    others = [name for name in wanted if name in right and name != part]
    for name in sorted(others, key=lambda name: -found[name].lineno if name in found else 0):
        new = span(right[name], solution)
        if name in found:
            begin = first_line(found[name])
            lines[begin - 1:found[name].end_lineno] = new
        elif "." not in name:
            lines += new
    for name in (part, *others):
        if name not in found and (name == part or "." in name):
            raise ValueError(f"{name} is missing")
    return "\n".join(lines)


def first_line(node):
    """The number of the first line of a function, decorators included."""
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def span(node, source):
    """The lines of a function."""
    return source.split("\n")[first_line(node) - 1:node.end_lineno]


def grade_part(copy, folder, number, part, names):
    """None if a part is right, or what is wrong. copy: a whole project."""
    file = EXERCISES[number][0]
    solution = (copy / file).read_text("utf-8")
    try:
        student = (folder / file).read_text("utf-8-sig")
        (copy / file).write_text(merged(student, solution, part), "utf-8")
    except (SyntaxError, ValueError, OSError) as error:
        return f"{file}: {error}"
    try:
        return first_wrong(run_tests(copy, "test_ardm.py", "-k", f"exercise_{number:02}"), names)
    finally:
        (copy / file).write_text(solution, "utf-8")


def grade_tenth(folder):
    """Nothing if the run and the three numbers are there, or what is missing."""
    try:
        results = json.loads((folder / "exercise_10" / "results.json").read_text("utf-8"))
        report = (folder / "exercise_10" / "report.md").read_text("utf-8-sig")
    except OSError:
        return "exercise_10/results.json or exercise_10/report.md is not there"
    except ValueError as error:
        return f"exercise_10 cannot be read: {error}"
    calls = {found[1] for found in REPORT.finditer(report)}
    if not isinstance(results, dict) or "bits_per_dim" not in results:
        return "exercise_10/results.json is not what train.py writes"
    missing = ", ".join(sorted({"10", "50", "200"} - calls, key=int))
    return missing and f"report.md has no row | calls | predicted | measured | for {missing} calls"


def grade(folder, numbers=EXERCISES):
    """[(exercise, part, points, most, words)] of a folder, printed line by line."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [])
        names = names_of(copy)
        for number in numbers:
            for part, most in EXERCISES[number][1].items():
                wrong = grade_part(copy, folder, number, part, names[number])
                rows.append((number, part, 0 if wrong else most, most, wrong or "right"))
                print("exercise {:02}, {}: {} of {}: {}".format(*rows[-1]), flush=True)
    wrong = grade_tenth(folder)
    rows.append((10, "the run and three numbers", 0 if wrong else 10, 10, wrong or "there"))
    print("exercise {:02}, {}: {} of {}: {}".format(*rows[-1]))
    print(f"total: {sum(row[2] for row in rows)} of {sum(row[3] for row in rows)}")
    return rows


def as_json(rows):
    """What Gradescope reads."""
    return json.dumps({"tests": [
        dict(name=f"exercise {number:02}: {part}", score=points, max_score=most, output=words)
        for number, part, points, most, words in rows]}, indent=1)


def as_junit(rows):
    """JUnit XML."""
    suite = xml.Element("testsuite", name="exercises", tests=str(len(rows)),
                        failures=str(sum(points < most for _, _, points, most, _ in rows)))
    for number, part, points, most, words in rows:
        case = xml.SubElement(suite, "testcase", classname=f"exercise_{number:02}", name=part)
        if points < most:
            xml.SubElement(case, "failure", message=words)
    return xml.tostring(suite, "unicode")


def look(folder):
    """In an assignment: a line for each exercise. True if all tests pass."""
    solved, names = True, names_of(folder)
    for number in EXERCISES:
        found = run_tests(folder, "test_ardm.py", "-k", f"exercise_{number:02}")
        wrong = first_wrong(found, names[number])
        passed = sum(found.get(name, "") is None for name in names[number])
        solved = solved and not wrong
        print(f"exercise {number:02}: {passed} of {len(names[number])} tests pass"
              + (f"; {wrong}" if wrong else ""), flush=True)
    return solved


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="an assignment to be graded")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the points for Gradescope")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the points as JUnit XML")
    parser.add_argument("--quick", action="store_true", help="a shorter proof")
    args = parser.parse_args()
    if not args.folder:
        if (ROOT / MARK).exists():
            sys.exit(not look(ROOT))
        from exercises.prove import prove                  # not in an assignment: it has solutions
        sys.exit(not prove(args.quick))
    if not (args.folder / "ardm.py").is_file() or (ROOT / MARK).exists():
        print(f"exercises.check: {args.folder} is no assignment with an ardm.py, or this is one: "
              "grade in the project", file=sys.stderr)
        sys.exit(2)
    wanted = [(path, form) for path, form in ((args.json, as_json), (args.junit, as_junit)) if path]
    try:
        for path, _ in wanted:
            path.touch()                                   # before minutes of work
    except OSError as error:
        print(f"exercises.check: {error}", file=sys.stderr)
        sys.exit(2)
    rows = grade(args.folder)
    for path, form in wanted:
        path.write_text(form(rows), "utf-8")
    sys.exit(any(points < most for _, _, points, most, _ in rows))


if __name__ == "__main__":
    main()
