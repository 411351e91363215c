"""The proof that the tests of the exercises tell right from wrong. It is not copied into an
assignment, as mistakes.json shows pieces of solutions; python -m exercises.check runs it.

Where an exercise is blank its tests fail, and others only if they meet the blank. They pass where
all is blank that `make.NEEDS` does not name. And every mistake in mistakes.json is noticed, with a
message.
"""
import json
import tempfile
from pathlib import Path

from exercises.make import EXERCISES, NEEDS, make
from exercises.run import first_wrong, names_of, run_tests


def needed(number):
    """An exercise and all that its tests use."""
    return {number}.union(*(needed(other) for other in NEEDS.get(number, ())))


def own(number):
    return f"exercise_{number:02}"


def prove_blank(number, quick):
    """A line on the assignment in which only this exercise is blank. True if it is as it must be:
    its tests fail, others only because they meet the blank."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [number])
        found = run_tests(copy, "test_ardm.py", "-k", own(number) if quick else "exercise")
        names = names_of(copy)[number]
    passed = [name for name in names if found.get(name, "") is None]
    strangers = [name for name, wrong in found.items() if wrong and own(number) not in name
                 and f"exercise {number:02}" not in "".join(wrong)]
    good = bool(names) and not passed and not strangers
    print(f"exercise {number:02} blank: its {len(names)} tests fail" if good else
          f"exercise {number:02} blank, WRONG: {passed} pass, {strangers} fail", flush=True)
    return good


def prove_needs(number):
    """A line on the assignment in which all is blank that this exercise does not need. True if its
    tests pass."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, sorted({*EXERCISES} - needed(number)))
        wrong = first_wrong(run_tests(copy, "test_ardm.py", "-k", own(number)),
                            names_of(copy)[number])
    print(f"exercise {number:02} needs {sorted(needed(number) - {number})} "
          f"{f'and more: {wrong}' if wrong else 'alone'}", flush=True)
    return not wrong


def prove_mistake(exercise, what, right, wrong):
    """A line on a mistake. True if the tests of the exercise fail with a message."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [])
        path = copy / EXERCISES[exercise][0]
        source = path.read_text("utf-8")
        assert source.count(right) == 1, f"{what}: {right!r} is not in the source once"
        path.write_text(source.replace(right, wrong), "utf-8")
        found = run_tests(copy, "test_ardm.py", "-k", own(exercise))
        words = first_wrong(found, found)
    print(f"exercise {exercise:02}, {what}: {words or 'NOT NOTICED'}", flush=True)
    return bool(words) and "*" not in found


def prove(quick):
    """Prints the proof, line by line. True if it holds. quick: of the mistakes one an exercise."""
    mistakes = json.loads(Path(__file__).with_name("mistakes.json").read_text("utf-8"))
    if quick:
        mistakes = [next(row for row in mistakes if row["exercise"] == number)
                    for number in EXERCISES]
    held = [prove_blank(number, quick) for number in EXERCISES]
    held += [prove_needs(number) for number in EXERCISES if not quick]
    held += [prove_mistake(**row) for row in mistakes]
    return all(held)
