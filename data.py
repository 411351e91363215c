"""Data sets as arrays of integers 0..K-1; how they are shown; a user's file in and out; errors.

    pydoc          help texts inside Python, reduced to a-z and space; they vary with the version
    glyphs         small grey pictures of digits, drawn here
    tones          strings, sweeps and pauses under noise, made here
    text8, enwik8, mnist, cifar10, sc09
                   in the folder ARDM_DATA, or data/; downloaded if missing
    a file         what its first bytes say, also in gzip or in a zip with one member: images (.npy,
                   idx), sound (.wav), a tar of .wav files or of binary CIFAR-10; else text
    a folder       its .wav files
"""
import argparse
import bz2
import gzip
import hashlib
import io
import lzma
import math
import os
import platform
import re
import secrets
import signal
import socket
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

NAMES = ("pydoc", "glyphs", "tones", "text8", "enwik8", "mnist", "cifar10", "sc09")
PIECES = {"text": "test.txt", "image": "test.npy", "audio": "test.wav"}     # of test data
SPLITS = ("train", "valid", "test")
OTHER = re.compile(rb"[^a-z ]")      # what has no symbol if K = 27
AUDIO_K = 1 << 16                    # values of a 16-bit sample; x = sample + 32,768
WINDOW = 2048                        # samples in a datapoint of audio, if nothing else is said


# -- Data sets -------------------------------------------------------------------------------------

class Data:
    """Integers 0..K-1 in three splits, "train", "valid" and "test".

    kind: "text", "image" or "audio". Images are (N, D), colour by colour. Text and audio are one
    stream (n,), and a datapoint is a piece of it, without what comes before. flips, turns: training
    images are mirrored, turned by quarters."""

    def __init__(self, kind, name, K, shape, splits, rate=None, flips=False):
        self.kind, self.name, self.K, self.shape, self.rate = kind, name, K, tuple(shape), rate
        self.D = math.prod(shape)
        self.flips, self.turns = flips, False
        self.unit = dict(image="dim", audio="sample", text="char" if K == 27 else "byte")[kind]
        self.splits = {part: torch.from_numpy(each) for part, each in splits.items()}
        for part, x in self.splits.items():
            if self.D == 0 or x.numel() < self.D:
                raise ValueError(f"{name} has {x.numel()} values for {part}, fewer than {self.D}")
        content = b"".join(part.tobytes() for part in splits.values())
        self.digest = hashlib.sha256(content).hexdigest()

    def batch(self, B, generator=None):
        """(B, D) int64: random training images, or windows of the stream that begin anywhere."""
        x = self.splits["train"]
        random = dict(device=x.device, generator=generator)
        if self.kind != "image":
            starts = torch.randint(len(x) - self.D + 1, (B, 1), **random)
            return x[starts + torch.arange(self.D, device=x.device)].long()
        x = x[torch.randint(len(x), (B,), **random)].view(B, *self.shape)
        if self.flips:
            x = torch.where(torch.rand(B, 1, 1, 1, **random) < 0.5, x.flip(3), x)
        for n in (1, 2) if self.turns else ():             # each with 1/2: all four alike
            x = torch.where(torch.rand(B, 1, 1, 1, **random) < 0.5, x.rot90(n, (2, 3)), x)
        return x.reshape(B, self.D).long()

    def chunks(self, split):
        """(N, D): a split as datapoints. What is left over of a stream does not count."""
        x = self.splits[split]
        return x if self.kind == "image" else x[:len(x) // self.D * self.D].view(-1, self.D)


def text(name, stream, length):
    """Data of (n,) uint8: characters, K = 27 (space, a-z), or bytes, K = 256. Split 90/5/5."""
    if stream.dtype != np.uint8:
        raise ValueError(f"{name}: a text must be an array of uint8, not {stream.dtype}")
    K, n, other = 27, len(stream), OTHER.search(stream)
    if other:
        K, name = 256, f"{name} (not a-z: byte {other[0][0]:#04x} at {other.start():,})"
    parts = np.split(to_symbols(stream.tobytes(), K), [n * 90 // 100, n * 95 // 100])
    return Data("text", name, K, (length,), dict(zip(SPLITS, parts)))


def images(name, train, test, bits=8, valid=None, flips=False):
    """Data of (N, C, H, W) uint8 arrays. Without valid: the last tenth of train. bits: how many of
    the 8 are kept; none is dropped if all values are below 2^bits. At 8 bits, all 0 or 1: K = 2."""
    if valid is None:
        train, valid = np.split(train, [len(train) - -(-len(train) // 10)])
    parts = dict(train=train, valid=valid, test=test)
    if not all(part.dtype in (np.uint8, bool) and part.ndim == 4
               and part.shape[1:] == train.shape[1:] for part in parts.values()):
        raise ValueError(f"{name}: images must be (N, C, H, W) of uint8, all of one size")
    top = max(part.max(initial=0) for part in parts.values())
    drop = 8 - bits if top >= 2 ** bits else 0
    K = 2 if bits == 8 and top < 2 else 2 ** bits
    splits = {part: each.reshape(len(each), -1) >> drop for part, each in parts.items()}
    name = f"{name}, {bits} of 8 bits" if drop else name
    return Data("image", name, K, train.shape[1:], splits, flips=flips)


def audio(name, clips, rate, length, listed=None):
    """Data of clips {file: (channels, n) int16}, channel after channel. listed names the clips of
    "test" and "valid". Without it `tenths` does, or fewer than ten clips are each cut 8:1:1."""
    names = sorted(clips)
    if listed:
        parts = [[clips[file] for file in names if listed.get(file, "train") == split]
                 for split in SPLITS]
    elif len(names) >= 10:
        parts = tenths([clips[file] for file in names])
    else:                                                  # by time: channels sound alike
        lengths = [clips[file].shape[1] for file in names]
        parts = zip(*(np.split(clips[file], [n - 2 * -(-n // 10), n - -(-n // 10)], axis=1)
                      for file, n in zip(names, lengths)))
    streams = [np.concatenate([np.empty(0, np.int32), *(clip.reshape(-1) for clip in part)])
               + AUDIO_K // 2 for part in parts]
    return Data("audio", name, AUDIO_K, (length,), dict(zip(SPLITS, streams)), rate)


def tenths(items):
    """(train, valid, test): every tenth is for the test, of the rest every ninth for validation."""
    rest = [item for i, item in enumerate(items, 1) if i % 10]
    return [item for i, item in enumerate(rest, 1) if i % 9], rest[8::9], list(items[9::10])


def load(name, length=None, bits=8, device="cpu", chunk=64):
    """The data set of that name, or of the file or folder at that path. length: of a datapoint of
    text (without it: chunk) or audio. bits: for images."""
    data = (load_name if name in NAMES else load_file)(name, length, bits, chunk)
    data.splits = {split: part.to(device) for split, part in data.splits.items()}
    return data


def load_name(name, length, bits, chunk):
    """`load` of one of the NAMES."""
    if name == "pydoc":
        return text(f"pydoc of Python {platform.python_version()}", pydoc(), length or chunk)
    if name == "glyphs":
        return images(name, *np.split(glyphs(12000, seed=0), [11000]), bits)
    if name == "tones":
        return audio(name, dict(enumerate(tones(240))), TONES_RATE, length or WINDOW)
    if name == "mnist":
        return images(name, *(file_array(fetch(f"{part}-images-idx3-ubyte.gz"), name).array
                              for part in ("train", "t10k")), bits)
    if name == "cifar10":
        return images(name, *cifar10(fetch("cifar-10-binary.tar.gz"), name), bits, flips=True)
    if name == "sc09":
        return load_clips(name, fetch("speech_commands_v0.02.tar.gz"), length or 16000, DIGITS,
                          pad=16000)
    return text(name, np.frombuffer(fetch(f"{name}.zip"), np.uint8), length or chunk)


def load_file(name, length, bits, chunk):
    """`load` of a folder, or of a file, by what its first bytes say."""
    if not os.path.lexists(name):
        raise ValueError(f"--data {name}: no such file, and none of the names {', '.join(NAMES)}")
    if re.search(BATCHES, name):
        raise ValueError(f"{name} is one batch of CIFAR-10: name their folder or tar")
    folder = os.path.isdir(name)
    content = name if folder else unpack(read(name), name)
    if folder or content[257:262] == b"ustar":
        if any(members(content, BATCHES)):
            return images(f"a part of cifar10, {name}", *cifar10(content, name), bits, flips=True)
        return load_clips(name, content, length)
    found = file_array(content, name)
    if found is None:
        warn_of_zeros(content, name)
        return text(name, np.frombuffer(content, np.uint8), length or chunk)
    if found.rate:
        return audio(name, {name: found.array}, found.rate, length or WINDOW)
    train, valid, test = tenths(found.array)
    if not test:
        raise ValueError(f"{name} has {len(found.array)} images: it takes 10 or more")
    return images(name, np.array(train), np.array(test), bits, np.array(valid))


def load_clips(name, place, length, wanted=r"(?i)(^|/)(?!\._)[^/]*\.wav$", pad=0):
    """Data of the .wav files (but a Mac's ._ files) in a folder or a tar (its path or content).
    testing_list.txt and validation_list.txt split them, if there. pad: zeros fill up each clip."""
    clips, listed, rate = {}, {}, None
    for file, content in members(place, wanted + r"|(^|/)(testing|validation)_list\.txt$"):
        if file.endswith("_list.txt"):
            split = "test" if file.endswith("testing_list.txt") else "valid"
            lines = content.decode("utf-8-sig", "replace").splitlines()
            listed |= {(Path(file).parent / line).as_posix(): split for line in lines}
            continue
        found = file_array(content, file)
        if found is None or not found.rate or file in clips:
            raise ValueError(f"{name}: {file} is no RIFF WAV file, or there are two of this name")
        rate = rate or found.rate
        if found.rate != rate:
            raise ValueError(f"{name}: {file} has {found.rate} samples a second, others {rate}")
        clips[file] = np.pad(found.array, ((0, 0), (0, max(0, pad - found.array.shape[1]))))
    if listed.keys() - clips.keys() and not pad:
        print(f"{name}: its lists name clips that are not there", file=sys.stderr)
    if not clips:
        raise ValueError(f"{name} is a folder or tar without a .wav file: name a file")
    return audio(name, clips, rate, length or WINDOW, listed)


# -- Symbols, characters and pictures --------------------------------------------------------------

def to_symbols(stream, K):
    """bytes -> (n,) uint8: the bytes themselves, or for K = 27 space 0 and a-z 1..26. For audio
    little-endian 16-bit samples -> uint16. ValueError names the first character that has none."""
    if K > 256:
        return np.frombuffer(stream, "<u2").astype(np.uint16) ^ 0x8000
    wrong = OTHER.search(stream) if K == 27 else None
    if wrong:
        at = wrong.start()
        char = bytes(stream[at:at + 4]).decode("utf-8", errors="replace")[0]
        raise ValueError(f"character {char!r} at position {at}: this model knows a-z and space")
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
    """(D,) integers -> a line of text: _ where known (D,) is False, spaces for control codes."""
    stream = np.frombuffer(to_bytes(x, K), dtype=np.uint8)
    if known is not None:
        stream = np.where(known, stream, np.uint8(ord("_")))
    line = stream.tobytes().decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() else " " for char in line)


def to_pictures(x, shape, K=256):
    """(N, D) integers -> (N, H, W, C) uint8. Values 0..K-1 are spread over 0..255, to be seen."""
    pictures = np.asarray(x, dtype=np.int64).reshape(-1, *shape).transpose(0, 2, 3, 1)
    return (pictures * 255 // (K - 1)).astype(np.uint8)


def grid(pictures, columns):
    """(N, H, W, C) uint8 -> one picture, row by row, each enlarged to 64 pixels or more."""
    N, _, W, C = pictures.shape
    n = -(-64 // W)
    pictures = pictures.repeat(n, axis=1).repeat(n, axis=2)
    pictures = np.pad(pictures, ((0, 0), (0, n), (0, n), (0, 0)), constant_values=255)   # gaps
    pictures = np.pad(pictures, ((0, -N % columns), (0, 0), (0, 0), (0, 0)))
    rows = pictures.reshape(-1, columns, *pictures.shape[1:]).transpose(0, 2, 1, 3, 4)
    whole = rows.reshape(len(rows) * pictures.shape[1], -1, C)
    return whole[..., :3] if C > 2 else whole[..., 0]


def png(pixels):
    """uint8 (H, W) or (H, W, 3) -> the bytes of a PNG file."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    H, W = pixels.shape[:2]
    rows = np.pad(pixels.reshape(H, -1), ((0, 0), (1, 0)))               # filter 0: as they are
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2 * (pixels.ndim == 3), 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b""))


def waveforms(samples, known=None, size=(64, 640)):
    """Samples (N, D) around 0 -> (N, *size, 1) uint8. Each column is a line from its lowest to its
    highest sample, light grey if all of them are known (D,)."""
    D, (H, W) = samples.shape[1], size
    edges = np.arange(W) * D // W
    loudest = max(1, np.abs(samples).max())
    low, high = ((H - 1) / 2 * (1 + ends.reduceat(samples / loudest, edges, axis=1))
                 for ends in (np.minimum, np.maximum))     # (N, W)
    row = np.arange(H)[::-1, None]
    ink = (row >= low[:, None] - 0.5) & (row <= high[:, None] + 0.5)     # (N, H, W)
    grey = 0 if known is None else 170 * np.minimum.reduceat(known, edges)
    return np.where(ink, grey, 255).astype(np.uint8)[..., None]


def exhibit(x, settings, name="samples", known=None, columns=8):
    """x (N, D) as {name: bytes}: lines of text; a grid of images; sounds one after the other, and
    their waveforms. known (N, D): other text is _, other pixels grey. Known sound (D,) is pale."""
    K, kind, shape = settings["K"], settings["kind"], settings["shape"]
    if kind == "text":
        lines = [to_bytes(row, K) for row in x] if known is None else [
            show(row, K, seen).encode() for row, seen in zip(x, known)]
        return {f"{name}.txt": b"".join(line + b"\n" for line in lines)}
    if kind == "image":
        pictures = to_pictures(x, shape, K)
        if known is not None:
            pictures = np.where(to_pictures(known, shape, 2), pictures, 128).astype(np.uint8)
        return {f"{name}.png": png(grid(pictures, min(columns, len(x))))}
    silence = np.full((len(x), settings["rate"] // 10), K // 2)
    whole = np.concatenate([x, silence], axis=1).reshape(-1)
    return {f"{name}.wav": file_of(whole, settings, [settings["rate"], 1]),
            f"{name}.png": png(grid(waveforms(x - K // 2, known), 1))}


def test_piece(data):
    """{name: bytes}: a piece of the test split, to try compress.py and sample.py on."""
    x, form = data.splits["test"].cpu().numpy(), None
    if data.kind == "image":
        C, H, _ = data.shape
        x, form = x[:16].reshape(-1), [1 if H in (1, 3) and C > 1 else 3, "|u1"]
    elif data.kind == "audio":
        x, form = x[:max(2 * data.rate, data.D)], [data.rate, 1]
    return {PIECES[data.kind]: file_of(x if form else x[:20000], vars(data), form)}


# -- Skip on a first reading: a user's files in and out, errors, downloads, data that is made here -

BATCHES = r"(^|/)(data_batch_[1-5]|test_batch)(\.bin)?$"    # of CIFAR-10, both its versions
DIGITS = r"^(\./)?(zero|one|two|three|four|five|six|seven|eight|nine)/.*\.wav$"
TONES_RATE = 8000                    # samples a second of `tones`
MAY_BE_0 = ("branch", "heads", "item", "seed", "temperature")            # flags
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SOURCES = {                          # file -> where from, md5 or SHA-256 (of a zip: of its member)
    "speech_commands_v0.02.tar.gz": (
        "https://storage.googleapis.com/download.tensorflow.org/data/",
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    "text8.zip": ("http://mattmahoney.net/dc/", "3bea1919949baf155f99411df5fada7e"),
    "enwik8.zip": ("http://mattmahoney.net/dc/", "a1fa5ffddb56f4953e226637dabbb36a"),
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/",
                               "c32a1d4ab5d03f1284b67883e8d87530"),
    "train-images-idx3-ubyte.gz": (MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "t10k-images-idx3-ubyte.gz": (MNIST, "9fb629c4189551a2d022fa330f9573f3")}
FONT = """
.###. ..#.. .###. .###. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# #...# ..##. #.... #.... ....# #...# #...#
#...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .###.
"""


class FileArray:
    """The array in a file: images (N, C, H, W) or sound (channels, n); the bytes before and behind
    it, which are not learnt; and its form, [axis of the colours, type] or [rate, channels]."""

    def __init__(self, form, array, content, begin):
        self.form, self.array = form, array
        self.rate = form[0] if array.ndim == 2 else None
        self.head, self.tail = content[:begin], content[begin + array.nbytes:]


def file_array(content, name):
    """The FileArray in the bytes of a .npy, idx or .wav file; None for others."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return wav_array(content, name)
    file, idx = io.BytesIO(content), content[:4] == b"\0\0\x08\x03"
    if not idx and content[:6] != b"\x93NUMPY":
        return None
    try:
        if idx:
            shape, begin = struct.unpack(">3I", content[4:16]), 16
            array = np.frombuffer(content, np.uint8, math.prod(shape), begin).reshape(shape)
        else:
            array = np.lib.format.read_array(file, allow_pickle=False)
            begin = file.tell() - array.nbytes
    except Exception as error:                             # whatever a damaged header raises
        raise ValueError(f"{name} cannot be read as .npy or idx ({str(error)[:80]})")
    return image_array(content, array, begin, name)


def image_array(content, array, begin, name):
    """The FileArray of images (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    shape, axis = array.shape, colour_axis(array.shape)
    if array.dtype not in (np.uint8, bool):
        raise ValueError(f"{name} holds {array.dtype} of shape {shape}, images are uint8: convert "
                         "0..1 by (255 * array).round().astype('u1'), 0..255 by astype('u1')")
    if axis is None or array.size == 0:
        raise ValueError(f"{name} has the shape {shape}: it must fit one of (N, H, W), (N, H, W, C)"
                         " and (N, C, H, W), and not be empty; (N, H, W, 1) is always grey")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is in Fortran's order: save numpy.ascontiguousarray(array)")
    planes = array.transpose(0, 3, 1, 2) if axis == 3 else array if axis else array[:, None]
    return FileArray([axis, array.dtype.str], planes.view(np.uint8), content, begin)


def colour_axis(shape):
    """Where the colours of images of that shape are: 3, 1, 0 if there are none, None if unclear."""
    if len(shape) == 3:                                    # (H, W, C) of one image is no (N, H, W)
        return 0 if shape[2] not in (1, 3, 4) or shape[1] == shape[2] else None
    if len(shape) != 4 or shape[3] == 1:
        return 3 if len(shape) == 4 else None
    found = [axis for axis, known in ((1, (1, 3)), (3, (3, 4))) if shape[axis] in known]
    return found[0] if len(found) == 1 else None


def wav_array(content, name):
    """The samples of a .wav file. A length that is missing or too large means: to the end."""
    at, found = 12, {}
    for _ in range(1000):                                  # chunks, at most
        if b"data" in found or at + 8 > len(content):
            break
        kind, size = struct.unpack("<4sI", content[at:at + 8])
        found[kind] = at + 8, size
        at += 8 + size + size % 2                          # an odd chunk is padded
    begin, size = found.get(b"fmt ", (0, 0))
    form = content[begin:begin + size]
    if len(form) < 16 or b"data" not in found:
        raise ValueError(f"{name} is no RIFF WAV file with a whole fmt chunk before its data")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if code == 0xFFFE:                                     # WAVE_FORMAT_EXTENSIBLE
        code = int.from_bytes(form[24:26], "little")
    if (code, bits) != (1, 16) or not (0 < rate < 1 << 20 and 0 < channels < 1 << 11):
        raise ValueError(f"{name}: {bits} bits a sample, format {code}, {channels} channels, {rate}"
                         " samples a second; it takes 16 bits: ffmpeg -i IN -c:a pcm_s16le OUT.wav")
    begin, size = found[b"data"]
    there = len(content) - begin
    if size == 0 and int.from_bytes(content[4:8], "little") + 8 != len(content):     # from a pipe
        size = there
    n = min(size, there) // (2 * channels)
    array = np.frombuffer(content, "<i2", n * channels, begin).reshape(n, channels).T
    return FileArray([rate, channels], array, content, begin)


def open_symbols(path, settings):
    """A user's file as (n,) symbols for the model with these settings, colour by colour or channel
    by channel; and its FileArray, None for text."""
    content, K, shape = read(path), settings["K"], tuple(settings["shape"])
    if settings["kind"] == "text":
        if K == 256:
            warn_of_zeros(content, path)
        return to_symbols(content, K), None
    found = file_array(content, path)
    image = settings["kind"] == "image"
    if not found or (found.array.shape[1:] != shape if image else not found.rate):
        raise ValueError(f"{path} holds {found.array.shape if found else 'no array or sound'}, the "
                         f"model takes {f'a .npy of (C, H, W) = {shape}' if image else 'a .wav'}")
    symbols = found.array.reshape(-1)
    if found.rate:
        return to_symbols(symbols.tobytes(), K), found
    if symbols.max() >= K:
        raise ValueError(f"{path} holds the value {symbols.max()}, the model knows 0 to {K - 1}; "
                         f"make 8-bit images fit by array // {256 // K}")
    return symbols, found


def warn_of_zeros(content, name):
    if b"\0" in content[:1 << 13]:
        print(f"{name!r} is no text: its bytes are taken as they are", file=sys.stderr)


def file_of(symbols, settings, form):
    """The bytes of a plain file that holds these symbols: text, .npy or .wav, of that form."""
    stream = to_bytes(symbols, max(settings["K"], 256) if form else settings["K"])
    if form is None:
        return stream
    if settings["kind"] == "audio":
        rate, channels = form
        stream = np.frombuffer(stream, "<i2").reshape(channels, -1).T.tobytes()
        form = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
        rest = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(stream))
        return b"RIFF" + struct.pack("<I", len(rest) + len(stream)) + rest + stream
    axis, dtype = form
    array = np.frombuffer(stream, dtype).reshape(-1, *settings["shape"])
    array = array.transpose(0, 2, 3, 1) if axis == 3 else array if axis else array[:, 0]
    described = {"descr": dtype, "fortran_order": False, "shape": array.shape}
    header = "{" + "".join(f"'{key}': {value!r}, " for key, value in described.items()) + "}"
    header += " " * (-(11 + len(header)) % 64) + "\n"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()
    return head + array.tobytes()


def references(symbols, K):
    """What others need for symbols (n,), taken as one file: {name: bits per dimension}."""
    p, n, stream = np.bincount(symbols) / len(symbols), len(symbols), to_bytes(symbols, K)
    entropy = float(np.sum(p[p > 0] * np.log2(1 / p[p > 0])))
    return {"uniform": float(np.log2(K)), "single symbols": entropy} | {
        name: 8 * len(packer.compress(stream)) / n
        for name, packer in (("bz2", bz2), ("xz", lzma), ("zlib", zlib))}


class Parser(argparse.ArgumentParser):
    """argparse that reports an error in one line. No flag may be empty. Numbers are at most 10^9
    and more than 0, but for those that MAY_BE_0. ~ is the home folder, but in a prompt."""

    def error(self, message):
        flag = re.match(r"argument (--\w+): expected one argument", message)
        if flag and flag[1] in sys.argv[:-1]:              # -5 looks like a flag
            message += f": try {flag[1]}={sys.argv[sys.argv.index(flag[1]) + 1]}"
        raise ValueError(f"{message} (--help lists everything)")

    def parse_args(self):
        args = super().parse_args()
        for name, value in vars(args).items():
            if value == "":
                raise ValueError("a flag has an empty value")
            if type(value) is str and name != "prompt":
                setattr(args, name, os.path.expanduser(value))
            least = 0 if name in MAY_BE_0 else 1e-12
            if type(value) in (int, float) and not least <= value <= 10 ** 9:
                above = "above" if least else "from"
                raise ValueError(f"--{name} {value}: choose a number {above} 0, 10^9 at most")
        return args


def run(main):
    """Runs a script. What a user can mend becomes one line on stderr, and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")       # if they are closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")           # a terminal that lacks a character
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))        # files are cleaned up
    try:
        return main()
    except KeyboardInterrupt:
        code, words = 130, "stopped"
    except Exception as error:
        code, words = 2, in_words(error)
        if words is None:
            raise
    finally:
        signal.signal(signal.SIGTERM, old)
    words = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words)
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
    sys.exit(code)


def in_words(error):
    """What a user can do about an error, or None."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a stream'}: {error.strerror or error}"
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
            "out of memory|can't allocate memory", str(error)):
        return "too little memory; in training --parts 4, a smaller --batch or --dim takes less"
    if re.search("dynamo|inductor|triton|compile", f"{type(error).__module__} {error}", re.I):
        return f"torch.compile failed ({str(error)[:80]!r}): try --no-compile"


def read(path):
    """The bytes of a file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no ordinary file: name a file")
    return Path(path).read_bytes()


def write(path, content, others=()):
    """Writes bytes to a file that gets its name only when it is complete and on the disk. Until
    then the old one stays. others: files that it must not replace. content None: only checks."""
    path = Path(os.path.realpath(path))                    # a link stays a link
    for other in others:
        if path.exists() and os.path.exists(other) and path.samefile(other):
            raise ValueError(f"{other} and {path} are the same file: choose another name")
    if path.is_symlink() or path.exists() and not path.is_file() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: it is no ordinary file in a folder that exists")
    part = path.with_name(f"{path.name[:48]}.{secrets.token_hex(4)}.part")    # no name too long
    try:
        with open(part, "wb") as file:
            if content is None:
                return
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}")
    finally:
        part.unlink(missing_ok=True)


def unpack(content, name):
    """Bytes without the gzip, or the zip with one member, that packs them."""
    try:
        if content[:2] == b"\x1f\x8b":
            packed = gzip.open(io.BytesIO(content))
        elif content[:4] == b"PK\3\4":
            archive = zipfile.ZipFile(io.BytesIO(content))
            names = [one for one in archive.namelist()
                     if not re.search(r"/$|^__MACOSX/|\.DS_Store$", one)]
            if len(names) != 1:
                raise ValueError(f"it holds {', '.join(names[:9]) or 'nothing'}, not one file")
            packed = archive.open(names[0])
        else:
            return content
        most = max(1 << 26, 100 * len(content))            # bytes, for a small file holds little
        content = packed.read(most)
    except Exception as error:                             # whatever a torn file raises
        raise ValueError(f"{name} is packed and cannot be read ({error}): unpack it yourself")
    if len(content) == most:
        raise ValueError(f"{name} unpacks to {most:,} bytes or more: unpack it yourself")
    return content


def members(place, wanted):
    """Yields (name, bytes) of what matches `wanted` in a folder, or in a tar (path or content)."""
    if isinstance(place, (str, Path)) and os.path.isdir(place):
        for path in files_below(Path(place)):
            if re.search(wanted, path.as_posix()):
                yield path.relative_to(place).as_posix(), read(path)
        return
    where = dict(fileobj=io.BytesIO(place)) if isinstance(place, bytes) else dict(name=place)
    try:
        with tarfile.open(**where) as archive:
            for member in archive:
                if member.isdir() or not re.search(wanted, member.name):
                    continue
                if member.issparse() or not member.isfile():
                    raise ValueError(f"{member.name} is a link, or has holes: pack whole files")
                yield member.name.removeprefix("./"), archive.extractfile(member).read()
            # A damaged header looks like the end.
            if isinstance(place, bytes) and not re.fullmatch(rb"\0{512,}", place[archive.offset:]):
                raise ValueError("it is cut off or changed, or another tar follows it")
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"this tar file cannot be read: {str(error)[:80]}")


def files_below(folder):
    """Yields the files below a folder, through links, each folder once, but no run's (ckpt.pt)."""
    todo, seen = [folder], set()                           # a link may lead in a circle
    while todo:
        path = todo.pop()
        if not path.is_dir():
            yield path
        elif path.stat()[1:3] not in seen and (path == folder or not (path / "ckpt.pt").exists()):
            seen.add(path.stat()[1:3])                     # inode and device
            for each in sorted(path.iterdir(), reverse=True):            # links last
                todo.insert(0 if each.is_symlink() else len(todo), each)


def fetch(name):
    """The bytes of an upstream file, unpacked; of a tar its path. It is looked for in ARDM_DATA or
    data/, and in their folders, and downloaded if it is missing. ValueError if it is not whole."""
    url, known = SOURCES[name]
    folder = Path(os.environ.get("ARDM_DATA", "data")).expanduser()
    path = next((path for way in ("", "*/") for path in folder.glob(way + name)), folder / name)
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)
            torch.hub.download_url_to_file(url + name, str(path))
    except Exception as error:                             # whatever a network raises
        raise ValueError(f"cannot download {url}{name} ({error}): put it into {folder}/ yourself")
    content = read(path) if name.endswith(".gz") else unpack(read(path), path)
    if hashlib.new("sha256" if len(known) == 64 else "md5", content).hexdigest() != known:
        raise ValueError(f"{path} is not the whole upstream file, by its checksum: remove it")
    return str(path) if name.endswith(".tar.gz") else unpack(content, path)


def cifar10(place, name):
    """(train, test) of CIFAR-10's binary version, (N, 3, 32, 32): records of 1 + 3,072 bytes."""
    try:
        parts = sorted(dict(members(place, BATCHES)).items())
        train, test = (np.concatenate([
            np.frombuffer(records, np.uint8).reshape(-1, 3073)[:, 1:] for file, records in parts
            if re.search(part + r"[^/]*\.bin$", file)]) for part in ("data_batch", "test_batch"))
        return train.reshape(-1, 3, 32, 32), test.reshape(-1, 3, 32, 32)
    except ValueError as error:
        raise ValueError(f"{name} is no binary CIFAR-10 ({error}): fetch cifar-10-binary.tar.gz")


def pydoc():
    """Topics of Python's help() in lower case. Each run of other characters becomes one space."""
    from pydoc_data.topics import topics
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower()).strip()
    return np.frombuffer(bytearray(text.encode()), np.uint8)


def glyphs(n, seed, size=16):
    """(n, 1, size, size) uint8: digits in a bitmap font, shifted, scaled, sheared, grey, noisy. By
    integers, so that all machines draw the same. A pixel is the sum of 2 x 2 points."""
    random = np.random.RandomState(seed)                   # the same numbers in every NumPy
    rows = [line.split() for line in FONT.split("\n")[1:-1]]
    font = np.array([[[cell == "#" for cell in row] for row in digit] for digit in zip(*rows)])
    font = np.pad(font, ((0, 0), (1, 1), (1, 1)))          # nothing is around a digit

    def uniform(low, high, *shape):
        return random.randint(low, high + 1, size=(n, *shape), dtype=np.int32)

    y, x = np.indices((2 * size, 2 * size), dtype=np.int32) - size
    height, width, slope = uniform(20, 27, 1, 1), uniform(12, 19, 1, 1), uniform(-12, 12, 1, 1)
    down, right = uniform(-3, 3, 1, 1), uniform(-6, 6, 1, 1)
    row = ((y + down + height // 2) * 7 // height).clip(-1, 7)
    column = ((x + (y * slope >> 5) + right + width // 2) * 5 // width).clip(-1, 5)
    ink = font[uniform(0, 9, 1, 1), row + 1, column + 1]   # (n, 2 size, 2 size)
    ink = ink.reshape(n, size, 2, size, 2).sum(axis=(2, 4))
    grey = uniform(0, 50, 1, 1) + uniform(32, 48, 1, 1) * ink + uniform(-4, 4, size, size)
    return grey.clip(0, 255).astype(np.uint8)[:, None]


def tones(n, seed=0):
    """(n, 1, 16000) int16, n clips of two seconds: four notes, each a plucked string, a sweep or a
    pause, under noise of standard deviation 16, which alone costs 6.05 bits a sample."""
    random = np.random.RandomState(seed)                   # the same numbers in every NumPy
    time = np.arange(4000) / TONES_RATE

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
