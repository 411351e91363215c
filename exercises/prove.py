"""The proof that the tests of the exercises tell right from wrong. It holds solutions, so it is not
copied into an assignment; python -m exercises.check runs it in the project.

Where an exercise is blank its tests fail, and others only if they meet the blank; and the classic
mistakes below fail, with a message.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from exercises.check import failures
from exercises.make import EXERCISES, make

MISTAKES = (                         # exercise, what is wrong, the right code, the wrong code
    (1, "sigma counts from 0", "argsort(dim=1) + 1", "argsort(dim=1)"),
    (2, "the weight is 1/t", "/ (D - t + 1)", "/ t"),
    (2, "the mask is sigma <= t", "m = sigma < t[:, None]", "m = sigma <= t[:, None]"),
    (2, "the loss is over what is known", "torch.where(m, 0, log_p)", "torch.where(m, log_p, 0)"),
    (3, "a call sees sigma <= t", "m = sigma[s - 1] < t ", "m = sigma[s - 1] <= t "),
    (3, "a call generates one too few", "(sigma[s - 1] < t + k)", "(sigma[s - 1] < t + k - 1)"),
    (4, "smooth returns L as it was", "return isotonic(local_fit(L, weights), weights)",
     "return L"),
    (4, "a call costs the next L", "k * np.atleast_2d(L)[s - 1, t - 1]",
     "k * np.atleast_2d(L)[s - 1, min(t, np.shape(L)[-1] - 1)]"),
    (5, "a call costs the L behind it", "cost = [E[i] + (j - i) * L[i] ",
     "cost = [E[i] + (j - i) * L[j - 1] "),
    (5, "the fast programme costs the L behind it", "(np.repeat(j, width) - i) * L[i] ",
     "(np.repeat(j, width) - i) * L[np.repeat(j, width) - 1] "),
    (5, "a plan has calls with no variable", "calls.append((i + 1, j - i))",
     "calls.append((i + 1, j - i - 1))"),
    (6, "digits from the least significant end", "return x // self.unit(s) % self.A",
     "return x // self.A ** (s - 1 if not torch.is_tensor(s) else s[:, None] - 1) % self.A"),
    (7, "the values of a digit are not summed up", "logits = branches.logsumexp(dim=-1)",
     "logits = branches[..., 0]"),
    (8, "symbols are pushed in reading order", "zip(starts[::-1].tolist(), freqs[::-1].tolist())",
     "zip(starts.tolist(), freqs.tolist())"),
    (8, "a frequency is 0", "w.sum(axis=1, keepdims=True) + 1", "w.sum(axis=1, keepdims=True)"),
    (9, "the decoder does not read the shift", "a = decoder.pop(coder.quantize(log_p, shift))",
     "a = decoder.pop(coder.quantize(log_p))"),
    (9, "blocks have no number", "good = check == zlib.crc32(raw, number)", "good = True"))


def names_of(folder, expression):
    """The names of the tests that -k finds."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", expression]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.split("\n")
    return {line.split("::")[1] for line in lines if "::" in line}


def prove_blank(number, quick):
    """A line on the assignment in which only this exercise is blank. True if it is as it must be:
    its tests fail, others only because they meet the blank."""
    own = f"exercise_{number:02}"
    others = [f"exercise_{n:02}" for n in (2, 5, 8) if n != number][:2]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [number])
        wrong = failures(copy, " or ".join([own, *others]) if quick else None)
        names = names_of(copy, own)
    missed = sorted(names - wrong.keys())
    strangers = [name for name, (words, text) in wrong.items() if own not in name
                 and f"exercise {number:02}" not in words + text]
    good = bool(names) and not missed and not strangers
    print(f"exercise {number:02} blank: its {len(names)} tests fail, and "
          f"{len(wrong) - len(names)} that build on it" if good else
          f"exercise {number:02} blank, WRONG: {missed} pass, {strangers} fail", flush=True)
    return good


def prove_mistake(number, what, right, mistake):
    """A line on a classic mistake. True if the tests of the exercise fail with a message."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "copy")
        make(copy, [])
        path = copy / EXERCISES[number][0]
        source = path.read_text("utf-8")
        assert source.count(right) == 1, f"{what}: {right!r} is not in the source once"
        path.write_text(source.replace(right, mistake), "utf-8")
        wrong = failures(copy, f"exercise_{number:02}")
    words = next(iter(wrong.values()))[0] if wrong else "NOT NOTICED"
    print(f"exercise {number:02}, {what}: {words}", flush=True)
    return bool(wrong) and "*" not in wrong


def prove(quick):
    """Prints the proof, line by line. True if it holds."""
    held = [prove_blank(number, quick) for number in EXERCISES]
    held += [prove_mistake(*mistake) for mistake in MISTAKES if not quick]
    return all(held)
