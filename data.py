"""Data sets: integers 0..K-1, how they are split, cut into datapoints and shown (App. D).

    pydoc          the help texts inside Python (pydoc_data.topics), reduced to a-z and space: real
                   English without a download. It changes with the Python version
    text8, enwik8  looked for in the data folder as NAME or NAME.zip, downloaded otherwise
    any file       27 symbols where it holds nothing but a-z and space, else bytes; a zip file with
                   one member is read through

    data = load("pydoc", length=64)    data.batch(32, 64) -> (32, 64) int64, random training windows
                                       data.chunks("test") -> (N, 64) uint8 and the shorter rest

Every split is by position: the first 90% for training, 5% for validation, the last 5% for the test.
"""
import hashlib
import os
import platform
import re
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

NAMES = ("pydoc", "text8", "enwik8")
URLS = {name: f"http://mattmahoney.net/dc/{name}.zip" for name in ("text8", "enwik8")}
MD5 = {"text8": "3bea1919949baf155f99411df5fada7e", "enwik8": "a1fa5ffddb56f4953e226637dabbb36a"}
LARGEST = 1 << 31                    # bytes that a zip file may unpack to


class UserError(Exception):
    """What the user can mend, in one line; the scripts print it and exit with code 2."""


class Text:
    """A stream of characters (K = 27: space, a-z) or bytes (K = 256), on one device as uint8.

    A datapoint is a chunk of D = `length` of them, without the text before it. `name` says where
    the stream comes from.
    """

    def __init__(self, name, stream, length, device="cpu"):
        self.name, self.shape = name, (length,)
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
        stream, length = self.splits["train"], length or self.shape[0]
        starts = torch.randint(len(stream) - length + 1, (B, 1), device=stream.device,
                               generator=generator)
        return stream[starts + torch.arange(length, device=stream.device)].long()

    def chunks(self, split):
        """`cut` of that split."""
        return cut(self.splits[split], self.shape[0])


def cut(stream, D):
    """(n,) -> whole chunks (N, D), and the n mod D characters that are left over."""
    whole = len(stream) // D * D
    return stream[:whole].view(-1, D), stream[whole:]


def load(name, length, data_dir="data", device="cpu", fetch=True):
    """The data set of that name, or the file at that path, in chunks of `length`.

    fetch: download text8 or enwik8 where `data_dir` does not have it.
    """
    if name == "pydoc":
        name, stream = f"pydoc of Python {platform.python_version()}", pydoc_stream()
    elif name in URLS:
        stream = upstream(name, Path(data_dir), fetch)
    elif Path(name).is_file():
        stream = read_stream(Path(name))
    else:
        raise UserError(f"--data {name}: no such file, and none of the names {', '.join(NAMES)}")
    if not stream:
        raise UserError(f"{name} is empty")
    return Text(name, stream, length, device)


# -- Characters and symbols ------------------------------------------------------------------------

def is_text(stream):
    """True where bytes hold nothing but a-z and space."""
    return not stream.translate(None, b" abcdefghijklmnopqrstuvwxyz")


def to_symbols(stream, K):
    """bytes -> (n,) uint8 symbols: the bytes themselves, or for K = 27 space 0 and a-z 1..26.

    UserError that names the first character which has no symbol, and its position (from 0).
    """
    if K == 27 and not is_text(stream):
        bad = re.search(rb"[^a-z ]", stream)
        char = stream[bad.start():bad.start() + 4].decode("utf-8", errors="replace")[0]
        raise UserError(f"character {char!r} at position {bad.start()}: this model knows a-z "
                        "and space alone")
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


# -- Where the streams come from -------------------------------------------------------------------

def pydoc_stream():
    """Topics of Python's help(), lower-cased, every run of other characters than a-z one space."""
    from pydoc_data.topics import topics
    text = " ".join(topics[key] for key in topics).lower()
    return re.sub("[^a-z]+", " ", text).strip().encode()


def upstream(name, folder, fetch=True):
    """text8 or enwik8 from `folder`, whole and checked; fetched first where it is not there."""
    archive = folder / f"{name}.zip"
    path = next((p for p in (folder / name, archive) if p.is_file()), None)
    if path is None and not fetch:
        raise UserError(f"neither {folder / name} nor {archive} is there")
    if path is None:
        return download(URLS[name], archive, lambda part: whole(name, part))
    return whole(name, path)


def whole(name, path):
    """The bytes of text8 or enwik8; UserError where the file holds anything else."""
    stream = read_stream(path)
    if (found := hashlib.md5(stream).hexdigest()) != MD5[name]:
        raise UserError(f"{path} is not the whole {name} (md5 {found}, expected {MD5[name]}); "
                        "remove it to download it again, or train on it as it is with "
                        f"--data {path}")
    return stream


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
    except (OSError, ValueError, UserError) as error:        # URLError and HTTPError are OSErrors
        raise UserError(f"cannot download {url} ({error}): fetch it elsewhere and put it at {path}")
    finally:
        part.unlink(missing_ok=True)
