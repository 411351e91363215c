"""Data sets as integers 0..K-1, how to show them, and all that touches a user's files (App. D).

    pydoc          the help texts inside Python, reduced to a-z and space: English without a
                   download; it changes with the Python version
    glyphs         small grey pictures of digits, drawn here: images without a download
    text8, enwik8, mnist, cifar10    in the folder ARDM_DATA, or data/; downloaded if missing
    any file       what its first bytes say: .npy of uint8 images (N, H, W) or (N, H, W, C), a
                   tarball of CIFAR-10 in its binary version, or text: 27 symbols if it holds
                   nothing but a-z and space, else bytes. A zip file with one member is read through

Text is split by position: 90% for training, 5% for validation, 5% for the test. Of images the
last tenth of what is to train on is for validation; the first tenth of a .npy file is for the test.
"""
import argparse
import bz2
import gzip
import hashlib
import http.client
import io
import lzma
import mmap
import os
import platform
import re
import socket
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

NAMES = ("pydoc", "glyphs", "text8", "enwik8", "mnist", "cifar10")
UNITS = {"text": "char", "bytes": "char", "image": "dim"}  # what bits are counted per
PIECES = {"text": "test.txt", "bytes": "test.bin", "image": "test.npy"}  # beside a checkpoint
LARGEST = 1 << 31                    # bytes that an archive may unpack to
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SOURCES = {                          # file -> where it comes from, md5 (of a zip: of its member)
    "text8.zip": ("http://mattmahoney.net/dc/", "3bea1919949baf155f99411df5fada7e"),
    "enwik8.zip": ("http://mattmahoney.net/dc/", "a1fa5ffddb56f4953e226637dabbb36a"),
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/",
                               "c32a1d4ab5d03f1284b67883e8d87530"),
    "train-images-idx3-ubyte.gz": (MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "t10k-images-idx3-ubyte.gz": (MNIST, "9fb629c4189551a2d022fa330f9573f3")}


# -- Errors, the reader and the writer -------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, as all others are."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists everything)\n")


def run(main):
    """Runs a script: what a user can mend is one line on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="replace")               # a terminal that lacks a character
    try:
        return main()
    except BrokenPipeError:                                # as in: python sample.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None
    except KeyboardInterrupt:
        code, words = 130, "stopped"
    except (ValueError, OSError) as error:
        code, words = 2, error
    except (MemoryError, RuntimeError) as error:           # of NumPy, of CUDA, of torch on a CPU
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and "can't allocate memory" not in str(error):
            raise
        code, words = 2, "too little memory: a smaller --batch or --size takes less"
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def write(path, others=(), mode="w+b"):
    """A file that gets its name only when it is complete and on the disk. Until then, and after
    an error, what was there before stays as it was. others: files that it must not replace."""
    path = Path(os.path.realpath(path))
    for other in others:
        if path.exists() and os.path.exists(other) and path.samefile(other):
            raise ValueError(f"{other} and {path} are the same file: choose another name")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no file'}")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")             # a name of its own
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}")
    finally:
        part.unlink(missing_ok=True)


def unzip(content, name):
    """The only member of a zip file; anything else as it is."""
    if not content.startswith(b"PK\x03\x04"):
        return content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) == 1 and members[0].file_size < LARGEST:
                return archive.read(members[0])
            reason = f"it holds {len(members)} files, or too large a one"
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        reason = error
    raise ValueError(f"{name} is a zip file that cannot be read: {reason}")


def fetch(name):
    """The content of an upstream file, unzipped: from ARDM_DATA or data/, or a folder in there;
    downloaded if it is missing. ValueError if it is not the whole upstream file."""
    folder = Path(os.environ.get("ARDM_DATA", "data"))
    url, md5 = SOURCES[name]
    there = [place / file for file in (name, name.removesuffix(".zip"))  # a zip may be unpacked
             for place in (folder, *folder.glob("*/")) if (place / file).is_file()]
    path = there[0] if there else folder / name
    try:
        if not there:
            folder.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)
            torch.hub.download_url_to_file(url + name, str(path))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download {url}{name} ({error}): fetch it elsewhere and put it "
                         f"into {folder}/")
    content = unzip(path.read_bytes(), name)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
        return content
    if not there:
        path.unlink()
    raise ValueError(f"this is not the whole upstream file {name}, by its md5: "
                     + (f"{path}: remove it, or name it by --data {path}" if there else url))


# -- Data sets -------------------------------------------------------------------------------------

class Text:
    """A stream of characters (K = 27: space, a-z) or of bytes (K = 256), as uint8 on one device.

    A datapoint is a chunk of D = `length` symbols, without the text before it.
    """
    flips = False

    def __init__(self, name, stream, length, device="cpu"):
        self.name, self.D, self.shape = name, length, (length,)
        self.kind, self.K = ("text", 27) if is_text(stream) else ("bytes", 256)
        n = len(stream)
        if n < 20 * length:
            raise ValueError(f"{name}: {n} characters are too few for chunks of {length}, it takes "
                             f"{20 * length}: use a longer text or a smaller --length")
        symbols = torch.from_numpy(to_symbols(stream, self.K)).to(device)
        parts = symbols.tensor_split((n * 90 // 100, n * 95 // 100))
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

    train, test: (N, C, H, W). bits: how many of the 8 are kept, from the most significant on.
    flips: training images are mirrored at random; turns: and turned by quarters.
    """
    kind = "image"

    def __init__(self, name, train, test, bits=8, device="cpu"):
        self.name = name if bits == 8 else f"{name}, {bits} of 8 bits"
        self.shape, self.K = train.shape[1:], 2 ** bits
        self.D = int(np.prod(self.shape))
        self.flips, self.turns = "cifar" in name, False
        n = len(train) - -(-len(train) // 10)
        if min(self.D, n, len(test)) == 0:
            raise ValueError(f"{name}: {len(train)} and {len(test)} images are too few to train on "
                             "and to test")
        parts = dict(train=train[:n], valid=train[n:], test=test)
        self.splits = {part: torch.from_numpy(pixels.reshape(-1, self.D) >> 8 - bits).to(device)
                       for part, pixels in parts.items()}

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


def load(name, length=64, bits=8, device="cpu"):
    """The data set of that name, or the file at that path; length is for text, bits for images."""
    if name == "pydoc":
        return Text(f"pydoc of Python {platform.python_version()}", pydoc(), length, device)
    if name in ("text8", "enwik8"):
        return Text(name, fetch(f"{name}.zip"), length, device)
    if name == "glyphs":
        images = glyphs(12000, seed=0)
        return Images(name, images[:11000], images[11000:], bits, device)
    if name == "mnist":
        parts = [idx(fetch(f"{part}-images-idx3-ubyte.gz")) for part in ("train", "t10k")]
        return Images(name, *parts, bits, device)
    if name == "cifar10":
        return Images(name, *cifar10(fetch("cifar-10-binary.tar.gz"), name), bits, device)
    if not Path(name).exists():
        raise ValueError(f"--data {name}: no such file, and none of the names {', '.join(NAMES)}")
    content = Path(name).read_bytes()
    if content.startswith(b"\x93NUMPY"):
        images = np.ascontiguousarray(open_npy(name).transpose(0, 3, 1, 2))
        n = len(images) // 10
        return Images(name, images[n:], images[:n], bits, device)
    if content.startswith(b"\x1f\x8b"):
        return Images(f"a part of cifar10, {name}", *cifar10(content, name), bits, device)
    if not content:
        raise ValueError(f"{name} is empty")
    return Text(name, unzip(content, name), length, device)


def pydoc():
    """Topics of Python's help() in lower case, every run of other characters than a-z one space."""
    from pydoc_data.topics import topics
    text = " ".join(topics[key] for key in topics).lower()
    return re.sub("[^a-z]+", " ", text).strip().encode()


def open_npy(path):
    """uint8 (N, H, W) or (N, H, W, C) in a .npy file -> (N, H, W, C), read as it is used."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        dtype, shape = images.dtype, images.shape
    except Exception as error:                             # whatever a damaged header brings up
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as .npy ({reason[:80]})")
    if dtype != np.uint8 or len(shape) not in (3, 4) or images.size == 0:
        raise ValueError(f"{path} holds {dtype} of shape {shape}: images are uint8 of shape "
                         "(N, H, W) or (N, H, W, C)")
    return images.reshape(*shape, 1) if len(shape) == 3 else images


def idx(content):
    """The images of one of MNIST's gzipped files: (N, 1, H, W)."""
    content = gzip.decompress(content)
    shape = struct.unpack(">3I", content[4:16])
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, *shape[1:]).copy()


def cifar10(content, name):
    """CIFAR-10's binary version, or a part of it: train and test, (N, 3, 32, 32) each.

    A record is a byte for the label and 3,072 for the pixels; nothing is unpacked to the disk.
    """
    parts = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                base = Path(member.name).name
                if member.isfile() and re.fullmatch(r"(data_batch_[1-5]|test_batch)\.bin", base):
                    records = archive.extractfile(member).read(LARGEST)
                    pixels = np.frombuffer(records, np.uint8).reshape(-1, 3073)[:, 1:]
                    parts[base] = pixels.reshape(-1, 3, 32, 32)
        test = parts.pop("test_batch.bin")
        return np.concatenate([parts[part] for part in sorted(parts)]), test
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError) as error:
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


# -- Symbols, characters and pictures --------------------------------------------------------------

def is_text(stream):
    """True where bytes hold nothing but a-z and space."""
    return not stream.translate(None, b" abcdefghijklmnopqrstuvwxyz")


def to_symbols(stream, K, start=0):
    """bytes -> (n,) uint8: the bytes themselves, or for K = 27 space 0 and a-z 1..26.

    ValueError names the first character without a symbol; start is the position of the first byte.
    """
    values = np.frombuffer(stream, dtype=np.uint8)
    if K == 256:
        return values.copy()
    if not is_text(stream):
        bad = re.search(rb"[^a-z ]", stream).start()
        char = stream[bad:bad + 4].decode("utf-8", errors="replace")[0]
        raise ValueError(f"character {char!r} at position {start + bad}: this model knows a-z and "
                         "space alone")
    return np.where(values == ord(" "), 0, values - 96).astype(np.uint8)


def to_bytes(symbols, K):
    """(n,) integers -> bytes: the inverse of `to_symbols`."""
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


def png(*frames, seconds=0.2):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG file; an animated one for several frames,
    which shows the last frame longest."""
    def chunk(kind, *values, layout=">", content=b""):
        content = struct.pack(layout, *values) + content
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    H, W = frames[0].shape[:2]
    colour = 2 if frames[0].ndim == 3 else 0
    parts = [chunk(b"IHDR", W, H, 8, colour, 0, 0, 0, layout=">IIBBBBB")]
    if len(frames) > 1:
        parts.append(chunk(b"acTL", len(frames), 0, layout=">II"))
    for i, frame in enumerate(frames):
        rows = np.pad(frame.reshape(H, -1), ((0, 0), (1, 0)))            # filter 0: as they are
        pixels = zlib.compress(rows.tobytes(), 9)
        if len(frames) > 1:
            pause = round(1000 * seconds) * (10 if i == len(frames) - 1 else 1)
            parts.append(chunk(b"fcTL", max(0, 2 * i - 1), W, H, 0, 0, pause, 1000, 0, 0,
                               layout=">IIIIIHHBB"))
        if i == 0:
            parts.append(chunk(b"IDAT", content=pixels))
        else:
            parts.append(chunk(b"fdAT", 2 * i, layout=">I", content=pixels))
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IEND")])


def exhibits(data, x):
    """What a run leaves beside its checkpoint, {name: bytes}: a piece of the test split, to try
    compress.py on, and the samples x, which are printed where they are text."""
    test, name = data.splits["test"].cpu(), PIECES[data.kind]
    if data.kind != "image":
        print("samples:", *(show(row, data.K) for row in x), sep="\n  ")
        return {name: to_bytes(test[:20000], data.K)}
    file = io.BytesIO()
    np.save(file, test[:16].view(-1, *data.shape).permute(0, 2, 3, 1).numpy())
    return {name: file.getvalue(),
            "samples.png": png(grid(to_images(x, data.shape, data.K), columns=8))}


class Source:
    """The n symbols of a file, read piece by piece: its size is no matter of memory.

    settings: of the model that reads it. head: the bytes before the first symbol.
    """

    def __init__(self, path, settings):
        self.path, self.kind, self.K = path, settings["kind"], settings["K"]
        self.shape, self.head = settings["shape"], b""
        with open(path, "rb") as file:
            try:
                self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (ValueError, OSError):                  # nothing in it, or a pipe
                self.content = file.read()
        if self.kind == "image":
            images, (C, H, W) = open_npy(path), self.shape
            if images.shape[1:] != (H, W, C):
                raise ValueError(f"{path} holds images of (H, W, C) = {images.shape[1:]}, the "
                                 f"model codes {(H, W, C)}")
            self.head = self.content[:images.offset]
            if not images.flags.c_contiguous or len(self.content) != images.offset + images.size:
                raise ValueError(f"{path} is in Fortran order, or has bytes behind its array: save "
                                 "the array again, by numpy.save")
        self.n = len(self.content) - len(self.head)

    def read(self, i, j):
        """Symbols i..j, (j - i,) uint8; of images whole ones, colour by colour."""
        content = self.content[len(self.head) + i:len(self.head) + j]
        if self.kind != "image":
            return torch.from_numpy(to_symbols(content, self.K, i))
        C, H, W = self.shape
        pixels = np.frombuffer(content, np.uint8).reshape(-1, H, W, C).transpose(0, 3, 1, 2)
        if pixels.max(initial=0) >= self.K:
            raise ValueError(f"{self.path} holds the value {pixels.max()}, the model knows 0 to "
                             f"{self.K - 1}")
        return torch.from_numpy(pixels.flatten())          # a copy


def write_back(file, header, settings, parts):
    """The file that an archive was made of, or what parts (an iterator) hold of it. Returns the
    number of symbols."""
    head, n, image = header["head"].encode("latin-1"), 0, settings["kind"] == "image"
    file.write(head)
    for part in parts:
        n += len(part)
        if image:
            part = part.view(-1, *settings["shape"]).permute(0, 2, 3, 1).flatten()
        file.write(to_bytes(part, settings["K"]))
    if image and n < header["length"]:                     # some are left out: another head
        C, H, W = settings["shape"]
        file.seek(len(head))
        pixels = np.frombuffer(file.read(), np.uint8)
        file.seek(0)
        np.save(file, pixels.reshape(-1, H, W, C) if C > 1 else pixels.reshape(-1, H, W))
        file.truncate()
    return n


PACKERS = {"bz2": bz2.compress, "xz": lzma.compress, "zlib": zlib.compress}


def references(symbols, K):
    """What others need for symbols (n,), taken as one file: {name: bits per dimension}."""
    share = np.bincount(symbols) / len(symbols)
    share = share[share > 0]
    found = {"uniform": float(np.log2(K)), "single symbols": float(-(share * np.log2(share)).sum())}
    stream = to_bytes(symbols, K)
    return found | {name: 8 * len(pack(stream)) / len(stream) for name, pack in PACKERS.items()}
