"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image, no other
    python compress.py bench --ckpt out/pydoc/ckpt.pt [IN]     bits, beside bz2, xz and zlib
    python compress.py info IN                                 what an archive holds

encode and bench read text (or bytes), or a .npy file of images. An archive, numbers big-endian:

    bytes   what
    4, 1    "ARDM", and the format version, 8
    4, 4    h, the length of the header, and its CRC-32
    h       header: JSON, deflated; see `encode_file`
    then for every block of datapoints, in the order of the file:
    4       length of the stream; its top bit: the symbols are stored raw
    1       shift: the grid of coder.py moved by shift/256 of a step
            the stream: what each call of the plan generates in this block, call by call

A block is decoded and checked as a whole: 2^14 symbols in whole datapoints. A last,
shorter datapoint is a block of its own. A stream starts from the CRC-32 of the block's number and
symbols, so a decoder that ends elsewhere has damaged bytes, or a block in a wrong place.

Encoder and decoder must compute the same integers on any machine. The network runs in float64,
where machines differ by less than 1e-12. A block in which a value lies within coder.MARGIN of where
rounding turns is coded again with the next shift. So under one assumption, a difference below
MARGIN, every decoder gets the encoder's integers: on CPU or CUDA, with any number of threads and
any batch. The encoder decodes every block before OUT gets its name.
"""
import copy
import hashlib
import io
import json
import os
import shlex
import struct
import sys
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

MAGIC, VERSION = b"ARDM", 8
BLOCK = 1 << 14                      # symbols in a block, about; twice as many at most
LONGEST_HEADER = 1 << 22             # bytes
RAW = 1 << 31                        # the bit of a length that says: stored raw
DAMAGED = b"\xff" * 5                # stands for a block that is not whole
IMAGE_CALLS, IMAGE_ORDER = 100, "random:1"


class Codec:
    """Blocks of datapoints to bytes and back, for a model, an order (by its name) and a plan."""

    def __init__(self, model, shape, rule, plan):
        device = next(model.parameters()).device
        self.device = "cpu" if device.type == "mps" else device          # MPS has no float64
        self.model = copy.deepcopy(model).to(self.device).double()
        self.shape, self.rule, self.plan = shape, rule, plan
        self.tick = lambda n: None                         # called with the symbols of every call

    def generate(self, x, choose):
        """ARDM.generate in one order for all rows of x (B, D); of text D may be shorter."""
        shape = self.shape if len(self.shape) == 3 else x.shape[1:]
        sigma = torch.from_numpy(planner.order(self.rule, shape)).to(self.device).expand(x.shape)
        return self.model.generate(x, self.plan, sigma, choose)

    def encode(self, x, first):
        """x (blocks, rows, D) uint8 -> the blocks as they stand in an archive, and -log2 p of all.
        first: the number of the first block."""
        packed, bits = [None] * len(x), 0.0
        for shift in range(256):
            todo = [i for i, block in enumerate(packed) if block is None]
            if not todo:
                return packed, bits
            starts, freqs, costs, safe = self.intervals(x[todo], shift)
            for i, start, freq, cost, good in zip(todo, starts, freqs, costs, safe):
                if good:
                    check = checksum(first + i, x[i])
                    stream, flag = coder.encode(start, freq, check), 0
                    if len(stream) > 4 + x[i].numel():     # the symbols themselves are shorter
                        stream, flag = check.to_bytes(4, "big") + x[i].numpy().tobytes(), RAW
                    packed[i] = struct.pack(">IB", flag | len(stream), shift) + stream
                    bits += cost
        raise ValueError("no grid is safe for a block: take a smaller --block")

    def intervals(self, x, shift):
        """starts and freqs (blocks, n) of all symbols in the order of the calls; -log2 p and
        whether the shifted grid is safe, (blocks,) each."""
        blocks, noted = len(x), []
        x = x.flatten(0, 1).long().to(self.device)         # (blocks * rows, D)

        def note(log_p, where, s):
            """Reads the symbols from the data, and notes their intervals."""
            a = self.model.symbol(x, s)[where]
            log_p, symbol, row = log_p.cpu().numpy(), a.cpu().numpy(), np.arange(len(a))
            cdf = coder.quantize(log_p, shift)
            start, end = cdf[row, symbol], cdf[row, symbol + 1]
            safe = [coder.safe(part, shift) for part in np.split(log_p, blocks)]
            noted.append([part.reshape(blocks, -1)
                          for part in (start, end - start, -log_p[row, symbol], np.array(safe))])
            self.tick(len(a))
            return a

        self.generate(x, note)
        starts, freqs, nats, safe = (np.concatenate(parts, axis=1) for parts in zip(*noted))
        return starts, freqs, bits_per_dim(nats.sum(axis=1), 1), safe.all(axis=1)

    def decode(self, packed, rows, D, first):
        """Blocks from an archive -> (rows * D,) uint8 symbols each; None where one is damaged."""
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
        x = self.generate(x, pop).to("cpu", torch.uint8).view(len(packed), -1)
        for i, block in enumerate(packed):
            part, end = x[i], decoders[i].end
            if block[0] & 128:                             # stored raw, behind the checksum
                part, end = torch.tensor(list(block[9:]), dtype=torch.uint8), block[5:9]
                end = int.from_bytes(end, "big")
            good = len(part) == rows * D and end == checksum(first + i, part)
            yield part if good else None


def checksum(number, symbols):
    """CRC-32 of a block's symbols, begun with its number, so that no two can change places."""
    return zlib.crc32(symbols.numpy().tobytes(), number)


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


# -- The two files ---------------------------------------------------------------------------------

class Source:
    """A file of n symbols, read piece by piece: its size is no matter of memory. head: the bytes
    before the first symbol; stored: of images the shape of one of them in the file."""

    def __init__(self, path, settings):
        self.path, self.settings, self.stored, offset = path, settings, [], 0
        self.file = open(path, "rb")
        if not self.file.seekable():
            self.file = io.BytesIO(self.file.read())
        size = self.file.seek(0, os.SEEK_END)
        if settings["kind"] == "image":
            images, array = datasets.open_npy(path), np.load(path, mmap_mode="r")
            C, H, W = settings["shape"]
            if images.shape[1:] != (H, W, C):
                raise ValueError(f"{path} holds images of (H, W, C) = {images.shape[1:]}, the "
                                 f"model codes {(H, W, C)}")
            self.stored, offset = array.shape[1:], array.offset
            if not array.flags.c_contiguous or array.nbytes + offset != size:
                raise ValueError(f"{path} is in Fortran order, or has bytes behind its array: save "
                                 "the array again, by numpy.save")
        self.n = size - offset
        self.file.seek(0)
        self.head = self.file.read(offset)

    def read(self, i, j):
        """Symbols i..j, (j - i,) uint8; of images whole ones, colour by colour."""
        self.file.seek(len(self.head) + i)
        content, K = self.file.read(j - i), self.settings["K"]
        if len(content) < j - i:
            raise ValueError(f"{self.path} became shorter while it was read")
        if self.settings["kind"] != "image":
            return torch.from_numpy(datasets.to_symbols(content, K, i))
        C, H, W = self.settings["shape"]
        pixels = np.frombuffer(content, np.uint8).reshape(-1, H, W, C).transpose(0, 3, 1, 2)
        if pixels.max(initial=0) >= K:
            raise ValueError(f"{self.path} holds the value {pixels.max()}, the model knows 0 to "
                             f"{K - 1}")
        return torch.from_numpy(pixels.flatten())          # a copy


def write_symbols(file, header, parts):
    """The file that an archive was made of, or what parts (an iterator) hold of it. Returns the
    number of symbols."""
    head, n, image = header["head"].encode("latin-1"), 0, header["kind"] == "image"
    file.write(head)
    for part in parts:
        n += len(part)
        if image:
            part = part.view(-1, *header["shape"]).permute(0, 2, 3, 1).flatten()
        file.write(datasets.to_bytes(part, header["K"]))
    if image and n < header["length"]:                     # some are left out: another head
        file.seek(len(head))
        pixels = np.frombuffer(file.read(), np.uint8)
        file.seek(0)
        np.save(file, pixels.reshape(-1, *header["stored"]))
        file.truncate()
    return n


# -- The archive -----------------------------------------------------------------------------------

def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def read_header(file, name):
    """The header of an open archive; ValueError where it is none, or damaged."""
    start = file.read(13)
    if start[:4] != MAGIC:
        raise ValueError(f"{name} is no archive of compress.py")
    if start[4:5] != bytes([VERSION]):
        raise ValueError(f"{name} has another format version than {VERSION}, which this program "
                         f"reads: {start[4:5].hex()}")
    try:
        length, check = struct.unpack(">II", start[5:])
        text = file.read(min(length, LONGEST_HEADER))
        require(zlib.crc32(text) == check)
        return dict(json.loads(zlib.decompressobj().decompress(text, LONGEST_HEADER)))
    except (ValueError, TypeError, RecursionError, struct.error, zlib.error):
        raise ValueError(f"{name} is damaged: its header is cut off or does not match its checksum")


def read_plan(header, model, settings, name):
    """The plan in a header; ValueError where header and model do not belong together, or where the
    header claims what would cost time or memory."""
    if header.get("weights") != digest(model):
        raise ValueError(f"{name} was written with another checkpoint")
    try:
        block, length, rule = header["block"], header["length"], header["order"]
        require(all(header[key] == settings[key] for key in ("kind", "K", "shape")))
        require(type(block) is type(length) is int and type(header["head"]) is type(rule) is str)
        require(0 <= length < 1 << 60 and (block == 1 or 1 <= block * model.D <= 2 * BLOCK))
        require(len(rule) < 40 and (header["kind"] != "image" or length % model.D == 0))
        planner.order(rule, header["shape"])
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
    codec = Codec(model, source.settings["shape"], rule, plan)
    header = dict({key: source.settings[key] for key in ("kind", "K", "shape")}, length=source.n,
                  order=rule, plan=[[s, k] for s, t, k in plan], block=block,
                  weights=digest(model), head=source.head.decode("latin-1"))
    if source.stored:
        header["stored"] = source.stored
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    file.write(struct.pack(">4sBII", MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
    together = max(1, nets.rows_at_once(codec.model) // block)
    done, total = 0, 0.0
    with tqdm(desc="encoding", unit="symbol", unit_scale=True, leave=False,
              total=source.n * model.S * (1 + verify)) as bar:
        codec.tick = bar.update
        for first, blocks, rows, D in groups(source.n, model.D, block, together):
            x = source.read(done, done + blocks * rows * D).view(blocks, rows, D)
            packed, bits = codec.encode(x, first)
            for part, true in zip(codec.decode(packed, rows, D, first) if verify else (), x):
                if part is None or not torch.equal(part, true.flatten()):
                    raise ValueError("a block does not decode to what went in: this machine does "
                                     "not compute the same numbers twice; nothing was written")
            file.write(b"".join(packed))
            done += x.numel()
            total += bits
            bar.set_postfix_str(f"{total / done:.3f} bits each")
    return total


def read_block(file, n):
    """The next block of an archive, of n symbols; where it is not whole, one that is damaged; b""
    where the archive has ended."""
    start = file.read(5)
    length = int.from_bytes(start[:4], "big") % RAW
    stream = file.read(min(length, n + 4))                 # no stream is longer than that
    whole = len(start) == 5 and len(stream) == length
    return start + stream if whole or not start else DAMAGED


def decode_file(file, model, header, plan, item=None, damaged=None):
    """An open archive behind its header -> iterator of its symbols, block by block, or of those of
    one datapoint.

    damaged: a list; then blocks that do not match are left out and described there. Else the first
    of them is a ValueError.
    """
    def report(words):
        if damaged is None:
            raise ValueError(f"the archive is damaged: {words} (--keep-going delivers the rest)")
        damaged.append(words)

    codec = Codec(model, header["shape"], header["order"], plan)
    n, block, D = header["length"], header["block"], model.D
    together, wanted = max(1, nets.rows_at_once(codec.model) // block), None
    if item is not None:
        if not 0 <= item < -(-n // D):
            raise ValueError(f"--item {item}: there are {-(-n // D)}, counted from 0")
        together, wanted = 1, item // block + (item == n // D and n // D % block > 0)
    with tqdm(desc="decoding", unit="symbol", unit_scale=True, total=n * model.S,
              leave=False) as bar:
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
                else:
                    row = item % block if width == D and item else 0
                    yield part if item is None else part.view(rows, width)[row]
            if b"" in packed:                              # whatever length the header claims
                break
    if item is None and file.read(1):
        report("something follows its last block")


# -- The commands ----------------------------------------------------------------------------------

def settle(args):
    """model, source, order and plan, by the command line: what encode and bench need.

    Text is read by `spaced` readers, with which an even plan is the cheapest; images in a fixed
    permutation. auto: the best of several on the beginning of the file.
    """
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings = checkpoint["settings"]
    piece = Path(args.ckpt).parent / datasets.PIECES[settings["kind"]]
    source = Source(args.input or piece, settings)
    image, full = settings["kind"] == "image", model.S * model.D
    calls = min(full, IMAGE_CALLS) if image else -(-full // 4)
    calls = calls if args.calls is None else args.calls
    plan = planner.uniform_plan(model.S, model.D, calls)
    spaced = f"spaced:{-(-full // calls)}"
    rule = args.order or (IMAGE_ORDER if image else spaced)
    if rule == "auto":
        rows, scores = min(source.n // model.D, max(4, 2048 // model.D)), {spaced: 0.0}
        x = source.read(0, rows * model.D).view(rows, model.D).long()
        x = x.to(next(model.parameters()).device)
        for name in (spaced, "forward", "random:1", "random:2") if rows else ():
            sigma = torch.from_numpy(planner.order(name, settings["shape"])).to(x.device)
            scores[name] = model.nll(x, plan, sigma.expand(x.shape)).sum().item()
        rule = min(scores, key=scores.get)
    planner.order(rule, settings["shape"])                 # ValueError for an unknown one
    if len(rule) >= 40:
        raise ValueError("--order: no order has so long a name")
    return model, source, rule, plan


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
        model, checkpoint = nets.load(args.ckpt, args.device)
        plan = read_plan(header, model, checkpoint["settings"], args.input)
        with datasets.write(args.output) as out:
            parts = decode_file(file, model, header, plan, args.item, damaged)
            n = write_symbols(out, header, parts)
    print(f"{args.output}: {n:,} symbols, their checksums match")
    if damaged:
        print(*damaged, f"{args.input} is damaged; this is what could be saved", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    with open(args.input, "rb") as file:
        header = read_header(file, args.input)
    print(f"{args.input}: {os.path.getsize(args.input):,} bytes, format {VERSION}")
    for name, value in header.items():
        print(f"  {name:8} {str(value)[:80]}")


def run_bench(args):
    """what a file costs by every measure; without IN, the piece of test data beside CKPT"""
    model, source, rule, plan = settle(args)
    settings, n = source.settings, source.n
    if not n:
        raise ValueError(f"{source.path} is empty")
    block = 1 if settings["kind"] == "image" else max(1, BLOCK // model.D)
    file = io.BytesIO()
    bits = encode_file(file, model, source, rule, plan, block)
    rows = {"exact nll of this order and plan": bits / n,
            f"archive, {file.tell():,} bytes": 8 * file.tell() / n}
    rows |= datasets.references(source.read(0, n).numpy(), settings["kind"], model.K,
                                settings["shape"])
    print(f"{source.path}: {n:,} symbols, order {rule}, {len(plan)} network calls; bits each:")
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}")
    print("decoded and identical; the weights, "
          f"{sum(4 * p.numel() for p in model.parameters()):,} bytes, are not counted")


def check_output(args):
    """ValueError where writing OUT would destroy what is read, or cannot be."""
    out = args.output
    if not Path(out).resolve().parent.is_dir():
        raise ValueError(f"{out} cannot be written: its folder does not exist")
    for name, path in (("IN", args.input), ("--ckpt", args.ckpt)):
        if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise ValueError(f"{name} and OUT are the same file")


def main():
    """The command line: encode, decode, bench, info."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="encode | decode | bench | info")
    for run in (run_encode, run_decode, run_bench, run_info):
        name = run.__name__.removeprefix("run_")
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("input", nargs="?" if name == "bench" else None, metavar="IN")
        if name != "info":
            command.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
            command.add_argument("--device", help="cuda, mps or cpu")
        if name in ("encode", "decode"):
            command.add_argument("output", metavar="OUT")
        if name in ("encode", "bench"):
            command.add_argument("--calls", type=int, help="network calls for a block (default: a "
                                 f"quarter of the variables of a text, {IMAGE_CALLS} for images)")
            command.add_argument("--order", help="forward, backward, random:SEED, spaced:G, or "
                                 "auto: the best of several on this file")
        if name == "encode":
            command.add_argument("--block", type=int, help="datapoints that are decoded together "
                                 f"(default: as many as have {BLOCK} symbols)")
            command.add_argument("--no-verify", dest="verify", action="store_false",
                                 help="skip the decoding that proves the archive")
        if name == "decode":
            command.add_argument("--item", type=int, help="only this datapoint, counted from 0")
            command.add_argument("--keep-going", action="store_true",
                                 help="leave out damaged blocks, deliver the others; exit code 1")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    datasets.run(main)
