"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image, no other
    python compress.py bench --ckpt out/pydoc/ckpt.pt [IN]     bits, beside bz2, xz and zlib
    python compress.py info IN                                 what an archive holds

IN is text, or a .npy file of images. An archive, numbers big-endian:

    offset   bytes   what
    0        4       "ARDM"
    4        1       format version, 8
    5        4       h, the length of the header
    9        4       CRC-32 of the header
    13       h       header: JSON, deflated; see `make_header`
    then for every block of datapoints, in the order of the file:
             4       length of the stream; its top bit: the symbols are stored raw
             1       shift: the grid of coder.py moved by shift/256 of a step
                     the stream: what each call of the plan generates in this block, call by call

A block is decoded, checked and repeated as a whole: 2^14 symbols in whole datapoints. A last,
shorter datapoint is a block of its own. A stream starts from the CRC-32 of the block's number and
symbols, so a decoder that ends elsewhere has damaged bytes, or a block in a wrong place.

Encoder and decoder must compute the same integers on any machine. The network runs in float64,
where machines differ by about 1e-13. A block in which a value lies within coder.MARGIN of where
rounding turns is coded again with the next shift. So under one assumption, a difference below
MARGIN, every decoder gets the encoder's integers: on CPU or CUDA, with any number of threads and
any batch. The encoder decodes every block before OUT gets its name.
"""
import copy
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import coder
import data as datasets
import nets
import planner
from ardm import bits_per_dim

MAGIC = b"ARDM\x08"                  # the last byte is the format version
BLOCK = 1 << 14                      # symbols in a block, about; twice as many at most
LONGEST_HEADER = 1 << 22             # bytes
RAW = 1 << 31                        # the bit of a length that says: stored raw
DAMAGED = b"\xff" * 5                # stands for a block that is not whole
IMAGE_CALLS, IMAGE_ORDER = 100, "random:1"


# -- Blocks ----------------------------------------------------------------------------------------

class Codec:
    """Blocks of datapoints to bytes and back, for a model, an order (by its name) and a plan."""

    def __init__(self, model, shape, rule, plan):
        device = next(model.parameters()).device
        self.device = "cpu" if device.type == "mps" else device          # MPS has no float64
        self.model = copy.deepcopy(model).to(self.device).double()
        self.shape = shape
        self.rule = rule
        self.plan = plan
        self.tick = lambda n: None                         # called with the symbols of every call

    def sigma(self, x):
        """The order, the same for every row of x (B, D); of text D may be shorter."""
        shape = self.shape if len(self.shape) == 3 else x.shape[1:]
        return torch.from_numpy(planner.order(self.rule, shape)).to(self.device).expand(x.shape)

    def encode(self, x, first):
        """x (blocks, rows, D) uint8 -> the blocks as they stand in an archive, and -log2 p of all.
        first: the number of the first block."""
        packed = [None] * len(x)
        bits = 0.0
        for shift in range(256):
            todo = [i for i, block in enumerate(packed) if block is None]
            if not todo:
                return packed, bits
            starts, freqs, costs, safe = self.intervals(x[todo], shift)
            for i, start, freq, cost, good in zip(todo, starts, freqs, costs, safe):
                if good:
                    check = checksum(first + i, x[i])
                    packed[i] = pack(coder.encode(start, freq, check), shift, check, x[i])
                    bits += cost
        raise ValueError("no grid is safe for a block: take a smaller --block")

    def intervals(self, x, shift):
        """starts and freqs (blocks, n) of all symbols in the order of the calls; -log2 p and
        whether the shifted grid is safe, (blocks,) each."""
        blocks = len(x)
        x = x.flatten(0, 1).long().to(self.device)         # (blocks * rows, D)
        noted = []

        def note(log_p, where, s):
            """Reads the symbols from the data, and notes their intervals."""
            a = self.model.symbol(x, s)[where]
            log_p, row, symbol = log_p.cpu().numpy(), np.arange(len(a)), a.cpu().numpy()
            cdf = coder.quantize(log_p, shift)
            start = cdf[row, symbol]
            safe = [coder.safe(part, shift) for part in np.split(log_p, blocks)]
            noted.append((start.reshape(blocks, -1),
                          (cdf[row, symbol + 1] - start).reshape(blocks, -1),
                          log_p[row, symbol].reshape(blocks, -1),
                          np.array(safe)[:, None]))
            self.tick(len(a))
            return a

        self.model.generate(x, self.plan, self.sigma(x), note)
        starts, freqs, log_p, safe = (np.concatenate(parts, axis=1) for parts in zip(*noted))
        return starts, freqs, bits_per_dim(-log_p.sum(axis=1), 1), safe.all(axis=1)

    def decode(self, packed, rows, D, first):
        """Blocks from an archive -> (rows * D,) uint8 symbols each; None where one is damaged."""
        raw = [block[0] >= 128 for block in packed]
        decoders = [coder.Decoder(block[5:]) for block in packed]
        x = torch.zeros(len(packed) * rows, D, dtype=torch.long, device=self.device)

        def pop(log_p, where, s):
            """Takes the symbols from the streams."""
            parts = zip(decoders, packed, np.split(log_p.cpu().numpy(), len(packed)))
            a = np.concatenate([decoder.pop(coder.quantize(part, block[4]))
                                for decoder, block, part in parts])
            a = torch.from_numpy(a).to(self.device)
            self.tick(len(a))
            impossible = log_p.gather(1, a[:, None])[:, 0] == -torch.inf
            return torch.where(impossible, 0, a)           # damaged, as the checksum will tell

        if not all(raw):
            x = self.model.generate(x, self.plan, self.sigma(x), pop)
        found = x.to("cpu", torch.uint8).view(len(packed), -1)
        ends = [decoder.end for decoder in decoders]
        parts = []
        for i, (block, part, end) in enumerate(zip(packed, found, ends)):
            if raw[i]:
                end = int.from_bytes(block[5:9], "big")
                part = torch.tensor(list(block[9:]), dtype=torch.uint8)
            good = len(part) == rows * D and end == checksum(first + i, part)
            parts.append(part if good else None)
        return parts


def checksum(number, symbols):
    """CRC-32 of a block's symbols, begun with its number, so that no two can change places."""
    return zlib.crc32(symbols.numpy().tobytes(), number)


def pack(stream, shift, check, x):
    """[length][shift][stream]; where the symbols are shorter they themselves, behind their check."""
    flag = 0
    if len(stream) > 4 + x.numel():
        stream = check.to_bytes(4, "big") + x.numpy().tobytes()
        flag = RAW
    return (flag | len(stream)).to_bytes(4, "big") + bytes([shift]) + stream


def read_block(file, n):
    """The next block of an archive, of n symbols; where it is not whole, one that is damaged; b""
    where the archive has ended."""
    start = file.read(5)
    if not start:
        return b""
    length = int.from_bytes(start[:4], "big") % RAW
    stream = file.read(min(length, n + 4))                 # no stream is longer than that
    whole = len(start) == 5 and len(stream) == length
    return start + stream if whole else DAMAGED


def groups(n, D, block, together):
    """(first block, blocks, rows, D) of what goes through the network together, for n symbols in
    blocks of `block` datapoints."""
    rows = n // D
    whole = rows // block
    for i in range(0, whole, together):
        yield i, min(together, whole - i), block, D
    if rows % block:
        yield whole, 1, rows % block, D
    if n % D:
        yield whole + (rows % block > 0), 1, 1, n % D


# -- The file that is coded ------------------------------------------------------------------------

class Source:
    """A file as n symbols, read piece by piece: its size is no matter of memory. head: what stands
    before the first symbol; npy: of images, the shape of one of them in the file."""

    def __init__(self, path, settings):
        self.path = path
        self.K = settings["K"]
        self.shape = tuple(settings["shape"])
        self.kind = settings["kind"]
        self.npy = None
        self.file = open(path, "rb")
        if not self.file.seekable():
            self.file = io.BytesIO(self.file.read())
        size = self.file.seek(0, os.SEEK_END)
        offset = self.open_images(size) if self.kind == "image" else 0
        self.n = size - offset
        self.file.seek(0)
        self.head = self.file.read(offset)

    def open_images(self, size):
        """Where the pixels begin in a .npy file of images that fit the model."""
        images = datasets.open_npy(self.path)
        found = (images.shape[3], *images.shape[1:3])
        if found != self.shape:
            raise ValueError(f"{self.path} holds images of (C, H, W) = {found}, the model codes "
                             f"{self.shape}")
        stored = np.load(self.path, mmap_mode="r")
        if not stored.flags.c_contiguous or stored.nbytes + stored.offset != size:
            raise ValueError(f"{self.path} is in Fortran order, or has bytes behind its array: "
                             "save the array again, by numpy.save")
        self.npy = list(stored.shape[1:])
        return stored.offset

    def read(self, i, j):
        """Symbols i..j, (j - i,) uint8; of images whole ones, colour by colour."""
        self.file.seek(len(self.head) + i)
        content = self.file.read(j - i)
        if len(content) < j - i:
            raise ValueError(f"{self.path} became shorter while it was read")
        if self.kind != "image":
            return torch.from_numpy(datasets.to_symbols(content, self.K, i))
        C, H, W = self.shape
        pixels = np.frombuffer(content, np.uint8).reshape(-1, H, W, C).transpose(0, 3, 1, 2)
        if pixels.max(initial=0) >= self.K:
            raise ValueError(f"{self.path} holds the value {pixels.max()}, the model knows 0 to "
                             f"{self.K - 1}")
        return torch.from_numpy(pixels.flatten())          # a copy


def write_symbols(file, header, parts):
    """The file that an archive was made of, or what parts (an iterator) hold of it. Returns the
    number of symbols."""
    n = 0
    file.write(header["head"].encode("latin-1"))
    for part in parts:
        n += len(part)
        if header["kind"] == "image":
            pixels = part.view(-1, *header["shape"]).permute(0, 2, 3, 1).contiguous()
            file.write(pixels.numpy().tobytes())
        else:
            file.write(datasets.to_bytes(part, header["K"]))
    if header["kind"] == "image" and n < header["length"]:               # some images are left out
        file.seek(len(header["head"]))
        content = file.read()
        file.seek(0)
        np.save(file, np.frombuffer(content, np.uint8).reshape(-1, *header["npy"]))
        file.truncate()
    return n


# -- The archive -----------------------------------------------------------------------------------

def make_header(model, source, rule, plan, block):
    """All that decoding needs beside the checkpoint. plan: the calls of an even one, or [[s, k]]."""
    even = plan == planner.uniform_plan(model.S, model.D, len(plan))
    return dict(kind=source.kind, shape=source.shape, K=source.K, length=source.n, order=rule,
                plan=len(plan) if even else [[s, k] for s, t, k in plan], block=block,
                weights=digest(model), head=source.head.decode("latin-1"), npy=source.npy)


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def read_header(file, name):
    """The header of an open archive, checked as far as can be without the model; ValueError where
    it is none. Nothing that it claims may cost time or memory."""
    start = file.read(13)
    if start[:4] != MAGIC[:4]:
        raise ValueError(f"{name} is no archive of compress.py")
    if start[4:5] != MAGIC[4:]:
        raise ValueError(f"{name} has format version {start[4] if len(start) > 4 else '?'}, this "
                         f"program reads {MAGIC[4]}")
    try:
        text = file.read(min(int.from_bytes(start[5:9], "big"), LONGEST_HEADER))
        require(zlib.crc32(text) == int.from_bytes(start[9:], "big"))
        header = json.loads(zlib.decompressobj().decompress(text, LONGEST_HEADER))
        numbers = [header[key] for key in ("length", "block", "K")] + header["shape"]
        require(len(header["shape"]) in (1, 3))
        require(all(type(n) is int and 0 <= n < 1 << 60 for n in numbers))
        require(type(header["order"]) is type(header["head"]) is type(header["weights"]) is str)
        D, block = math.prod(header["shape"]), header["block"]
        require(D > 0 and block > 0 and (block == 1 or block * D <= 2 * BLOCK))
        require(header["kind"] in ("image", "text", "bytes") and len(header["order"]) < 40)
        if header["kind"] == "image":
            C, *sides = header["shape"]
            require(header["length"] % D == 0 and header["npy"] in ([*sides, C], sides))
        return header
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error):
        raise ValueError(f"{name} is damaged: its header is cut off or does not match its checksum")


def read_plan(header, model, name):
    """The plan in a header; ValueError where header and model do not belong together."""
    if header["weights"] != digest(model):
        raise ValueError(f"{name} was written with another checkpoint")
    try:
        require(header["K"] == model.K and math.prod(header["shape"]) == model.D)
        planner.order(header["order"], header["shape"])
        if type(header["plan"]) is int:
            return planner.uniform_plan(model.S, model.D, header["plan"])
        plan, done = [], dict.fromkeys(range(1, model.S + 1), 0)
        for s, k in header["plan"]:
            require(type(s) is type(k) is int and k > 0)
            plan.append((s, done[s] + 1, k))
            done[s] += k
        require(set(done.values()) == {model.D})
        return plan
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{name} is damaged: its header makes no sense")


def require(holds):
    """What a header must fulfil; unlike an assert it also counts under python -O."""
    if not holds:
        raise ValueError


def encode_file(file, model, source, rule, plan, block, verify=True):
    """A source -> an archive in an open file. Returns -log2 p under this order and plan."""
    codec = Codec(model, source.shape, rule, plan)
    header = json.dumps(make_header(model, source, rule, plan, block), separators=(",", ":"))
    text = zlib.compress(header.encode(), 9)
    for part in (MAGIC, len(text).to_bytes(4, "big"), zlib.crc32(text).to_bytes(4, "big"), text):
        file.write(part)
    together = max(1, nets.rows_at_once(codec.model) // block)
    done, total = 0, 0.0
    with tqdm(desc="encoding", unit="symbol", unit_scale=True, leave=False,
              total=source.n * model.S * (1 + verify)) as bar:
        codec.tick = bar.update
        for first, blocks, rows, D in groups(source.n, model.D, block, together):
            x = source.read(done, done + blocks * rows * D).view(blocks, rows, D)
            packed, bits = codec.encode(x, first)
            if verify:
                back = codec.decode(packed, rows, D, first)
                if not all(part is not None and torch.equal(part, block.flatten())
                           for part, block in zip(back, x)):
                    raise ValueError("a block does not decode to what went in: this machine does "
                                     "not compute the same numbers twice; nothing was written")
            file.write(b"".join(packed))
            done += x.numel()
            total += bits
            bar.set_postfix_str(f"{total / done:.3f} bits/{datasets.UNITS[source.kind]}")
    return total


def decode_file(file, model, header, name, item=None, damaged=None):
    """An open archive behind its header -> iterator of its symbols, block by block, or of those of
    one datapoint.

    damaged: a list; then blocks that do not match are left out and described there. Else the first
    of them is a ValueError.
    """
    def report(words):
        if damaged is None:
            raise ValueError(f"{name} is damaged: {words} (--keep-going delivers what is whole)")
        damaged.append(words)

    codec = Codec(model, tuple(header["shape"]), header["order"], read_plan(header, model, name))
    n, block, D = header["length"], header["block"], model.D
    wanted = None
    if item is not None:
        if not 0 <= item < -(-n // D):
            raise ValueError(f"--item {item}: {name} has {-(-n // D)}, counted from 0")
        wanted = item // block + (item == n // D and n // D % block > 0)
    together = max(1, nets.rows_at_once(codec.model) // block) if item is None else 1
    with tqdm(desc="decoding", unit="symbol", unit_scale=True, leave=False,
              total=n * model.S) as bar:
        codec.tick = bar.update
        for first, blocks, rows, width in groups(n, D, block, together):
            packed = [read_block(file, rows * width) for _ in range(blocks)]
            if wanted not in (None, first):
                continue
            parts = codec.decode([block or DAMAGED for block in packed], rows, width, first)
            for number, part in enumerate(parts, start=first):
                if part is None:
                    report(f"block {number} (counted from 0) is cut off or does not decode to its "
                           "checksum")
                elif item is None:
                    yield part
                else:
                    yield part.view(rows, width)[item % block if width == D else 0]
            if b"" in packed:                              # whatever length the header claims
                break
    if item is None and file.read(1):
        report("something follows its last block")


# -- The commands ----------------------------------------------------------------------------------

def settle(args):
    """model, source, order, plan: what encode and bench need, by the command line.

    Text is read by `spaced` readers, with which an even plan is the cheapest; images in a fixed
    permutation. auto: the best of several on the beginning of the file.
    """
    model, checkpoint = nets.load(args.ckpt, args.device)
    source = Source(args.input or beside(args.ckpt, checkpoint), checkpoint["settings"])
    image, full = source.kind == "image", model.S * model.D
    calls = args.calls or min(full, IMAGE_CALLS if image else -(-full // 4))
    plan = planner.uniform_plan(model.S, model.D, calls)
    spaced = f"spaced:{-(-full // calls)}"
    rule = args.order or (IMAGE_ORDER if image else spaced)
    rows = min(source.n // model.D, max(4, 2048 // model.D))
    if rule == "auto" and rows:
        x = source.read(0, rows * model.D).view(rows, -1).long().to(next(model.parameters()).device)
        scores = {}
        for rule in ("forward", "random:1", "random:2", spaced):
            sigma = torch.from_numpy(planner.order(rule, source.shape)).to(x.device)
            scores[rule] = model.nll(x, plan, sigma.expand(x.shape)).sum().item()
        rule = min(scores, key=scores.get)
    rule = spaced if rule == "auto" else rule
    planner.order(rule, source.shape)                      # ValueError for an unknown one
    return model, source, rule, plan


def beside(path, checkpoint):
    """The piece of test data that train.py leaves beside a checkpoint."""
    name = {"image": "test.npy", "text": "test.txt", "bytes": "test.bin"}
    return Path(path).parent / name[checkpoint["settings"]["kind"]]


def run_encode(args):
    """a file to an archive"""
    check_output(args)
    model, source, rule, plan = settle(args)
    block = max(1, BLOCK // model.D) if args.block is None else args.block
    if block != 1 and not 1 <= block * model.D <= 2 * BLOCK:
        raise ValueError(f"--block {block}: choose 1 to {max(1, 2 * BLOCK // model.D)}")
    with datasets.write(args.output) as file:
        encode_file(file, model, source, rule, plan, block, args.verify)
        size = file.tell()
    print(f"{args.input}: {source.n:,} symbols -> {size:,} bytes, "
          f"{8 * size / max(1, source.n):.3f} bits each; order {rule}, {len(plan)} network calls"
          f"{', decoded and compared' if args.verify else ''}")
    print("back again: python compress.py decode --ckpt",
          shlex.quote(args.ckpt), shlex.quote(args.output), "FILE")


def run_decode(args):
    """an archive back to text or images"""
    check_output(args)
    damaged = [] if args.keep_going else None
    with open(args.input, "rb") as file:
        header = read_header(file, args.input)
        model, _ = nets.load(args.ckpt, args.device)
        parts = decode_file(file, model, header, args.input, args.item, damaged)
        with datasets.write(args.output) as out:
            n = write_symbols(out, header, parts)
    print(f"{args.output}: {n:,} symbols, the checksums match")
    if damaged:
        print(*damaged, f"{args.input} is damaged; this is what could be saved", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    with open(args.input, "rb") as file:
        header = read_header(file, args.input)
    plan, n = header["plan"], header["length"]
    size = os.path.getsize(args.input)
    print(f"{args.input}: {size:,} bytes, format {MAGIC[4]}, {n:,} symbols of K = {header['K']}, "
          f"{8 * size / max(1, n):.3f} bits each")
    print(f"  blocks of {header['block']} x {'x'.join(map(str, header['shape']))}, "
          f"order {header['order']}, {plan if type(plan) is int else len(plan)} network calls, "
          f"weights {header['weights']}")


def run_bench(args):
    """what a file costs by every measure; without IN, the piece of test data beside CKPT"""
    model, source, rule, plan = settle(args)
    if not source.n:
        raise ValueError(f"{source.path} is empty")
    file = io.BytesIO()
    begin = time.perf_counter()
    block = 1 if source.kind == "image" else max(1, BLOCK // model.D)
    bits = encode_file(file, model, source, rule, plan, block, verify=False)
    middle = time.perf_counter()
    size = file.tell()
    file.seek(0)
    back = torch.cat([*decode_file(file, model, read_header(file, "archive"), "archive")])
    end = time.perf_counter()
    x, n = source.read(0, source.n), source.n
    rows = {"exact nll of this order and plan": bits / n, f"archive, {size:,} bytes": 8 * size / n}
    rows |= datasets.references(x.numpy(), source.kind, model.K, source.shape)
    print(f"{source.path}: {n:,} symbols, order {rule}, {len(plan)} network calls; bits each:")
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}")
    print(f"encoded in {middle - begin:.1f} s, decoded in {end - middle:.1f} s, "
          f"{'identical' if torch.equal(back, x) else 'DIFFERENT'}; the weights, "
          f"{sum(4 * p.numel() for p in model.parameters()):,} bytes, are not counted")


def check_output(args):
    """ValueError where writing OUT would destroy what is read, or cannot be."""
    if not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"{args.output} cannot be written: its folder does not exist")
    for name, path in (("IN", args.input), ("--ckpt", args.ckpt)):
        if os.path.exists(path) and os.path.exists(args.output) and os.path.samefile(
                path, args.output):
            raise ValueError(f"{name} and OUT are the same file")


def main():
    """The command line: encode, decode, bench, info."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="encode | decode | bench | info")

    def command(run, name, *flags):
        one = commands.add_parser(name, help=run.__doc__)
        one.set_defaults(run=run)
        for flag, how in flags:
            one.add_argument(flag, **how)

    source = ("input", dict(metavar="IN", help="the file to read"))
    output = ("output", dict(metavar="OUT", help="the file to write"))
    model = [("--ckpt", dict(required=True, help="a checkpoint of train.py")),
             ("--device", dict(help="cuda, mps or cpu"))]
    choices = [("--calls", dict(type=int, help="network calls for a block (default: a quarter of "
                                f"the variables of a text, {IMAGE_CALLS} for images)")),
               ("--order", dict(help="forward, backward, random:SEED, spaced:G, or auto: the best "
                                "of several on this file"))]
    command(run_encode, "encode", source, output, *model, *choices,
            ("--block", dict(type=int, help="datapoints that are decoded together (default: as "
                             f"many as have {BLOCK} symbols)")),
            ("--no-verify", dict(dest="verify", action="store_false",
                                 help="skip the decoding that proves the archive")))
    command(run_decode, "decode", source, output, *model,
            ("--item", dict(type=int, help="only this datapoint, counted from 0")),
            ("--keep-going", dict(action="store_true", help="leave out damaged blocks, deliver the "
                                  "others; exit code 1")))
    command(run_bench, "bench", ("input", dict(nargs="?", **source[1])), *model, *choices)
    command(run_info, "info", source)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    datasets.run(main)
