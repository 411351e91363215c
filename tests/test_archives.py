"""Archives: what comes back byte for byte, what decodes elsewhere, what is refused."""
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from conftest import (DEVICES, HERE, LIST, blocks_of, call, child, pack, pictures, unpack,
                      wav_bytes)

import numpy as np
import pytest
import torch

import coder
import compress
import data as datasets
import nets
import planner
import sample
import train
from ardm import ARDM, bits_per_dim
from test_ardm import Fixed

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


def test_texts_come_back_whatever_the_order_and_the_blocks(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").write_bytes((folder / "test.txt").read_bytes()[:2000])
    (tmp_path / "none").touch()
    for flags in (["--calls", 8], ["--order", "halves", "--block", 3], ["--order", "random:2"]):
        for name in ("in", "none"):
            there_and_back(folder, tmp_path / name, *flags)
    for most, even in ((0, False), (2000, True)):
        monkeypatch.setattr(compress, "SHORT", most)
        archive = there_and_back(folder, tmp_path / "in", "--order", "random:2").read_bytes()
        (ks,) = compress.read_header(archive, "in.ardm")[0]["plan"]
        assert (max(ks) - min(ks) < 2) == even             # a planned plan needs more bytes
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
    assert blocks_of(archive)[0][0] < 60
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
        assert call(compress, "encode", *ckpt, "--calls", 20, place / name, tmp_path / "a") == 0
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


@pytest.mark.parametrize("device", DEVICES)
def test_texts_of_any_length_come_back_at_their_ideal_length(folder, tmp_path, device):
    model = nets.load(folder / "ckpt.pt", device)[0]
    text = (folder / "test.txt").read_bytes()
    for n, block, calls in ((0, 10, 6), (1, 10, 24), (23, 1, 6), (24, 1, 5), (25, 7, 24),
                            (1001, 10, 6), (700, 1, 6), (4000, 1000, 6)):
        archive, bits = pack(tmp_path, model, text[:n], block=block, calls=calls)
        assert unpack(model, archive) == text[:n], "the file does not come back"
        assert unpack(nets.load(folder / "ckpt.pt", "cpu")[0], archive) == text[:n]
        blocks = blocks_of(archive)
        assert len(blocks) == -(-(n // 24) // block) + (n % 24 > 0)
        payload = sum(length for _, length in blocks)
        assert payload <= bits / 8 * 1.001 + 10 * len(blocks)
    whole = torch.from_numpy(datasets.to_symbols(text[:960], 27)).long().view(-1, 24).to(device)
    sigma = torch.from_numpy(planner.order("spaced:4", 24)).to(device).expand(whole.shape)
    nll = model.double().nll(whole, planner.uniform_plan(1, 24, 6), sigma).sum().item()
    assert math.isclose(pack(tmp_path, model, text[:960])[1], bits_per_dim(nll, 1), rel_tol=1e-9)


def test_damage_is_noticed_and_intact_blocks_are_delivered(model, folder, tmp_path):
    """All truncations, and one changed bit at every position. A changed shift may lead to the same
    integers, and deflate fills up its last byte: then the text is the right one."""
    text = (folder / "test.txt").read_bytes()[:80]
    archive, _ = pack(tmp_path, model, text, calls=3, block=1)
    blocks = blocks_of(archive)
    harmless = {blocks[0][0] - 5, *(at + 4 for at, _ in blocks)}
    for i in range(len(archive)):
        flipped = archive[:i] + bytes([archive[i] ^ 1 << i % 8]) + archive[i + 1:]
        with pytest.raises(ValueError):
            unpack(model, archive[:i])
        if i in harmless and unpack(model, flipped, damaged=[]) == text:
            continue
        with pytest.raises(ValueError):
            unpack(model, flipped)
        if i >= blocks[0][0]:
            damaged, hit = [], max(n for n, (at, _) in enumerate(blocks) if at <= i)
            back = unpack(model, flipped, damaged=damaged)
            assert back.startswith(text[:24 * hit]) and damaged
            if i - blocks[hit][0] >= 4:                    # not in the length of a block
                assert back == text[:24 * hit] + text[24 * (hit + 1):]
                assert damaged == [hit]
    moved = archive[:blocks[0][0]] + b"".join(archive[at:at + n] for at, n in (
        blocks[1], blocks[0], *blocks[2:]))
    with pytest.raises(ValueError, match="block 0"):       # right bytes, in a wrong place
        unpack(model, moved)
    with pytest.raises(ValueError, match="block 4"):       # something follows the last one
        unpack(model, archive + b"x")


def test_blocks_near_a_boundary_have_a_shifted_grid(model, folder, tmp_path, monkeypatch):
    text = (folder / "test.txt").read_bytes()[:1000]
    plain, _ = pack(tmp_path, model, text, block=2)
    monkeypatch.setattr(coder, "MARGIN", 1e-5)             # many values are too near a boundary now
    archive, _ = pack(tmp_path, model, text, block=2)
    shifts = [archive[at + 4] for at, _ in blocks_of(archive)]
    assert len(set(shifts)) > 2 and {plain[at + 4] for at, _ in blocks_of(plain)} == {0}
    assert unpack(model, archive) == text
    noise = np.random.default_rng(0).bytes(24 * 50 + 7)
    archive, _ = pack(tmp_path, ARDM(Fixed(6 * torch.randn(256)), 24, 256), noise, block=50, K=256)
    assert len(archive) < len(noise) + 200                 # stored raw


def test_archives_decode_where_other_numbers_come_out(folder, tmp_path, monkeypatch):
    """On another machine numbers differ, here by up to `size`."""
    model = nets.load(folder / "ckpt.pt", "cpu")[0]
    text = (folder / "test.txt").read_bytes()[:2000]
    archive, _ = pack(tmp_path, model, text)
    monkeypatch.setattr(nets, "rows_per_call", lambda device, D: 17)     # and other batches
    model.net.register_forward_hook(
        lambda net, inputs, logits: logits + size * (2 * torch.rand_like(logits) - 1))
    for size in (0, 4e-11):
        assert unpack(model, archive) == text
    size = 1e-4
    with pytest.raises(ValueError, match="block 0 is damaged"):
        unpack(model, archive)
