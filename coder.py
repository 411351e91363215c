"""rANS: integers to bytes and back, as short as the model's probabilities promise (Sec. 5).

The coder keeps one integer, the state x. A symbol with frequency f out of 2^P owns the interval
[start, start + f) of every 2^P numbers:

        0          start       start + f                    2^P
        |------------|#############|--------------------------|        cdf, a row of `quantize`
        :    cdf[a] _|   cdf[a+1] _|                          :

    push:  x  ->  (x // f) * 2^P + start + x % f         x grows by log2(2^P / f) bits
    pop:   slot = x % 2^P                                its interval tells the symbol
           x  ->  f * (x // 2^P) + slot - start          undoes the push exactly

The symbol that is pushed last is popped first. So the encoder begins with the last symbol, and the
decoder reads forward. Callers give everything in reading order.

The state stays below 2^64. If a push would give more, the low 32 bits of x first move to a list
of words. If a pop leaves x < 2^32, a word comes back. Both sides decide by x alone, so they agree:

    push:  x >= f * 2^(64-P)  <=>  the push would give x >= 2^64          (before the push)
    pop:   x <  2^32          <=>  the push had moved a word out          (while words are left)

The encoder's first state is 0 or a checksum, below 2^32. The decoder must end at the same number.
A stream is the state (big-endian, as short as it can be), then the words in reading order. If
there are words, the state has 5 bytes or more, so the length shows where the words begin.

Both sides need the same integers, but networks differ in their last bits from machine to machine.
So log-probabilities (float64) are rounded to a grid of 1/64 nat, and integer arithmetic follows.
Values that differ by less than MARGIN round alike, unless a boundary lies between them. So the
encoder moves the grid until no value is near a boundary (`safe`). This file needs NumPy alone.
"""
from bisect import bisect_right
from decimal import Decimal

import numpy as np

P = 22                               # 2^P is the total of the frequencies
WORD = (1 << 32) - 1
GRID = 64                            # levels in a nat; 1/64 nat costs less than 0.005% of the bits
DEEPEST = 16 * GRID                  # from this level on the weight is 0: e^-16 < 2^-22
MARGIN = 1e-10                       # nats; networks in float64 differ by less than 1e-12
WEIGHTS = np.array([int((Decimal(-k) / GRID).exp() * 2 ** 40) for k in range(DEEPEST)] + [0])


def grid_position(log_p, shift):
    """Where log_p (nats) lies on the grid moved by shift/256 of a step; its floor is the level."""
    return np.minimum(-log_p * GRID + shift / 256, DEEPEST) + 0.5


def safe(log_p, shift=0):
    """True if no value lies within MARGIN of a boundary of the shifted grid."""
    position = grid_position(log_p, shift)
    return not (np.abs(position - np.rint(position)) <= MARGIN * GRID).any()


def quantize(log_p, shift=0):
    """log_p (N, A) float64 nats -> cdf (N, A + 1) int64, strictly increasing from 0 to 2^P.

    The frequency is f = floor(w (2^P - A) / sum of w) + 1 with w = WEIGHTS[level]. It is never 0,
    so every symbol can be coded. The last symbol gets the numbers that are left.
    ValueError for another type or shape, or if the p of a row do not sum to 1 within 1e-6."""
    if log_p.dtype != np.float64 or log_p.ndim != 2:
        raise ValueError(f"log_p must be (N, A) float64, not {log_p.shape} {log_p.dtype}")
    N, A = log_p.shape
    if not (np.abs(np.exp(log_p).sum(axis=1) - 1) < 1e-6).all():
        raise ValueError("log_p are not log-probabilities: are the network's weights damaged?")
    w = WEIGHTS[np.floor(grid_position(log_p, shift)).astype(np.int64)]
    f = w * (2 ** P - A) // w.sum(axis=1, keepdims=True) + 1
    cdf = np.zeros((N, A + 1), dtype=np.int64)
    np.cumsum(f, axis=1, out=cdf[:, 1:])
    cdf[:, A] = 2 ** P
    return cdf


def intervals(cdf, symbols):
    """The starts and frequencies, (N,) each, of symbols (N,) by their rows of cdf (N, A + 1)."""
    row = np.arange(len(symbols))
    return cdf[row, symbols], cdf[row, symbols + 1] - cdf[row, symbols]


def encode(starts, freqs, state=0):
    """Intervals (N,) in reading order -> bytes. state: what the decoder is to end at, < 2^32.

    Example with 2^P = 4 and frequencies (1, 3), so that cdf = (0, 1, 4): pushing symbol 1 onto
    x = 5 gives (5 // 3) * 4 + 1 + 5 % 3 = 7.
    ValueError for an interval that is empty or leaves 0..2^P."""
    starts = np.asarray(starts, dtype=np.int64)
    freqs = np.asarray(freqs, dtype=np.int64)
    if starts.size and (freqs.min() < 1 or starts.min() < 0 or (starts + freqs).max() > 2 ** P):
        raise ValueError(f"an interval is empty or lies outside 0..2^{P}")
    x, words = state, []
    for start, f in zip(starts[::-1].tolist(), freqs[::-1].tolist()):
        if x >= f << 64 - P:
            words.append(x & WORD)
            x >>= 32
        x = (x // f << P) + start + x % f                  # push
    head = x.to_bytes((x.bit_length() + 7) // 8, "big")
    return head + np.array(words[::-1], dtype=">u4").tobytes()


class Decoder:
    """Reads one stream. Any bytes decode to something: `end` tells whether it is right."""

    def __init__(self, data):
        head = len(data) if len(data) <= 8 else 5 + (len(data) - 5) % 4
        self.x = int.from_bytes(data[:head], "big")
        self.words = np.frombuffer(data[head:], dtype=">u4")[::-1].tolist()

    def pop(self, cdf):
        """cdf (n, A + 1) from `quantize` -> (n,) int64: the next n symbols, one per row.

        Example, the one of `encode`: x = 7. The slot 7 % 4 = 3 lies in [1, 4), the interval of
        symbol 1. Then x = 3 * (7 // 4) + 3 - 1 = 5, as before the push."""
        x, symbols, width = self.x, [], cdf.shape[1]
        table = memoryview(np.ascontiguousarray(cdf).reshape(-1))
        for row in range(0, len(table), width):
            slot = x & (1 << P) - 1
            i = bisect_right(table, slot, row, row + width) - 1          # cdf[a] <= slot
            start, f = table[i], table[i + 1] - table[i]
            x = f * (x >> P) + slot - start                # pop
            if x <= WORD and self.words:
                x = x << 32 | self.words.pop()
            symbols.append(i - row)
        self.x = x
        return np.array(symbols, dtype=np.int64)

    @property
    def end(self):
        """None while words are left, then the state: it must be the one the encoder began with."""
        return None if self.words else self.x
