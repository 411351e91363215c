"""Runs the tests of exercises in processes of their own: only what ran and passed is right."""
import collections
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

SECONDS = 120                        # for the tests of one part


def pytest_command(folder, place, *arguments):
    """What runs tests of a folder, whatever settings of pytest lie around or above it."""
    (place / "pytest.ini").write_text("[pytest]\n")
    return [sys.executable, "-m", "pytest", "-q", "-c", str(place / "pytest.ini"), "--rootdir",
            str(folder), "-p", "no:cacheprovider", "--tb=short", *arguments]


def environment():
    """The same everywhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | dict(COLUMNS="80", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def names_of(folder):
    """{number: the names of the tests of that exercise, in their order}."""
    with tempfile.TemporaryDirectory() as place:
        command = pytest_command(folder, Path(place), "--collect-only", "test_ardm.py")
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True,
                              text=True)
    names = collections.defaultdict(list)
    for number, name in re.findall(r"::(?=test_exercise_(\d\d))(.*)", done.stdout):
        names[int(number)].append(name)
    return names


def run_tests(folder, *arguments, seconds=SECONDS):
    """Runs tests of a folder. -> {test: None if it ran and passed, else (message, text)}; one named
    * if pytest itself does not come to an end."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        command = pytest_command(folder, Path(place), f"--junitxml={report}", *arguments)
        try:
            done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True,
                                  text=True, encoding="utf-8", errors="replace",
                                  stdin=subprocess.DEVNULL, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"*": (f"not done after {seconds} seconds: does a loop never end?", "")}
        if done.returncode not in (0, 1) or not report.exists():
            lines = [line[1:].strip() for line in done.stdout.split("\n") if line[:1] == "E"]
            return {"*": ((lines or ["no tests were found"])[-1], done.stdout)}
        return {case.get("name"): verdict(case) for case in xml.parse(report).iter("testcase")}


def verdict(case):
    """None if a test ran and passed, else (message, text): skipped is not passed."""
    for kind in ("failure", "error", "skipped"):
        for wrong in case.findall(kind):
            words = wrong.get("message", "").removeprefix("AssertionError: ").split("\n")[0]
            text = wrong.get("message", "") + (wrong.text or "")
            waits = re.search(r"(exercise \d\d): (\S+) is yours to write", text)
            if waits:
                words = f"waits for {waits[1]}, {waits[2]}"
            return (f"skipped: {words}" if kind == "skipped" else words), text
    return None


def first_wrong(found, names):
    """What is said of the first of these tests that did not run and pass, or None."""
    if "*" in found:
        return found["*"][0]
    for name in names:
        if name not in found:
            return f"{name} did not run"
        if found[name]:
            return found[name][0]
    return None
