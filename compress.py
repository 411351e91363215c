"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode IN OUT                           with the model of English, any file
    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode IN OUT
    python compress.py decode --ckpt out/mnist/ckpt.pt --item 17 IN OUT     that image alone
    python compress.py bench --ckpt out/pydoc/ckpt.pt [IN]     bits, beside bz2, xz and zlib
    python compress.py info IN

IN is text, images (.npy, idx) or sound (.wav). An archive, with big-endian numbers:

    4, 1    "ARDM", and the format version, 9
    4       length of the header
    header  a zlib stream, dictionary COMMON: JSON, then the unusual bytes around an array, if any
    then for every block of datapoints, in the order of the file:
    4       length of the stream. If its top bit is set, the stream is the CRC, then the symbols as
            they are, 16-bit ones little-endian
    1       shift: the grid of coder.py is moved by shift/256 of a step
            the stream: what each call of the plan generates in this block, call by call

A block has about 2^14 symbols, in whole datapoints; a last, shorter datapoint is its own block. A
stream starts from the CRC-32 of the block's number and symbols. The decoder must end at this
CRC. If it does not, the block is damaged, or in a wrong place. COMMON must never change.

If a log-probability lies within coder.MARGIN of a rounding boundary, the block uses the next shift.
A machine whose log-probabilities differ by less than MARGIN gets the same integers: CPU or CUDA,
with any number of threads. In float64 the machines that were tried differ by less than 1e-12.
"""
import copy
import itertools
import json
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

MAGIC, VERSION = b"ARDM", 9
BLOCK = 1 << 14                      # symbols in a block, about (at most twice, or one datapoint)
RAW = 1 << 31                        # the bit of a length that says: stored raw
LONGEST = 1 << 26                    # bytes of a header
SHORT = 1 << 15                      # bytes; longer files in a random order take the cheapest plan
CALLS = {"image": 100, "audio": 64}  # by default; of text an eighth of the variables
FIELDS = ("kind", "length", "form", "order", "block", "plan", "weights", "head")
COMMON = b'"image",["audio",[16000,1],"random:1",8,[[64,64,["text",null,"spaced:8",64,[[8],"",null]'


class Codec:
    """Blocks of datapoints to bytes and back.

    settings: of the checkpoint. order: by name. ks: the k of each call, a list for every stage.
    block: datapoints in a block. ValueError if these do not fit the model."""

    def __init__(self, model, settings, order, ks, block):
        if isinstance(model, nets.MixtureARDM):
            raise ValueError("an order-agnostic model of audio cannot code: use --branch 256")
        device = next(model.parameters()).device
        self.device = "cpu" if device.type == "mps" else device          # MPS has no float64
        self.model = copy.deepcopy(model).to(self.device).double()
        self.shape, self.order, self.ks, self.block = settings["shape"], order, ks, block
        self.dtype = "<u2" if model.K > 256 else "u1"      # of symbols stored raw
        self.tick = lambda n: None                         # told how many symbols are done
        most = max(1, 2 * BLOCK // model.D)
        if type(block) is not int or not 1 <= block <= most:
            raise ValueError(f"--block {block}: choose 1 to {most}")
        if [sum(stage) for stage in ks] != [model.D] * model.S or not all(
                type(k) is int and k > 0 for stage in ks for k in stage):
            raise ValueError("a plan must generate each variable once in every stage")
        planner.order(order, self.shape)
        self.plan = [(s, end - k + 1, k) for s, stage in enumerate(ks, start=1)
                     for k, end in zip(stage, itertools.accumulate(stage))]

    def generate(self, x, choose):
        """ARDM.generate in one order for all rows of x (B, T). Text and sound may have T < D."""
        shape = self.shape if len(self.shape) == 3 else x.shape[1:]
        sigma = torch.from_numpy(planner.order(self.order, shape)).to(self.device)
        return self.model.generate(x, self.plan, sigma.expand(x.shape), choose)

    def encode(self, x, number):
        """Block `number` of symbols x (rows, D) -> (the bytes of it in an archive, -log2 p)."""
        raw, calls = x.astype(self.dtype).tobytes(), []    # pairs of log_p (n, A), symbols (n,)
        x = torch.from_numpy(x.astype(np.int64)).to(self.device)

        def read(log_p, where, s):
            """Reads the symbols from the data, and notes what the model says about them."""
            a = self.model.symbol(x, s)[where]
            calls.append((log_p.cpu().numpy(), a.cpu().numpy()))
            self.tick(len(a))
            return a

        self.generate(x, read)
        shift = safe_shift([log_p for log_p, _ in calls])
        intervals = [coder.intervals(coder.quantize(log_p, shift), a) for log_p, a in calls]
        starts, freqs = map(np.concatenate, zip(*intervals))
        check, flag = zlib.crc32(raw, number), 0           # numbered: no two can change places
        stream = coder.encode(starts, freqs, check)
        if len(stream) > 4 + len(raw):                     # the symbols themselves are shorter
            stream, flag = check.to_bytes(4, "big") + raw, RAW
        nats = -sum(log_p[np.arange(len(a)), a].sum() for log_p, a in calls)
        return struct.pack(">IB", flag | len(stream), shift) + stream, bits_per_dim(nats, 1)

    def decode(self, block, rows, D, number):
        """The bytes of a block in an archive -> symbols (rows, D), or None if it is damaged."""
        length, shift = struct.unpack(">IB", block[:5])
        if length & RAW:
            check, raw = int.from_bytes(block[5:9], "big"), block[9:]
            if len(raw) != rows * D * np.dtype(self.dtype).itemsize:
                return None
            self.tick(rows * D * self.model.S)
        else:
            decoder = coder.Decoder(block[5:])

            def pop(log_p, where, s):
                """Takes the symbols from the stream."""
                log_p = log_p.cpu().numpy()
                a = decoder.pop(coder.quantize(log_p, shift))
                if (log_p[np.arange(len(a)), a] == -np.inf).any():
                    raise ValueError("a symbol of probability 0 came out of the stream")
                self.tick(len(a))
                return torch.from_numpy(a).to(self.device)

            x = torch.zeros(rows, D, dtype=torch.long, device=self.device)
            try:
                raw = self.generate(x, pop).cpu().numpy().astype(self.dtype).tobytes()
            except ValueError:
                return None
            check = decoder.end
        good = check == zlib.crc32(raw, number)
        return np.frombuffer(raw, self.dtype).reshape(rows, D) if good else None


def safe_shift(log_probs):
    """The first shift of the grid at which no log-probability is near a boundary."""
    for shift in range(256):
        if all(coder.safe(log_p, shift) for log_p in log_probs):
            return shift
    raise ValueError("no grid is safe for a block: take a smaller --block")


# -- The archive -----------------------------------------------------------------------------------

def encode_file(path, model, codec, settings):
    """A file -> (its archive, its symbols (n,), -log2 p). Every block has been decoded."""
    symbols, found = datasets.open_symbols(path, settings)
    n, total, form = len(symbols), 0.0, found and found.form
    content, anew = datasets.read(path), datasets.file_of(symbols, settings, form)
    beside = (found.head, found.tail) if found and anew != content else None
    head, tail = beside or (b"", b"")
    if beside and head + anew[len(anew) - symbols.nbytes:] + tail != content:
        raise ValueError(f"{path} would not come back byte for byte: no archive")
    fields = (settings["kind"], n, form, codec.order, codec.block, codec.ks, nets.digest(model),
              len(head) if beside else None)
    header = json.dumps(fields, separators=(",", ":")).encode() + b"\n" + head + tail
    if len(header) > LONGEST:
        raise ValueError(f"{path}: {len(head + tail):,} bytes beside its data are too many")
    deflate = zlib.compressobj(9, zdict=COMMON)
    header = deflate.compress(header) + deflate.flush()
    parts = [struct.pack(">4sBI", MAGIC, VERSION, len(header)) + header]
    with tqdm(desc="encoding", unit="symbol", unit_scale=True, leave=False, disable=None,
              total=2 * n * model.S) as bar:
        codec.tick = bar.update
        for number, start, rows, D in layout(n, codec):
            x = symbols[start:start + rows * D].reshape(rows, D)
            block, bits = codec.encode(x, number)
            if not np.array_equal(codec.decode(block, rows, D, number), x):
                raise ValueError("this machine does not compute the same numbers twice: no archive")
            parts.append(block)
            total += bits
            bar.set_postfix_str(f"{total / (start + rows * D):.3f} bits each")
    return b"".join(parts), symbols, total


def layout(n, codec):
    """Yields (number, first symbol, rows, D) of the blocks of a file of n symbols."""
    D, number = codec.model.D, 0
    for row in range(0, n // D, codec.block):
        yield number, row * D, min(codec.block, n // D - row), D
        number += 1
    if n % D:
        yield number, n // D * D, 1, n % D


def read_header(archive, name):
    """Header of an archive, a dict; the bytes beside its array, or None; where the blocks begin."""
    if archive[:4] != MAGIC:
        raise ValueError(f"{name} is no archive of compress.py")
    if archive[4:5] != bytes([VERSION]):
        raise ValueError(f"{name} has format version {archive[4:5].hex()}, not {VERSION}: decode "
                         "it by the edition of this program that wrote it")
    try:
        end = 9 + struct.unpack(">I", archive[5:9])[0]
        inflate = zlib.decompressobj(zdict=COMMON)
        text, _, beside = inflate.decompress(archive[9:end], LONGEST).partition(b"\n")
        if not inflate.eof or inflate.unused_data or len(text) > LONGEST >> 3:
            raise ValueError
        header = dict(zip(FIELDS, json.loads(text), strict=True))
        cut = header["head"]
        return header, None if cut is None else (beside[:cut], beside[cut:]), end
    except (ValueError, TypeError, RecursionError, struct.error, zlib.error):
        raise ValueError(f"{name} is damaged: its header is cut off or changed")


def open_codec(header, model, settings, name):
    """The codec of an archive. ValueError if header and model do not belong together."""
    if header["weights"] != nets.digest(model):
        raise ValueError(f"{name} was written with another checkpoint: name it by --ckpt")
    n, form, kind = header["length"], header["form"], settings["kind"]
    try:
        datasets.file_of(np.empty(0, np.int64), settings, form)
        wrong = (form is None) != (kind == "text") or kind == "image" and n % model.D
        if wrong or type(n) is not int or not 0 <= n < 1 << 60:
            raise ValueError
        return Codec(model, settings, header["order"], header["plan"], header["block"])
    except (ValueError, TypeError, ArithmeticError, AttributeError, struct.error):
        raise ValueError(f"{name} is damaged: its header makes no sense")


def decode_file(archive, at, codec, n, item=None):
    """Yields (number, symbols or None if they are damaged) of the blocks of an archive, from byte
    `at`. n: symbols in the file. With item: only that datapoint."""
    D = codec.model.D
    if item is not None and not 0 <= item < -(-n // D):
        raise ValueError(f"--item {item}: there are {-(-n // D)} datapoints, from 0 on")
    with tqdm(desc="decoding", unit="symbol", unit_scale=True, leave=False, disable=None,
              total=n * codec.model.S) as bar:
        codec.tick = bar.update
        number = -1
        for number, start, rows, width in layout(n, codec):
            end = at + 5 + int.from_bytes(archive[at:at + 4], "big") % RAW
            block, at = archive[at:end], end
            whole = len(block) > 4 and end <= len(archive)
            if not whole:                                  # whatever length the header claims
                yield number, None
                return
            if item is None:
                yield number, codec.decode(block, rows, width, number)
            elif 0 <= item - start // D < rows:
                x = codec.decode(block, rows, width, number)
                yield number, None if x is None else x[item - start // D]
                return
        if at != len(archive):                             # something follows the last block
            yield number + 1, None


# -- Skip on a first reading: the commands ---------------------------------------------------------

def settle(args):
    """model, codec, settings and the path of the file, by the command line."""
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings = checkpoint["settings"]
    S, D, kind = model.S, model.D, settings["kind"]
    if args.input is None and Path(args.ckpt).name == nets.ENGLISH.name:
        raise ValueError("name a file, or a checkpoint beside which a piece of test data lies")
    path = Path(args.ckpt).parent / datasets.PIECES[kind] if args.input is None else args.input
    calls = min(S * D, CALLS.get(kind, -(-S * D // 8))) if args.calls is None else args.calls
    plan = planner.uniform_plan(S, D, calls)
    order = args.order or (f"spaced:{-(-S * D // calls)}" if kind == "text" else "random:1")
    known = order.startswith("random") and checkpoint.get("L") is not None
    if known and len(datasets.read(path)) > SHORT:
        plan = planner.plan(planner.smooth(checkpoint["L"], checkpoint.get("counts")), calls)
    ks = [[k for stage, _, k in plan if stage == s] for s in range(1, S + 1)]
    block = max(1, BLOCK // D) if args.block is None else args.block
    if checkpoint.get("L") is None and "optimizer" in checkpoint:
        print("this run is not finished: keep a copy of its checkpoint, as --resume changes it",
              file=sys.stderr)
    return model, Codec(model, settings, order, ks, block), settings, path


def run_encode(args):
    """a file to an archive"""
    datasets.write(args.output, None, (args.input, args.ckpt))           # before all work
    model, codec, settings, path = settle(args)
    archive, symbols, _ = encode_file(path, model, codec, settings)
    datasets.write(args.output, archive, (args.input, args.ckpt))
    n, ckpt = len(symbols), shlex.quote(str(args.ckpt))
    print(f"{path}: {n:,} symbols -> {len(archive):,} bytes, "
          f"{8 * len(archive) / (n or np.nan):.3f} bits each; order {codec.order}, "
          f"{len(codec.plan)} network calls, proved by decoding\n"
          f"back again: python compress.py decode --ckpt {ckpt} {shlex.quote(args.output)} FILE")


def run_decode(args):
    """an archive back to a file"""
    datasets.write(args.output, None, (args.input, args.ckpt))
    archive = datasets.read(args.input)
    header, beside, at = read_header(archive, args.input)
    model, checkpoint = nets.load(args.ckpt, args.device)
    settings, form = checkpoint["settings"], header["form"]
    codec = open_codec(header, model, settings, args.input)
    parts, damaged = [np.empty(0, codec.dtype)], []
    for number, x in decode_file(archive, at, codec, header["length"], args.item):
        if x is not None:
            parts.append(x.reshape(-1))
            continue
        damaged.append(f"block {number} (counted from 0) is cut off, changed, or surplus")
        if not args.keep_going:
            raise ValueError(f"{args.input} is damaged: {damaged[0]}; try --keep-going")
    symbols = np.concatenate(parts)
    if len(symbols) < header["length"] and settings["kind"] == "audio":
        form = [form[0], 1]                                # parts of channels, one after another
    content = datasets.file_of(symbols, settings, form)
    if beside and len(symbols) == header["length"]:
        size = symbols.nbytes
        content = beside[0] + content[len(content) - size:] + beside[1]
    datasets.write(args.output, content, (args.input, args.ckpt))
    print(f"{args.output}: {len(symbols):,} symbols by {args.ckpt}, their checksums match")
    if damaged:
        print(*damaged, f"{args.input} is damaged; this is what could be saved", sep="\n",
              file=sys.stderr)
        sys.exit(1)


def run_info(args):
    """what an archive holds, without decoding it"""
    archive = datasets.read(args.input)
    header, _, _ = read_header(archive, args.input)
    print(f"{args.input}: {len(archive):,} bytes, format {VERSION}")
    for name, value in header.items():
        print(f"  {name:8} {ascii(value)[:80]}")           # no control characters


def run_bench(args):
    """what a file costs by every measure; without IN, the piece of test data beside CKPT"""
    model, codec, settings, path = settle(args)
    archive, symbols, bits = encode_file(path, model, codec, settings)
    n = len(symbols)
    if not n:
        raise ValueError(f"{path} is empty")
    rows = {"exact nll of this order and plan": bits / n,
            f"archive, {len(archive):,} bytes": 8 * len(archive) / n}
    rows |= datasets.references(symbols, model.K)
    print(f"{path}: {n:,} symbols, order {codec.order}, {len(codec.plan)} calls; bits each:")
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}")
    print("decoded and identical; the weights, "
          f"{sum(4 * p.numel() for p in model.parameters()):,} bytes, are not counted")


def main():
    """One of the four commands."""
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="encode | decode | bench | info")
    for run in (run_encode, run_decode, run_bench, run_info):
        name = run.__name__.removeprefix("run_")
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        add = command.add_argument
        add("input", nargs="?" if name == "bench" else None, metavar="IN")
        if name != "info":
            add("--ckpt", default=nets.ENGLISH, help="a checkpoint of train.py (default: "
                "results/english.pt)")
            add("--device", help="cuda, mps or cpu; the network runs in float64, in which consumer "
                "GPUs are 32 to 64 times slower than in float32")
        if name in ("encode", "decode"):
            add("output", metavar="OUT")
        if name in ("encode", "bench"):
            add("--calls", type=int, help="network calls for a block (default: an eighth of the "
                f"variables of a text, {CALLS['image']} for images, {CALLS['audio']} for audio)")
            add("--order", help="forward, backward, random:SEED, spaced:G or halves (default: the "
                "best measured for each kind)")
            add("--block", type=int, help="datapoints that are decoded together (default: as many "
                f"as have {BLOCK} symbols)")
        if name == "decode":
            add("--item", type=int, help="only this datapoint, counted from 0")
            add("--keep-going", action="store_true", help="leave out damaged blocks, deliver the "
                "others; exit code 1")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    datasets.run(main)
