"""Bad input: one line, exit code 2, nothing written. And samples of every kind."""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import wave
from pathlib import Path

from conftest import call, pack, pictures, wav_bytes

import numpy as np
import pytest
import torch

import compress
import data as datasets
import nets
import planner
import sample
import train
from ardm import ARDM


def test_sample_takes_the_newest_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("b", 2000), ("a", 1000)):
        path = tmp_path / "out" / name / "ckpt.pt"
        path.parent.mkdir(parents=True)
        shutil.copy(folder / "ckpt.pt", path)
        os.utime(path, (seconds, seconds))
    assert call(sample, "--n", 1) == 0
    assert f"by {Path('out/b/ckpt.pt')}\n" in capsys.readouterr().out
    assert Path("out/b/samples.txt").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(io.StringIO()):        # a notebook's has no reconfigure
        assert call(sample, "--ckpt=~/out/a/ckpt.pt", "--n", 1, "--out=~/mine") == 0
    assert Path("mine/samples.txt").exists() and signal.getsignal(signal.SIGTERM) is before


def test_in_a_prompt_an_underscore_is_a_blank_an_escaped_one_is_itself():
    x, known = sample.read_prompt(r"a\_b_\n_", 256)
    assert bytes(x.tolist()) == b"a_b \\n " and known.tolist() == [1, 1, 1, 0, 1, 1, 0]
    x, known = sample.read_prompt("é", 256, length=4)
    assert bytes(x.tolist()) == "é  ".encode() and known.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("T, n_known", [(24, 0), (25, 0), (60, 0), (60, 30), (61, 41), (7, 2)])
def test_windows_cover_what_is_unknown_once_and_see_what_came_before(T, n_known):
    model, known = ARDM(None, 24, 27), torch.arange(T) < n_known
    args = argparse.Namespace(order="forward", calls=None)
    seen = known.clone()
    settings = dict(settings=dict(shape=[24], kind="text"))
    for part, m, plan in sample.windows(model, settings, known, args):
        assert part.stop - part.start <= 24 and torch.equal(m, seen[part]) and not m.all()
        assert part.start == 0 or m[:12].all()
        assert part.start in (0, T - 24) or not m[12]      # the first blank is in the middle
        assert [t for _, t, _ in plan] == list(range(int(m.sum()) + 1, len(m) + 1))
        seen[part] = True
    assert seen.all()


def test_a_short_prompt_reads_L_where_as_much_is_known():
    L, known = planner.smooth(np.geomspace(9, 0.1, 24)[None]), torch.arange(12) < 2
    (_, _, plan), = sample.windows(ARDM(None, 24, 27), dict(
        L=np.geomspace(9, 0.1, 24)[None], settings=dict(shape=[24], kind="text")), known,
        argparse.Namespace(order="random", calls=3))
    assert plan == [(1, t + 2, k) for _, t, k in planner.plan(L[:, 4::2], 3)]
    assert plan != [(1, t + 2, k) for _, t, k in planner.plan(L[:, 2:12], 3)]

def test_longer_text_and_sound_go_on_by_windows(folder, studio, tmp_path):
    text = ("--ckpt", folder / "ckpt.pt", "--out", tmp_path, "--calls", 6, "--n", 3)
    for length, prompt in ((70, ""), (70, "so long a prompt that it is cut"), (9, "")):
        flags = ("--prompt", prompt) if prompt else ()
        assert call(sample, *text, "--length", length, *flags) == 0
        lines = (tmp_path / "samples.txt").read_text().splitlines()
        assert len(lines) == 3 and all(len(line) == length for line in lines)
        assert all(line.startswith(prompt) for line in lines)
    for length in (150, 3):
        assert call(sample, "--ckpt", studio / "ckpt.pt", "--out", tmp_path, "--length", length,
                    "--calls", 6, "--n", 2) == 0
        with wave.open(str(tmp_path / "samples.wav")) as file:
            assert file.getnframes() == 2 * (length + 800)


def test_a_terminal_shows_how_a_text_fills_in(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "PAUSE", 0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "16")
    flags = ("--ckpt", folder / "ckpt.pt", "--n", 3, "--calls", 4, "--out", tmp_path)
    for lines in ("2", "6"):                               # of two there is no room for a sample
        monkeypatch.setenv("LINES", lines)
        assert call(sample, *flags) == 0
        printed = capsys.readouterr().out
        states = re.findall("\x1b\\[2A\x1b\\[J([a-z_ ]{24})\n", printed)
        assert lines == "6" or not states
    left = [text.count("_") for text in states[:4]]
    assert 24 > left[0] > left[1] > left[2] > left[3] == 0
    assert printed.split("\x1b[J")[-1].startswith(states[3])


def test_a_mask_in_a_file_says_what_is_known(gallery, tmp_path, monkeypatch, refused):
    shown = []
    monkeypatch.setattr(datasets, "png", lambda pixels: shown.append(pixels) or b"")
    mask, flags = tmp_path / "mask.npy", ("--ckpt", gallery / "ckpt.pt", "--out", tmp_path / "out")
    known = np.arange(30).reshape(6, 5) % 3 == 0
    np.save(mask, known)
    assert call(sample, *flags, "--inpaint", mask, "--n", 2, "--from", gallery / "test.npy") == 0
    rows = shown[0][::13, ::13]
    original = np.load(gallery / "test.npy")[0]
    for j in range(2, 6):
        part = rows[:6, 6 * j:6 * j + 5]
        assert np.array_equal(part[known], original[known]) and not np.array_equal(part, original)
    for wrong, match in ((np.ones((6, 5), bool), "some must be known"),
                         (known * 1, "holds torch.int"),
                         (known[0], "bool [3, 6, 5] or [6, 5] is wanted"),
                         (known & False, "some must be known"),
                         (np.array([{}]), "or a .npy file of bool")):
        np.save(mask, wrong)
        refused(sample, *flags, "--inpaint", mask, match=match)


def test_images_are_sampled_completed_and_shown(gallery, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(datasets, "png", lambda pixels: shown.append(pixels) or b"")
    for flags in (["--frames"], ["--inpaint", "top"]):
        assert call(sample, "--ckpt", gallery / "ckpt.pt", "--n", 3, "--calls", 20, *flags,
                    "--out", tmp_path) == 0
    names = ["frames.png", "inpaint.png", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    drawn, frames, completed = shown
    assert frames.shape[1] == 12 * drawn.shape[1] / 3 and (frames[:, :60] == 128).mean() > 0.8
    assert np.array_equal(frames[:78, -78:-13], drawn[:78, :65])
    settings = torch.load(gallery / "ckpt.pt", weights_only=True)["settings"]
    assert not settings["branch"] or (frames[:, 312:377] == 128).all(axis=2).mean() < 0.1  # stage 2
    with pytest.raises(ValueError, match="not of image"):
        nets.build(settings | dict(shape=[100, 6, 5]))
    rows = completed[::13, ::13]                           # enlarged 13 times, with a gap of one
    for i, original in enumerate(np.load(gallery / "test.npy")[[0, 5, 10]]):
        row = [rows[7 * i:7 * i + 6, 6 * j:6 * j + 5] for j in range(6)]
        assert np.array_equal(row[0], original) and (row[1][3:] == 128).all()
        assert all(np.array_equal(part[:3], original[:3]) for part in row[1:])


def test_sounds_are_drawn_completed_and_shown(studio, tmp_path, capsys):
    results = json.loads((studio / "results.json").read_text())
    assert results["rate"] == 8000 and {"xz", "uniform"} < results["references"].keys()
    ckpt = ("--ckpt", studio / "ckpt.pt", "--out", tmp_path)
    assert call(sample, *ckpt, "--n", 2, "--frames") == 0
    assert "64 network calls" in capsys.readouterr().out
    with wave.open(str(tmp_path / "samples.wav")) as file:
        assert file.getframerate() == 8000 and file.getnframes() == 2 * (64 + 800)
        assert len(set(file.readframes(64))) > 30
    test = datasets.file_array((studio / "test.wav").read_bytes(), "test").array[0]
    (tmp_path / "fast.wav").write_bytes(wav_bytes(test[:, None], rate=16000))
    assert call(sample, *ckpt, "--inpaint", "ends", "--n", 2, "--from", tmp_path / "fast.wav") == 0
    (tmp_path / "fast.wav").rename(tmp_path / "samples.wav")
    assert call(sample, *ckpt, "--inpaint", "ends", "--from", tmp_path / "inpaint.wav") == 2
    with wave.open(str(tmp_path / "inpaint.wav")) as file:
        assert file.getframerate() == 16000                # the file's own
        found = np.frombuffer(file.readframes(8 * 1664), "<i2").reshape(8, 1664)
    assert np.array_equal(found[0, :16], test[:16]) and np.array_equal(found[3, 48:64], test[48:64])
    assert not np.array_equal(found[0, 16:48], found[1, 16:48])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frames.png", "inpaint.png", "inpaint.wav", "samples.png", "samples.wav"]


@pytest.fixture(scope="module")
def bad(folder, model, tmp_path_factory):
    """A folder of files that are wrong, each in its way."""
    place = tmp_path_factory.mktemp("bad")
    archive, _ = pack(place, model, b"some text")
    for name, content in (("empty", b""), ("in", b"Hello"), ("foreign", os.urandom(300)),
                          ("bytes", bytes(range(1, 256)) * 10), ("a", archive),
                          ("cut", archive[:-1]), ("old", archive[:4] + b"\x08" + archive[5:])):
        (place / name).write_bytes(content)
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    (place / "cut.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:9000])
    torch.save(Path, place / "code.pt")
    for name, change in (("second", dict(edition=None)), ("deep", dict(depth=10 ** 6)),
                         ("long", dict(shape=[20_000_000])), ("odd", dict(data=None)),
                         ("axes", dict(shape=[1, 4, 6]))):
        torch.save(whole | dict(settings=whole["settings"] | change), place / f"{name}.pt")
    torch.save(whole | dict(L=torch.zeros(4, 24)), place / "rows.pt")
    wide = whole["ema"] | dict(more=torch.zeros(1).expand(1 << 40))
    torch.save(whole | dict(ema=wide), place / "wide.pt")
    shutil.make_archive(place / "packed", "zip", folder)
    other = torch.load(folder / "ckpt.pt", weights_only=True)
    other["ema"]["net.head.bias"] += 1
    torch.save(other, place / "other.pt")
    other["ema"]["net.head.bias"] += np.nan
    torch.save(other, place / "nan.pt")
    return place


REFUSALS = """
train --data tex8 -> no such file, and none of the names pydoc, glyphs
train --data {bad}/empty -> 0 values for train, fewer than 64
train --steps 0 -> --steps 0: choose a number above 0
train --seed -1 -> --seed -1: choose a number from 0
train --resume --evaluate x -> --evaluate: not allowed with argument --resume
train --steps 3 --minutes 1 -> --minutes: not allowed with argument --steps
train --bits 5 -> --bits is for images
train --data tones --parametrization data -> data is not for audio
train --resume -> no such checkpoint
train --steps 1 --out {bad}/empty -> File exists
train --evaluate {run}/ckpt.pt --data {bad}/bytes -> was trained on ('
train --resume --out {run} --dim 64 -> leave out --dim
train --resume --out {run} --data {bad}/bytes -> is not the data that
train --evaluate {bad}/cut.pt -> is no checkpoint
train --evaluate {bad}/second.pt -> not of edition 3
sample --ckpt {bad}/code.pt -> is no checkpoint
sample --ckpt {bad}/deep.pt -> its settings want more weights
sample --ckpt {bad}/nan.pt -> its weights are not numbers
sample --ckpt {bad}/axes.pt -> not of text
sample --ckpt {bad}/rows.pt -> its L is not of this model
sample --ckpt {bad}/wide.pt -> more weights than it has, or fewer
sample --ckpt {bad}/packed.zip -> torch does not pack
train --evaluate {bad}/odd.pt -> a setting is no word
sample --ckpt {bad}/long.pt -> is no checkpoint
sample --ckpt {run}/ckpt.pt --calls 25 -> 25 network calls: choose 1 to 24
sample --ckpt {run}/ckpt.pt --prompt the____of --length 5 -> --length 5: the prompt alone has 9
sample --ckpt {run}/ckpt.pt --n 10000000000 -> --n 10000000000: choose a number above 0, 10^9
sample --ckpt {run}/ckpt.pt --prompt nothing -> no blank
sample --ckpt {run}/ckpt.pt --prompt -5____ -> try --prompt=-5____
sample --ckpt {run}/ckpt.pt --length 30 --frames -> one window
sample --ckpt {run}/ckpt.pt --from x -> --inpaint and --from are for images
sample --ckpt {run}/ckpt.pt --device meta -> choose cuda, mps or cpu
sample --ckpt {pictures}/ckpt.pt --prompt a_ -> --prompt is for text
sample --ckpt {pictures}/ckpt.pt --inpaint bottom -> choose left or top
compress encode --ckpt {run}/ckpt.pt {bad}/in {out} -> 'H' at position 0
compress encode --ckpt {run}/ckpt.pt {bad}/none {out} -> none: No such file
compress encode --ckpt {run}/ckpt.pt {bad}/in {bad}/in -> the same file
compress encode --ckpt {run}/ckpt.pt {bad}/in /dev/null -> no ordinary file
compress encode --ckpt {run}/ckpt.pt {bad}/in {run}/ckpt.pt -> the same file
compress decode --ckpt {run}/ckpt.pt {bad}/foreign {out} -> is no archive
compress decode --ckpt {run}/ckpt.pt {bad}/old {out} -> has format version 08, not 9
compress decode --ckpt {run}/ckpt.pt {bad}/cut {out} -> is damaged: block 0
compress decode --ckpt {run}/ckpt.pt --item 1 {bad}/a {out} -> --item 1:
compress decode --ckpt {bad}/other.pt {bad}/a {out} -> written with another checkpoint
compress bench --ckpt {run}/ckpt.pt {bad}/empty -> is empty
compress bench -> name a file, or a checkpoint
train --out= -> a flag has an empty value
train --depth 99999999 -> too much, or not of text
"""


@pytest.mark.parametrize("row", REFUSALS.strip().split("\n"))
def test_what_a_user_can_mend_is_one_line(row, bad, folder, gallery, refused, tmp_path,
                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, _, match = row.partition(" -> ")
    name, *flags = line.format(bad=bad, run=folder, pictures=gallery, out=tmp_path / "out").split()
    script = dict(train=train, sample=sample, compress=compress)[name]
    refused(script, *flags, match=match)


def test_files_that_a_model_of_images_does_not_know_are_refused(gallery, refused, tmp_path):
    ckpt, out = ("--ckpt", gallery / "ckpt.pt"), tmp_path / "out"
    np.save(tmp_path / "objects.npy", np.array([Path("x")]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((gallery / "test.npy").read_bytes()[:300])
    bad = {"shape": (pictures(30, (5, 6, 3)), "the model takes a .npy of (C, H, W) = (3, 6, 5)"),
           "grey": (pictures(30, (6, 5)), "the model takes"),
           "float": (np.zeros((30, 6, 5, 3)), "float64"),
           "flat": (np.zeros(90, np.uint8), "has the shape (90,)"),
           "objects": (None, "cannot be read as .npy"), "cut": (None, "cannot be read as .npy")}
    for name, (pixels, match) in bad.items():
        if pixels is not None:
            np.save(tmp_path / f"{name}.npy", pixels)
        refused(compress, "encode", *ckpt, tmp_path / f"{name}.npy", out, match=match)
        if name not in ("shape", "grey"):
            refused(train, "--data", tmp_path / f"{name}.npy", "--out", out, match=match)


def test_a_checkpoint_of_settings_and_weights_alone_samples_and_codes(folder, tmp_path, refused):
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save({key: whole[key] for key in ("settings", "ema")}, tmp_path / "ckpt.pt")
    ckpt = ("--ckpt", tmp_path / "ckpt.pt")
    assert call(sample, *ckpt, "--calls", 5, "--out", tmp_path) == 0
    (tmp_path / "in").write_text("some text")
    assert call(compress, "encode", *ckpt, tmp_path / "in", tmp_path / "out") == 0
    refused(train, "--resume", "--out", tmp_path, match="the whole state of a run")
    torch.save({key: whole[key] for key in ("settings", "ema", "L")}, tmp_path / "ckpt.pt")
    assert call(sample, *ckpt, "--calls", 5, "--out", tmp_path) == 0


def test_control_characters_do_not_reach_the_terminal(refused, tmp_path):
    refused(train, "--data", "\x1b]0;title\x07", match="--data \\x1b]0;title\\x07: no such file")
