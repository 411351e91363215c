"""Archives: what comes back byte for byte, what decodes elsewhere, what is refused."""
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from conftest import HERE, LIST, call, child, pictures, wav_bytes

import numpy as np
import pytest
import torch

import compress
import data as datasets
import nets
import sample
import train
from test_ardm import blocks_of, pack, unpack

PROVERB = b"Whatever is worth doing at all, is worth doing well.\r\n\xff\x00"


def there_and_back(place, path, *flags):
    """The archive of a file, which comes back byte for byte."""
    ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
    archive, back = path.with_suffix(".ardm"), path.with_suffix(".back")
    assert call(compress, "encode", *ckpt, *flags, path, archive) == 0
    assert call(compress, "decode", *ckpt, archive, back) == 0
    assert back.read_bytes() == path.read_bytes()
    return archive


def image_files():
    """{name: bytes} of files of the pictures that `gallery` knows."""
    pixels, files = pictures(7, (6, 5, 3)), {}
    for name, array in (("last", pixels), ("first", pixels.transpose(0, 3, 1, 2).copy()),
                        ("mask", pixels > 200), ("odd", (pixels > 200).view("u1") * 255)):
        file = io.BytesIO()
        np.save(file, array.view(bool) if name == "odd" else array)
        files[name] = file.getvalue()
    file = io.BytesIO()
    np.lib.format.write_array(file, pixels, version=(2, 0))
    return files | {"version 2": file.getvalue(), "behind": files["last"] + b"behind" * 99}


def sound_files():
    """{name: bytes} of .wav files of every kind."""
    sound = (400 * np.sin(np.arange(200) / 7)).astype(int)
    stereo = np.stack((sound, sound[::-1]), axis=1)
    noise = np.random.default_rng(0).integers(-32768, 32768, (100, 1))
    cover = b"LIST" + struct.pack("<I", 1_200_000) + os.urandom(1_200_000)
    return {"plain": wav_bytes(sound[:, None]), "silence": wav_bytes(np.zeros((150, 1))),
            "stereo": wav_bytes(stereo, before=LIST, after=LIST),
            "empty": wav_bytes(sound[:0, None]), "one": wav_bytes(sound[:1, None], after=LIST),
            "noise": wav_bytes(noise) + b"\0",
            "endless": wav_bytes(sound[:, None], size=0xFFFFFFFF),
            "cover": wav_bytes(sound[:, None], after=cover), "44.1 kHz": wav_bytes(stereo, 44100)}


def test_image_files_come_back_byte_for_byte(gallery, tmp_path):
    ckpt, one = ("--ckpt", gallery / "ckpt.pt"), tmp_path / "one"
    for name, content in image_files().items():
        (tmp_path / "a").write_bytes(content)
        archive = there_and_back(gallery, tmp_path / "a", "--calls", 20)
        _, beside, _ = compress.read_header(archive.read_bytes(), "a")
        assert (beside is None) == (name in ("last", "first", "mask", "odd"))
        if name == "mask":
            assert call(compress, "decode", *ckpt, archive, one, "--item", 1) == 0
            assert np.array_equal(np.load(one), (pictures(7, (6, 5, 3)) > 200)[1:2])


def test_sound_files_come_back_byte_for_byte(studio, refused, tmp_path):
    ckpt, one = ("--ckpt", studio / "ckpt.pt"), tmp_path / "one.wav"
    for name, content in sound_files().items():
        (tmp_path / "a.wav").write_bytes(content)
        archive = there_and_back(studio, tmp_path / "a.wav", "--calls", 12)
        assert archive.stat().st_size < 1.002 * len(content) + 160
    assert call(compress, "encode", *ckpt, "--block", 1, tmp_path / "a.wav", tmp_path / "a") == 0
    assert call(compress, "decode", *ckpt, "--item", 1, tmp_path / "a", one) == 0
    part = datasets.file_array(one.read_bytes(), "one")
    whole = datasets.file_array((tmp_path / "a.wav").read_bytes(), "a").array.reshape(-1)
    assert part.rate == 44100 and np.array_equal(part.array[0], whole[64:128])
    assert call(train, "--steps", 2, "--dim", 8, "--depth", 1, "--passes", 1, "--length", 64,
                "--branch", 0, "--data", studio.parent / "a.wav", "--out", tmp_path / "run") == 0
    ckpt = ("--ckpt", tmp_path / "run" / "ckpt.pt")
    assert call(sample, *ckpt, "--n", 1, "--calls", 5, "--frames", "--out", tmp_path) == 0
    refused(compress, "encode", *ckpt, tmp_path / "a.wav", tmp_path / "c",
            match="order-agnostic model of audio cannot code")


@pytest.mark.parametrize("form", [
    [2 ** 30, 5], [8000, 65535], [8000.0, 1], [True, True], [8000, 0], ["x", 1], None, [1]])
def test_no_archive_of_sound_claims_a_file_that_cannot_be(form, studio, refused, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(np.zeros((0, 1))))
    archive = there_and_back(studio, tmp_path / "a.wav").read_bytes()
    (tmp_path / "bad").write_bytes(changed(archive, form=form))
    refused(compress, "decode", "--ckpt", studio / "ckpt.pt", tmp_path / "bad", tmp_path / "out",
            match="its header makes no sense")


def test_texts_come_back_whatever_the_order_and_the_blocks(folder, tmp_path, capsys):
    (tmp_path / "in").write_bytes((folder / "test.txt").read_bytes()[:2000])
    (tmp_path / "none").touch()
    for flags in (["--calls", 8], ["--order", "halves", "--block", 3], ["--order", "random:2"]):
        for name in ("in", "none"):
            there_and_back(folder, tmp_path / name, *flags)
    unfinished = torch.load(folder / "ckpt.pt", weights_only=True) | dict(L=None, counts=None)
    torch.save(unfinished, tmp_path / "u")
    assert call(compress, "encode", "--ckpt", tmp_path / "u", tmp_path / "in", tmp_path / "b") == 0
    assert "this run is not finished" in capsys.readouterr().err


def test_images_are_decoded_in_part_and_where_damaged(gallery, tmp_path, capsys):
    ckpt = ("--ckpt", gallery / "ckpt.pt", "--device", "cpu")
    pixels = pictures(9, (6, 5, 3), seed=1)
    np.save(tmp_path / "in.npy", pixels)
    path = there_and_back(gallery, tmp_path / "in.npy", "--calls", 20, "--block", 1)
    archive = bytearray(path.read_bytes())
    (tmp_path / "cut").write_bytes(archive[:blocks_of(archive)[2][0] + 3])
    for item in (7, 2):
        assert call(compress, "decode", *ckpt, "--item", item, tmp_path / "cut",
                    tmp_path / "b") == 2 and not (tmp_path / "b").exists()
        assert "is damaged" in capsys.readouterr().err
    archive[blocks_of(archive)[3][0] + 6] ^= 4
    (tmp_path / "a").write_bytes(archive)
    assert call(compress, "decode", *ckpt, tmp_path / "a", tmp_path / "b") == 2
    assert "block 3" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert call(compress, "decode", *ckpt, "--keep-going", tmp_path / "a", tmp_path / "b") == 1
    assert "block 3" in capsys.readouterr().err
    assert np.array_equal(np.load(tmp_path / "b"), np.delete(pixels, 3, axis=0))


def changed(archive, **change):
    """The archive with other fields in its header."""
    header, _, at = compress.read_header(archive, "archive")
    fields = [*(header | change).values()]
    text = zlib.compress(json.dumps(fields, separators=(",", ":")).encode() + b"\n", 9)
    return archive[:5] + len(text).to_bytes(4, "big") + text + archive[at:]


def test_headers_are_short_and_those_that_make_no_sense_are_refused(model, tmp_path):
    archive, _ = pack(tmp_path, model, b"some text")
    assert blocks_of(archive)[0][0] < 86
    assert unpack(model, changed(archive)) == b"some text"
    assert unpack(model, changed(archive, plan=[[4] * 6])) == b"some text"
    for change in (dict(length=10 ** 12), dict(block=0), dict(block=10 ** 9), dict(length=-1),
                   dict(plan=[[0, 24]]), dict(plan=[[10 ** 12]]), dict(plan=[[-1, 25]]),
                   dict(length=10 ** 4000), dict(order="sideways"), dict(length=9.0),
                   dict(weights="0"), dict(plan=[[24.0]]), dict(plan=[[0.5, 23.5]]), dict(plan=[]),
                   dict(plan=[[24], [24]]), dict(order="random:" + 10 ** 6 * "1"), dict(head="x"),
                   dict(plan=6), dict(plan=[6]), dict(order=None), dict(block=1.0), dict(form=3),
                   dict(form=[8000, 1]), dict(form=[3, "|u1"])):
        with pytest.raises(ValueError):
            unpack(model, changed(archive, **change))
        (tmp_path / "bad").write_bytes(changed(archive, **change))
        assert call(compress, "info", tmp_path / "bad") in (0, 2)        # and never a traceback


def test_an_archive_that_claims_too_much_is_cut_off(gallery, tmp_path, capsys):
    """Nothing is allocated beyond what the blocks that are there can hold."""
    np.save(tmp_path / "in.npy", pictures(2, (6, 5, 3)))
    archive = there_and_back(gallery, tmp_path / "in.npy", "--calls", 20).read_bytes()
    ckpt = ("--ckpt", gallery / "ckpt.pt")
    for length, code, words in ((90 * 10 ** 7, 2, "is damaged: block"), (181, 2, "no sense")):
        (tmp_path / "big").write_bytes(changed(archive, length=length))
        for flags in ([], ["--item", 1], ["--keep-going"]):
            found = call(compress, "decode", *ckpt, *flags, tmp_path / "big", tmp_path / "out")
            assert found == (1 if flags == ["--keep-going"] and length > 181 else code)
            assert words in capsys.readouterr().err or found == 1
            assert not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size < 1000


def test_the_model_in_the_repository_writes_and_codes_any_bytes(tmp_path, monkeypatch, capsys):
    old = Path(nets.ENGLISH).with_suffix(".ardm")          # written once: it must stay readable
    monkeypatch.chdir(tmp_path)                            # no run in out/
    assert call(compress, "decode", old, "back") == 0 and Path("back").read_bytes() == PROVERB
    assert call(sample, "--n", 2, "--calls", 8) == 0 and "english.pt" in capsys.readouterr().out
    assert len(Path("out/english/samples.txt").read_bytes()) == 2 * (256 + 1)
    Path("noise").write_bytes(os.urandom(3_000))
    for name, most in (("noise", 3_000 * 1.002 + 200), ("back", len(PROVERB) + 200)):
        assert call(compress, "encode", name, "packed", "--calls", 8) == 0
        assert Path("packed").stat().st_size < most
        assert call(compress, "decode", "packed", "again") == 0
        assert Path("again").read_bytes() == Path(name).read_bytes()
    assert nets.ENGLISH.stat().st_size < 6e6


def numpy_features():
    """Vector instructions that NumPy uses here and can be told not to."""
    core = np._core._multiarray_umath
    return " ".join(name for name in core.__cpu_dispatch__ if core.__cpu_features__[name])


ELSEWHERE = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41",
                 NPY_DISABLE_CPU_FEATURES=numpy_features(), OMP_NUM_THREADS="1")


def test_archives_decode_on_a_simulated_other_machine(folder, gallery, studio, tmp_path, request):
    places = [(gallery, "test.npy")]
    if request.node.callspec.id == "upscale":              # text and sound once
        places += [(folder, "test.txt"), (studio, "test.wav")]
    for place, name in places:
        ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
        assert call(compress, "encode", *ckpt, "--calls", 20, place / name,
                    tmp_path / "a") == 0
        done = child("compress.py", "decode", *ckpt, tmp_path / "a", tmp_path / "b",
                     env={**os.environ, **ELSEWHERE})
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "b").read_bytes() == (place / name).read_bytes()


def test_a_killed_command_and_a_full_disk_leave_the_old_file(folder, tmp_path):
    (tmp_path / "a").write_text("old")
    encode = ("encode", "--ckpt", folder / "ckpt.pt", "--device", "cpu", folder / "test.txt",
              tmp_path / "a")
    code = "import os, data, compress; data.os.fsync = lambda file: os.kill(os.getpid(), 9)\n" \
           "data.run(compress.main)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, encode)], cwd=HERE,
                          capture_output=True)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.glob("a.*.part"))) == 1
    next(tmp_path.glob("a.*.part")).unlink()

    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = child("compress.py", *encode, preexec_fn=limit)
    assert done.returncode == 2 and "cannot write" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_gets_its_name_when_it_is_whole_and_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    datasets.write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path in ("loop", "pipe", ".", "none/file"):
        with pytest.raises(ValueError, match="no ordinary file in a folder that exists"):
            datasets.write(tmp_path / path, b"new")
    with pytest.raises(ValueError, match="the same file"):
        datasets.write(link, b"new", (target,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop", "pipe", "target"]


def test_what_does_not_decode_is_not_written(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compress.Codec, "decode", lambda self, block, rows, *args: None)
    with pytest.raises(ValueError, match="does not compute the same numbers twice"):
        pack(tmp_path, model, b"some text")
    broken = nets.load(folder / "ckpt.pt", "cpu")[0]
    broken.net.head.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="weights damaged"):
        pack(tmp_path, broken, b"some text")
