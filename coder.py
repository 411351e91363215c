"""rANS: integers to bytes and back, at the length that the model's probabilities promise (Sec. 5).

A message is one integer, the state x. A symbol with frequency f out of 2^P owns the interval
[start, start + f) of every 2^P numbers:

        0          start       start + f                    2^P
        |------------|#############|--------------------------|        cdf, a row of `quantize`
        :  cdf[sym] _|  cdf[sym+1]_|                          :

    push:  x  ->  (x // f) * 2^P + start + x % f         x grows by log2(2^P / f) bits
    pop:   slot = x % 2^P lies in the symbol's interval: that tells the symbol, and
           x  ->  f * (x // 2^P) + slot - start          undoes the push exactly

What is pushed last is popped first. The encoder therefore starts with the last symbol, and the
decoder reads forward: callers give everything in reading order and never see this.

The state is kept below 2^64. A push that would pass that moves the low 32 bits out to a list of
words first; a pop that leaves x < 2^32 takes a word back. Both sides decide by x alone:

    push:  x >= f * 2^(64-P)  <=>  the push would give x >= 2^64          (before the push)
    pop:   x <  2^32          <=>  the push had moved a word out          (after the pop)

The state starts at 0, which nothing needs to tell, and is written in as few bytes as hold it: a
message costs less than 4 bytes more than its symbols, and no symbols cost none. A right decode ends
at state 0 with no word left. Or the state starts at a number below 2^32, a checksum say, and a
right decode ends at that: the message then costs the 4 bytes of the number, and rounding, and
nothing else. A message is the state (big-endian), then the words in the order of reading; the state
has over 4 bytes where there are words, so the length alone tells them apart.

Frequencies are integers: both sides compute them by `quantize`, from the same probabilities to
the last bit, or by `quantize_levels`, from the same integers, or decoding goes wrong without a
sign. This file needs NumPy alone.
"""
from bisect import bisect_right
from functools import cache
from itertools import chain

import numpy as np

WORD = (1 << 32) - 1
GRID = 1 << 10                       # levels in a nat
LANES = 40                           # streams from which on NumPy is faster than one by one
DEEPEST = 16 * GRID                  # level from which on a probability counts as 0: e^-16 < 2^-23


def quantize(probs, precision=22):
    """Probabilities (N, A) float64 -> cdf (N, A + 1) int32, strictly rising from 0 to 2^precision.

    f = floor(p * (1 - 1e-6) * (2^P - A)) + 1, so that every symbol can be coded; the last one
    takes what is left, and 1e-6 is room for a row whose sum is above 1 by rounding. A row gives
    the same integers whatever rows are beside it. At P = 22 this costs below 1e-4 bits a symbol
    for A = 256. ValueError for values that are no probabilities and for rows whose sum is further
    than 1e-6 from 1.
    """
    probs = np.asarray(probs, dtype=np.float64)
    if not 1 <= precision <= 30 or probs.ndim != 2 or not 1 <= probs.shape[1] < 1 << precision:
        raise ValueError(f"probs of shape {probs.shape}: expected (N, A) with "
                         f"1 <= A < 2^{precision} <= 2^30")
    N, A = probs.shape
    if probs.min(initial=0) < 0 or not (np.abs(np.einsum("na->n", probs) - 1) <= 1e-6).all():
        raise ValueError("probabilities must be finite, not negative, and sum to 1 in each row")
    cdf = np.empty((N, A + 1), dtype=np.int32)
    scale = (1 - 1e-6) * ((1 << precision) - A)
    rows = max(1, (1 << 17) // A)                        # at a time: what fits in the cache
    for i in range(0, N, rows):
        freqs = (probs[i:i + rows] * scale).astype(np.int32)     # floor: none is below 0
        freqs += 1
        np.add.accumulate(freqs, axis=1, out=cdf[i:i + rows, 1:])
    assert (cdf[:, A] <= 1 << precision).all(), "frequencies sum to more than 2^P"
    cdf[:, 0], cdf[:, A] = 0, 1 << precision
    return cdf


@cache
def exponentials():
    """(DEEPEST + 1,) int64: 2^40 e^(-level / GRID), rounded down, by integer arithmetic alone, so
    that it is the same table on every machine."""
    unit, term, n = 0, 1 << 128, 0                       # e^(-1/GRID) as a series, times 2^128
    while term:
        unit += -term if n % 2 else term
        n += 1
        term //= GRID * n
    table, x = [], 1 << 128
    for _ in range(DEEPEST + 1):
        table.append(x >> 88)
        x = x * unit >> 128
    table[-1] = 0
    return np.array(table, dtype=np.int64)


def quantize_levels(levels, precision=22):
    """Whole levels (N, A), p = e^(-level / GRID) up to a factor -> cdf (N, A + 1) as `quantize`.

    Integers from end to end: f = floor(w (2^P - A) / sum of w) + 1 with w from `exponentials`, and
    the last symbol takes what is left. ValueError for a level below 0, or a row of nothing.
    """
    levels = np.asarray(levels)
    assert precision <= 22, "2^40 times more does not fit in 63 bits"
    if levels.min(initial=0) < 0:
        raise ValueError("a level is below 0")
    N, A = levels.shape
    w = exponentials()[np.minimum(levels, DEEPEST)]
    total = w.sum(axis=1, keepdims=True)
    if not total.all():
        raise ValueError("all symbols of a row have probability 0")
    cdf = np.zeros((N, A + 1), dtype=np.int32)
    np.cumsum(w * ((1 << precision) - A) // total + 1, axis=1, out=cdf[:, 1:])
    cdf[:, A] = 1 << precision
    return cdf


def intervals(cdf, symbols):
    """cdf (N, A + 1), or one row for all, symbols (N,) -> starts, freqs, (N,) each: what the
    encoder needs of them."""
    symbols, width = np.asarray(symbols), cdf.shape[1]
    assert not symbols.size or 0 <= symbols.min() <= symbols.max() < width - 1, "not a symbol"
    at = np.arange(len(cdf)) * width + symbols
    starts = cdf.take(at)                                # of the flat table: faster than [row, sym]
    return starts, cdf.take(at + 1) - starts


def last_first(numbers):
    """The numbers of an array as Python ints, the last one first: piece by piece, so that they are
    in the cache when they are used."""
    pieces = np.split(numbers[::-1], range(4096, len(numbers), 4096))
    return chain.from_iterable(piece.tolist() for piece in pieces)


def encode(starts, freqs, precision=22, state=0):
    """One stream: (N,) starts and freqs in reading order -> bytes. state: what the decoder is to
    end at, below 2^32.

    ValueError for an empty interval.
    """
    starts, freqs = _check_intervals(starts, freqs, precision)
    room, total = 64 - precision, 1 << precision
    x, words = state, []
    for start, f in zip(last_first(starts), last_first(freqs)):
        if x >> room >= f:
            words.append(x & WORD)
            x >>= 32
        x += x // f * (total - f) + start                # = (x // f) * 2^P + start + x % f
    return _message(x, words[::-1])


class Decoder:
    """Reads one stream.

    Any bytes decode to something: `end` or a checksum tells whether it is right.
    """

    def __init__(self, data, precision=22):
        self.x, words = _parse(data)
        self.words = words[::-1].tolist()                # popped from the end
        self.precision = precision

    def pop(self, cdf):
        """cdf (n, A + 1) from `quantize` -> (n,) int64, the next n symbols, one per row."""
        x, words, P = self.x, self.words, self.precision
        symbols, width, mask = [], cdf.shape[1], (1 << P) - 1
        rows = max(1, (1 << 16) // width)                # at a time: a copy that is in the cache
        for part in np.split(cdf, range(rows, len(cdf), rows)):
            table = memoryview(part.ravel().astype(np.int32))
            for row in range(0, len(table), width):
                slot = x & mask
                i = bisect_right(table, slot, row, row + width) - 1      # cdf[sym] <= slot
                start = table[i]
                x = (table[i + 1] - start) * (x >> P) + slot - start
                if x <= WORD and words:
                    x = x << 32 | words.pop()
                symbols.append(i - row)
        assert 0 <= x < 1 << 64, "the state left its interval"
        self.x = x
        return np.array(symbols, dtype=np.int64)

    @property
    def end(self):
        """The state, where everything was read: where the encoder started, if all went right."""
        return None if self.words else self.x

    @property
    def done(self):
        """True at a clean end of a stream whose encoder started at 0."""
        return self.end == 0


def encode_streams(starts, freqs, precision=22, states=None):
    """M streams at once: (T, M) starts and freqs, in reading order down each column -> M bytes.
    states: M numbers that the decoders are to end at, below 2^32; None: 0."""
    T, M = starts.shape
    states = [0] * M if states is None else states
    if M < LANES:
        return [encode(*stream, precision, state)
                for *stream, state in zip(starts.T, freqs.T, states)]
    starts, freqs = (a.astype(np.uint64) for a in _check_intervals(starts, freqs, precision))
    rest, room = np.uint64(1 << precision) - freqs, np.uint64(64 - precision)
    x = np.array(states, dtype=np.uint64)
    words = np.empty((T, M), dtype=np.uint32)
    moved = np.empty((T, M), dtype=bool)
    for step in reversed(range(T)):
        f = freqs[step]
        words[step] = x                                  # the low 32 bits
        moved[step] = full = x >> room >= f
        x = np.where(full, x >> np.uint64(32), x)
        x += x // f * rest[step] + starts[step]
    lanes = np.split(words.T[moved.T], np.cumsum(moved.sum(axis=0))[:-1])
    return [_message(state, lane) for state, lane in zip(x.tolist(), lanes)]


def decoders(streams, precision=22):
    """What reads these M streams: `DecoderStreams`, or for few of them `FewDecoders`."""
    return (DecoderStreams if len(streams) >= LANES else FewDecoders)(streams, precision)


class FewDecoders:
    """`DecoderStreams` of few streams, each read by itself."""

    def __init__(self, streams, precision=22):
        self.each = [Decoder(stream, precision) for stream in streams]

    def pop(self, cdf):
        """cdf (T, M, A + 1) -> (T, M) int64, the next T symbols of each stream."""
        return np.stack([one.pop(cdf[:, i]) for i, one in enumerate(self.each)], axis=1)

    @property
    def ends(self):
        """The `end` of each stream: M numbers or None."""
        return [one.end for one in self.each]


class DecoderStreams:
    """Reads M streams from a list of M bytes, in NumPy lanes."""

    def __init__(self, streams, precision=22):
        states, words = zip(*map(_parse, streams)) if streams else ((), ())
        self.x = np.array(states, dtype=np.uint64)
        self.words = np.concatenate(words + (np.zeros(1, np.uint32),)).astype(np.uint64)
        self.stop = np.cumsum([len(w) for w in words], dtype=np.int64)
        self.next = self.stop - [len(w) for w in words]
        self.precision = precision

    def pop(self, cdf):
        """cdf (T, M, A + 1) -> (T, M) int64, the next T symbols of each stream."""
        P, mask = np.uint64(self.precision), np.uint64((1 << self.precision) - 1)
        x, lanes = self.x, np.arange(len(self.x))
        symbols = np.empty(cdf.shape[:2], dtype=np.int64)
        for step, table in enumerate(cdf):
            slot = x & mask
            symbols[step] = sym = (table[:, 1:] > slot.astype(np.int32)[:, None]).argmax(axis=1)
            start = table[lanes, sym]
            f = (table[lanes, sym + 1] - start).astype(np.uint64)
            x = f * (x >> P) + slot - start.astype(np.uint64)
            refill = (x <= np.uint64(WORD)) & (self.next < self.stop)
            x = np.where(refill, x << np.uint64(32) | self.words[np.where(refill, self.next, 0)], x)
            self.next += refill
        self.x = x
        return symbols

    @property
    def ends(self):
        """The `end` of each stream: M numbers or None."""
        return [x if read else None for x, read in zip(self.x.tolist(), self.next == self.stop)]

    @property
    def done(self):
        """True when every stream is at a clean end, and its encoder started at 0."""
        return self.ends == [0] * len(self.x)


def _check_intervals(starts, freqs, precision):
    """Both as int64 arrays, after a look at what would make a stream that cannot be read."""
    starts, freqs = np.asarray(starts, dtype=np.int64), np.asarray(freqs, dtype=np.int64)
    if starts.shape != freqs.shape:
        raise ValueError(f"{starts.shape} starts and {freqs.shape} freqs")
    if starts.size and (freqs.min() < 1 or starts.min() < 0
                        or (starts + freqs).max() > 1 << precision):
        raise ValueError(f"an interval is empty or lies outside 0..2^{precision}")
    return starts, freqs


def _message(x, words):
    """Final state and the words in reading order -> bytes."""
    assert 0 <= x < 1 << 64 and (x > WORD or len(words) == 0), "the state left its interval"
    return x.to_bytes((x.bit_length() + 7) // 8, "big") + np.array(words, dtype=">u4").tobytes()


def _parse(data):
    """bytes -> (state, words in reading order): inverse of `_message`."""
    head = len(data) if len(data) <= 8 else 5 + (len(data) - 5) % 4
    return int.from_bytes(data[:head], "big"), np.frombuffer(data[head:], dtype=">u4")
