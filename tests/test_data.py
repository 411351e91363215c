"""Data sets: what is read, how it is split, and what is refused."""
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

from conftest import LIST, pictures, wav_bytes

import numpy as np
import pytest
import torch

import data as datasets

def test_symbols_and_bytes_are_inverse():
    text = b"the quick brown fox jumps over the lazy dog"
    symbols = datasets.to_symbols(text, 27)
    assert symbols.max() <= 26 and symbols[3] == 0 and datasets.to_bytes(symbols, 27) == text
    every = bytes(range(256))
    assert datasets.to_bytes(datasets.to_symbols(every, 256), 256) == every
    for bad, match in (("the Quick", "'Q' at position 4"), ("caféx", "'é' at position 3")):
        with pytest.raises(ValueError, match=match):
            datasets.to_symbols(bad.encode(), 27)


def test_text_is_split_by_position_and_cut_into_windows_and_chunks(tmp_path):
    stream = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(stream)
    data = datasets.load(str(tmp_path / "f"), 30)
    assert (data.K, data.kind, data.unit) == (256, "text", "byte")
    assert b"".join(datasets.to_bytes(part, 256) for part in data.splits.values()) == stream
    assert [len(part) for part in data.splits.values()] == [1152, 64, 64]
    assert torch.equal(data.chunks("test"), data.splits["test"][:60].view(2, 30))
    (tmp_path / "f").write_bytes(bytes(range(200)))
    x = datasets.load(str(tmp_path / "f"), 10).batch(5000)
    assert x.dtype == torch.int64 and (x.diff(dim=1) == 1).all()
    assert x[:, 0].min() == 0 and x[:, 0].max() == 170 and x.max() == 179
    text = datasets.show(datasets.load("pydoc").splits["train"][:20000], 27)
    assert " the " in text and "  " not in text


@pytest.mark.parametrize("pack", [gzip.compress, None])
def test_packed_text_is_read_through_whatever_its_name(tmp_path, pack):
    text, path = b"some text " * 100, tmp_path / "logs.npy"
    if pack:
        path.write_bytes(pack(text))
    else:
        with zipfile.ZipFile(path, "w") as archive:        # as a Mac makes one
            for name, content in (("a/", ""), ("a/b.txt", text), ("__MACOSX/a/._b.txt", b"x")):
                archive.writestr(name, content)
    data = datasets.load(str(path), 20)
    assert data.kind == "text" and sum(map(len, data.splits.values())) == 1000
    for content, words in ((path.read_bytes()[:-9], "is packed and cannot be read"),
                           (gzip.compress(bytes(1 << 26)), "unpacks to 67,108,864 bytes or more")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            datasets.load(str(path), 20)


def test_what_is_no_array_sound_or_tar_is_text_and_zeros_are_named(tmp_path, capsys):
    path, text = tmp_path / "file", b"words of a text, " * 100
    for start in (b"ID3", b"BZh", b"GIF8", b"PAR1", b"Rar!", b"\x80\x04", b"%PDF-1.7"):
        path.write_bytes(start + text)
        data = datasets.load(str(path), 20)
        assert (data.kind, data.K) == ("text", 256) and capsys.readouterr().err == ""
        place = re.search(rb"[^a-z ]", start + text).start()
        assert data.name.endswith(f"(not a-z: byte {(start + text)[place]:#04x} at {place})")
    path.write_bytes(b"\x89PNG\r\n\0" + text)
    assert datasets.load(str(path), 20).K == 256
    assert "is no text: its bytes are taken as they are" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a folder or tar without"):
        datasets.load(str(tmp_path), 20)


def test_downloads_are_whole_or_not_there(tmp_path, monkeypatch):
    """A login page instead of the file is refused, by a line that says to remove it."""
    monkeypatch.setenv("ARDM_DATA", str(tmp_path / "data"))
    url, md5 = f"{tmp_path.as_uri()}/", hashlib.md5(b"good").hexdigest()
    monkeypatch.setitem(datasets.SOURCES, "text8.zip", (url, md5))
    for torn, words in ((b"please log in " * 100, "not the whole upstream file.*remove it"),
                        (b"PK\3\4cut off", "packed and cannot be read")):
        (tmp_path / "text8.zip").write_bytes(torn)
        for _ in range(2):                                 # it is not taken when it is there, too
            with pytest.raises(ValueError, match=words):
                datasets.load("text8", 20)
        (tmp_path / "data" / "text8.zip").unlink()
    (tmp_path / "text8.zip").write_bytes(b"good")
    assert datasets.fetch("text8.zip") == b"good"
    assert (tmp_path / "data" / "text8.zip").read_bytes() == b"good"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ARDM_DATA", "~/data")              # the home folder
    (tmp_path / "data" / "text8.zip").write_bytes(b"torn")
    with pytest.raises(ValueError, match="remove it"):
        datasets.fetch("text8.zip")
    monkeypatch.setitem(datasets.SOURCES, "enwik8.zip", (url, md5))
    with pytest.raises(ValueError, match="cannot download .*put it into .* yourself"):
        datasets.fetch("enwik8.zip")


def test_images_are_split_and_flattened_colour_by_colour_in_any_layout(tmp_path):
    pixels, path = pictures(40, (6, 5, 3)), tmp_path / "a.NPY"
    digests, test = set(), [9, 19, 29, 39]
    valid = [i for i in range(40) if i not in test][8::9]
    for array in (pixels, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))):
        with open(path, "wb") as file:
            np.save(file, array)
        data = datasets.load(str(path))
        digests.add(data.digest)
        assert (data.shape, data.D, data.K, data.kind) == ((3, 6, 5), 90, 256, "image")
        assert np.array_equal(datasets.to_pictures(data.splits["test"], data.shape), pixels[test])
        assert np.array_equal(datasets.to_pictures(data.splits["valid"], data.shape), pixels[valid])
        assert len(data.splits["train"]) == 32 and not data.flips
    assert len(digests) == 1                               # the same data
    few = datasets.load(str(path), bits=3)
    assert few.K == 8 and torch.equal(few.splits["test"], data.splits["test"] // 32)
    np.savez(tmp_path / "b.npz", x=pixels)
    assert datasets.load(str(tmp_path / "b.npz")).digest == data.digest
    np.savez(tmp_path / "b.npz", x=pixels, y=np.arange(40))
    with pytest.raises(ValueError, match="it holds x.npy, y.npy, not one file"):
        datasets.load(str(tmp_path / "b.npz"))
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (40, 6, 5))
    path.write_bytes(gzip.compress(idx + pixels[..., 0].tobytes()))
    assert torch.equal(datasets.load(str(path)).splits["test"], data.splits["test"][:, :30])


def test_a_file_that_is_written_anew_is_the_one_of_numpy():
    for axis, shape, C, H in ((3, (99, 13, 7, 3), 3, 13), (3, (9, 120, 7, 1), 1, 120),
                              (1, (9, 3, 13, 7), 3, 13), (0, (100_000, 1, 7), 1, 1)):
        file, settings = io.BytesIO(), dict(kind="image", K=256, shape=(C, H, 7))
        np.save(file, np.zeros(shape, np.uint8))
        anew = datasets.file_of(np.zeros(math.prod(shape)), settings, [axis, "|u1"])
        assert anew == file.getvalue()


@pytest.mark.parametrize("shape, found", [
    ((20, 6, 5), (1, 6, 5)), ((20, 3, 3), (1, 3, 3)), ((20, 1, 1), (1, 1, 1)),
    ((20, 3, 3, 1), (1, 3, 3)), ((20, 1, 1, 1), (1, 1, 1)), ((20, 6, 5, 4), (4, 6, 5)),
    ((20, 3, 6, 5), (3, 6, 5)), ((60, 50, 3), None), ((20, 3, 6, 3), None), ((20, 7), None)])
def test_layouts_of_images_are_read_or_refused(tmp_path, shape, found):
    np.save(tmp_path / "a.npy", np.arange(math.prod(shape)).reshape(shape).astype(np.uint8))
    if found:
        assert datasets.load(str(tmp_path / "a.npy")).shape == found
    else:
        with pytest.raises(ValueError, match="\\(N, H, W, 1\\) is always grey"):
            datasets.load(str(tmp_path / "a.npy"))


def test_small_values_are_taken_as_they_are_and_what_is_no_image_is_refused(tmp_path):
    values, path = np.arange(2400).reshape(20, 10, 12), tmp_path / "a.npy"
    for array, bits, K, top in ((values % 2, 8, 2, 1), (values % 2 > 0, 8, 2, 1),
                                (values % 8, 3, 8, 7), (values % 256, 3, 8, 7),
                                (values % 3, 8, 256, 2)):
        np.save(path, array if array.dtype == bool else array.astype(np.uint8))
        data = datasets.load(str(path), bits=bits)
        assert data.K == K and max(part.max() for part in data.splits.values()) == top
    assert datasets.to_pictures(np.array([[0, 1]]), (1, 1, 2), 2).max() == 255
    for bad, match in ((np.zeros((9, 6, 5)), "holds float64.*astype"), (values, "holds int64"),
                       (np.zeros((0, 6, 5), np.uint8), "shape"),
                       (np.zeros((9, 6, 5), np.uint8), "9 images: it takes 10 or more"),
                       (np.asfortranarray(np.zeros((20, 6, 5), np.uint8)), "Fortran's order"),
                       ((-1, 8, 8), "cannot be read as .npy"),
                       ((10 ** 9, 8, 8), "cannot be read as .npy")):
        if type(bad) is tuple:
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, dict(
                    descr="|u1", fortran_order=False, shape=bad))
        else:
            np.save(path, bad)
        with pytest.raises(ValueError, match=match):
            datasets.load(str(path))


def test_batches_are_training_images_mirrored_and_turned_where_asked(tmp_path):
    np.save(tmp_path / "a.npy", pictures(20, (4, 4, 1)))
    data = datasets.load(str(tmp_path / "a.npy"))
    for data.flips, data.turns in itertools.product((False, True), repeat=2):
        originals = data.splits["train"].view(-1, 4, 4)
        made = {tuple(p.rot90(n, (1, 2)).flatten(1)[i].tolist())
                for p in ([originals, originals.flip(2)] if data.flips else [originals])
                for n in (range(4) if data.turns else [0]) for i in range(len(originals))}
        batch = {tuple(x.tolist()) for x in data.batch(500)}
        assert batch <= made and len(batch) > len(made) / 2


def tar(path, files, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as archive:            # -> its bytes, unpacked
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            archive.addfile(member, io.BytesIO(content))
    return gzip.decompress(path.read_bytes())


def test_cifar_is_read_from_a_partial_tar_and_damaged_ones_are_refused(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (30, 3073)).astype(np.uint8)
    parts = {"data_batch_2.bin": records[10:20].tobytes(), "readme.html": b"hello",
             "data_batch_1.bin": records[:10].tobytes(), "test_batch.bin": records[20:].tobytes()}
    path, place = tmp_path / "c.tar.gz", tmp_path / "cifar-10-batches-bin"
    tar(path, parts)
    data = datasets.load(str(path))
    place.mkdir()
    for name, content in parts.items():
        (place / name).write_bytes(content)
    assert datasets.load(str(place)).digest == data.digest
    (tmp_path / "twice" / "again").mkdir(parents=True)
    (tmp_path / "twice" / "again" / "test_batch.bin").write_bytes(records[:5].tobytes())
    (tmp_path / "twice" / "once").symlink_to(place)
    assert len(datasets.load(str(tmp_path / "twice")).splits["test"]) == 15
    with pytest.raises(ValueError, match="is one batch of CIFAR-10: name their folder"):
        datasets.load(str(place / "data_batch_1.bin"))
    whole = torch.cat([data.splits[part] for part in ("train", "valid", "test")])
    assert np.array_equal(whole.numpy(), records[:, 1:]) and data.shape == (3, 32, 32)
    assert "part of cifar10" in data.name and data.flips
    content = path.read_bytes()
    for bad in (parts | {"data_batch_1.bin": b"x" * 100}, {"test_batch.bin": records.tobytes()},
                {"data_batch_1.bin": records.tobytes()}, content[:len(content) // 2],
                {"data_batch_1": b"a pickle", "test_batch": b"a pickle"}):
        if type(bad) is dict:
            tar(path, bad)
        else:
            path.write_bytes(bad)
        with pytest.raises(ValueError, match="fetch cifar-10-binary|packed and cannot be read"):
            datasets.load(str(path))


@pytest.mark.parametrize("how", [
    dict(), dict(before=LIST), dict(after=LIST), dict(code=0xFFFE), dict(size=0, riff=0),
    dict(size=0xFFFFFFFF, riff=0xFFFFFFFF), dict(size=99999)])
def test_samples_are_found_in_every_16_bit_wav_file(how, tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, (50, 2))
    samples[:2] = [[-32768, 32767], [0, -1]]
    content = wav_bytes(samples, **how)
    found = datasets.file_array(content, "x.wav")
    assert np.array_equal(found.array[:, :50], samples.T) and found.rate == 8000
    (tmp_path / "x.wav").write_bytes(content)
    if "size" not in how:
        x, _ = datasets.open_symbols(tmp_path / "x.wav", dict(kind="audio", K=65536, shape=[8]))
        assert x.tolist() == (samples.T.reshape(-1) + 32768).tolist()
        assert found.head + samples.astype("<i2").tobytes() + found.tail == content


def clip(i, n=30):
    return np.full((n, 1), i)


def test_clips_are_read_from_folders_and_tars(tmp_path, monkeypatch, capsys):
    place = tmp_path / "clips"
    place.mkdir()
    for i in range(20):
        (place / f"{i:02d}.wav").write_bytes(wav_bytes(clip(i)))
    (place / "._00.wav").write_bytes(b"a Mac's")
    (place / "00a.wav").write_bytes(wav_bytes(clip(0, 0)))               # no sample
    (place / "00b.WAV").write_bytes(wav_bytes(np.array([[5, -5]])))       # one, in two channels
    data = datasets.load(str(place), 10)
    assert (data.kind, data.K, data.D, data.rate) == ("audio", 65536, 10, 8000)
    parts = {name: part.numpy().astype(int) - 32768 for name, part in data.splits.items()}
    assert set(parts["test"]) == {7, 17} and set(parts["valid"]) == {6, 16}
    assert len(parts["train"]) == 16 * 30 + 2 and data.chunks("test").shape == (6, 10)
    assert data.batch(3).shape == (3, 10) and data.batch(3).dtype == torch.int64
    for name in ("clips", "my_batch1"):
        with tarfile.open(tmp_path / "clips.tgz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
            archive.add(place, name)
        assert datasets.load(str(tmp_path / "clips.tgz"), 10).digest == data.digest
    (place / "00b.WAV").rename(place / "é b.wav")
    (place / "train_list.txt").write_text("06.wav\n")
    (place / "testing_list.txt").write_text("\ufeff03.wav\r\n", "utf-8")
    (place / "validation_list.txt").write_text("04.wav\n05.wav\né b.wav\n", "utf-8")
    assert "lists name clips" not in capsys.readouterr().err
    (tmp_path / "a link").symlink_to(place)                # files keep the names of lists
    assert all("a link" not in path.parts for path in datasets.files_below(tmp_path))
    for where in (place, tmp_path):                        # and where it is a folder in a folder
        listed = datasets.load(str(where), 10).splits
        assert set(listed["test"].tolist()) == {32771} and len(listed["valid"]) == 62
    (place / "validation_list.txt").write_text("04.wav\n05.wav\né b.wav\n77.wav\n", "utf-8")
    assert torch.equal(datasets.load(str(place), 10).splits["valid"], listed["valid"])
    assert "its lists name clips that are not there" in capsys.readouterr().err
    (tmp_path / "run").mkdir()                             # a run's own sounds are no data
    (tmp_path / "run" / "ckpt.pt").touch()
    (tmp_path / "run" / "test.wav").write_bytes(wav_bytes(clip(9)))
    assert not [path for path in datasets.files_below(tmp_path) if path.name == "test.wav"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "clips").symlink_to(place)
    (place / "circle").symlink_to(tmp_path / "linked")
    linked = datasets.load(str(tmp_path / "linked"), 10).splits
    assert all(torch.equal(linked[split], listed[split]) for split in listed)
    old = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: old(path / ("x" * (path.name == "clips"))))
    with pytest.raises(OSError):                           # a folder in it that cannot be read
        datasets.load(str(tmp_path / "linked"), 10)


def test_of_fewer_than_ten_clips_the_last_tenths_are_for_validation_and_test(tmp_path):
    one = tmp_path / "one"
    one.write_bytes(gzip.compress(wav_bytes(np.arange(100)[:, None] + [0, 500])))    # two channels
    parts = datasets.load(str(one), 5).splits
    assert [len(part) for part in parts.values()] == [160, 20, 20]
    assert set(parts["test"].tolist()) == {32768 + i + j for i in range(90, 100) for j in (0, 500)}


def test_sound_that_is_not_read_is_refused_in_words(tmp_path):
    place = tmp_path / "clips"
    place.mkdir()
    (place / "00.wav").write_bytes(wav_bytes(clip(0, 9000)))
    first = {"a.wav": wav_bytes(clip(0))}
    one, twice, soft, hard = (tar(tmp_path / "tar", *made) for made in (
        (first | {"b.wav": b""},), (first | {"./a.wav": first["a.wav"]},),
        ({"a.wav": b""}, tarfile.SYMTYPE), ({"a.wav": b""}, tarfile.LNKTYPE)))
    for content, words in (
            (wav_bytes(clip(1), rate=0), "0 samples a second"),
            (wav_bytes(np.zeros((1, 3000))), "3000 channels"),
            (wav_bytes(clip(1), bits=8), "8 bits a sample, format 1, 1 channels"),
            (wav_bytes(clip(1), code=3, bits=32), "32 bits a sample, format 3"),
            (wav_bytes(clip(1))[:30], "with a whole fmt chunk"),
            (wav_bytes(clip(1), before=b"junk\0\0\0\0" * 2000), "with a whole fmt chunk"),
            (wav_bytes(clip(1)), "fewer than"), (soft, "a.wav is a link, or has holes"),
            (hard, "a.wav is a link"), (twice, "or there are two of this name"),
            (one[:550], "tar file cannot be read"), (one[:1040], "it is cut off or changed"),
            (one + one, "or another tar follows it")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            datasets.load(str(tmp_path / "x"), 20)
    picture = b"\0\0\x08\x03" + bytes([0, 0, 0, 1] * 3) + b"x"
    for content, words in ((b"RF64" + wav_bytes(clip(0))[4:], "22.wav is no RIFF WAV file"),
                           (picture, "22.wav is no RIFF WAV file"),
                           (wav_bytes(clip(0), rate=16000), "has 16000 samples a second, others")):
        (place / "22.wav").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            datasets.load(str(place), 10)


def test_spoken_digits_have_their_published_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_DATA", str(tmp_path))
    path = tmp_path / "speech_commands_v0.02.tar.gz"
    tar(path, {"./one/a.wav": wav_bytes(clip(1, 9)), "nine/b.wav": wav_bytes(clip(2, 9)),
               "zero/c.wav": wav_bytes(clip(3, 9)), "bed/a.wav": b"RIFF",
               "./testing_list.txt": b"nine/b.wav\nbed/a.wav\n",
               "validation_list.txt": b"one/a.wav\n"})
    with pytest.raises(ValueError, match="not the whole upstream file, by its checksum"):
        datasets.load("sc09")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SOURCES, path.name, ("", sha256))
    data = datasets.load("sc09")
    assert data.D == 16000 and [int(part[0]) - 32768 for part in data.splits.values()] == [3, 1, 2]
    assert all(len(part) == 16000 and part[9] == 32768 for part in data.splits.values())


def test_glyphs_are_the_same_everywhere_and_tones_lie_under_noise():
    pixels = datasets.glyphs(200, seed=0)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "cc183d4e28b5d9ec"
    data = datasets.load("tones")
    assert [len(part) for part in data.splits.values()] == [3072000, 384000, 384000]
    assert 13 < data.splits["test"].view(-1, 400).float().std(dim=1).min() < 16.5


def test_real_data_is_read():
    folder = Path(os.environ.get("ARDM_DATA", ""))
    if not (folder / "cifar10" / "cifar-10-binary.partial.tar.gz").is_file():
        pytest.skip("ARDM_DATA has no cifar10/cifar-10-binary.partial.tar.gz")
    text = datasets.load(str(folder / "text8" / "text8_prefix.zip"), 250)
    assert datasets.show(text.splits["train"][:30], 27) == " anarchism originated as a ter"
    mnist = datasets.load("mnist")
    assert [len(part) for part in mnist.splits.values()] == [54000, 6000, 10000]
    assert 33 < mnist.splits["train"].float().mean() < 34  # 0.1307 of 255
    images = datasets.load(str(folder / "cifar10" / "cifar-10-binary.partial.tar.gz"))
    assert [len(part) for part in images.splits.values()] == [18000, 2000, 1017]


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3), (1, 1)])
def test_png_holds_the_pixels(shape):
    frame = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    content = datasets.png(frame)
    begin = content.index(b"IDAT")
    end = begin + 4 + int.from_bytes(content[begin - 4:begin], "big")
    assert zlib.crc32(content[begin:end]).to_bytes(4, "big") == content[end:end + 4]
    rows = np.frombuffer(zlib.decompress(content[begin + 4:end]), np.uint8).reshape(shape[0], -1)
    assert not rows[:, 0].any() and np.array_equal(rows[:, 1:].reshape(shape), frame)


def test_waveforms_are_the_peaks_of_their_columns():
    x = np.array([[0, 0, 100, -100, 50, 50, -50, -50]])
    picture = datasets.waveforms(x, np.arange(8) < 3, size=(5, 4))[0, :, :, 0]
    assert picture.tolist() == [[255, 0, 255, 255], [255, 0, 0, 255], [170, 0, 255, 255],
                                [255, 0, 255, 0], [255, 0, 255, 255]]
