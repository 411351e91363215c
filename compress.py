"""Files to archives and back, without loss (Sec. 5): rANS, driven by the conditionals of one order.

    python compress.py encode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py decode --ckpt out/pydoc/ckpt.pt IN OUT
    python compress.py bench --ckpt out/pydoc/ckpt.pt [FILE]    bits/char, beside bz2, lzma and zlib

The file is cut into chunks of D symbols, and `batch` chunks together are a block: one walk over
the plan, one rANS stream. The encoder makes the decoder's very calls, in the same batches: the
last block is filled up with absent variables. An archive, all numbers big-endian:

    offset      bytes   what
    0           4       "ARDM"
    4           1       format version, 1
    5           2       h, length of the header
    7           h       header: JSON, see `make_header`
    7 + h       4       CRC-32 of all before it
    then for each block
                4       p, length of the payload
                4       CRC-32 of the payload
                4       CRC-32 of the symbols that it decodes to, one byte each
                p       payload: coder.py

The network runs in float32, whose last bits depend on the machine and the library. The header
carries a fingerprint of what the network says about a fixed input: a machine on which it says
something else would decode garbage, and refuses first. Within one machine the encoder proves each
block by decoding it.
"""
import collections
import hashlib
import itertools
import json
import os
import shlex
import struct
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
from train import Parser, bound, command_line, load_data, load_model, references, replacing, spread

MAGIC, VERSION, PRECISION = b"ARDM", 1, 22
BLOCK = 1 << 15                                      # symbols in a block, about


class Codec:
    """Blocks to payloads and back: a model, an order, a plan and a batch size.

    A block has 1..batch * D symbols; what it lacks to the full number is absent. tick() is called
    once for every network call.
    """

    def __init__(self, model, order, plan, batch):
        self.model, self.plan, self.batch, self.tick = model, plan, batch, lambda: None
        self.device = next(model.parameters()).device
        self.sigma = torch.from_numpy(planner.order(order, model.D)).to(self.device)

    def encode(self, symbols):
        """(n,) symbols -> payload, and ideal length in bits: -log2 p under this order and plan."""
        pushed, bits = [], [0.0]

        def push(log_p, where, s):
            a = self.model.symbol(x, s)
            cdf, written = tables(log_p[where]), a[where]
            pushed.append(coder.intervals(cdf, written.cpu().numpy()))
            nats = -log_p[where].gather(1, written[:, None]).cpu().double().sum().item()
            bits[0] += bits_per_dim(nats, 1)
            return a

        x = self._blank()
        x.view(-1)[:len(symbols)] = symbols.to(x)
        self._walk(x, len(symbols), push)
        return coder.encode(*map(np.concatenate, zip(*pushed)), PRECISION), bits[0]

    def decode(self, payload, n):
        """Payload -> (n,) uint8 symbols, and whether the stream came to a clean end."""
        decoder = coder.Decoder(payload, PRECISION)

        def pop(log_p, where, s):
            a = self._blank()
            a[where] = torch.from_numpy(decoder.pop(tables(log_p[where]))).to(a)
            return a

        x = self._walk(self._blank(), n, pop)
        return x.view(-1)[:n].to("cpu", torch.uint8), decoder.done

    def fingerprint(self):
        """CRC-32 of the integer tables for a fixed input of the very shape that coding uses."""
        B, D = self.batch, self.model.D
        x = torch.arange(B * D, device=self.device).view(B, D) % self.model.K
        half = torch.full((B,), D // 2 + 1, device=self.device)
        with torch.no_grad():
            log_p = self.model.log_probs(x, self.sigma.expand(B, D) < half[0], half,
                                         torch.ones_like(half))
        return zlib.crc32(tables(log_p.flatten(0, 1)).tobytes())

    def _blank(self):
        return torch.zeros(self.batch, self.model.D, dtype=torch.long, device=self.device)

    def _walk(self, x, n, choose):
        """One walk over the plan, as far as a block of n symbols needs it."""
        def counted(*call):
            self.tick()
            return choose(*call)

        absent = torch.arange(x.numel(), device=self.device).view(x.shape) >= n
        sigma = rerank(self.sigma.expand(x.shape), absent=absent)
        plan = [(s, t, k) for s, t, k in self.plan if t <= n]
        return self.model.walk(self.model.coarse(x, 0), plan, sigma, counted)


def tables(log_p):
    """(n, A) log-probabilities -> (n, A + 1) integer tables."""
    return coder.quantize(torch.softmax(log_p.cpu().double(), dim=-1).numpy(), PRECISION)


# -- The archive -----------------------------------------------------------------------------------

def make_header(model, codec, kind, length, order):
    """All that decoding needs beside the checkpoint; the plan as runs [s, k, how many]."""
    runs = [[*key, len(list(run))]
            for key, run in itertools.groupby((s, k) for s, _, k in codec.plan)]
    return dict(kind=kind, length=length, D=model.D, K=model.K, order=order, plan=runs,
                batch=codec.batch, weights=digest(model), probe=codec.fingerprint(),
                device=codec.device.type, threads=torch.get_num_threads(),
                torch=torch.__version__)


def digest(model):
    """A hash of the weights, by which an archive knows its checkpoint."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def pack(header, blocks):
    """Header dict and [(crc, payload)] -> the bytes of an archive."""
    text = json.dumps(header, separators=(",", ":")).encode()
    head = MAGIC + struct.pack(">BH", VERSION, len(text)) + text
    body = b"".join(struct.pack(">III", len(payload), zlib.crc32(payload), crc) + payload
                    for crc, payload in blocks)
    return head + struct.pack(">I", zlib.crc32(head)) + body


def unpack(archive, name):
    """The bytes of an archive -> header dict and [(crc, payload)], checked as far as can be
    without the model. UserError says what is wrong."""
    if archive[:4] != MAGIC:
        raise UserError(f"{name} is no archive of compress.py")
    if archive[4:5] != bytes([VERSION]):
        raise UserError(f"{name} has format version {archive[4] if len(archive) > 4 else '?'}, "
                        f"this program reads {VERSION}")
    end = 7 + int.from_bytes(archive[5:7], "big")
    if (zlib.crc32(archive[:end]) != int.from_bytes(archive[end:end + 4], "big")
            or len(archive) < end + 4):
        raise UserError(f"{name} is damaged: the header does not match its checksum, or is cut off")
    try:
        header, blocks, at = json.loads(archive[7:end]), [], end + 4
        symbols = header["batch"] * header["D"]
        require(type(header["length"]) is type(symbols) is int and 0 <= header["length"])
        require(0 < symbols <= max(BLOCK, header["D"]))  # what `encode` would write
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{name} is damaged: its header makes no sense")
    for number in range(1, -(-header["length"] // symbols) + 1):
        size, check, crc = struct.unpack(">III", archive[at:at + 12].rjust(12, b"\xff"))
        payload = archive[at + 12:at + 12 + size]
        if len(payload) < size:
            raise UserError(f"{name} is cut off: block {number} is not there, or not whole")
        if zlib.crc32(payload) != check:
            raise UserError(f"{name} is damaged: block {number} does not match its checksum")
        blocks.append((crc, payload))
        at += 12 + size
    if at != len(archive):
        raise UserError(f"{name} is damaged: {len(archive) - at} bytes follow the last block")
    return header, blocks


def require(holds):
    """What a header must fulfil; unlike an assert it also counts under python -O."""
    if not holds:
        raise ValueError


def open_codec(header, model, name):
    """The codec that wrote this archive, or a UserError where it would decode to something else."""
    if (header.get("weights"), header["D"], header.get("K")) != (digest(model), model.D, model.K):
        raise UserError(f"{name} was written with another checkpoint")
    try:
        probe, written = header["probe"], "torch {torch}, {threads} threads, {device}"
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
        written = written.format_map(header)
        codec = Codec(model, header["order"], plan, header["batch"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} is damaged: its header makes no sense")
    if codec.fingerprint() != probe:
        raise UserError(f"{name} cannot be decoded here: this machine computes other probabilities "
                        f"than the one that wrote it ({written})")
    return codec


def encode(model, kind, stream, order, plan, verify=True):
    """bytes -> archive, and its ideal length in bits: -log2 p under this order and plan.

    verify: decode each block at once, and compare.
    """
    symbols = torch.from_numpy(datasets.to_symbols(stream, model.K))
    chunks = max(1, -(-len(symbols) // model.D))
    codec = Codec(model, order, plan, batch=-(-chunks // -(-chunks // max(1, BLOCK // model.D))))
    blocks, bits, done = [], 0.0, 0
    parts = symbols.split(codec.batch * model.D) if len(symbols) else ()
    with tqdm(desc="encoding", unit="call", total=len(parts) * len(plan) * (1 + verify)) as bar:
        codec.tick = bar.update
        for block in parts:
            payload, ideal = codec.encode(block)
            if verify and not torch.equal(codec.decode(payload, len(block))[0], block):
                raise UserError("a block does not decode to what went in: this machine does not "
                                "compute the same probabilities twice, and nothing was written")
            blocks.append((zlib.crc32(block.numpy().tobytes()), payload))
            bits, done = bits + ideal, done + len(block)
            bar.set_postfix_str(f"{bits / done:.3f} bits/char")
    return pack(make_header(model, codec, kind, len(symbols), order), blocks), bits


def decode(model, archive, name):
    """Archive -> bytes; UserError where anything does not match."""
    header, blocks = unpack(archive, name)
    codec, left, parts = open_codec(header, model, name), header["length"], []
    with tqdm(desc="decoding", unit="call", total=len(blocks) * len(codec.plan)) as bar:
        codec.tick = bar.update
        for number, (crc, payload) in enumerate(blocks, start=1):
            symbols, done = codec.decode(payload, n := min(left, codec.batch * model.D))
            if not done or zlib.crc32(symbols.numpy().tobytes()) != crc:
                raise UserError(f"{name} is damaged: block {number} of {len(blocks)} does not "
                                "decode to its checksum")
            parts.append(datasets.to_bytes(symbols, model.K))
            left -= n
    return b"".join(parts)


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
    rules = ["forward", "backward", "random:1", "random:2"] + [f"spaced:{k}" for k in widest]
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
        data = load_data(checkpoint["settings"], next(model.parameters()).device, model.K,
                         fetch=False)
    except UserError as error:
        print(f"no search for an order, {label(*pairs[0], model)} is taken: "
              f"the training data is not there ({error})")
        return pairs[0]
    x, scores = spread(data.chunks("train")[0], max(1, 2048 // model.D)).long(), []
    for rule, plan in tqdm(pairs, desc="searching an order", unit="order", leave=False):
        sigma = torch.from_numpy(planner.order(rule, model.D)).to(x.device).expand(x.shape)
        scores.append(bits_per_dim(model.nll(x, plan, sigma).mean().item(), model.D))
    table = sorted(zip(scores, range(len(pairs))))
    print("orders, bits/char of training text: " + ", ".join(
        f"{label(*pairs[i], model)} {score:.3f}" for score, i in table))
    return pairs[table[0][1]]


# -- The commands ----------------------------------------------------------------------------------

def read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")


def settle(args):
    """(model, checkpoint, order, plan) that a command line asks for."""
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
    stream = read(args.input)
    datasets.to_symbols(stream, model.K)                 # what cannot be coded is said first
    order, plan = search(model, checkpoint, pairs)
    archive, bits = encode(model, checkpoint["kind"], stream, order, plan, args.verify)
    with replacing(args.output) as file:
        file.write(archive)
    print(f"{args.input}: {len(stream):,} characters -> {len(archive):,} bytes, "
          f"{8 * len(archive) / max(1, len(stream)):.3f} bits/char; "
          f"order {label(order, plan, model)}, {len(plan)} network calls a block"
          f"{', decoded and compared' if args.verify else ''}")
    print(f"back again: python compress.py decode --ckpt {shlex.quote(args.ckpt)} "
          f"{shlex.quote(args.output)} FILE")


def run_decode(args):
    """an archive to the file it was made of"""
    archive = read(args.input)
    header, _ = unpack(archive, args.input)
    model, _ = load_model(args.ckpt, args.device or str(header.get("device")))
    stream = decode(model, archive, args.input)
    with replacing(args.output) as file:
        file.write(stream)
    print(f"{args.output}: {len(stream):,} characters, checksums match")


def compare(model, kind, stream, order, plan):
    """What one text costs by every measure: ({name: bits/char}, facts about the archive)."""
    n, device = len(stream), next(model.parameters()).device
    symbols = torch.from_numpy(datasets.to_symbols(stream, model.K)).to(device)
    test = bound(model, *datasets.cut(symbols, model.D), progress=True)
    begin = time.perf_counter()
    archive, bits = encode(model, kind, stream, order, plan, verify=False)
    encoded = time.perf_counter()
    same = decode(model, archive, "the archive") == stream
    decoded = time.perf_counter()
    payload = sum(len(part) for _, part in unpack(archive, "the archive")[1])
    rows = {"bound, mean over all orders": test["bits"],
            "exact nll of this order and plan": bits / n,
            "archive, payload": 8 * payload / n, "archive, whole file": 8 * len(archive) / n}
    facts = dict(characters=n, order=label(order, plan, model), calls=len(plan),
                 stderr=test["stderr"], payload_bytes=payload, archive_bytes=len(archive),
                 percent_over_nll=100 * (8 * payload / bits - 1), encode_seconds=encoded - begin,
                 decode_seconds=decoded - encoded, identical=same,
                 weight_bytes=4 * sum(p.numel() for p in model.parameters()))
    return rows | references(stream, model.D, model.K), facts


def run_bench(args):
    """what a file costs by every measure; without FILE, the beginning of the test split"""
    model, checkpoint, pairs = settle(args)
    if args.input:
        stream = read(args.input)
        datasets.to_symbols(stream, model.K)             # what cannot be coded is said first
    else:
        data = load_data(checkpoint["settings"], "cpu", model.K)
        stream = datasets.to_bytes(data.splits["test"][:20000], model.K)
    if len(stream) < model.D:
        raise UserError(f"{args.input} is shorter than a chunk of {model.D}")
    order, plan = search(model, checkpoint, pairs)
    rows, f = compare(model, checkpoint["kind"], stream, order, plan)
    print(f"{f['characters']:,} characters, chunks of {model.D}, "
          f"order {label(order, plan, model)}, {len(plan)} network calls a block; bits/char:")
    notes = {"bound, mean over all orders": f" (standard error {f['stderr']:.4f})",
             "archive, payload": f" ({f['payload_bytes']:,} bytes, "
                                 f"{f['percent_over_nll']:+.3f}% of the nll)",
             "archive, whole file": f" ({f['archive_bytes']:,} bytes)"}
    for name, value in rows.items():
        print(f"  {name:34} {value:.4f}{notes.get(name, '')}")
    print(f"encoded in {f['encode_seconds']:.1f} s, decoded in {f['decode_seconds']:.1f} s, "
          f"{'identical' if f['identical'] else 'DIFFERENT'}; the weights, "
          f"{f['weight_bytes']:,} bytes, are in none of these numbers")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="encode | decode | bench")
    for name, run in (("encode", run_encode), ("decode", run_decode), ("bench", run_bench)):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
        command.add_argument("--device", help="cuda, mps or cpu")
        command.add_argument("input", nargs="?" if name == "bench" else None,
                             help="the file to read")
        if name != "bench":
            command.add_argument("output", help="the file to write")
        if name != "decode":
            command.add_argument("--calls", type=int,
                                 help="network calls a block (default: one for each step)")
            command.add_argument("--order", default="auto",
                                 help="forward, backward, random:SEED, spaced:G, or auto: "
                                      "the best of several on training text")
        if name == "encode":
            command.add_argument("--no-verify", dest="verify", action="store_false",
                                 help="skip the decoding that proves it")
    args = parser.parse_args()
    if args.command != "bench" and Path(args.output).exists():
        if Path(args.output).is_dir():
            raise UserError(f"{args.output} is a folder, not a file to write")
        if Path(args.input).exists() and os.path.samefile(args.input, args.output):
            raise UserError("IN and OUT are the same file")
    args.run(args)


if __name__ == "__main__":
    command_line(main)
