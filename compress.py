"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image, no other
    python compress.py bench --ckpt out/pydoc/ckpt.pt [FILE]    bits/char, beside bz2, lzma and zlib
    python compress.py info IN                                  what an archive holds

IN is text, or images: a .npy file, or train, valid or test for that split of the model's data.
`batch` datapoints go through the network together, in one walk over the plan. Those of text, the
chunks of a file, share one rANS stream, a block; every image is a stream and a block by itself.
The encoder makes the decoder's very calls, in the same batches: a batch that is not full is filled
up with absent variables. An archive, all numbers big-endian:

    offset      bytes   what
    0           4       "ARDM"
    4           1       format version, 2
    5           4       h, length of the header
    9           h       header: JSON, see `make_header`, deflated by zlib
    then        w + 4   of each block: length of the payload, in w bytes (`width` in the header),
                        and CRC-32 of the symbols that it decodes to, one byte each, and then of
                        the payload
    then        4       CRC-32 of all before it
    then                the payloads, one behind the other: in portable mode the shifts of the
                        grid, see `pack_shifts`, then a stream of coder.py

Encoder and decoder must compute the same integers, but the last bits of what a network says depend
on the machine, its libraries, the number of threads, and what is beside a datapoint in its batch.

portable, the default: the network runs in float64, where those differences are about 1e-14. Its
log-probabilities, in nats, are rounded to a grid of 2^-10; from there on everything is integers
(`coder.quantize_levels`). Two machines that differ by less than MARGIN = 1e-10 nats round to the
same level unless a boundary lies between them. The encoder looks: where a value lies within MARGIN
of a boundary, it shifts the grid of that call a little, until none does, and stores the shift. So
under this one assumption, a difference below MARGIN, every decoder gets the encoder's integers: on
CPU or CUDA, with any number of threads and any batch size.

--fast: float32, several times as fast, bound to the machine. The header carries a fingerprint of
what the network says about a fixed input: a machine on which it says something else would decode
garbage, and refuses first.

In both modes the encoder proves each block by decoding it, and checksums tell damage.
"""
import collections
import copy
import hashlib
import io
import itertools
import json
import os
import shlex
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
                   replacing, spread)

MAGIC, VERSION, PRECISION = b"ARDM", 2, 22
BLOCK = 1 << 15                                      # symbols in a batch, about
LONGEST_HEADER = 1 << 24                             # bytes; a plan has up to S * D entries
MARGIN = 1e-10                                       # nats: see above


class Codec:
    """Batches of datapoints to payloads and back: a model, an order, a plan and a batch size.

    shape: of a datapoint, (D,) or (C, H, W). separate: every datapoint is a stream of its own;
    otherwise all of a batch are one, and the last may be shorter than D: what it lacks is absent.
    fast: float32, bound to this machine; see above. tick() is called for every network call.
    """

    def __init__(self, model, shape, order, plan, batch, separate, fast=False):
        self.plan, self.batch, self.separate, self.fast = plan, batch, separate, fast
        self.weights, device = digest(model), next(model.parameters()).device
        self.device = torch.device("cpu") if device.type == "mps" and not fast else device
        self.model = model if fast else copy.deepcopy(model).to(self.device).double()
        self.tick = lambda: None
        self.sigma = torch.from_numpy(planner.order(order, shape)).to(self.device)

    def encode(self, symbols):
        """(n,) symbols, n <= batch * D -> payloads, and ideal length in bits: -log2 p under this
        order and plan."""
        n, D, pushed, bits = len(symbols), self.model.D, [], [0.0]
        x, streams = self._blank(n), n // D if self.separate else 1
        shifts = [[] for _ in range(streams)]            # (call, shift of the grid), where not 0

        def push(log_p, where, s):
            a, log_p = self.model.symbol(x, s), log_p[where]
            written = a[where]
            cdf, shift = self._tables(log_p, streams)
            for i in np.flatnonzero(shift):
                shifts[i].append((self.call, int(shift[i])))
            pushed.append(coder.intervals(cdf, written.cpu().numpy()))
            nats = -log_p.gather(1, written[:, None]).cpu().double().sum().item()
            bits[0] += bits_per_dim(nats, 1)
            return a

        x.view(-1)[:n] = symbols.to(x)
        self._walk(x, n, push)
        if self.separate:                                # each call: (streams * k,) -> (k, streams)
            lanes = (np.concatenate([part.reshape(streams, -1).T for part in parts])
                     for parts in zip(*pushed))
            coded = coder.encode_streams(*lanes, PRECISION)
        else:
            coded = [coder.encode(*map(np.concatenate, zip(*pushed)), PRECISION)]
        if self.fast:
            return coded, bits[0]
        return [pack_shifts(row) + part for row, part in zip(shifts, coded)], bits[0]

    def decode(self, payloads, n):
        """Payloads -> (n,) uint8 symbols, and for each payload whether its stream came to a clean
        end. A payload None is left out, its symbols are 0: the network still predicts them, so that
        its calls have the encoder's shapes."""
        wanted = [i for i, payload in enumerate(payloads) if payload is not None]
        streams, shifts = [payloads[i] for i in wanted], [{}] * len(wanted)
        if not self.fast:
            shifts, streams = zip(*map(unpack_shifts, streams))
        decoder = (coder.DecoderStreams(streams, PRECISION) if self.separate else
                   coder.Decoder(streams[0], PRECISION))

        def pop(log_p, where, s):
            a, log_p = torch.zeros_like(where, dtype=torch.long), log_p[where]
            symbols = np.zeros((len(payloads), len(log_p) // len(payloads)), dtype=np.int64)
            part = log_p.view(*symbols.shape, -1)[wanted]                # (streams, k, A)
            cdf, _ = self._tables(part.flatten(0, 1), len(wanted),
                                  [row.get(self.call, 0) for row in shifts])
            if self.separate:
                cdf = cdf.reshape(*part.shape[:2], -1).swapaxes(0, 1)    # (k, streams, A + 1)
            symbols[wanted] = decoder.pop(cdf).T
            symbols = torch.from_numpy(symbols).flatten().to(a)
            possible = log_p.gather(1, symbols[:, None])[:, 0] > -torch.inf
            a[where] = torch.where(possible, symbols, 0)         # damaged bytes may say anything
            return a

        x = self._walk(self._blank(n), n, pop)
        clean = np.ones(len(payloads), bool)
        clean[wanted] = decoder.clean if self.separate else decoder.done
        return x.view(-1)[:n].to("cpu", torch.uint8), clean

    def _tables(self, log_p, streams, shifts=None):
        """(n, A) log-probabilities, of that many streams one after the other -> (n, A + 1) integer
        tables, and by how much the grid of each stream is shifted: as far as it takes to be safe,
        where shifts are not given."""
        if self.fast:
            probs = torch.softmax(log_p.cpu().double(), dim=-1)
            return coder.quantize(probs.numpy(), PRECISION), np.zeros(streams, dtype=np.int64)
        log_p = log_p.cpu().numpy().reshape(streams, -1)
        shift = np.zeros(streams, dtype=np.int64) if shifts is None else np.array(shifts)
        levels, safe = to_levels(log_p, shift)
        while shifts is None and not safe.all():
            shift += ~safe
            if shift.max() > 255:
                raise UserError("no grid is safe: the network gives no usable numbers")
            levels, safe = to_levels(log_p, shift)
        return coder.quantize_levels(levels.reshape(-1, self.model.A), PRECISION), shift

    def fingerprint(self):
        """CRC-32 of the integer tables for a fixed input of the very shape that coding uses."""
        B, D = self.batch, self.model.D
        x = torch.arange(B * D, device=self.device).view(B, D) % self.model.K
        half = torch.full((B,), D // 2 + 1, device=self.device)
        with torch.no_grad():
            log_p = self.model.log_probs(x, self.sigma.expand(B, D) < half[0], half,
                                         torch.ones_like(half))
        return zlib.crc32(self._tables(log_p.flatten(0, 1), 1)[0].tobytes())

    def _blank(self, n):
        """Zeros for n symbols: (batch, D) in fast mode, else as many rows as they fill."""
        rows = self.batch if self.fast else -(-n // self.model.D)
        return torch.zeros(rows, self.model.D, dtype=torch.long, device=self.device)

    def _walk(self, x, n, choose):
        """One walk over the plan, as far as n symbols need it."""
        def counted(*call):
            self.tick()
            self.call += 1
            return choose(*call)

        absent = torch.arange(x.numel(), device=self.device).view(x.shape) >= n
        sigma = rerank(self.sigma.expand(x.shape), absent=absent)
        plan, self.call = [(s, t, k) for s, t, k in self.plan if t <= n], -1
        return self.model.walk(self.model.coarse(x, 0), plan, sigma, counted)


def to_levels(log_p, shift):
    """(streams, n) float64 log-probabilities in nats -> their levels, whole numbers of 1/GRID nat
    below 0, on a grid shifted by shift / 256 of a level, (streams,); and (streams,) whether all of
    a stream's values are further than MARGIN from where rounding turns."""
    if np.isnan(log_p).any():
        raise UserError("the network gives no numbers: its weights are damaged")
    above = np.minimum(-log_p * coder.GRID + shift[:, None] / 256, coder.DEEPEST) + 0.5
    levels = np.floor(above)
    far = np.abs(above - levels - 0.5) < 0.5 - MARGIN * coder.GRID
    return np.maximum(levels, 0).astype(np.int64), far.all(axis=1)


def pack_shifts(shifts):
    """[(call, shift)] -> how many in one byte, then call (3 bytes) and shift (1) of each."""
    if len(shifts) > 255:
        raise UserError("too many network calls are near a rounding boundary; use --fast")
    return bytes([len(shifts)]) + b"".join(
        struct.pack(">I", call << 8 | shift) for call, shift in shifts)


def unpack_shifts(payload):
    """A payload -> {call: shift}, and the stream behind them; whatever the bytes."""
    end = 1 + 4 * int.from_bytes(payload[:1], "big")
    numbers = np.frombuffer(payload[1:end][:(len(payload[1:end]) // 4) * 4], ">u4").tolist()
    return {number >> 8: number & 255 for number in numbers}, payload[end:]


# -- The archive -----------------------------------------------------------------------------------

class Content:
    """What is coded: its symbols (n,) uint8, what they are (kind), and the shape of a datapoint.

    npy: of images, the shape of one of them in the .npy file, (H, W) or (H, W, C).
    """

    def __init__(self, kind, symbols, K, shape, npy=None):
        self.kind, self.symbols, self.K, self.shape, self.npy = kind, symbols, K, shape, npy

    @property
    def count(self):
        """How many units (characters, images) there are, and what they are called."""
        n, D = len(self.symbols), int(np.prod(self.shape))
        return (n // D, "images") if self.kind == "image" else (n, "characters")

    def to_bytes(self):
        """The bytes of the file."""
        if self.kind != "image":
            return datasets.to_bytes(self.symbols, self.K)
        images = datasets.to_images(self.symbols, self.shape)
        np.save(file := io.BytesIO(), images.reshape(-1, *self.npy))
        return file.getvalue()


def read_content(stream, checkpoint, name="IN"):
    """The bytes of a file -> Content that the model of this checkpoint can code, or a UserError."""
    kind, K, shape = checkpoint["kind"], checkpoint["K"], tuple(checkpoint["shape"])
    if kind != "image":
        return Content(kind, torch.from_numpy(datasets.to_symbols(stream, K)), K, shape)
    images, npy = datasets.read_npy(io.BytesIO(stream), name)
    if images.shape[1:] != shape:
        raise UserError(f"{name} holds images of (C, H, W) = {images.shape[1:]}, the model codes "
                        f"{shape}")
    if images.max() >= K:
        raise UserError(f"{name} holds the value {images.max()}, the model knows 0 to {K - 1}")
    return Content(kind, torch.from_numpy(images).reshape(-1), K, shape, npy)


def make_header(codec, content, order):
    """All that decoding needs beside the checkpoint; the plan as runs [s, k, how many]."""
    runs = [[*key, len(list(run))]
            for key, run in itertools.groupby((s, k) for s, _, k in codec.plan)]
    image = dict(npy=content.npy) if content.kind == "image" else {}
    machine = dict(probe=codec.fingerprint(), device=codec.device.type,
                   threads=torch.get_num_threads(), torch=torch.__version__) if codec.fast else {}
    return dict(kind=content.kind, length=len(content.symbols), shape=content.shape, **image,
                K=codec.model.K, order=order, plan=runs, batch=codec.batch, weights=codec.weights,
                fast=codec.fast, **machine)


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def pack(header, blocks):
    """Header dict and [(symbols, payload)] -> the bytes of an archive."""
    longest = max([len(payload) for _, payload in blocks], default=0)
    width = -(-longest.bit_length() // 8)
    text = json.dumps(header | dict(width=width), separators=(",", ":")).encode()
    text = zlib.compress(text, 9)
    head = MAGIC + struct.pack(">BI", VERSION, len(text)) + text
    head += b"".join(len(payload).to_bytes(width, "big") + checksum(symbols, payload)
                     for symbols, payload in blocks)
    return head + struct.pack(">I", zlib.crc32(head)) + b"".join(part for _, part in blocks)


def checksum(symbols, payload):
    return struct.pack(">I", zlib.crc32(payload, zlib.crc32(symbols.numpy().tobytes())))


def unpack(archive, name, keep_going=False):
    """The bytes of an archive -> header dict and [(checksum, payload, offset)], checked as far as
    can be without the model. UserError says what is wrong. keep_going: payloads that are not whole
    are no error."""
    if archive[:4] != MAGIC:
        raise UserError(f"{name} is no archive of compress.py")
    if archive[4:5] != bytes([VERSION]):
        raise UserError(f"{name} has format version {archive[4] if len(archive) > 4 else '?'}, "
                        f"this program reads {VERSION}")
    at = 9 + int.from_bytes(archive[5:9], "big")
    try:
        header = json.loads(zlib.decompressobj().decompress(archive[9:at], LONGEST_HEADER))
        require(all(type(header[key]) is int for key in ("length", "batch", "width")))
        sizes = header["shape"]
        require(len(sizes) in (1, 3) and all(type(n) is int and n > 0 for n in sizes))
        D, width = int(np.prod(sizes)), header["width"]
        symbols = D if header["kind"] == "image" else header["batch"] * D        # of a block
        require(0 <= header["length"] and 0 <= width <= 4 and header["batch"] > 0)
        require(header["batch"] * D <= max(BLOCK, D))    # what `encode` would write
        require(header["kind"] != "image" or header["length"] % D == 0)
        number = -(-header["length"] // symbols)
        end = at + number * (width + 4)
        require(end + 4 <= len(archive))
        require(zlib.crc32(archive[:end]) == int.from_bytes(archive[end:end + 4], "big"))
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error):
        raise UserError(f"{name} is damaged: its header or index is cut off, or does not match its "
                        "checksum")
    blocks, begin = [], end + 4
    for entry in range(at, end, width + 4):
        size = int.from_bytes(archive[entry:entry + width], "big")
        if begin + size > len(archive) and not keep_going:
            raise UserError(f"{name} is cut off: block {len(blocks)}, at byte {begin}, is not "
                            "there, or not whole (--keep-going delivers the others)")
        blocks.append((archive[entry + width:entry + width + 4], archive[begin:begin + size],
                       begin))
        begin += size
    if begin != len(archive) and not keep_going:
        raise UserError(f"{name} is damaged: {len(archive) - begin} bytes follow the last block")
    return header, blocks


def require(holds):
    """What a header must fulfil; unlike an assert it also counts under python -O."""
    if not holds:
        raise ValueError


def open_codec(header, model, checkpoint, name):
    """The codec that wrote this archive, or a UserError where it would decode to something else."""
    if (header.get("weights"), header["shape"], header.get("K")) != (
            digest(model), [*checkpoint["shape"]], model.K):
        raise UserError(f"{name} was written with another checkpoint")
    try:
        require(header["kind"] == checkpoint["kind"] and type(header["fast"]) is bool
                and type(header["order"]) is str)
        if header["fast"]:
            probe, written = header["probe"], "torch {torch}, {threads} threads, {device}"
            written = written.format_map(header)
            require(0 < header["threads"] <= 1024)
            torch.set_num_threads(header["threads"])
        runs, step, plan = header["plan"], collections.Counter(), []
        require(all(times > 0 for _, _, times in runs)
                and sum(times for _, _, times in runs) <= model.S * model.D)
        for s, k in (call for s, k, times in runs for call in [(s, k)] * times):
            plan.append((s, step[s] + 1, k))
            step[s] += k
        require(step == {s: model.D for s in range(1, model.S + 1)}
                and all(k > 0 for _, _, k in plan))
        if header["kind"] == "image":
            require(sorted(header["npy"]) in (sorted(header["shape"]),
                                              sorted(header["shape"][1:])))
        codec = Codec(model, header["shape"], header["order"], plan, header["batch"],
                      header["kind"] == "image", header["fast"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} is damaged: its header makes no sense")
    if codec.fast and codec.fingerprint() != probe:
        raise UserError(f"{name} cannot be decoded here: this machine computes other probabilities "
                        f"than the one that wrote it ({written})")
    return codec


def encode(model, content, order, plan, verify=True, fast=False):
    """Content -> archive, and its ideal length in bits: -log2 p under this order and plan.

    verify: decode each block at once, and compare.
    """
    n, D, separate = len(content.symbols), model.D, content.kind == "image"
    chunks = max(1, -(-n // D))
    batch = -(-chunks // -(-chunks // max(1, BLOCK // D)))
    codec = Codec(model, content.shape, order, plan, batch, separate, fast)
    blocks, bits, done = [], 0.0, 0
    parts = content.symbols.split(batch * D) if n else ()
    with tqdm(desc="encoding", unit="call", total=len(parts) * len(plan) * (1 + verify)) as bar:
        codec.tick = bar.update
        for part in parts:
            payloads, ideal = codec.encode(part)
            if verify and not torch.equal(codec.decode(payloads, len(part))[0], part):
                raise UserError("a block does not decode to what went in: this machine does not "
                                "compute the same probabilities twice, and nothing was written")
            blocks += zip(part.split(D) if separate else [part], payloads)
            bits, done = bits + ideal, done + len(part)
            bar.set_postfix_str(f"{bits / done:.3f} bits/{datasets.UNITS[content.kind]}")
    return pack(make_header(codec, content, order), blocks), bits


def decode(model, checkpoint, archive, name, item=None, damaged=None):
    """Archive -> Content, or that of one block alone; UserError where anything does not match.

    damaged: a list; then a block that does not match is left out, and told there in words.
    """
    header, blocks = unpack(archive, name, damaged is not None)
    if item is not None and not 0 <= item < len(blocks):
        raise UserError(f"--item {item}: {name} has {len(blocks)}, counted from 0")
    codec = open_codec(header, model, checkpoint, name)
    parts, D = [], model.D
    size = D if codec.separate else codec.batch * D      # symbols in a block
    each = codec.batch if codec.separate else 1          # blocks in a batch
    batches = [item // each] if item is not None else range(-(-len(blocks) // each))
    with tqdm(desc="decoding", unit="call", total=len(batches) * len(codec.plan)) as bar:
        codec.tick = bar.update
        for batch in batches:
            here = range(batch * each, min((batch + 1) * each, len(blocks)))
            if item is not None and not codec.fast:
                here = [item]                            # no need of the others' company
            wanted = [blocks[i][1] if item in (None, i) else None for i in here]
            n = min(len(here) * size, header["length"] - here[0] * size)
            x, clean = codec.decode(wanted, n)
            for i, part, good in zip(here, x.split(size), clean):
                check, payload, offset = blocks[i]
                if item not in (None, i):
                    continue
                if good and checksum(part, payload) == check:
                    parts.append(part)
                    continue
                error = (f"block {i} of {len(blocks)} (counted from 0), at byte {offset}, does not "
                         "decode to its checksum")
                if damaged is None:
                    raise UserError(f"{name} is damaged: {error} (--keep-going delivers the "
                                    "others)")
                damaged.append(error)
    return Content(header["kind"], torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8),
                   model.K, header["shape"], header.get("npy"))


# -- Which order and plan --------------------------------------------------------------------------

def candidates(model, L, calls, rule="auto"):
    """[(order, plan)] to try: the cheapest plan by L, and for fewer calls than steps an even one,
    whose calls of k variables suit k readers that march together. rule: only this order."""
    full = model.S * model.D
    if not model.S <= calls <= full:
        raise UserError(f"--calls {calls}: choose {model.S} to {full}")
    if calls == full:
        plans = [planner.full_plan(model.S, model.D)]
    elif L is None:
        raise UserError("this checkpoint has no L_t yet, which --calls needs: "
                        "let train.py --resume finish the run")
    else:
        plans = [planner.plan(L, calls), planner.uniform_plan(model.S, model.D, calls)]
    widest = sorted({max(k for _, _, k in plan) for plan in plans} - {1}) or [2]
    rules = ["forward", "backward", "random:1", "random:2", "coarse"] + [
        f"spaced:{k}" for k in widest]
    return list(itertools.product(rules if rule == "auto" else [rule], plans))


def label(order, plan, model):
    """An order and plan in words."""
    if len(plan) == model.S * model.D:
        return order
    even = plan == planner.uniform_plan(model.S, model.D, len(plan))
    return f"{order} ({'even' if even else 'cheapest'} plan)"


def search(model, checkpoint, pairs):
    """The best of several (order, plan), by the exact nll of some training chunks (App. D)."""
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

def read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")


def open_input(path, checkpoint):
    """Content of a file, or of the split of that name of the data that the model was trained on."""
    if path in ("train", "valid", "test") and not Path(path).exists():
        data = load_data(checkpoint["settings"], "cpu", checkpoint, fetch=False)
        C, *sides = data.shape                           # of text: its length
        npy = sides if C == 1 else (*sides, C)
        return Content(data.kind, data.splits[path].reshape(-1), data.K, data.shape, npy)
    return read_content(read(path), checkpoint, path)


def settle(args):
    """(model, checkpoint, pairs of orders and plans to try) that a command line asks for."""
    model, checkpoint = load_model(args.ckpt, args.device)
    calls = model.S * model.D if args.calls is None else args.calls
    try:
        args.order == "auto" or planner.order(args.order, model.D)
    except ValueError as error:
        raise UserError(f"--order: {error}, or auto")
    return model, checkpoint, candidates(model, checkpoint["L"], calls, args.order)


def run_encode(args):
    """a file to an archive"""
    model, checkpoint, pairs = settle(args)
    content = open_input(args.input, checkpoint)         # what cannot be coded is said first
    order, plan = search(model, checkpoint, pairs)
    archive, bits = encode(model, content, order, plan, args.verify, args.fast)
    with replacing(args.output) as file:
        file.write(archive)
    number, units = content.count
    print(f"{args.input}: {number:,} {units} -> {len(archive):,} bytes, "
          f"{8 * len(archive) / max(1, len(content.symbols)):.3f} "
          f"bits/{datasets.UNITS[content.kind]}; "
          f"order {label(order, plan, model)}, {len(plan)} network calls a batch"
          f"{', decoded and compared' if args.verify else ''}")
    print(f"back again: python compress.py decode --ckpt {shlex.quote(args.ckpt)} "
          f"{shlex.quote(args.output)} FILE")


def run_decode(args):
    """an archive to the file it was made of"""
    archive = read(args.input)
    header, _ = unpack(archive, args.input, args.keep_going)
    device = args.device or (str(header["device"]) if "device" in header else None)
    model, checkpoint = load_model(args.ckpt, device)
    damaged = [] if args.keep_going else None
    content = decode(model, checkpoint, archive, args.input, args.item, damaged)
    with replacing(args.output) as file:
        file.write(content.to_bytes())
    number, units = content.count
    print(f"{args.output}: {number:,} {units}, checksums match")
    if damaged:
        print(*damaged, f"{args.input} is damaged: {len(damaged)} blocks are left out", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    archive = read(args.input)
    header, blocks = unpack(archive, args.input, keep_going=True)
    D, n = int(np.prod(header["shape"])), header["length"]
    units = f"{n // D:,} images" if header["kind"] == "image" else f"{n:,} characters"
    calls = sum(times for _, _, times in header["plan"])
    mode = ("fast: for torch {torch} with {threads} threads on {device}".format_map(header)
            if header["fast"] else "portable")
    print(f"{args.input}: {len(archive):,} bytes, format {VERSION}, {mode}",
          f"  {units} of K = {header['K']}, {8 * len(archive) / max(1, n):.3f} bits each",
          f"  {len(blocks)} blocks, {'x'.join(map(str, header['shape']))}, {header['batch']} "
          "datapoints in a batch",
          f"  order {header['order']}, {calls} network calls a batch",
          f"  weights {header['weights']}", sep="\n")


def compare(model, checkpoint, content, order, plan, fast=False):
    """What one file costs by every measure: ({name: bits/dim}, facts about the archive)."""
    n, D, device = len(content.symbols), model.D, next(model.parameters()).device
    test = bound(model, *datasets.cut(content.symbols.to(device), D), progress=True)
    begin = time.perf_counter()
    archive, bits = encode(model, content, order, plan, verify=False, fast=fast)
    encoded = time.perf_counter()
    back = decode(model, checkpoint, archive, "the archive").symbols
    decoded = time.perf_counter()
    sizes = [len(part) for _, part, _ in unpack(archive, "the archive")[1]]
    payload = sum(sizes)
    rows = {"bound, mean over all orders": test["bits"],
            "exact nll of this order and plan": bits / n,
            "archive, payload": 8 * payload / n, "archive, whole file": 8 * len(archive) / n}
    facts = dict(symbols=n, order=label(order, plan, model), calls=len(plan),
                 stderr=test["stderr"], blocks=sizes, payload_bytes=payload,
                 archive_bytes=len(archive),
                 percent_over_nll=100 * (8 * payload / bits - 1), encode_seconds=encoded - begin,
                 decode_seconds=decoded - encoded, identical=torch.equal(back, content.symbols),
                 weight_bytes=4 * sum(p.numel() for p in model.parameters()))
    return rows | references(content.symbols.numpy(), content.kind, content.K,
                             content.shape), facts


def print_sizes(blocks, others, most=20):
    """Bytes of the first images, one by one, and in how many of all the archive is smaller."""
    for name, sizes in others.items():
        smaller = sum(ours < theirs for ours, theirs in zip(blocks, sizes))
        print(f"  smaller than {name} in {smaller} of {len(sizes)}")
    print(f"  bytes of image 0, 1, ...: archive {' '.join(map(str, blocks[:most]))}")
    for name, sizes in others.items():
        print(f"    {name} {' '.join(map(str, sizes[:most]))}")


def run_bench(args):
    """what a file costs by every measure; without FILE, the beginning of the test split"""
    model, checkpoint, pairs = settle(args)
    content = open_input(args.input or "test", checkpoint)
    if not args.input:
        content.symbols = content.symbols[:max(16 * model.D if content.kind == "image" else 0,
                                               20000 // model.D * model.D)]
    if len(content.symbols) < model.D:
        raise UserError(f"{args.input or 'the test split'} is shorter than a chunk of {model.D}")
    order, plan = search(model, checkpoint, pairs)
    rows, f = compare(model, checkpoint, content, order, plan, args.fast)
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
        print_sizes(f["blocks"], image_sizes(datasets.to_images(content.symbols, content.shape)))
    print(f"encoded in {f['encode_seconds']:.1f} s, decoded in {f['decode_seconds']:.1f} s, "
          f"{'identical' if f['identical'] else 'DIFFERENT'}; the weights, "
          f"{f['weight_bytes']:,} bytes, are in none of these numbers")


def main():
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
                             help="the file to read, or train, valid or test: of the model's data")
        if name != "bench":
            command.add_argument("output", help="the file to write")
        if name != "decode":
            command.add_argument("--calls", type=int,
                                 help="network calls a block (default: one for each step)")
            command.add_argument("--order", default="auto",
                                 help="forward, backward, random:SEED, spaced:G, coarse, or "
                                      "auto: the best of several on training data")
        if name != "decode":
            command.add_argument("--fast", action="store_true",
                                 help="float32: faster, but only this machine can decode it")
        if name == "decode":
            command.add_argument("--keep-going", action="store_true",
                                 help="leave out damaged blocks, deliver the others; exit code 1")
            command.add_argument("--item", type=int,
                                 help="only this block, counted from 0: this image")
        if name == "encode":
            command.add_argument("--no-verify", dest="verify", action="store_false",
                                 help="skip the decoding that proves it")
    args = parser.parse_args()
    if args.command in ("encode", "decode") and Path(args.output).exists():
        if Path(args.output).is_dir():
            raise UserError(f"{args.output} is a folder, not a file to write")
        if Path(args.input).exists() and os.path.samefile(args.input, args.output):
            raise UserError("IN and OUT are the same file")
    args.run(args)


if __name__ == "__main__":
    command_line(main)
