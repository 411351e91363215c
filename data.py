"""Data sets: integers 0..K-1, how they are split, cut into datapoints and shown (App. D).

    pydoc          the help texts inside Python (pydoc_data.topics), reduced to a-z and space: real
                   English without a download. It changes with the Python version
    glyphs         small grey pictures of digits, drawn here: images without a download
    text8, enwik8, mnist, cifar10    looked for in the data folder, downloaded otherwise
    any file       FILE.npy: images, uint8 (N, H, W) or (N, H, W, C); the tarball of CIFAR-10, or
                   a part of it; else text: 27 symbols where it holds nothing but a-z and space,
                   bytes otherwise; a zip file with one member is read through

    data = load("pydoc", length=64)    data.batch(32, 64) -> (32, 64) int64, random training windows
                                       data.chunks("test") -> (N, 64) uint8 and the shorter rest
    data = load("glyphs")              data.batch(32) -> (32, 256) int64, random training images

Text is split by position: the first 90% for training, 5% for validation, the last 5% for the test.
Of images, the last tenth of what is to train on is for validation; the first tenth of a .npy file
is the test split.
"""
import gzip
import hashlib
import http.client
import io
import os
import pickle
import platform
import re
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

TEXTS, IMAGES = ("pydoc", "text8", "enwik8"), ("glyphs", "mnist", "cifar10")
NAMES = TEXTS + IMAGES
URLS = {"text8.zip": "http://mattmahoney.net/dc/text8.zip",
        "enwik8.zip": "http://mattmahoney.net/dc/enwik8.zip",
        "cifar-10-python.tar.gz": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"}
URLS |= {f"{part}-images-idx3-ubyte.gz":
         f"https://ossci-datasets.s3.amazonaws.com/mnist/{part}-images-idx3-ubyte.gz"
         for part in ("train", "t10k")}
MD5 = {"text8": "3bea1919949baf155f99411df5fada7e", "enwik8": "a1fa5ffddb56f4953e226637dabbb36a",
       "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
       "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
       "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3"}
UNITS = {"text": "char", "bytes": "char", "image": "dim"}            # what bits are counted per
LARGEST = 1 << 31                    # bytes that an archive may unpack to


class UserError(Exception):
    """What the user can mend, in one line; the scripts print it and exit with code 2."""


class Text:
    """A stream of characters (K = 27: space, a-z) or bytes (K = 256), on one device as uint8.

    A datapoint is a chunk of D = `length` of them, without the text before it. `name` says where
    the stream comes from.
    """

    def __init__(self, name, stream, length, device="cpu"):
        self.name, self.shape, self.D = name, (length,), length
        self.kind, self.K = ("text", 27) if is_text(stream) else ("bytes", 256)
        n = len(stream)
        if n < 20 * length:
            raise UserError(f"{name}: {n} characters are too few for chunks of {length}; the 5% "
                            f"held out must hold one, so it takes {20 * length}: use a longer "
                            "text or a smaller --length")
        symbols = torch.from_numpy(to_symbols(stream, self.K)).to(device)
        self.splits = dict(zip(("train", "valid", "test"),
                               symbols.tensor_split((n * 90 // 100, n * 95 // 100))))

    def batch(self, B, length=None, generator=None):
        """(B, length) int64: windows of training text that begin anywhere, cut on the device."""
        stream, length = self.splits["train"], length or self.D
        starts = torch.randint(len(stream) - length + 1, (B, 1), device=stream.device,
                               generator=generator)
        return stream[starts + torch.arange(length, device=stream.device)].long()

    def chunks(self, split):
        """`cut` of that split."""
        return cut(self.splits[split], self.D)


class Images:
    """Images of uint8, kept flat on one device: (N, D) with D = C * H * W, colour by colour.

    train, test: (N, C, H, W); the last tenth of train becomes the validation split. bits: how many
    of the 8, from the most significant on, are kept (K = 2^bits). flips, turns: training images are
    mirrored, or turned by quarters (where they are square), at random.
    """
    kind = "image"

    def __init__(self, name, train, test, bits=8, flips=False, turns=False, device="cpu"):
        self.name, self.shape, self.K = name, train.shape[1:], 2 ** bits
        if self.K < 256:
            self.name += f", {bits} of 8 bits"
        self.D, self.flips, self.turns = int(np.prod(self.shape)), flips, turns
        n = len(train) - -(-len(train) // 10)
        if min(self.D, n, len(test)) == 0:
            raise UserError(f"{name}: {len(train)} and {len(test)} images are too few to train on "
                            "and to test")
        if turns and self.shape[1] != self.shape[2]:
            raise UserError("--turns: the images are not square")
        parts = zip(("train", "valid", "test"), (train[:n], train[n:], test))
        self.splits = {part: torch.from_numpy(pixels.reshape(len(pixels), -1) >> (8 - bits))
                       .to(device) for part, pixels in parts}

    def batch(self, B, length=None, generator=None):
        """(B, D) int64: random training images; they are not cut, so length is not used."""
        images = self.splits["train"]
        draw = dict(device=images.device, generator=generator)
        x = images[torch.randint(len(images), (B,), **draw)].view(B, *self.shape)
        if self.flips:
            x = torch.where(torch.rand(B, 1, 1, 1, **draw) < 0.5, x.flip(3), x)
        if self.turns:
            turns = torch.randint(4, (B, 1, 1, 1), **draw)
            for n in (1, 2, 3):
                x = torch.where(turns == n, x.rot90(n, (2, 3)), x)
        return x.reshape(B, self.D).long()

    def chunks(self, split):
        """(N, D) images of that split, and no rest."""
        return self.splits[split], self.splits[split].new_zeros(0)


def cut(stream, D):
    """(n,) -> whole chunks (N, D), and the n mod D characters that are left over."""
    whole = len(stream) // D * D
    return stream[:whole].view(-1, D), stream[whole:]


def kind_of(name):
    """"image" or "text", of a data set's name or a file's path, without reading it."""
    image = name in IMAGES or name.endswith((".npy", ".tar", ".tar.gz", ".tgz"))
    return "image" if image else "text"


def load(name, length=None, data_dir="data", device="cpu", fetch=True, bits=8, **augmentation):
    """The data set of that name, or the file at that path.

    length: of a datapoint of text. bits, flips, turns: see Images.
    fetch: download what `data_dir` does not have.
    """
    if name not in NAMES and not Path(name).is_file():
        raise UserError(f"--data {name}: no such file, and none of the names {', '.join(NAMES)}")
    if kind_of(name) == "image":
        name, train, test = read_images(name, Path(data_dir), fetch)
        return Images(name, train, test, bits, device=device, **augmentation)
    if name == "pydoc":
        name, stream = f"pydoc of Python {platform.python_version()}", pydoc_stream()
    elif name in TEXTS:
        stream = read_text(name, locate(name, Path(data_dir), fetch, f"{name}.zip", name))
    else:
        stream = read_stream(Path(name))
    if not stream:
        raise UserError(f"{name} is empty")
    return Text(name, stream, length, device)


# -- Characters and symbols ------------------------------------------------------------------------

def is_text(stream):
    """True where bytes hold nothing but a-z and space."""
    return not stream.translate(None, b" abcdefghijklmnopqrstuvwxyz")


def to_symbols(stream, K, start=0):
    """bytes -> (n,) uint8 symbols: the bytes themselves, or for K = 27 space 0 and a-z 1..26.

    UserError that names the first character which has no symbol, and its position: start is that
    of the first byte.
    """
    if K == 27 and not is_text(stream):
        bad = re.search(rb"[^a-z ]", stream)
        char = stream[bad.start():bad.start() + 4].decode("utf-8", errors="replace")[0]
        raise UserError(f"character {char!r} at position {start + bad.start()}: this model knows "
                        "a-z and space alone")
    values = np.frombuffer(stream, dtype=np.uint8)
    return (np.where(values == ord(" "), 0, values - 96).astype(np.uint8) if K == 27
            else values.copy())


def to_bytes(symbols, K):
    """(n,) integers -> bytes: inverse of `to_symbols`."""
    values = np.asarray(symbols, dtype=np.uint8)
    if K == 27:
        values = np.where(values == 0, ord(" "), values + 96).astype(np.uint8)
    return values.tobytes()


def show(x, K, known=None):
    """(D,) integers -> one line of text, `_` where `known` (D,) is False; bytes are shown as UTF-8.

    Control characters become spaces, so that a sample cannot move the cursor.
    """
    stream = np.frombuffer(to_bytes(x, K), dtype=np.uint8)
    stream = stream if known is None else np.where(known, stream, ord("_"))
    text = stream.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() else " " for char in text)


def to_images(x, shape, K=None):
    """(N, D) integers -> (N, H, W, C) uint8. K: values 0..K-1 are spread over 0..255, to be seen.
    """
    images = np.asarray(x, dtype=np.int64).reshape(-1, *shape).transpose(0, 2, 3, 1)
    return (images if K is None else images * 255 // (K - 1)).astype(np.uint8)


def grid(images, columns):
    """(N, H, W, C) uint8 -> one picture, row by row, in colour where C is over 2; pixels n wide, so
    that an image has at least 64, and a pixel of white between images."""
    (N, _, W, C), n = images.shape, -(-64 // images.shape[2])
    images = images.repeat(n, axis=1).repeat(n, axis=2)
    blank = np.zeros((-N % columns, *images.shape[1:]), np.uint8)
    images = np.pad(np.concatenate((images, blank)), ((0, 0), (0, n), (0, n), (0, 0)),
                    constant_values=255)
    rows = images.reshape(-1, columns, *images.shape[1:])
    picture = rows.transpose(0, 2, 1, 3, 4).reshape(len(rows) * images.shape[1], -1, C)
    return picture[..., :3] if C > 2 else picture[..., 0]


def piece(data):
    """(file name, bytes) of a part of the test split, to be tried with compress.py."""
    test = data.splits["test"].cpu()
    if data.kind == "image":
        np.save(file := io.BytesIO(), to_images(test[:16], data.shape))
        return "test.npy", file.getvalue()
    name = "test.txt" if data.kind == "text" else "test.bin"
    return name, to_bytes(test[:20000], data.K)


# -- Where the streams come from -------------------------------------------------------------------

def pydoc_stream():
    """Topics of Python's help(), lower-cased, every run of other characters than a-z one space."""
    from pydoc_data.topics import topics
    text = " ".join(topics[key] for key in topics).lower()
    return re.sub("[^a-z]+", " ", text).strip().encode()


def read_text(name, path):
    """The bytes of text8 or enwik8; UserError where the file holds anything else."""
    stream = read_stream(path)
    check_md5(path, stream, MD5[name])
    return stream


def locate(name, folder, fetch, *files):
    """The path of the first of these files in folder or folder/name; else the first, fetched."""
    for path in (place / file for file in files for place in (folder, folder / name)):
        if path.is_file():
            return path
    path = folder / name / files[0] if len(files) == 1 else folder / files[0]
    if not fetch:
        raise UserError(f"{path} is not there")
    download(URLS[files[0]], path, lambda part: read_text(name, part) if name in TEXTS
             else check_md5(part, part.read_bytes(), MD5[files[0]]))
    return path


def check_md5(path, content, md5):
    if (found := hashlib.md5(content).hexdigest()) != md5:
        advice = "" if path.suffix == ".part" else "; remove it to download it again"
        if advice and not path.name.endswith("ubyte.gz"):
            advice += f", or train on it as it is with --data {path}"
        raise UserError(f"{path} is not the whole upstream file (md5 {found}, expected {md5})"
                        f"{advice}")


def read_stream(path):
    """All bytes of a file; of its only member where it is a zip file."""
    try:
        if not zipfile.is_zipfile(path):
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise UserError(f"{path} holds {len(members)} files: a zip file with exactly one "
                                "can be read")
            if members[0].file_size > LARGEST:
                raise UserError(f"{path} unpacks to {members[0].file_size} bytes: "
                                f"more than {LARGEST}")
            return archive.read(members[0])
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError,
            NotImplementedError) as error:
        raise UserError(f"{path} cannot be read: {error}")


# -- Images ----------------------------------------------------------------------------------------

def read_images(name, folder, fetch):
    """-> (name, train, test), arrays (N, C, H, W) uint8."""
    if name == "glyphs":
        images = draw_glyphs(12000, seed=0)
        return name, images[:11000], images[11000:]
    if name == "mnist":
        paths = [locate(name, folder, fetch, f"{part}-images-idx3-ubyte.gz")
                 for part in ("train", "t10k")]
        return name, *(read_idx(path) for path in paths)
    if name == "cifar10":
        path = locate(name, folder, fetch, "cifar-10-python.tar.gz")
        check_md5(path, path.read_bytes(), MD5[path.name])
        return name, *read_cifar(path)[1:]
    if Path(name).suffix != ".npy":
        return read_cifar(Path(name))
    images = np.ascontiguousarray(open_npy(name)[0].transpose(0, 3, 1, 2))
    n = len(images) // 10
    return name, images[n:], images[:n]


def open_npy(path):
    """(N, H, W) or (N, H, W, C) uint8 in a .npy file -> (N, H, W, C), read as it is used, and the
    shape that one image has in the file."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        dtype, shape = images.dtype, images.shape
    except Exception as error:                           # whatever a damaged header brings up
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as .npy ({reason[:80]})")
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise UserError(f"{path} holds {dtype} of shape {shape}: images are uint8 of shape "
                        "(N, H, W) or (N, H, W, C)")
    if images.size == 0:
        raise UserError(f"{path} is empty: shape {shape}")
    return images if len(shape) == 4 else images[..., None], shape[1:]


def read_idx(path):
    """The images of one of MNIST's .gz files, checked by its md5: (N, 1, H, W)."""
    check_md5(path, path.read_bytes(), MD5[path.name])
    content = gzip.decompress(path.read_bytes())
    magic, n, H, W = struct.unpack(">4I", content[:16])
    return np.frombuffer(content, np.uint8, offset=16).reshape(n, 1, H, W).copy()


def read_cifar(path):
    """CIFAR-10's python tarball, or as many of its batches as a partial one holds."""
    parts = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                base = Path(member.name).name
                if member.isfile() and re.fullmatch(r"data_batch_[1-5]|test_batch", base):
                    if member.size > LARGEST:
                        raise UserError(f"{path}: {base} is larger than {LARGEST} bytes")
                    pixels = PlainUnpickler(archive.extractfile(member), encoding="bytes").load()
                    parts[base] = pixels[b"data"].reshape(-1, 3, 32, 32)
                    require_uint8(parts[base])
    except UserError as error:
        raise UserError(f"{path}: {error}")
    except Exception as error:                           # what a damaged file brings up
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no tarball of CIFAR-10, or a damaged one ({reason[:80]})")
    test = parts.pop("test_batch", None)
    if test is None or not parts:
        raise UserError(f"{path} holds no data_batch or no test_batch of CIFAR-10")
    whole = len(parts) == 5 and len(test) == 10000
    name = "cifar10" if whole else (f"a part of cifar10 ({', '.join(sorted(parts))} and "
                                    f"{len(test):,} test images)")
    return name, np.concatenate([parts[part] for part in sorted(parts)]), test


def require_uint8(pixels):
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels of type {pixels.dtype}")


class PlainUnpickler(pickle.Unpickler):
    """Reads NumPy arrays, bytes, numbers and containers; refuses, by name, whatever else a pickle
    asks for, so that none of it is ever run."""
    ADMITTED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
                ("numpy.core.multiarray", "_reconstruct"),
                ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise UserError(f"the pickle asks for {module}.{name}, which images do not need: "
                            "refused")
        return super().find_class(module, name)


DIGITS = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
"""


def draw_glyphs(n, seed, size=16):
    """(n, 1, size, size) uint8: digits in a bitmap font, shifted, scaled, sheared, grey, noisy."""
    font = torch.tensor([[[[cell == "#" for cell in row] for row in rows]]
                         for rows in zip(*map(str.split, DIGITS.split("\n")[1:-1]))]).float()
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)
    width, height = uniform(0.4, 0.6), uniform(0.6, 0.85)                # parts of the picture
    theta = torch.zeros(n, 2, 3)                # where in the font each pixel of the picture lies
    theta[:, 0, 0], theta[:, 1, 1] = 1 / width, 1 / height
    theta[:, 0, 1] = uniform(-0.5, 0.5)
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.5, 0.5), uniform(-0.25, 0.25)
    digits = font[torch.randint(10, (n,), generator=generator)]          # (n, 1, 7, 5)
    grid = nn.functional.affine_grid(theta, (n, 1, size, size), align_corners=False)
    ink = nn.functional.grid_sample(digits, grid, align_corners=False)
    ink = uniform(0.0, 0.2, 1, 1, 1) + uniform(0.5, 0.75, 1, 1, 1) * ink
    noise = 0.01 * torch.randn(ink.shape, generator=generator)
    return ((ink + noise).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def png(*frames, seconds=0.2):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG file; of an animated one where there are
    several frames, which shows the last one longest and then begins again."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    H, W = frames[0].shape[:2]
    parts, number = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(
        ">IIBBBBB", W, H, 8, 2 if frames[0].ndim == 3 else 0, 0, 0, 0))], 0
    if len(frames) > 1:
        parts.append(chunk(b"acTL", struct.pack(">II", len(frames), 0)))
    for i, frame in enumerate(frames):
        pixels = zlib.compress(filtered(frame), 9)
        if len(frames) > 1:
            pause = round(1000 * seconds) * (10 if i == len(frames) - 1 else 1)
            parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, W, H, 0, 0, pause, 1000,
                                                    0, 0)))
            number += 1
        if i == 0:
            parts.append(chunk(b"IDAT", pixels))
        else:
            parts.append(chunk(b"fdAT", struct.pack(">I", number) + pixels))
            number += 1
    return b"".join(parts + [chunk(b"IEND", b"")])


def filtered(image):
    """The rows of an image as PNG stores them: each as it is or minus a prediction from its
    neighbours, whichever makes the smallest numbers."""
    rows = image.reshape(len(image), -1).astype(np.int16)
    step = rows.shape[1] // image.shape[1]               # values in a pixel
    left = np.pad(rows, ((0, 0), (step, 0)))[:, :rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(up, ((0, 0), (step, 0)))[:, :rows.shape[1]]
    near = np.stack([left, up, corner])
    paeth = np.take_along_axis(near, abs(left + up - corner - near).argmin(axis=0)[None], axis=0)[0]
    all_five = np.stack([rows, rows - left, rows - up, rows - (left + up) // 2, rows - paeth])
    small = abs(all_five.astype(np.int8).astype(np.int16)).sum(axis=2).argmin(axis=0)      # (H,)
    chosen = all_five[small, np.arange(len(rows))].astype(np.uint8)
    return np.column_stack([small.astype(np.uint8), chosen]).tobytes()


def download(url, path, check=lambda part: None):
    """Fetches url to path with a progress bar, under a temporary name until it is complete and
    check(temporary path) has found nothing wrong. Returns what check returns."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
            size = int(reply.headers.get("Content-Length", 0))
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 18):
                    file.write(block)
                    bar.update(len(block))
            if size and bar.n != size:
                raise OSError(f"the connection ended after {bar.n} of {size} bytes")
        found = check(part)
        os.replace(part, path)
        return found
    except (OSError, ValueError, http.client.HTTPException, UserError) as error:
        raise UserError(f"cannot download {url} ({error}): fetch it elsewhere and put it at {path}")
    finally:
        part.unlink(missing_ok=True)
