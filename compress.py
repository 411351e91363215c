"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image, no other
    python compress.py bench --ckpt out/pydoc/ckpt.pt [FILE]    bits/char, beside bz2, lzma and zlib
    python compress.py info IN                                  what an archive holds

IN is text, or images: a .npy file, or train, valid or test for that split of the model's data.
A block is a stream that is decoded as a whole: datapoints of 2^14 symbols, or --block of them.
Blocks go through the network together, as many as --batch says, or as the memory at hand allows. A
file is read, coded and written block by block: its size is no matter of memory. All numbers of an
archive are big-endian:

    offset      bytes   what
    0           4       "ARDM"
    4           1       format version, 7
    5           4       h, length of the header
    9           h       header: JSON, see `make_header`, packed by `deflate`
    then        w       of each block (w by `index_width`): the length of its stream
    then        4       CRC-32 of all before it
    then                the streams of coder.py, one behind the other

A stream holds what each entry of the plan writes in this block, one after the other, in portable
mode behind the shift of its grid (`shift_table`). It starts from the CRC-32 of the symbols of its
block, one byte each, which itself starts from the number of the block. A decoder that does not end
at the CRC-32 of what it decoded has damaged bytes, another block, or other integers.

Encoder and decoder must compute the same integers, but the last bits of what a network says depend
on the machine, its libraries, the number of threads, and what is beside a datapoint in its batch.

portable, the default: the network runs in float64, where those differences are about 1e-14. Its
log-probabilities, in nats, are rounded to a grid of 2^-10; from there on everything is integers
(`coder.quantize_levels`). Two machines that differ by less than MARGIN = 1e-10 nats round to the
same level unless a boundary lies between them. The encoder looks: where a value lies within MARGIN
of a boundary, it shifts the grid of that call in that block by 1/256 of a level, and again until
none does, and codes the shift. So under this one assumption, a difference below MARGIN, every
decoder gets the encoder's integers: on CPU or CUDA, with any number of threads and any batch size.

--fast: float32, bound to the machine: the decoder makes the encoder's very calls, in batches of the
same shape; one that is not full is filled up with absent variables. The header carries a
fingerprint of what the network says about a fixed input: a machine on which it says something else
would decode garbage, and refuses first.

In both modes the encoder proves each block by decoding it, unless --no-verify forbids it.
"""
import collections
import copy
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import coder
import data as datasets
import planner
from ardm import bits_per_dim, rerank
from data import UserError
from train import (Parser, bound, command_line, image_sizes, load_data, load_model, references,
                   replacing, spread, typed)

MAGIC, VERSION, PRECISION = b"ARDM", 7, 22
BLOCK = 1 << 15                                      # symbols in a block at most
DEFAULT_BLOCK = 1 << 14                              # the default: costs 0.3%, or less
LONGEST_HEADER = 1 << 22                             # bytes; a plan has up to S * D entries
WORDS = (b'bytes"image","npy":[28,28],"backward"random:1"coarse"spaced:"probe":"batch":"device":'
         b'"cpu""threads":2,"torch":"2.13.0+cpu",{"kind":"text","length":20000,"shape":[64],"K":27,'
         b'"order":"forward","plan":[[1,1,64]],[1,2,"block":256,"weights":"","fast":false}')
WRITTEN = "torch {torch}, {threads} threads, {device}"
MARGIN = 1e-10                                       # nats: see above


class Codec:
    """Datapoints to streams and back, for a model, an order and a plan.

    shape: of a datapoint, (D,) or (C, H, W). block: datapoints in a stream; only a last stream may
    hold fewer, and of text less than a whole last one: what it lacks is absent. batch: datapoints
    that go through the network together, rounded to whole blocks, one at the least. fast: float32,
    bound to this machine; see above. tick() is called for every entry of the plan.
    """

    def __init__(self, model, shape, order, plan, block, batch, fast=False):
        self.plan, self.fast = plan, fast
        self.block, self.batch = block, max(block, batch // block * block)
        self.weights, device = digest(model), next(model.parameters()).device
        self.device = torch.device("cpu") if device.type == "mps" and not fast else device
        self.model = model if fast else copy.deepcopy(model).to(self.device).double()
        self.tick = lambda: None
        self.sigma = torch.from_numpy(planner.order(order, shape)).to(self.device)

    def encode(self, symbols, first=0):
        """(n,) symbols, whole blocks or a single one -> the stream of each, and its ideal length in
        bits, (streams,): -log2 p under this order and plan. first: number of the first block."""
        x, sigma, plan = self._begin(len(symbols))
        x.view(-1)[:len(symbols)] = symbols.to(x)
        blocks, pushed = symbols.split(self.block * self.model.D), []
        streams, bits = len(blocks), np.zeros(len(blocks))

        def push(log_p, where, s):
            """Takes down the intervals of what one call writes."""
            written = self.model.symbol(x, s)[where]
            cdf, shift = self._tables(log_p, streams)
            if not self.fast:
                table = shift_table(log_p, streams)
                pushed.append([part[None] for part in coder.intervals(table[None], shift)])
            parts = coder.intervals(cdf, written.cpu().numpy())
            pushed.append([part.reshape(streams, -1).T for part in parts])       # (k, streams)
            nats = -log_p.gather(1, written[:, None]).cpu().double().view(streams, -1).sum(dim=1)
            bits[:] += bits_per_dim(nats.numpy(), 1)

        self._read(x, plan, sigma, push)
        return coder.encode_streams(*map(np.concatenate, zip(*pushed)), PRECISION,
                                    [*map(checksum, itertools.count(first), blocks)]), bits

    @torch.no_grad()
    def _read(self, x, plan, sigma, push):
        """Gives push what the network says at each entry of the plan: ((n, A) log-probabilities,
        where, s). These calls need not wait for each other, as data that is known waits for
        nothing: in portable mode as many go together as the batch has room for."""
        B, size = len(x), 1 if self.fast else max(1, self.batch // len(x))
        for first in range(0, len(plan), size):
            part = plan[first:first + size]
            s, t, k = torch.tensor(part, device=x.device).repeat_interleave(B, dim=0).T
            order = sigma.repeat(len(part), 1)                           # (calls * B, D)
            m = order < t[:, None]
            where = ~m & (order < (t + k)[:, None])
            log_p = self.model.log_probs(x.repeat(len(part), 1), m, t, s, where)
            where = where.view(len(part), B, -1)
            each = log_p.split(where.sum(dim=(1, 2)).tolist())
            for log_p, here, (stage, _, _) in zip(each, where, part):
                self.tick()
                push(log_p, here, stage)

    def decode(self, streams, n, first=0):
        """Streams -> the symbols of each, (m,) uint8, n in all; None where they do not match their
        checksum. A stream None is left out: beside others the network still predicts its symbols,
        so that its calls have the encoder's shapes. first: number of the first block."""
        wanted = [i for i, stream in enumerate(streams) if stream is not None]
        if not wanted:
            return streams
        x, sigma, plan = self._begin(n)
        decoder = coder.decoders([streams[i] for i in wanted], PRECISION)

        def pop(log_p, where, s):
            """What one call writes, read from the streams: `choose` of `walk`."""
            self.tick()
            a, log_p, shift = torch.zeros_like(where, dtype=torch.long), log_p[where], None
            if not self.fast:
                table = shift_table(log_p, len(streams))
                shift = decoder.pop(np.broadcast_to(table, (1, len(wanted), len(table))))[0]
            symbols = np.zeros((len(streams), len(log_p) // len(streams)), dtype=np.int64)
            part = log_p.view(*symbols.shape, -1)[wanted]                # (streams, k, A)
            cdf, _ = self._tables(part.flatten(0, 1), len(wanted), shift)
            cdf = cdf.reshape(*part.shape[:2], -1).swapaxes(0, 1)        # (k, streams, A + 1)
            symbols[wanted] = decoder.pop(cdf).T
            symbols = torch.from_numpy(symbols).flatten().to(a)
            possible = log_p.gather(1, symbols[:, None])[:, 0] > -torch.inf
            a[where] = torch.where(possible, symbols, 0)         # damaged bytes may say anything
            return a

        x = self.model.walk(self.model.coarse(x, 0), plan, sigma, pop)
        parts = x.view(-1)[:n].to("cpu", torch.uint8).split(self.block * self.model.D)
        right = {i: parts[i] for i, end in zip(wanted, decoder.ends)
                 if end == checksum(first + i, parts[i])}
        return [right.get(i) for i in range(len(streams))]

    def _begin(self, n):
        """For n symbols: zeros (rows, D), as many rows as they fill, in fast mode the whole batch;
        sigma (rows, D), in which what is too many is absent; and the plan, as far as it goes."""
        D = self.model.D
        x = torch.zeros(self.batch if self.fast else -(-n // D), D, dtype=torch.long,
                        device=self.device)
        absent = torch.arange(x.numel(), device=self.device).view(x.shape) >= n
        sigma = rerank(self.sigma.expand(x.shape), absent=absent)
        return x, sigma, [(s, t, k) for s, t, k in self.plan if t <= n]

    def _tables(self, log_p, streams, shifts=None):
        """(n, A) log-probabilities, of that many streams one after the other -> (n, A + 1) integer
        tables, and by how many 256ths of a level the grid of each stream is shifted: as far as it
        takes to be safe, where shifts are not given."""
        if log_p.isnan().any():
            raise UserError("the network gives no numbers: its weights are damaged")
        if self.fast:
            probs = torch.softmax(log_p.cpu().double(), dim=-1)
            return coder.quantize(probs.numpy(), PRECISION), np.zeros(streams, dtype=np.int64)
        log_p = log_p.cpu().numpy().reshape(streams, -1)
        shift = np.zeros(streams, dtype=np.int64) if shifts is None else shifts
        levels, safe = to_levels(log_p, shift)
        while shifts is None and not safe.all():
            shift += ~safe
            if shift.max() > 255:
                raise UserError("no grid is safe, as too many values are rounded in one call: take "
                                "more --calls, or a shorter --block, or --fast")
            levels, safe = to_levels(log_p, shift)
        return coder.quantize_levels(levels.reshape(-1, self.model.A), PRECISION), shift

    def fingerprint(self):
        """CRC-32 of the integer tables for a fixed input of the very shape that coding uses."""
        B, D = self.batch, self.model.D
        x = torch.arange(B * D, device=self.device).view(B, D) % self.model.K
        t = torch.full((B,), D // 2 + 1, device=self.device)
        m = self.sigma.expand(B, D) < t[0]
        with torch.no_grad():
            log_p = torch.cat([self.model.log_probs(x, m, t, torch.full_like(t, s), ~m)
                               for s in range(1, self.model.S + 1)])
        return zlib.crc32(self._tables(log_p, 1)[0].tobytes())


def pick_batch(model):
    """Datapoints that go through the network together: on a CPU 2^13 variables, more are slower, on
    a GPU 2^18, and no more than a quarter of the free memory holds, where the system tells."""
    device = next(model.parameters()).device
    wide = max(p.shape[0] for group in model.net.matrices().values() for p in group)
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory())
    each = 64 * wide + 80 * model.A + 16 * model.D       # bytes: activations, tables, attention
    most = 1 << (18 if device.type == "cuda" else 13)
    return max(1, min(most, free // 4 // each) // model.D)


def available_memory():
    """Bytes that the system can spare, where it tells (Linux); else as if there were plenty."""
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", text)[1])
    except (OSError, TypeError):
        return 1 << 40


def pick_sizes(model, fast=False, block=None, batch=None):
    """(block, batch) as they are asked for, where they are; UserError where they cannot be."""
    most = max(1, BLOCK // model.D)
    if block is None:
        block = max(1, DEFAULT_BLOCK // model.D)
    if not 1 <= block <= most:
        raise UserError(f"--block {block}: choose 1 to {most}")
    if batch is None:
        batch = min(most, pick_batch(model)) if fast else pick_batch(model)
    if batch < 1 or fast and batch > most:
        raise UserError(f"--batch {batch}: choose 1 or more, with --fast up to {most}")
    return block, batch


def to_levels(log_p, shift):
    """(streams, n) float64 log-probabilities in nats -> their levels, whole numbers of 1/GRID nat
    below 0, on a grid shifted by shift / 256 of a level, (streams,); and (streams,) whether all of
    a stream's values are further than MARGIN from where rounding turns."""
    above = np.minimum(-log_p * coder.GRID + shift[:, None] / 256, coder.DEEPEST) + 0.5
    levels = np.floor(above)
    far = np.abs(above - levels - 0.5) < 0.5 - MARGIN * coder.GRID
    return np.maximum(levels, 0).astype(np.int64), far.all(axis=1)


def shift_table(log_p, streams):
    """The table (257,), as of `quantize`, of a stream's shift, 0..255, in a call that rounds these
    log-probabilities (n, A), of all streams.

    A value is within MARGIN of a boundary once in 2^22 times, or a little less. So the frequency of
    a shift by 1 is one more than the number of values in a stream, or than 2^20 at most; larger
    shifts, which only a second such value asks for, are as rare as can be; 0 has the rest.
    """
    cdf = np.append(0, (1 << PRECISION) + np.arange(-255, 1))
    cdf[1] -= min(log_p.numel() // streams, 1 << 20)
    return cdf


def checksum(number, symbols):
    """CRC-32 of the symbols (n,) uint8 of the block of that number. Started from the number, so
    that no two blocks can change places."""
    return zlib.crc32(symbols.numpy().tobytes(), number)


# -- The archive -----------------------------------------------------------------------------------

class Content:
    """What is coded: how many symbols (length), what they are (kind), and the shape of a datapoint.

    read(start, stop) -> (n,) uint8 of them: a file is never in memory as a whole. npy: of images,
    the shape of one of them in the .npy file, (H, W) or (H, W, C).
    """

    def __init__(self, read, length, kind, K, shape, npy=None):
        self.read, self.length, self.kind, self.K = read, length, kind, K
        self.shape, self.npy = tuple(shape), npy

    @classmethod
    def of(cls, symbols, kind, K, shape, npy=None):
        """That of symbols (n,) in memory."""
        return cls(lambda start, stop: symbols[start:stop], len(symbols), kind, K, shape, npy)

    @property
    def symbols(self):
        """All of them, (length,) uint8."""
        return self.read(0, self.length)

    @property
    def count(self):
        """How many units (characters, images) there are, and what they are called."""
        return amount(self.length, self.kind, self.shape)

    def check(self, name):
        """UserError where this model has no symbol for something, before anything is written."""
        D = math.prod(self.shape)
        size = max(1, (1 << 20) // D) * D
        for start in range(0, self.length if self.K < 256 else 0, size):
            part = self.read(start, min(start + size, self.length))
            if self.kind == "image" and (high := int(part.max())) >= self.K:
                raise UserError(f"{name} holds the value {high}, the model knows 0 to "
                                f"{self.K - 1}")


def amount(n, kind, shape):
    """n symbols in units: (number, their name)."""
    return (n // math.prod(shape), "images") if kind == "image" else (n, "characters")


def open_input(path, checkpoint):
    """Content of a file, or of the split of that name of the data that the model was trained on; a
    UserError where the model of this checkpoint cannot code it."""
    kind, K, shape = checkpoint["kind"], checkpoint["K"], tuple(checkpoint["shape"])
    if path in ("train", "valid", "test") and not Path(path).exists():
        data = load_data(checkpoint["settings"], "cpu", checkpoint, fetch=False)
        C, *sides = shape                                # of text: its length
        return Content.of(data.splits[path].reshape(-1), kind, K, shape,
                          sides if C == 1 else (*sides, C))
    content = open_images(path, K, shape) if kind == "image" else open_text(path, kind, K, shape)
    content.check(path)
    return content


def open_text(path, kind, K, shape):
    """Content of a file of characters or bytes."""
    try:
        file = open(path, "rb")
        file = file if file.seekable() else io.BytesIO(file.read())
        length = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")

    def read(start, stop):
        part = read_at(file, stop - start, start, path)
        if len(part) < stop - start:
            raise UserError(f"{path} became shorter while it was read")
        return torch.from_numpy(datasets.to_symbols(part, K, start))
    return Content(read, length, kind, K, shape)


def open_images(path, K, shape):
    """Content of a .npy file of images of that shape (C, H, W)."""
    images, npy = datasets.open_npy(path)
    found, D = (images.shape[3], *images.shape[1:3]), math.prod(shape)
    if found != shape:
        raise UserError(f"{path} holds images of (C, H, W) = {found}, the model codes {shape}")

    def read(start, stop):
        part = images[start // D:stop // D].transpose(0, 3, 1, 2)
        return torch.from_numpy(part.flatten())          # a copy
    return Content(read, len(images) * D, "image", K, shape, npy)


def write_content(file, header, parts):
    """The file that an archive was made of, from its symbols: an iterator of (n,) uint8. Returns
    how many there were."""
    shape, n = header["shape"], 0
    if header["kind"] != "image":
        for part in parts:
            n += file.write(datasets.to_bytes(part, header["K"]))
        return n

    def head(number):
        """A .npy header; of the same size for any number."""
        np.lib.format.write_array_header_1_0(file, dict(
            descr="|u1", fortran_order=False, shape=(number, *header["npy"])))

    head(header["length"] // math.prod(shape))
    for part in parts:
        n += file.write(datasets.to_images(part, shape).tobytes())
    file.seek(0)
    head(n // math.prod(shape))                          # fewer, where some are left out
    return n


def make_header(codec, content, order):
    """All that decoding needs beside the checkpoint; the plan as runs [s, k, how many]."""
    runs = [[*key, len(list(run))]
            for key, run in itertools.groupby((s, k) for s, _, k in codec.plan)]
    image = dict(npy=content.npy) if content.kind == "image" else {}
    machine = dict(probe=codec.fingerprint(), batch=codec.batch, device=codec.device.type,
                   threads=torch.get_num_threads(), torch=torch.__version__) if codec.fast else {}
    return dict(kind=content.kind, length=content.length, shape=content.shape, **image,
                K=codec.model.K, order=order, plan=runs, block=codec.block, weights=codec.weights,
                fast=codec.fast, **machine)


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def blocks_of(header):
    """[n, ...], how many symbols each block of an archive decodes to."""
    block, n = header["block"] * math.prod(header["shape"]), header["length"]
    return [block] * (n // block) + [n % block] * (n % block > 0)


def longest(header):
    """Bytes that a stream may take at most: checksum, rest of a state, symbols and shifts."""
    symbols = min(header["length"], header["block"] * math.prod(header["shape"]))
    calls = sum(times for _, _, times in header["plan"])
    return 4 + 8 + (symbols * header["plan"][-1][0] + calls) * PRECISION // 8


def index_width(header):
    """Bytes of an entry of the index."""
    return -(-longest(header).bit_length() // 8)


def write_archive(file, header, streams):
    """header: a dict; streams: an iterator, written as they come: the place of the index is kept
    free and filled in at the end, as all lengths are known to fit."""
    text, width = deflate(json.dumps(header, separators=(",", ":")).encode()), index_width(header)
    head = bytearray(MAGIC + struct.pack(">BI", VERSION, len(text)) + text)
    file.write(head + bytes(len(blocks_of(header)) * width + 4))
    for stream in streams:
        head += len(stream).to_bytes(width, "big")
        file.write(stream)
    file.seek(0)
    file.write(head + struct.pack(">I", zlib.crc32(head)))


def deflate(text):
    """The header's JSON, packed; its words are known beforehand (WORDS), so that it is short."""
    packer = zlib.compressobj(9, zdict=WORDS)
    return packer.compress(text) + packer.flush()


def unpack(file, name, keep_going=False):
    """An open archive -> header dict and [(size, offset)] of the streams, checked as far as can be
    without the model. UserError says what is wrong. keep_going: streams that are not whole are no
    error."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(9)
    if start[:4] != MAGIC:
        raise UserError(f"{name} is no archive of compress.py")
    if start[4:5] != bytes([VERSION]):
        raise UserError(f"{name} has format version {start[4] if len(start) > 4 else '?'}, "
                        f"this program reads {VERSION}")
    try:
        text = file.read(min(int.from_bytes(start[5:9], "big"), LONGEST_HEADER))
        header = json.loads(zlib.decompressobj(zdict=WORDS).decompress(text, LONGEST_HEADER))
        check_header(header, total)
        width = index_width(header)
        index = file.read(len(blocks_of(header)) * width)
        require(zlib.crc32(start + text + index) == int.from_bytes(file.read(4), "big"))
        sizes = [int.from_bytes(index[i:i + width], "big") for i in range(0, len(index), width)]
        require(max(sizes, default=0) <= longest(header))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, zlib.error):
        raise UserError(f"{name} is damaged: its header or index is cut off, or does not match its "
                        "checksum")
    blocks, begin = [], file.tell()
    for size in sizes:
        if begin + size > total and not keep_going:
            raise UserError(f"{name} is cut off: block {len(blocks)}, at byte {begin}, is not "
                            "there, or not whole (--keep-going delivers the others)")
        blocks.append((size, begin))
        begin += size
    if begin != total and not keep_going:
        raise UserError(f"{name} is damaged: {total - begin} bytes follow the last block")
    return header, blocks


def check_header(header, total):
    """ValueError, KeyError or TypeError where this is not the header of an archive of that many
    bytes: nothing that it claims may cost time or memory."""
    shape, runs, order, fast = (header[key] for key in ("shape", "plan", "order", "fast"))
    numbers = [header[key] for key in ("length", "block", "K")] + shape
    numbers += itertools.chain.from_iterable(runs)
    require(all(type(n) is int and 0 <= n < 1 << 60 for n in numbers) and 0 < len(shape) <= 3)
    require(min(header["block"], *shape) > 0)
    require(type(order) is str and len(order) < 40 and type(header["weights"]) is str)
    require(all(s > 0 and k > 0 and times > 0 for s, k, times in runs) and len(runs) > 0)
    D, length = math.prod(shape), header["length"]
    require(type(fast) is bool)
    if header["kind"] == "image":
        C, *sides = shape
        require(length % D == 0 and header["npy"] in ([*sides, C], sides if C == 1 else None))
    else:
        require(header["kind"] in ("text", "bytes") and shape == [D])
    if fast:
        require(header["device"] in ("cpu", "cuda", "mps") and type(header["torch"]) is str)
        require(type(header["threads"]) is type(header["batch"]) is type(header["probe"]) is int)
        require(0 < header["threads"] <= 1024 and header["batch"] >= header["block"])
    rows = header["batch"] if fast else header["block"]
    require(rows * D <= max(BLOCK, D))                   # what `encode` would write
    require(length // (header["block"] * D) * index_width(header) <= total)


def require(holds):
    """What a header must fulfil; unlike an assert it also counts under python -O."""
    if not holds:
        raise ValueError


def open_codec(header, model, checkpoint, name, batch=None):
    """The codec that wrote this archive, or a UserError where it would decode to something else."""
    if (header["weights"], header["shape"], header["K"]) != (
            digest(model), [*checkpoint["shape"]], model.K):
        raise UserError(f"{name} was written with another checkpoint")
    plan, step = [], collections.Counter()
    try:
        require(header["kind"] == checkpoint["kind"])
        require(sum(times for _, _, times in header["plan"]) <= model.S * model.D)
        for s, k in (call for s, k, times in header["plan"] for call in [(s, k)] * times):
            plan.append((s, step[s] + 1, k))
            step[s] += k
        require(step == {s: model.D for s in range(1, model.S + 1)})
        planner.order(header["order"], header["shape"])
    except ValueError:
        raise UserError(f"{name} is damaged: its header makes no sense")
    if header["fast"]:
        torch.set_num_threads(header["threads"])
    codec = Codec(model, header["shape"], header["order"], plan, header["block"],
                  header["batch"] if header["fast"] else batch or pick_batch(model), header["fast"])
    if codec.fast and codec.fingerprint() != header["probe"]:
        raise UserError(f"{name} cannot be decoded here: this machine computes other probabilities "
                        f"than the one that wrote it ({WRITTEN.format_map(header)})")
    return codec


def together(sizes, codec):
    """[range of blocks, ...] that go through the network together: whole blocks, as many as the
    batch holds, and a last shorter one by itself."""
    whole, size = len(sizes), codec.batch // codec.block
    if whole and sizes[-1] < sizes[0]:
        whole -= 1
    groups = [range(i, min(i + size, whole)) for i in range(0, whole, size)]
    return groups + [range(i, i + 1) for i in range(whole, len(sizes))]


def same(parts, symbols):
    """Whether every part is there, and all of them together are these symbols."""
    return all(part is not None for part in parts) and torch.equal(torch.cat(parts), symbols)


def encode_file(file, model, content, order, plan, verify=True, fast=False, block=None, batch=None):
    """Content -> an archive, written to a file that can seek. Returns the ideal length of each
    block in bits: -log2 p under this order and plan.

    verify: decode each block at once, and compare. block, batch: see Codec.
    """
    block, batch = pick_sizes(model, fast, block, batch)
    chunks = max(1, -(-content.length // model.D))
    block, batch = min(block, chunks), min(batch, chunks) if fast else batch
    codec = Codec(model, content.shape, order, plan, block, batch, fast)
    header, ideal, done, total = make_header(codec, content, order), [], 0, 0.0
    sizes, units = blocks_of(header), datasets.UNITS[content.kind]
    groups = together(sizes, codec)

    def blocks():
        nonlocal done, total
        for group in groups:
            part = content.read(done, done + sum(sizes[i] for i in group))
            streams, bits = codec.encode(part, group[0])
            if verify and not same(codec.decode(streams, len(part), group[0]), part):
                raise UserError("a block does not decode to what went in: this machine does not "
                                "compute the same probabilities twice, and nothing was written")
            yield from streams
            ideal.extend(bits)
            done, total = done + len(part), total + bits.sum()
            bar.set_postfix_str(f"{total / done:.3f} bits/{units}")

    with tqdm(desc="encoding", unit="call", total=len(groups) * len(plan) * (1 + verify)) as bar:
        codec.tick = bar.update
        write_archive(file, header, blocks())
    return np.array(ideal)


def encode(*args, **flags):
    """`encode_file` in memory: the archive and its ideal length in bits."""
    ideal = encode_file(file := io.BytesIO(), *args, **flags).sum()
    return file.getvalue(), float(ideal)


def decode_file(file, model, checkpoint, name, item=None, damaged=None, batch=None):
    """An open archive -> iterator of its symbols, block by block, or those of one datapoint;
    UserError, before or on the way, where anything does not match.

    damaged: a list; then a block that does not match is left out, and told there in words.
    """
    header, blocks = unpack(file, name, damaged is not None)
    codec, sizes, D = open_codec(header, model, checkpoint, name, batch), blocks_of(header), model.D
    number = -(-header["length"] // D)
    if item is not None and not 0 <= item < number:
        raise UserError(f"--item {item}: {name} has {number}, counted from 0")
    groups, only = together(sizes, codec), None if item is None else item // codec.block
    if item is not None:                                 # in portable mode without any company
        groups = [group if codec.fast else [only] for group in groups if only in group]

    def good_blocks():
        """What decodes to its checksum, as symbols; `report` hears of the rest."""
        for group in groups:
            streams = [read_stream(*blocks[i]) if only in (None, i) else None for i in group]
            n = sum(sizes[i] for i in group)
            for i, part in zip(group, codec.decode(streams, n, group[0])):
                if part is not None:
                    yield part if item is None else part.split(D)[item % codec.block]
                elif only in (None, i):
                    report(f"block {i} of {len(blocks)} (counted from 0), at byte {blocks[i][1]}, "
                           "is cut off or does not decode to its checksum")

    def read_stream(size, offset):
        """None where it is not whole."""
        stream = read_at(file, size, offset, name)
        return stream if len(stream) == size else None

    def report(error):
        if damaged is None:
            others = " (--keep-going delivers the others)" if item is None else ""
            raise UserError(f"{name} is damaged: {error}{others}")
        damaged.append(error)

    def parts():
        with tqdm(desc="decoding", unit="call", total=len(groups) * len(codec.plan)) as bar:
            codec.tick = bar.update
            yield from good_blocks()
    return parts()


def decode(model, checkpoint, archive, *args, **flags):
    """`decode_file` in memory: the bytes of an archive -> symbols, (n,)."""
    parts = list(decode_file(io.BytesIO(archive), model, checkpoint, *args, **flags))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def read_at(file, size, offset, name):
    """The bytes there, fewer at the end of the file; UserError where it cannot be read."""
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}")


# -- Which order and plan --------------------------------------------------------------------------

def candidates(model, L, calls, rule="auto"):
    """[(order, plan)] to try, the likeliest first. Plans: the cheapest by L, and for fewer calls
    than steps an even one, whose calls of k variables suit k readers that march together. rule:
    only this order."""
    full = model.S * model.D
    if not model.S <= calls <= full:
        raise UserError(f"--calls {calls}: choose {model.S} to {full}")
    if calls == full:
        plans = [planner.full_plan(model.S, model.D)]
    elif L is None:
        raise UserError("this checkpoint has no L_t yet, which --calls needs: "
                        "let train.py --resume finish the run")
    else:
        even, cheapest = planner.uniform_plan(model.S, model.D, calls), planner.plan(L, calls)
        plans = [even] if even == cheapest else [even, cheapest]
    widest = sorted({max(k for _, _, k in plan) for plan in plans} - {1}) or [2]
    rules, spaced = ["forward", "backward", "random:1", "random:2", "coarse"], [
        f"spaced:{k}" for k in widest]
    rules = rules + spaced if calls == full else spaced + rules
    return list(itertools.product(rules if rule == "auto" else [rule], plans))


def label(order, plan, model):
    """An order and plan in words."""
    if len(plan) == model.S * model.D:
        return order
    even = plan == planner.uniform_plan(model.S, model.D, len(plan))
    return f"{order} ({'even' if even else 'cheapest'} plan)"


def search(model, checkpoint, pairs):
    """The best of several (order, plan), by the exact nll of some training chunks (Sec. 5)."""
    if len(pairs) == 1:
        return pairs[0]
    try:
        data = load_data(checkpoint["settings"], next(model.parameters()).device, checkpoint,
                         fetch=False)
    except UserError as error:
        print(f"no search for an order, {label(*pairs[0], model)} is taken: "
              f"the training data is not there ({error})")
        return pairs[0]
    x, scores = spread(data.chunks("train")[0], max(4, 2048 // model.D)).long(), []
    for rule, plan in tqdm(pairs, desc="searching an order", unit="order", leave=False):
        sigma = torch.from_numpy(planner.order(rule, data.shape)).to(x.device).expand(x.shape)
        scores.append(bits_per_dim(model.nll(x, plan, sigma).mean().item(), model.D))
    table = sorted(zip(scores, range(len(pairs))))
    print(f"orders, bits/{datasets.UNITS[data.kind]} of training data: " + ", ".join(
        f"{label(*pairs[i], model)} {score:.3f}" for score, i in table))
    return pairs[table[0][1]]


# -- The commands ----------------------------------------------------------------------------------

def settle(args):
    """(model, checkpoint, pairs of orders and plans to try) that a command line asks for."""
    model, checkpoint = load_model(args.ckpt, args.device)
    calls = model.S * model.D if args.calls is None else args.calls
    try:
        if len(args.order) > 30:
            raise ValueError("no order has so long a name")
        args.order == "auto" or planner.order(args.order, model.D)
    except ValueError as error:
        raise UserError(f"--order: {error}, or auto")
    return model, checkpoint, candidates(model, checkpoint["L"], calls, args.order)


def run_encode(args):
    """a file to an archive"""
    model, checkpoint, pairs = settle(args)
    sizes = pick_sizes(model, args.fast, args.block, args.batch)
    content = open_input(args.input, checkpoint)         # what cannot be coded is said first
    order, plan = search(model, checkpoint, pairs)
    with replacing(args.output) as file:
        encode_file(file, model, content, order, plan, args.verify, args.fast, *sizes)
        size = file.seek(0, os.SEEK_END)
    number, units = content.count
    print(f"{args.input}: {number:,} {units} -> {size:,} bytes, "
          f"{8 * size / max(1, content.length):.3f} bits/{datasets.UNITS[content.kind]}; "
          f"order {label(order, plan, model)}, {len(plan)} network calls a batch"
          f"{', decoded and compared' if args.verify else ''}")
    print(f"back again: python compress.py decode --ckpt {typed(args.ckpt)} "
          f"{typed(args.output)} FILE")


def open_archive(path):
    try:
        file = open(path, "rb")
        return file if file.seekable() else io.BytesIO(file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")


def run_decode(args):
    """an archive back to text or images"""
    file = open_archive(args.input)
    header, _ = unpack(file, args.input, args.keep_going)
    try:
        device = args.device or (header["device"] if header["fast"] else None)
        model, checkpoint = load_model(args.ckpt, device)
    except UserError as error:
        if args.device or not header["fast"]:
            raise
        raise UserError(f"{args.input} cannot be decoded here: {error} "
                        f"({WRITTEN.format_map(header)} wrote it)")
    damaged = [] if args.keep_going else None
    parts = decode_file(file, model, checkpoint, args.input, args.item, damaged, args.batch)
    with replacing(args.output) as out:
        n = write_content(out, header, parts)
    number, units = amount(n, header["kind"], header["shape"])
    which = "these" if damaged else "all" if args.item is None else "its"
    print(f"{args.output}: {number:,} {units}, {which} checksums match")
    if damaged:
        print(*damaged, f"{args.input} is damaged; blocks left out: {len(damaged)}", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    file = open_archive(args.input)
    header, blocks = unpack(file, args.input, keep_going=True)
    size, n = file.seek(0, os.SEEK_END), header["length"]
    calls = sum(times for _, _, times in header["plan"])
    mode = ("fast: for torch {torch} with {threads} threads on {device}".format_map(header)
            if header["fast"] else "portable")
    print(f"{args.input}: {size:,} bytes, format {VERSION}, {mode}",
          "  {:,} {} of K = {}, {:.3f} bits each".format(
              *amount(n, header["kind"], header["shape"]), header["K"], 8 * size / max(1, n)),
          f"  {len(blocks)} blocks of {header['block']} datapoints of "
          f"{'x'.join(map(str, header['shape']))}",
          f"  order {header['order']}, {calls} network calls a batch",
          f"  weights {header['weights']}", sep="\n")


def compare(model, checkpoint, content, order, plan, **flags):
    """What one file costs by every measure: ({name: bits/dim}, facts about the archive)."""
    n, D, symbols = content.length, model.D, content.symbols
    test = bound(model, *datasets.cut(symbols.to(next(model.parameters()).device), D),
                 progress=True)
    begin = time.perf_counter()
    file = io.BytesIO()
    ideal = encode_file(file, model, content, order, plan, verify=False, **flags)
    encoded = time.perf_counter()
    back = torch.cat([*decode_file(file, model, checkpoint, "the archive",
                                   batch=flags.get("batch"))])
    decoded = time.perf_counter()
    sizes = [size for size, _ in unpack(file, "the archive")[1]]
    bits, payload, whole = float(ideal.sum()), sum(sizes), file.seek(0, os.SEEK_END)
    rows = {"bound, mean over all orders": test["bits"],
            "exact nll of this order and plan": bits / n,
            "archive, payload": 8 * payload / n, "archive, whole file": 8 * whole / n}
    facts = dict(symbols=n, order=label(order, plan, model), calls=len(plan),
                 stderr=test["stderr"], payload_bytes=payload, archive_bytes=whole,
                 bounds=(test["each"] * D / 8).tolist(), nlls=(ideal / 8).tolist(), blocks=sizes,
                 percent_over_nll=100 * (8 * payload / bits - 1), encode_seconds=encoded - begin,
                 decode_seconds=decoded - encoded, identical=torch.equal(back, symbols),
                 weight_bytes=4 * sum(p.numel() for p in model.parameters()))
    return rows | references(symbols.numpy(), content.kind, content.K, content.shape), facts


def print_sizes(facts, others, most=20):
    """A table of the bytes of the first images, one by one, and in how many of all the archive is
    the smallest."""
    columns = dict(bound=facts["bounds"], nll=facts["nlls"], archive=facts["blocks"]) | {
        name.split()[0]: sizes for name, sizes in others.items()}
    print("  bytes" + "".join(f"{name:>10}" for name in columns))
    for i, row in zip(range(most), zip(*columns.values())):
        print(f"  {i:5}" + "".join(f"{size:10.1f}" if size % 1 else f"{size:10.0f}"
                                   for size in row))
    for name, sizes in others.items():
        smaller = sum(ours < theirs for ours, theirs in zip(facts["blocks"], sizes))
        print(f"  smaller than {name} in {smaller} of {len(sizes)}")


def run_bench(args):
    """what a file costs by every measure; without FILE, the beginning of the test split"""
    model, checkpoint, pairs = settle(args)
    content = open_input(args.input or "test", checkpoint)
    if not args.input:
        least = 16 * model.D if content.kind == "image" else 0
        content.length = min(content.length, max(least, 20000 // model.D * model.D))
    if content.length < model.D:
        raise UserError(f"{args.input or 'the test split'} is shorter than a chunk of {model.D}")
    order, plan = search(model, checkpoint, pairs)
    block = 1 if content.kind == "image" else None       # so that each has its own number of bytes
    rows, f = compare(model, checkpoint, content, order, plan, fast=args.fast, block=block,
                      batch=args.batch)
    number, units = content.count
    print(f"{number:,} {units}, {'x'.join(map(str, content.shape))}, order "
          f"{label(order, plan, model)}, {len(plan)} network calls a batch; "
          f"bits/{datasets.UNITS[content.kind]}:")
    notes = {"bound, mean over all orders": f" (standard error {f['stderr']:.4f})",
             "archive, payload": f" ({f['payload_bytes']:,} bytes, "
                                 f"{f['percent_over_nll']:+.3f}% of the nll)",
             "archive, whole file": f" ({f['archive_bytes']:,} bytes)"}
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}{notes.get(name, '')}")
    if content.kind == "image":
        print("each image a block by itself, as encode --block 1 writes it:")
        print_sizes(f, image_sizes(datasets.to_images(content.symbols, content.shape)))
    print(f"encoded in {f['encode_seconds']:.1f} s, decoded in {f['decode_seconds']:.1f} s, "
          f"{'identical' if f['identical'] else 'DIFFERENT'}; the weights, "
          f"{f['weight_bytes']:,} bytes, are in none of these numbers")


def build_parser():
    """The flags of encode, decode, bench and info."""
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="encode | decode | bench | info")
    for name, run in (("encode", run_encode), ("decode", run_decode), ("bench", run_bench),
                      ("info", run_info)):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        if name == "info":
            command.add_argument("input", help="an archive")
            continue
        command.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
        command.add_argument("--device", help="cuda, mps or cpu")
        command.add_argument("input", nargs="?" if name == "bench" else None,
                             help="an archive" if name == "decode" else
                             "the file to read, or train, valid or test: of the model's data")
        if name != "bench":
            command.add_argument("output", help="the file to write")
        if name != "decode":
            command.add_argument("--calls", type=int,
                                 help="network calls a batch (default: one for each step)")
            command.add_argument("--order", default="auto",
                                 help="forward, backward, random:SEED, spaced:G, coarse, or "
                                      "auto: the best of several on training data")
            command.add_argument("--fast", action="store_true",
                                 help="float32: faster, but only this machine can decode it")
        command.add_argument("--batch", type=int, help="datapoints that go through the network "
                             "together, a block at the least (default: by the memory at hand)")
        if name == "decode":
            command.add_argument("--keep-going", action="store_true",
                                 help="leave out damaged blocks, deliver the others; exit code 1")
            command.add_argument("--item", type=int,
                                 help="only this datapoint, counted from 0: this image")
        if name == "encode":
            command.add_argument("--no-verify", dest="verify", action="store_false",
                                 help="skip the decoding that proves it")
            command.add_argument("--block", type=int, help="datapoints in a block, which is "
                                 "decoded as a whole (default: as many as have "
                                 f"{DEFAULT_BLOCK} symbols)")
    return parser


def main():
    """The command line: encode, decode, bench, info."""
    args = build_parser().parse_args()
    if getattr(args, "batch", None) is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: choose 1 or more")
    if args.command in ("encode", "decode"):
        check_output(args)
    args.run(args)


def check_output(args):
    """UserError where writing OUT would destroy what is read."""
    if Path(args.output).is_dir():
        raise UserError(f"{args.output} is a folder, not a file to write")
    for name, path in (("IN", args.input), ("--ckpt", args.ckpt)):
        for written, message in (
                (args.output, f"{name} and OUT are the same file"),
                (args.output + ".part", f"{path} is where OUT is written before it gets its name: "
                                        f"rename {name}")):
            if Path(path).exists() and Path(written).exists() and os.path.samefile(path, written):
                raise UserError(message)


if __name__ == "__main__":
    command_line(main)
