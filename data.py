"""Data sets as integers 0..K-1, how to show them, and all that touches a user's files (App. D).

    pydoc          the help texts inside Python, reduced to a-z and space: English without a
                   download; it changes with the Python version
    glyphs         small grey pictures of digits, drawn here: images without a download
    tones          strings, sweeps and pauses under noise, made here: audio without a download
    text8, enwik8, mnist, cifar10, sc09, fsdd
                   in the folder ARDM_DATA, or data/; downloaded if missing
    any file       what its first bytes say, also if gzip, bz2, xz or a zip packs it: images (.npy,
                   .npz, idx, CIFAR-10 in its binary version), audio (.wav, or a folder or a tar of
                   them), or text: 27 symbols if it holds nothing but a-z and space, else bytes
"""
import argparse
import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import math
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import wave
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

NAMES = ("pydoc", "glyphs", "tones", "text8", "enwik8", "mnist", "cifar10", "sc09", "fsdd")
UNITS = {"text": "char", "bytes": "byte", "image": "dim", "audio": "sample"}      # bits per what
PIECES = {"text": "test.txt", "bytes": "test.bin", "image": "test.npy", "audio": "test.wav"}
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SOURCES = {                          # file -> where from, md5 or SHA-256 (of a zip: of its member)
    "v1.0.10.tar.gz": ("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/",
                       None),
    "speech_commands_v0.02.tar.gz": (
        "https://storage.googleapis.com/download.tensorflow.org/data/",
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    "text8.zip": ("http://mattmahoney.net/dc/", "3bea1919949baf155f99411df5fada7e"),
    "enwik8.zip": ("http://mattmahoney.net/dc/", "a1fa5ffddb56f4953e226637dabbb36a"),
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/",
                               "c32a1d4ab5d03f1284b67883e8d87530"),
    "train-images-idx3-ubyte.gz": (MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "t10k-images-idx3-ubyte.gz": (MNIST, "9fb629c4189551a2d022fa330f9573f3")}
LARGEST = 1 << 31                    # bytes that a file may unpack to
PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma, b"PK\x03\x04": zipfile}
FOREIGN = {                          # what is not read, and its first bytes
    "a PNG picture": b"\x89PNG", "a JPEG picture": b"\xff\xd8\xff", "a GIF picture": b"GIF8",
    "a TIFF picture": (b"II*\0", b"MM\0*"), "a PDF document": b"%PDF", "a program": b"\x7fELF",
    "a WAV, WebP or another RIFF file": b"RIFF", "a large WAV file": b"RF64", "MP3 audio": b"ID3",
    "FLAC audio": b"fLaC", "Ogg audio": b"OggS", "an archive": b"ARDM", "a RAR file": b"Rar!",
    "a 7z file": b"7z\xbc\xaf", "an empty zip file": b"PK\5\6", "a .npy file": b"\x93NUMPY",
    "a Parquet table": b"PAR1", "an HDF5 file": b"\x89HDF", "packed by zstd": b"\x28\xb5\x2f\xfd",
    "an SQLite database": b"SQLite format 3", "packed (unpack it first)": tuple(PACKED),
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")}
OTHER = re.compile(rb"[^a-z ]")      # what has no symbol where K = 27
WAVS = r"(?i)(^|/)(?!\._)[^/]*\.wav$|(testing|validation)_list\.txt$"    # ._* are a Mac's
BATCHES = r"(^|/)(data_batch_[1-5]|test_batch)\.bin$"       # of CIFAR-10, its binary version
SOUND_PACKERS = {                    # used where they are installed
    "FLAC -8": ("flac", "-8", "--no-padding", "--no-seektable", "--silent", "-c", "-"),
    "WavPack -hhx6": ("wavpack", "-hhx6", "-q", "-", "-o", "-")}


# -- Errors, the writer and the reader -------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse that reports an error in one line, like the rest; no flag may be shortened."""

    def __init__(self, **how):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists everything)\n")


class Patient:
    """A stream that may be full, or close: what is shown never stops what is computed."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def run(main):
    """Runs a script: what a user can mend is one line on stderr and exit code 2."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")           # a terminal that lacks a character
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))              # files are cleaned up
    sys.stdout = Patient(sys.stdout or open(os.devnull, "w"))            # where it is closed
    sys.stderr = Patient(sys.stderr or open(os.devnull, "w"))
    try:
        return main()
    except KeyboardInterrupt:
        code, words = 130, "stopped"
    except ValueError as error:
        code, words = 2, error
    except OSError as error:
        code, words = 2, f"{error.filename or 'a stream'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        code, words = 2, "too little memory; a smaller --batch or --size of train.py takes less"
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
    sys.exit(code)


def out_of_memory(error):
    """True if that is what an error says: of NumPy, of CUDA, of MPS, of torch on a CPU."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or re.search("out of memory|can't allocate memory", str(error)) is not None)


@contextmanager
def write(path, others=(), mode="w+b"):
    """A file that gets its name only when it is complete and on the disk. Until then, and after
    an error, what was there before stays as it was. others: files that it must not replace."""
    target = stream(path)
    if target is not None:
        with tempfile.TemporaryFile() as file:             # seekable, as a pipe is not
            yield file
            file.seek(0)
            with open(target, "wb", closefd=type(target) is not int) as out:
                shutil.copyfileobj(file, out)
        return
    path = Path(os.path.realpath(path))                    # a link stays a link
    for other in others:
        if path.exists() and os.path.exists(other) and path.samefile(other):
            raise ValueError(f"{other} and {path} are the same file: choose another name")
    if path.is_dir() or path.is_symlink():
        what = "a folder" if path.is_dir() else "a loop of symbolic links"
        raise ValueError(f"cannot write {path}: it is {what}")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")    # a name of its own
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
        with suppress(OSError):                            # not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}")
    finally:
        part.unlink(missing_ok=True)


def stream(path):
    """What to open for - (stdout), a descriptor, or what is there and no file (a pipe); or None."""
    found = re.fullmatch(r"-|/dev/stdout|/dev/fd/(\d+)", str(path))
    if found:
        return int(found[1] or 1)
    there = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return path if there else None


def read(path, mapped=False):
    """A file, or a pipe, as (n,) uint8; mapped: it is read as it is used, and cannot be changed."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        if os.path.isfile(path) and os.path.getsize(path):
            return np.memmap(path, mode="r") if mapped else np.fromfile(path, np.uint8)
        with open(path, "rb") as file:
            return np.frombuffer(bytearray(file.read()), np.uint8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}")


def unpack(content, name, member=""):
    """(n,) uint8 without what packs it, layer by layer: gzip, bz2, xz, or a zip file with one
    member (or one of that name). ValueError for what is damaged, or too large."""
    start = content[:8].tobytes()
    packer = next((PACKED[magic] for magic in PACKED if start.startswith(magic)), None)
    if packer is None:
        return content
    packed = io.BytesIO(content)                           # a copy
    try:
        if packer is zipfile:
            archive = zipfile.ZipFile(packed)
            names = [one for one in archive.namelist()
                     if not re.search(r"/$|^__MACOSX/|\.DS_Store$", one)]
            found = [one for one in names if member in ("", one.removesuffix(".npy"))]
            if len(found) != 1:
                raise ValueError(f"one file is wanted, it holds {', '.join(names[:9])} (of a .npz "
                                 "name one: FILE.npz:NAME)")
            packed, packer = found[0], archive
        inner = packer.open(packed).read(LARGEST)
        if len(inner) == LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
    except (zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError, EOFError, OSError,
            ValueError) as error:
        raise ValueError(f"{name} is packed and cannot be read: {error}")
    return unpack(np.frombuffer(bytearray(inner), np.uint8), name)


def layout(content, name, whole=True):
    """Where images lie in the bytes of a .npy or idx file: offset, shape, the axes that make it
    (N, C, H, W), type, order; the same of samples in a .wav file, (channels, n); None for other
    files. ValueError for an array that is not images, or cut off."""
    start, offset, fortran, kind = content[:1 << 16].tobytes(), 16, False, np.dtype(np.uint8)
    if start[:4] == b"RIFF" and start[8:12] == b"WAVE":
        return *wav_layout(content, name)[:2], [1, 0], "<i2", "C"
    if start.startswith(b"\x93NUMPY"):
        file = io.BytesIO(start)
        try:
            first = np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, kind = (np.lib.format.read_array_header_1_0 if first else
                                    np.lib.format.read_array_header_2_0)(file)
        except Exception as error:                         # whatever a damaged header brings up
            raise ValueError(f"{name} cannot be read as .npy ({str(error)[:80]})")
        offset = file.tell()
    elif start.startswith(b"\0\0\x08\x03") and len(start) >= 16:
        shape = struct.unpack(">3I", start[4:16])
    else:
        return None
    if kind not in (np.uint8, bool):
        raise ValueError(f"{name} holds {kind} of shape {shape}, images are uint8: convert 0..1 by "
                         "(255 * array).round().astype(np.uint8), 0..255 by astype(np.uint8)")
    colours = [axis for axis, known in ((1, (1, 3)), (3, (1, 3, 4)))
               if len(shape) == 4 and shape[axis] in known]
    grey = len(shape) == 3 and shape[2] not in (1, 3, 4)
    if not grey and len(colours) != 1 or min(shape) < 1:
        raise ValueError(f"{name} holds an array of shape {shape}, images are (N, H, W), (N, H, W, "
                         "C) or (N, C, H, W), no two of these: one picture is (1, H, W, C), grey "
                         "ones (N, H, W, 1)")
    if whole and len(content) < offset + math.prod(shape):
        raise ValueError(f"{name} is cut off: its header promises more pixels")
    axes = [0, 1, 2, 3] if colours == [1] else [0, 3, 1, 2]
    shape = (*shape, 1) if grey else shape
    return offset, shape, axes, np.uint8, "F" if fortran else "C"


def wav_layout(content, name):
    """Where the samples of a .wav file lie: offset, (samples, channels), rate. ValueError for what
    is not 16-bit PCM. A length that nobody filled in, or that is too large, means: to the end."""
    at, found = 12, {}
    while b"data" not in found and at + 8 <= len(content):
        kind, size = struct.unpack("<4sI", content[at:at + 8].tobytes())
        found[kind] = at + 8, size
        at += 8 + size + size % 2                          # an odd chunk is padded
    begin, size = found.get(b"fmt ", (0, 0))
    form = content[begin:begin + size].tobytes()
    if len(form) < 16 or b"data" not in found or content[:4].tobytes() != b"RIFF":
        raise ValueError(f"{name} is no RIFF WAV file with a whole fmt chunk before its data")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if code == 0xFFFE:                                     # WAVE_FORMAT_EXTENSIBLE
        code = int.from_bytes(form[24:26], "little")
    if (code, bits) != (1, 16) or channels == 0 or not 0 < rate < 1 << 30:
        raise ValueError(f"{name} is a WAV file with {bits} bits a sample, format {code}, "
                         f"{channels} channels, {rate} samples a second; 16-bit PCM is read: "
                         "convert it, for example by ffmpeg -i IN -c:a pcm_s16le OUT.wav")
    begin, size = found[b"data"]
    there = len(content) - begin
    riff = int.from_bytes(content[4:8].tobytes(), "little")
    if size == 0 and riff + 8 != len(content):             # written into a pipe
        size = there
    return begin, (min(size, there) // (2 * channels), channels), rate


def members(name, wanted, file=None):
    """Yields (name, content) of what matches `wanted` in a folder, or in a tar, given by its path
    or as an open file; nothing is unpacked to the disk."""
    if file is None and os.path.isdir(name):
        for path in sorted(Path(name).rglob("*")):
            if path.is_file() and re.search(wanted, path.as_posix()):
                yield path.relative_to(name).as_posix(), read(path)
        return
    try:
        with tarfile.open(name, fileobj=file) as archive:
            for member in archive:
                if member.isfile() and re.search(wanted, member.name):
                    content = archive.extractfile(member).read(LARGEST)
                    yield member.name.removeprefix("./"), np.frombuffer(content, np.uint8)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: a tar file that cannot be read: {str(error).splitlines()[0]}")


def array_in(content, name):
    """The images of a file as (N, C, H, W), or the samples as (channels, n): a view of its bytes
    (n,); None if it has none."""
    found = layout(content, name)
    if found is None:
        return None
    offset, shape, axes, kind, order = found
    return np.ndarray(shape, kind, content, offset, order=order).transpose(axes)


def refuse_foreign(content, name):
    """ValueError for bytes that nobody would want to learn as text."""
    for words, start in FOREIGN.items():
        if content[:16].tobytes().startswith(start):
            raise ValueError(f"{name} is {words}, which is not read: make it a text, a .npy of "
                             "uint8 images, or a 16-bit .wav")


def folder():
    """Where the data sets lie."""
    return Path(os.environ.get("ARDM_DATA", "data"))


def fetch(name):
    """The content of an upstream file, unpacked but for a tar: from ARDM_DATA or data/, or a folder
    in there; downloaded if it is missing. ValueError if it is not the whole upstream file."""
    url, known = SOURCES[name]
    there = [place / file for file in (name, name.removesuffix(".zip"))  # a zip may be unpacked
             for place in (folder(), *folder().glob("*/")) if (place / file).is_file()]
    path = there[0] if there else folder() / name
    try:
        if not there:
            folder().mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)
            torch.hub.download_url_to_file(url + name, str(path))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download {url}{name} ({error}): fetch it elsewhere and put it "
                         f"into {folder()}/")
    content = read(path, mapped=name.endswith(".tar.gz"))
    with suppress(ValueError):                             # a torn zip is not the whole file
        content = unpack(content, name) if name.endswith(".zip") else content
    kind = "sha256" if len(known or "") == 64 else "md5"
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if known in (None, found) and len(content):
        return content if name.endswith(".tar.gz") else unpack(content, name)
    if not there:
        path.unlink()
    raise ValueError(f"this is not the whole upstream file {name}, by its {kind}: "
                     + (f"{path}: remove it, or name it by --data {path}" if there else url))


# -- Data sets -------------------------------------------------------------------------------------

class Text:
    """A stream of characters (K = 27: space, a-z) or of bytes (K = 256), as uint8 on one device.

    A datapoint is a chunk of D = `length` symbols, without the text before it.
    """
    flips = False

    def __init__(self, name, stream, length, device="cpu"):
        self.name, self.D, self.shape = name, length, (length,)
        self.kind, self.K = ("bytes", 256) if OTHER.search(stream) else ("text", 27)
        self.digest = hashlib.sha256(stream).hexdigest()
        n = len(stream)
        if n < 20 * length:
            raise ValueError(f"{name}: {n} characters are too few for chunks of {length}, it takes "
                             f"{20 * length}: use a longer text or a smaller --length")
        if self.K == 27:
            stream &= 31                                   # space 32 -> 0, a..z 97.. -> 1..26
        parts = torch.from_numpy(stream).to(device).tensor_split((n * 90 // 100, n * 95 // 100))
        self.splits = dict(zip(("train", "valid", "test"), parts))

    def batch(self, B, generator=None):
        """(B, D) int64: windows of training text that begin anywhere."""
        stream = self.splits["train"]
        starts = torch.randint(len(stream) - self.D + 1, (B, 1), device=stream.device,
                               generator=generator)
        return stream[starts + torch.arange(self.D, device=stream.device)].long()

    def chunks(self, split):
        """(N, D): the split as datapoints; what is left over, less than one, does not count."""
        stream = self.splits[split]
        return stream[:len(stream) // self.D * self.D].view(-1, self.D)


class Images:
    """Images, kept flat as uint8 on one device: (N, D) with D = C * H * W, colour by colour.

    train, test: (N, C, H, W); the last tenth of train is for validation. bits: how many of the 8
    are kept, from the most significant on; what is smaller than 2^bits is taken as it is, and 0 and
    1 alone are K = 2.
    flips: training images are mirrored at random; turns: and turned by quarters.
    """
    kind = "image"

    def __init__(self, name, train, test, bits=8, device="cpu", flips=False):
        self.shape = train.shape[1:]
        self.D = math.prod(self.shape)
        self.flips, self.turns = flips, False
        n = len(train) - -(-len(train) // 10)
        if min(self.D, n, len(test)) == 0:
            raise ValueError(f"{name}: {len(train)} and {len(test)} images are too few to train on "
                             "and to test; 10 or more in a file will do")
        top = max(train.max(), test.max())
        dropped = 8 - bits if top >= 2 ** bits else 0
        self.K = 2 if bits == 8 and top < 2 else 2 ** bits
        self.name = f"{name}, {bits} of 8 bits" if dropped else name
        parts = dict(train=train[:n], valid=train[n:], test=test)
        self.splits = {part: torch.from_numpy(pixels.reshape(-1, self.D) >> dropped).to(device)
                       for part, pixels in parts.items()}
        digests = [hashlib.sha256(part.cpu().numpy()).digest() for part in self.splits.values()]
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()

    def batch(self, B, generator=None):
        """(B, D) int64: random training images."""
        images = self.splits["train"]
        draw = dict(device=images.device, generator=generator)
        x = images[torch.randint(len(images), (B,), **draw)].view(B, *self.shape)
        if self.flips:
            x = torch.where(torch.rand(B, 1, 1, 1, **draw) < 0.5, x.flip(3), x)
        for n in (1, 2) if self.turns else ():             # each with 1/2: all four alike
            x = torch.where(torch.rand(B, 1, 1, 1, **draw) < 0.5, x.rot90(n, (2, 3)), x)
        return x.reshape(B, self.D).long()

    def chunks(self, split):
        """(N, D): the images of a split."""
        return self.splits[split]


class Audio(Text):
    """A stream of 16-bit samples, x = sample + 32,768, as int32 on one device: the channels of the
    clips one after the other. A datapoint is a window of D = `length` samples.

    clips: {name: (channels, n) int16}; valid, test: sets of names. Where none are named for the
    test, it is the last tenth of each clip; for validation it is the last tenth of what is left.
    rate: samples a second.
    """
    kind, K = "audio", 1 << 16

    def __init__(self, name, clips, rate, length, device="cpu", valid=frozenset(),
                 test=frozenset()):
        self.name, self.D, self.shape, self.rate = name, length, (length,), rate
        parts = [[clips[clip] for clip in sorted(part)]
                 for part in (clips.keys() - valid - test, valid, test)]
        for i in () if test else (2, 1):                   # by time: channels sound alike
            parts[0], parts[i] = zip(*(np.split(clip, [-(-clip.shape[1] * 9 // 10)], axis=1)
                                       for clip in parts[0]))
        nothing = np.empty(0, np.int16)
        streams = [np.concatenate([nothing, *(clip.reshape(-1) for clip in part)])
                   for part in parts]
        if test and not valid:
            streams[0], streams[1] = np.split(streams[0], [-(-len(streams[0]) * 9 // 10)])
        total, self.splits = hashlib.sha256(), {}
        for part, stream in zip(("train", "valid", "test"), streams):
            if len(stream) < length:
                raise ValueError(f"{name}: {len(stream)} samples are too few for {part} in windows "
                                 f"of {length}: use more sound or a smaller --length")
            total.update(np.ascontiguousarray(stream))
            self.splits[part] = torch.from_numpy(stream.astype(np.int32) + 0x8000).to(device)
        self.digest = total.hexdigest()


def audio(name, files, length=2048, device="cpu", test=None, pad=0):
    """The data set of .wav files, (name, content) each. For the test: the names that match `test`;
    without it, what testing_list.txt names if it is there; else every tenth clip. pad: zeros make
    the clips that long."""
    clips, rates, lists = {}, {}, {}
    for file, content in files:
        if file.endswith("_list.txt"):
            base = file.rpartition("/")[2]
            names = content.tobytes().decode("latin-1").split()
            lists[base[:4]] = {file.removesuffix(base) + one for one in names}
            continue
        samples, rate = array_in(content, file), wav_layout(content, file)[2]
        clips[file] = np.pad(samples, ((0, 0), (0, max(0, pad - samples.shape[1]))))
        rates.setdefault(rate, file)
        if len(rates) > 1:
            (one, first), (other, second) = rates.items()
            raise ValueError(f"{name}: {first} has {one} samples a second, {second} has {other}: "
                             "make them alike")
    if not clips:
        raise ValueError(f"{name} is a folder or tar without a .wav file: name a file")
    parts = dict(test=set(sorted(clips)[9::10]))
    if clips.keys() & lists.get("test", set()):
        parts = {part: clips.keys() & lists.get(part[:4], set()) for part in ("valid", "test")}
    if test:
        parts = dict(test={file for file in clips if re.search(test, file)})
    return Audio(name, clips, rate, length, device, **parts)


def load(name, length=None, bits=8, device="cpu", chunk=64):
    """The data set of that name, or the file at that path. length: of a datapoint of text (without
    it: chunk) or audio; bits: for images."""
    if name == "pydoc":
        name = f"pydoc of Python {platform.python_version()}"
        return Text(name, pydoc(), length or chunk, device)
    if name == "glyphs":
        return Images(name, *np.split(glyphs(12000, seed=0), [11000]), bits, device)
    if name == "mnist":
        parts = [array_in(fetch(f"{part}-images-idx3-ubyte.gz"), name)
                 for part in ("train", "t10k")]
        return Images(name, *parts, bits, device)
    if name == "cifar10":
        parts = cifar10(fetch("cifar-10-binary.tar.gz"), name)
        return Images(name, *parts, bits, device, flips=True)
    if name == "tones":
        return Audio(name, dict(enumerate(tones(240))), RATE, length or 2048, device,
                     test=set(range(9, 240, 10)))
    if name == "fsdd":
        there = [*folder().rglob("recordings"), *folder().rglob("free-spoken-digit-dataset*.gz")]
        place = there[0] if there else fetch("v1.0.10.tar.gz").filename
        return audio(name, members(place, WAVS), length or 2048, device, test=r"_[0-4]\.wav$")
    if name == "sc09":
        digits = r"^(\./)?(zero|one|two|three|four|five|six|seven|eight|nine)/.*\.wav$|_list\.txt$"
        place = fetch("speech_commands_v0.02.tar.gz").filename
        return audio(name, members(place, digits), length or 16000, device, pad=16000)
    if name in NAMES:
        return Text(name, fetch(f"{name}.zip"), length or chunk, device)
    return load_file(name, length, bits, device, chunk)


def load_file(name, length, bits, device, chunk):
    """`load` of a path, or of FILE.npz:NAME, by what the first bytes say."""
    path, _, member = (name, "", "") if os.path.exists(name) else name.partition(".npz:")
    path += ".npz" if member else ""
    if not os.path.lexists(path):
        raise ValueError(f"--data {name}: no such file, and none of the names {', '.join(NAMES)}")
    if os.path.isdir(path):
        return audio(name, members(path, WAVS), length or 2048, device)
    content = unpack(read(path), path, member)
    array = array_in(content, name)
    if array is not None and array.ndim == 2:              # (channels, n)
        return audio(name, [(path, content)], length or 2048, device)
    if array is not None:
        n = len(array) // 10
        return Images(name, array[n:], array[:n], bits, device)
    if content[257:262].tobytes() == b"ustar":
        if any(members(name, BATCHES, io.BytesIO(content))):
            name = f"a part of cifar10, {name}"
            return Images(name, *cifar10(content, name), bits, device, flips=True)
        return audio(name, members(name, WAVS, io.BytesIO(content)), length or 2048, device)
    refuse_foreign(content, name)
    if len(content) == 0:
        raise ValueError(f"{name} is empty")
    return Text(name, content, length or chunk, device)


def pydoc():
    """Topics of Python's help() in lower case, every run of other characters than a-z one space."""
    from pydoc_data.topics import topics
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower()).strip()
    return np.frombuffer(bytearray(text.encode()), np.uint8)


def cifar10(content, name):
    """CIFAR-10's binary version, or a part of it: train and test, (N, 3, 32, 32) each.

    A record is a byte for the label and 3,072 for the pixels.
    """
    try:
        parts = {Path(file).name: records.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32)
                 for file, records in members(name, BATCHES, io.BytesIO(content))}
        test = parts.pop("test_batch.bin")
        return np.concatenate([parts[part] for part in sorted(parts)]), test
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} is no tarball of CIFAR-10's binary version with a data_batch and "
                         f"the test_batch, or a damaged one ({error})")


DIGITS = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
"""


def glyphs(n, seed, size=16):
    """(n, 1, size, size) uint8: digits in a bitmap font, shifted, scaled, sheared, grey, noisy."""
    rows = [line.split() for line in DIGITS.split("\n")[1:-1]]
    font = torch.tensor([[[[cell == "#" for cell in row] for row in digit]]
                         for digit in zip(*rows)]).float()
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    theta = torch.zeros(n, 2, 3)                           # picture coordinates -> font coordinates
    theta[:, 0, 0] = 1 / uniform(0.4, 0.6)
    theta[:, 1, 1] = 1 / uniform(0.6, 0.85)
    theta[:, 0, 1] = uniform(-0.5, 0.5)
    theta[:, 0, 2] = uniform(-0.5, 0.5)
    theta[:, 1, 2] = uniform(-0.25, 0.25)
    digits = font[torch.randint(10, (n,), generator=generator)]          # (n, 1, 7, 5)
    grid = nn.functional.affine_grid(theta, (n, 1, size, size), align_corners=False)
    ink = nn.functional.grid_sample(digits, grid, align_corners=False)
    ink = uniform(0.0, 0.2, 1, 1, 1) + uniform(0.5, 0.75, 1, 1, 1) * ink
    noise = 0.01 * torch.randn(ink.shape, generator=generator)
    return ((ink + noise).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


RATE = 8000                          # samples a second of `tones`


def tones(n, seed=0):
    """(n, 1, 16000) int16, n clips of two seconds: four notes, each a plucked string, a sweep or a
    pause, under noise of standard deviation 16: below 6.05 bits a sample nobody can come."""
    random = np.random.RandomState(seed)                   # the same numbers in every NumPy
    time = np.arange(4000) / RATE

    def uniform(low, high):
        return low + (high - low) * random.rand(n * 4, 1)

    pitch, loudness = 80 * 2 ** uniform(0, 3), 400 * 2 ** uniform(0, 4)
    string, decay = 0.0, uniform(1, 5)
    for overtone in range(1, 9):                           # the high ones die first
        wave = np.sin(2 * np.pi * (overtone * pitch * time + uniform(0, 1)))
        string = string + wave * np.exp(-decay * overtone * time) / overtone
    speed = pitch * (2 ** uniform(-1, 1) - 1)              # from the pitch to half or twice of it
    sweep = np.sin(2 * np.pi * (pitch * time + speed * time ** 2)) * np.sin(2 * np.pi * time)
    kind = random.randint(5, size=(n * 4, 1))
    notes = np.where(kind < 3, string, np.where(kind < 4, sweep, 0.0))
    sound = loudness * notes + 16 * random.randn(n * 4, 4000)
    return np.rint(sound).clip(-32768, 32767).astype(np.int16).reshape(n, 1, -1)


# -- Symbols, characters and pictures --------------------------------------------------------------

def to_symbols(stream, K, start=0):
    """bytes -> (n,) uint8: the bytes themselves, or for K = 27 space 0 and a-z 1..26; uint16 for
    the samples of audio.

    ValueError names the first character without a symbol; start is the position of the first byte.
    """
    if K > 256:
        return np.frombuffer(stream, "<u2").astype(np.uint16) ^ 0x8000
    wrong = OTHER.search(stream) if K == 27 else None
    if wrong:
        at = wrong.start()
        char = bytes(stream[at:at + 4]).decode("utf-8", errors="replace")[0]
        raise ValueError(f"character {char!r} at position {start + at}: this model knows a-z and "
                         "space alone")
    return np.frombuffer(stream, np.uint8) & (31 if K == 27 else 255)    # a copy


def to_bytes(symbols, K):
    """(n,) integers -> bytes: the inverse of `to_symbols`."""
    if K > 256:
        return (np.asarray(symbols).astype("<u2") ^ 0x8000).tobytes()
    values = np.asarray(symbols, dtype=np.uint8)
    if K == 27:
        values = np.where(values == 0, ord(" "), values + 96).astype(np.uint8)
    return values.tobytes()


def show(x, K, known=None):
    """(D,) integers -> one line of text; `_` where `known` (D,) is False.

    Control characters become spaces, so that a sample cannot move the cursor.
    """
    stream = np.frombuffer(to_bytes(x, K), dtype=np.uint8)
    if known is not None:
        stream = np.where(known, stream, ord("_")).astype(np.uint8)
    text = stream.tobytes().decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() else " " for char in text)


def to_images(x, shape, K=256):
    """(N, D) integers -> (N, H, W, C) uint8; values 0..K-1 are spread over 0..255, to be seen."""
    images = np.asarray(x, dtype=np.int64).reshape(-1, *shape).transpose(0, 2, 3, 1)
    return (images * 255 // (K - 1)).astype(np.uint8)


def grid(images, columns):
    """(N, H, W, C) uint8 -> one picture, row by row, enlarged to 64 pixels an image or more."""
    N, _, W, C = images.shape
    n = -(-64 // W)
    images = images.repeat(n, axis=1).repeat(n, axis=2)
    images = np.pad(images, ((0, 0), (0, n), (0, n), (0, 0)), constant_values=255)   # gaps
    images = np.pad(images, ((0, -N % columns), (0, 0), (0, 0), (0, 0)))
    rows = images.reshape(-1, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    picture = rows.reshape(len(rows) * images.shape[1], -1, C)
    return picture[..., :3] if C > 2 else picture[..., 0]


def png(*frames):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG file; several are a film of five a second,
    which shows the last frame longest."""
    def chunk(kind, layout="", *values, content=b""):
        content = struct.pack(">" + layout, *values) + content
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    H, W = frames[0].shape[:2]
    colour = 2 if frames[0].ndim == 3 else 0
    parts = [chunk(b"IHDR", "IIBBBBB", W, H, 8, colour, 0, 0, 0)]
    if len(frames) > 1:
        parts.append(chunk(b"acTL", "II", len(frames), 0))
    for i, frame in enumerate(frames):
        rows = np.pad(frame.reshape(H, -1), ((0, 0), (1, 0)))            # filter 0: as they are
        pixels = zlib.compress(rows.tobytes(), 9)
        if len(frames) > 1:
            pause = 200 if i < len(frames) - 1 else 2000   # milliseconds
            parts.append(chunk(b"fcTL", "IIIIIHHBB", max(0, 2 * i - 1), W, H, 0, 0, pause, 1000,
                               0, 0))
        parts.append(chunk(b"fdAT", "I", 2 * i, content=pixels) if i else
                     chunk(b"IDAT", content=pixels))
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IEND")])


def wav(symbols, rate):
    """(n,) symbols of audio -> the bytes of a WAV file with one channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", None))
        writer.writeframes(to_bytes(symbols, Audio.K))
    return file.getvalue()


def waveforms(samples, known=None, size=(64, 640)):
    """Samples (N, D) around 0 -> (N, *size, 1) uint8: for each column a line from its lowest to its
    highest sample; light grey where all of them are known (N, D)."""
    (N, D), (H, W) = samples.shape, size
    edges = np.arange(W) * D // W
    loudest = max(1, np.abs(samples).max())
    low, high = ((H - 1) / 2 * (1 + ends.reduceat(samples / loudest, edges, axis=1))
                 for ends in (np.minimum, np.maximum))     # (N, W)
    row = np.arange(H)[::-1, None]
    ink = (row >= low[:, None] - 0.5) & (row <= high[:, None] + 0.5)     # (N, H, W)
    grey = np.zeros((N, W)) if known is None else 170 * np.minimum.reduceat(known, edges, axis=1)
    return np.where(ink, grey[:, None], 255).astype(np.uint8)[..., None]


def exhibits(data, x):
    """What a run leaves beside its checkpoint, {name: bytes}: a piece of the test split, to try
    compress.py on, and the samples x (N, D), which are printed where they are text."""
    test, name = data.splits["test"].cpu(), PIECES[data.kind]
    if data.kind == "audio":
        shapes = waveforms(x.numpy() - data.K // 2)
        return {name: wav(test[:2 * data.rate], data.rate), "samples.png": png(grid(shapes, 1)),
                "samples.wav": wav(x.flatten(), data.rate)}
    if data.kind != "image":
        print("samples:", *(show(row, data.K) for row in x), sep="\n  ")
        return {name: to_bytes(test[:20000], data.K)}
    file = io.BytesIO()
    np.save(file, test[:16].view(-1, *data.shape).permute(0, 2, 3, 1).numpy())
    return {name: file.getvalue(),
            "samples.png": png(grid(to_images(x, data.shape, data.K), columns=8))}


class Source:
    """The n symbols of a file, read piece by piece: its size is no matter of memory.

    settings: of the model that reads it. head, tail: the bytes before and behind the symbols.
    """

    def __init__(self, path, settings):
        self.path, self.kind, self.K = path, settings["kind"], settings["K"]
        self.array = content = read(path, mapped=True)
        begin, end = 0, len(content)
        if self.kind in ("image", "audio"):
            self.array = array_in(content, path)
        if self.kind == "text" or self.array is None:      # a model of bytes codes any file
            refuse_foreign(content, path)
        if self.kind in ("image", "audio"):
            found = () if self.array is None else self.array.shape
            shape, image = tuple(settings["shape"]), self.kind == "image"
            if found[1:] != shape if image else len(found) != 2:
                wanted = f"(C, H, W) = {shape}" if image else "(channels, n), a .wav file"
                raise ValueError(f"{path} holds {found or 'something else'}, the model codes "
                                 + wanted)
            begin = layout(content, path)[0]
            end = begin + self.array.nbytes
        self.n = self.array.size
        self.head, self.tail = content[:begin], content[end:]

    def read(self, i, j):
        """Symbols i..j, (j - i,) uint8; of images whole ones, colour by colour; of audio uint16,
        channel by channel."""
        part = np.array(self.array.flat[i:j])
        if self.kind != "image":
            return torch.from_numpy(to_symbols(part.tobytes(), self.K, i))
        if part.max(initial=0) >= self.K:
            raise ValueError(f"{self.path} holds the value {part.max()}, the model knows 0 to "
                             f"{self.K - 1}; of 8-bit images it knows array // {256 // self.K}")
        return torch.from_numpy(part)


def write_back(file, header, settings, parts):
    """The file that an archive was made of, or what parts (an iterator) hold of it, into an open
    file. Returns the number of symbols."""
    head, tail = (header[part].encode("latin-1") for part in ("head", "tail"))
    if settings["kind"] in ("image", "audio"):
        return write_array(file, head, tail, settings, header["length"], parts)
    n = 0
    for part in parts:
        file.write(to_bytes(part, settings["K"]))
        n += len(part)
    return n


def write_array(file, head, tail, settings, length, parts):
    """`write_back` of images and audio, each value put where it was in the file."""
    content = np.frombuffer(head, np.uint8)
    offset, shape, axes, kind, order = layout(content, "the archive", whole=False)
    if settings["kind"] == "audio":
        shape = (length // shape[1], shape[1])
    file.write(head)
    size = offset + length * np.dtype(kind).itemsize
    file.truncate(size)
    # Takes the space now, where the platform can: under a map a full disk is a fatal signal.
    with suppress(AttributeError):
        os.posix_fallocate(file.fileno(), 0, size)
    stored = np.empty(shape, kind)                         # a file of no symbols cannot be mapped
    if length:
        stored = np.memmap(file, kind, "r+", offset, shape, order)
    array, n = stored.transpose(axes), 0
    for part in parts:
        array.flat[n:n + len(part)] = np.frombuffer(to_bytes(part, max(256, settings["K"])), kind)
        n += len(part)
    if n == length:
        file.seek(0, os.SEEK_END)
        file.write(tail)
    else:                                                  # some are left out: a file of its own
        few = array.flat[:n]
        del array, stored                                  # Windows does not cut a mapped file
        file.truncate(0)
        file.seek(0)
        if settings["kind"] == "audio":
            file.write(wav(to_symbols(few.tobytes(), settings["K"]), settings["rate"]))
        else:
            few = few.reshape(-1, *settings["shape"]).transpose(0, 2, 3, 1)
            few = few.view(bool) if b"'|b1'" in head else few
            np.save(file, few.squeeze(3) if few.shape[3] == 1 else few)
    return n


def references(symbols, K, rate=None):
    """What others need for symbols (n,), taken as one file: {name: bits per dimension}. rate: of
    audio."""
    share = np.bincount(symbols) / len(symbols)
    share = share[share > 0]
    found = {"uniform": float(np.log2(K)), "single symbols": float(share @ np.log2(1 / share))}
    stream = to_bytes(symbols, K)
    sizes = {"bz2": len(bz2.compress(stream)), "xz": len(lzma.compress(stream)),
             "zlib": len(zlib.compress(stream))}
    for name, command in SOUND_PACKERS.items():
        if K == Audio.K and shutil.which(command[0]):
            done = subprocess.run(command, input=wav(symbols, rate), capture_output=True)
            sizes[name] = len(done.stdout)
    return found | {name: 8 * size / len(symbols) for name, size in sizes.items() if size}
