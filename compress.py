"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode IN OUT                           by a model of English, of any bytes
    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image, no other
    python compress.py bench --ckpt out/pydoc/ckpt.pt [IN]     bits, beside bz2, xz and zlib
    python compress.py info IN                                 what an archive holds

IN is text, bytes, images (.npy, idx) or audio (.wav). An archive, numbers big-endian:

    4, 1    "ARDM", and the format version, 8
    4, 4    h, the length of the header, and its CRC-32
    h       header: JSON, deflated after TYPICAL; see `encode_file`
    then for every block of datapoints, in the order of the file:
    4       length of the stream; its top bit: the symbols are stored raw
    1       shift: the grid of coder.py moved by shift/256 of a step
            the stream: what each call of the plan generates in this block, call by call

A block, 2^14 symbols in whole datapoints, is decoded and checked as a whole; a last, shorter
datapoint is a block of its own. A stream starts from the CRC-32 of the block's number and symbols,
so a decoder that ends elsewhere has damaged bytes, or a block in a wrong place.

In float64 the machines that were tried differ by less than 1e-12. A block with a log-probability
within coder.MARGIN of a rounding boundary uses the next shift. So where numbers differ by less, the
same integers come out: on CPU or CUDA, with any number of threads and any batch.
"""
import copy
import io
import itertools
import json
import os
import shlex
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import coder
import data as datasets
import nets
import planner
from ardm import bits_per_dim

MAGIC, VERSION = b"ARDM", 8
BLOCK = 1 << 14                      # symbols in a block, about; twice as many at most
LONGEST_HEADER = 1 << 22             # bytes
TYPICAL = (                          # what deflated headers have in common: a part of the format
    rb'"text" "bytes" "image" "forward" "spaced:63" "head":"\u0093NUMPY\u0001\u0000v\u0000{'
    rb"'descr': '|u1', 'fortran_order': False, 'shape': (16, 28, 28), }             \n"
    rb'{"kind":"audio","length":16384,"order":"random:1","plan":[[64,63,62,31,32,16,15]],'
    rb'"tail":"","block":8,"weights":"0123456789abcdef","head":"RIFF\u0000\u0000WAVEfmt \u0010'
    rb'\u0000\u0000\u0000\u0001\u0000\u0001\u0000@\u001f\u0000\u0000\u0080>\u0000\u0000\u0002\u0000'
    rb'\u0010\u0000data\u0000\u0000"}')
RAW = 1 << 31                        # the bit of a length that says: stored raw
DAMAGED = b"\xff" * 5                # stands for a block that is not whole
CALLS = {"image": 100, "audio": 64}  # by default; of text a quarter of the variables


class Codec:
    """Blocks of datapoints to bytes and back.

    settings: of the checkpoint. order: by name. plan: the k of each call, a list for every stage.
    block: datapoints in a block. ValueError for what cannot be.
    """

    def __init__(self, model, settings, order, plan, block):
        device = next(model.parameters()).device
        self.device = "cpu" if device.type == "mps" else device          # MPS has no float64
        self.model = copy.deepcopy(model).to(self.device).double()
        self.settings, self.block, self.order, self.ks = settings, block, order, plan
        self.dtype = torch.uint16 if model.K > 256 else torch.uint8
        if model.draws != model.S:
            raise ValueError("an order-agnostic model of audio cannot code: train one with "
                             "--branch 16")
        planner.order(order, settings["shape"])
        most = max(1, 2 * BLOCK // model.D)
        if type(block) is not int or not 1 <= block <= most:
            raise ValueError(f"--block {block}: choose 1 to {most}")
        if [sum(ks) for ks in plan] != [model.D] * model.S or not all(
                type(k) is int and k > 0 for ks in plan for k in ks):
            raise ValueError("a plan must generate each variable once in every stage")
        self.plan = [(s, end - k + 1, k) for s, ks in enumerate(plan, start=1)
                     for k, end in zip(ks, itertools.accumulate(ks))]
        self.together = max(1, model.rows // block)
        self.tick = lambda n: None                         # called with the symbols of every call

    def groups(self, n):
        """(blocks, rows, D) of what goes through the network together, for a file of n symbols;
        the last rows and a shorter last datapoint are blocks of their own."""
        while n > 0:
            D = min(n, self.model.D)
            rows = min(n // D, self.block)
            blocks = min(n // (rows * D), self.together)
            yield blocks, rows, D
            n -= blocks * rows * D

    def generate(self, x, choose):
        """ARDM.generate in one order for all rows of x (B, D); of text D may be shorter."""
        shape = self.settings["shape"] if len(self.settings["shape"]) == 3 else x.shape[1:]
        sigma = torch.from_numpy(planner.order(self.order, shape)).to(self.device)
        return self.model.generate(x, self.plan, sigma.expand(x.shape), choose)

    def encode(self, x, first):
        """x (blocks, rows, D) uint8 or uint16 -> [(block as it stands in an archive, -log2 p)].
        first: the number of the first block."""
        true = x.flatten(0, 1).long().to(self.device)      # (blocks * rows, D)
        noted = []                                         # for every call, block by block

        def note(log_p, where, s):
            """Reads the symbols from the data, and notes what the model says about them."""
            a = self.model.symbol(true, s)[where]
            noted.append(zip(*(np.split(part.cpu().numpy(), len(x)) for part in (log_p, a))))
            self.tick(len(a))
            return a

        self.generate(true, note)
        return [pack(x[i], calls, first + i) for i, calls in enumerate(zip(*noted))]

    def decode(self, packed, rows, D, first):
        """Blocks from an archive -> (rows * D,) symbols each; None where one is damaged."""
        decoders = [coder.Decoder(block[5:]) for block in packed]

        def pop(log_p, where, s):
            """Takes the symbols from the streams."""
            parts = zip(decoders, packed, np.split(log_p.cpu().numpy(), len(packed)))
            a = np.concatenate([decoder.pop(coder.quantize(part, block[4]))
                                for decoder, block, part in parts])
            a = torch.from_numpy(a).to(self.device)
            self.tick(len(a))
            impossible = log_p.gather(1, a[:, None])[:, 0] == -torch.inf
            return torch.where(impossible, 0, a)           # damaged, as the checksum will tell

        x = torch.zeros(len(packed) * rows, D, dtype=torch.long, device=self.device)
        x = self.generate(x, pop).cpu().to(self.dtype).view(len(packed), -1)
        for i, block in enumerate(packed):
            part, end = x[i], decoders[i].end
            if block[0] & 128:                             # stored raw, behind the checksum
                whole = len(block) == 9 + part.nbytes
                part = torch.frombuffer(bytearray(block[9:]), dtype=self.dtype) if whole else part
                end = int.from_bytes(block[5:9], "big")
            yield part if end == checksum(part, first + i) else None


def pack(x, calls, number):
    """One block x (rows, D) as it stands in an archive, and -log2 p of it. calls: of every network
    call log_p (n, A) and the symbols (n,) that it generates."""
    safe = (i for i in range(256) if all(coder.safe(log_p, i) for log_p, _ in calls))
    shift = next(safe, None)
    if shift is None:
        raise ValueError("no grid is safe for a block: take a smaller --block")
    intervals = [coder.intervals(coder.quantize(log_p, shift), a) for log_p, a in calls]
    starts, freqs = map(np.concatenate, zip(*intervals))
    check, flag = checksum(x, number), 0
    stream = coder.encode(starts, freqs, check)
    if len(stream) > 4 + x.nbytes:                         # the symbols themselves are shorter
        stream, flag = check.to_bytes(4, "big") + x.numpy().tobytes(), RAW
    nats = -sum(log_p[np.arange(len(a)), a].sum() for log_p, a in calls)
    return struct.pack(">IB", flag | len(stream), shift) + stream, bits_per_dim(nats, 1)


def checksum(symbols, number):
    """CRC-32 of a block's symbols, begun with its number, so that no two can change places."""
    return zlib.crc32(symbols.numpy().tobytes(), number)


# -- The archive -----------------------------------------------------------------------------------

def encode_file(file, model, codec, source):
    """A source -> an archive in an open file, every block decoded before it is written. Returns
    -log2 p under this order and plan."""
    head, tail = (part.tobytes().decode("latin-1") for part in (source.head, source.tail))
    header = dict(kind=source.kind, length=source.n, order=codec.order, plan=codec.ks, tail=tail,
                  block=codec.block, weights=nets.digest(model), head=head)
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"{source.path}: {len(head + tail):,} bytes beside its data are too many")
    deflate = zlib.compressobj(9, wbits=-15, zdict=TYPICAL)
    text = deflate.compress(text) + deflate.flush()
    file.write(struct.pack(">4sBII", MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
    first = done = total = 0
    with tqdm(desc="encoding", unit="symbol", unit_scale=True, leave=False, disable=None,
              total=2 * source.n * model.S) as bar:
        codec.tick = bar.update
        for blocks, rows, D in codec.groups(source.n):
            x = source.read(done, done + blocks * rows * D).view(blocks, rows, D)
            packed, bits = zip(*codec.encode(x, first))
            for part, true in zip(codec.decode(packed, rows, D, first), x):
                if part is None or not torch.equal(part, true.flatten()):
                    raise ValueError("a block does not decode to what went in: this machine does "
                                     "not compute the same numbers twice; nothing was written")
            file.write(b"".join(packed))
            first += blocks
            done += x.numel()
            total += sum(bits)
            bar.set_postfix_str(f"{total / done:.3f} bits each")
    return total


def read_header(file, name):
    """The header of an open archive; ValueError where it is none, or damaged."""
    start = file.read(13)
    if start[:4] != MAGIC:
        raise ValueError(f"{name} is no archive of compress.py")
    if start[4:5] != bytes([VERSION]):
        raise ValueError(f"{name} has another format version than {VERSION}, which this program "
                         f"reads: {start[4:5].hex()}")
    inflate = zlib.decompressobj(-15, zdict=TYPICAL)
    try:
        length, check = struct.unpack(">II", start[5:])
        text = file.read(min(length, LONGEST_HEADER))
        if zlib.crc32(text) != check:
            raise ValueError
        return dict(json.loads(inflate.decompress(text, LONGEST_HEADER)))
    except (ValueError, TypeError, RecursionError, struct.error, zlib.error):
        raise ValueError(f"{name} is damaged: its header is cut off or does not match its checksum")


def open_codec(header, model, settings, name):
    """The codec of an archive; ValueError where header and model do not belong together, or where
    the header claims what would cost time or memory."""
    if header.get("weights") != nets.digest(model):
        right = find(header) or "which is not in out/*/"
        raise ValueError(f"{name} was written with another checkpoint, {right}")
    try:
        length, head = header["length"], header["head"].encode("latin-1")
        header["tail"].encode("latin-1")
        if type(length) is not int or not 0 <= length < 1 << 60:
            raise ValueError
        if settings["kind"] in ("image", "audio"):
            _, shape, axes, *_ = datasets.layout(np.frombuffer(head, np.uint8), name, whole=False)
            found = [shape[axis] for axis in axes]
            wanted = [length // model.D, *settings["shape"]]
            if length % found[0] if settings["kind"] == "audio" else found != wanted:
                raise ValueError
        return Codec(model, settings, header["order"], header["plan"], header["block"])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{name} is damaged: its header makes no sense")


def find(header):
    """The path of the checkpoint of an archive, one in out/*/ or the model of English; or None."""
    for path in [nets.ENGLISH, *sorted(Path("out").glob("*/ckpt*.pt"))]:
        with suppress(ValueError):
            if nets.digest(nets.load(path, "cpu")[0]) == header.get("weights"):
                return str(path)
    return None


def read_block(file, n):
    """The next block of an archive, of n symbols; where it is not whole, one that is damaged; b""
    where the archive has ended."""
    start = file.read(5)
    length = int.from_bytes(start[:4], "big") % RAW
    stream = file.read(min(length, 2 * n + 4))             # no stream is longer than that
    whole = len(start) == 5 and len(stream) == length
    return start + stream if whole or not start else DAMAGED


def decode_file(file, codec, n, item=None):
    """An open archive of n symbols behind its header -> iterator of (number of a block, its
    symbols or None where it is damaged); of item, the number of a datapoint, its symbols alone."""
    first = row = 0
    if item is not None:
        codec.together = 1
        if not 0 <= item < -(-n // codec.model.D):
            raise ValueError(f"--item {item}: there are {-(-n // codec.model.D)}, counted from 0")
    with tqdm(desc="decoding", unit="symbol", unit_scale=True, leave=False, disable=None,
              total=n * codec.model.S) as bar:
        codec.tick = bar.update
        for blocks, rows, D in codec.groups(n):
            packed = [read_block(file, rows * D) for _ in range(blocks)]
            if item is None or row <= item < row + rows:
                whole = [block or DAMAGED for block in packed]
                for i, part in enumerate(codec.decode(whole, rows, D, first), start=first):
                    if item is not None and part is not None:
                        part = part.view(rows, D)[item - row]
                    yield i, part
            first += blocks
            row += blocks * rows
            if b"" in packed:                              # whatever length the header claims
                break
    missing = item is not None and item >= row
    if missing or item is None and file.read(1):           # or something follows the last block
        yield first, None


# -- The commands ----------------------------------------------------------------------------------

def settle(args):
    """model, codec and source by the command line. Text is read by `spaced` readers and audio in
    halves, with which an even plan is the cheapest; images in a random order, as L_t was measured
    in, by the best plan."""
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings = checkpoint["settings"]
    S, D, kind = model.S, model.D, settings["kind"]
    piece = Path(args.ckpt).parent / datasets.PIECES[kind]
    source = datasets.Source(args.input or piece, settings)
    usual = min(S * D, CALLS.get(kind, -(-S * D // 4)))
    calls = usual if args.calls is None else args.calls
    even = planner.uniform_plan(S, D, calls)
    spaced = f"spaced:{-(-S * D // calls)}"
    order = args.order or {"image": "random:1", "audio": "halves"}.get(kind, spaced)
    if checkpoint.get("L") is None and "optimizer" in checkpoint:
        print("this run is not finished: keep a copy of its checkpoint, as --resume changes it",
              file=sys.stderr)

    def codec(order):
        plan = even
        if order.startswith("random") and checkpoint.get("L") is not None:
            plan = planner.plan(planner.smooth(checkpoint["L"], checkpoint["counts"]), calls)
        ks = [[k for stage, _, k in plan if stage == s] for s in range(1, S + 1)]
        block = max(1, BLOCK // D) if args.block is None else args.block
        return Codec(model, settings, order, ks, block)

    if order == "auto":                                    # the smallest nll of the first symbols
        rows = min(source.n // D, max(4, 2048 // D))
        x = source.read(0, rows * D).view(1, rows, D)
        found = {rule: sum(bits for _, bits in codec(rule).encode(x, 0))
                 for rule in (spaced, "halves", "forward", "random:1") if rows}
        order = min(found, key=found.get, default=spaced)
    return model, codec(order), source


def run_encode(args):
    """a file to an archive"""
    with datasets.write(args.output, (args.input, args.ckpt)) as file:   # before all work
        model, codec, source = settle(args)
        encode_file(file, model, codec, source)
        size = file.tell()
    print(f"{args.input}: {source.n:,} symbols -> {size:,} bytes, {8 * size / max(1, source.n):.3f}"
          f" bits each; order {codec.order}, {len(codec.plan)} network calls, proved by decoding\n"
          f"back again: python compress.py decode --ckpt {shlex.quote(args.ckpt)} "
          f"{shlex.quote(args.output)} FILE", file=args.words)


def run_decode(args):
    """an archive back to text or images"""
    damaged = []

    def intact(parts):
        """The symbols of the blocks that are not damaged."""
        for i, part in parts:
            if part is not None:
                yield part
                continue
            damaged.append(f"block {i} (counted from 0) is cut off, too many, or does not match "
                           "its checksum")
            if not args.keep_going:
                raise ValueError(f"{args.input} is damaged: {damaged[0]}; --keep-going delivers "
                                 "the rest")

    with open(args.input, "rb") as file:
        header = read_header(file, args.input)
        ckpt = args.ckpt or find(header)
        if not ckpt:
            raise ValueError(f"{args.input}: its checkpoint is not in out/*/, name it by --ckpt")
        model, checkpoint = nets.load(ckpt, args.device)
        codec = open_codec(header, model, checkpoint["settings"], args.input)
        parts = intact(decode_file(file, codec, header["length"], args.item))
        with datasets.write(args.output, (args.input, ckpt)) as out:
            n = datasets.write_back(out, header, checkpoint["settings"], parts)
    print(f"{args.output}: {n:,} symbols by {ckpt}, their checksums match", file=args.words)
    if damaged:
        print(*damaged, f"{args.input} is damaged; this is what could be saved", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    with open(args.input, "rb") as file:
        header = read_header(file, args.input)
    size = f"{os.path.getsize(args.input):,} bytes, " * os.path.isfile(args.input)
    print(f"{args.input}: {size}format {VERSION}")
    for name, value in header.items():
        print(f"  {name:8} {ascii(value)[:80]}")           # no control characters


def run_bench(args):
    """what a file costs by every measure; without IN, the piece of test data beside CKPT"""
    model, codec, source = settle(args)
    n, file = source.n, io.BytesIO()
    if not n:
        raise ValueError(f"{source.path} is empty")
    bits = encode_file(file, model, codec, source)
    rows = {"exact nll of this order and plan": bits / n,
            f"archive, {file.tell():,} bytes": 8 * file.tell() / n}
    rows |= datasets.references(source.read(0, n).numpy(), model.K, codec.settings.get("rate"))
    print(f"{source.path}: {n:,} symbols, order {codec.order}, {len(codec.plan)} network calls; "
          "bits each:")
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}")
    print("decoded and identical; the weights, "
          f"{sum(4 * p.numel() for p in model.parameters()):,} bytes, are not counted")


def main():
    """The command line: encode, decode, bench, info."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="encode | decode | bench | info")
    for run in (run_encode, run_decode, run_bench, run_info):
        name = run.__name__.removeprefix("run_")
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        add = command.add_argument
        add("input", nargs="?" if name == "bench" else None, metavar="IN", help="a file, or -")
        if name != "info":
            add("--ckpt", help="a checkpoint of train.py (default: results/english.pt; to decode, "
                "the archive's own, looked for in out/*/, too)")
            add("--device", help="cuda, mps or cpu; the network runs in float64, in which consumer "
                "GPUs are 32 to 64 times slower than in float32")
        if name in ("encode", "decode"):
            add("output", metavar="OUT", help="a file, or -")
        if name in ("encode", "bench"):
            add("--calls", type=int, help="network calls for a block (default: a quarter of the "
                f"variables of a text, {CALLS['image']} for images, {CALLS['audio']} for audio)")
            add("--order", help="forward, backward, random:SEED, spaced:G, halves, or auto: "
                "the best of several on this file")
            add("--block", type=int, help="datapoints that are decoded together (default: as many "
                f"as have {BLOCK} symbols)")
        if name == "decode":
            add("--item", type=int, help="only this datapoint, counted from 0")
            add("--keep-going", action="store_true", help="leave out damaged blocks, deliver the "
                "others; exit code 1")
    args = parser.parse_args()
    if args.input == "-":
        args.input = "/dev/stdin"
    piped = datasets.stream(getattr(args, "output", "")) is not None
    args.words = sys.stderr if piped else sys.stdout       # not into what goes to stdout
    if args.run in (run_encode, run_bench) and args.ckpt is None:
        args.ckpt = str(nets.ENGLISH)
        if args.input is None:
            raise ValueError("name a file, or a checkpoint beside which a piece of test data lies")
    args.run(args)


if __name__ == "__main__":
    datasets.run(main)
