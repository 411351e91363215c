"""Which variables in which network call: plans for a budget of calls, orders (Sec. 3.1, App. A.2).

Each of the k variables that one call at step t writes together costs L_t (Eq. 3), where one by
one they would cost L_t + ... + L_{t+k-1}. The cheapest way to D variables in n calls is the
cheapest path with n edges from 0 to D, where the edge i -> j (i variables known before the call,
j after it) costs

    (j - i) L_{i+1}           E_k[j] = min over i < j of  E_{k-1}[i] + (j - i) L_{i+1}

The plain dynamic programme takes O(D^2) for each added call. Two facts, both true because L does
not increase (Eq. 4), make it fast and let stages share one budget:

- The best i grows with j: the edge to j + 1 costs L_{i+1} more than that to j, for a later i no
  more than for an earlier one. So the best i of the middle j bounds those on either side of it, and
  one more call takes O(D log D), in a few whole-array operations.
- The cheapest cost is convex in the number of calls. So calls may be handed out one at a time, each
  to the stage where it saves most, and the split is still exact.

Measured L_t are noisy and rise here and there; a plan would pick out the lucky ones. So `plan` and
`costs` work on `smooth(L)`.

L is (S, D), or (D,) for one stage, in any unit; L[s-1, t-1] is the component of step t in stage s.
A plan is a list of (s, t, k), in the order of the calls: see ardm.py. This file needs NumPy alone.
"""
import hashlib
import heapq

import numpy as np


def smooth(L):
    """The non-increasing fit to L that is nearest in squares, per stage: isotonic regression.

    Pool adjacent violators: a step that lies above its predecessor is merged with it, and both take
    their mean. Same shape as L; an L that never rises is returned unchanged.
    """
    L = np.asarray(L, dtype=np.float64)
    if L.ndim not in (1, 2) or L.size == 0 or not np.isfinite(L).all():
        raise ValueError(f"L must be finite numbers of shape (S, D) or (D,), not shape {L.shape}")
    if L.ndim == 2:
        return np.stack([smooth(row) for row in L])
    sums, counts = [], []                                    # pools; their means decrease
    for value in L.tolist():
        total, count = value, 1
        while sums and sums[-1] * count < total * counts[-1]:
            total, count = total + sums.pop(), count + counts.pop()
        sums.append(total), counts.append(count)
    return np.repeat(np.array(sums) / counts, counts)


def plan(L, budget, first=1, last=None):
    """The cheapest plan with exactly `budget` network calls in all: [(s, t, k), ...].

    S..S*D calls; they are split over the stages as pays best. ValueError for any other budget.
    first, last: the steps that are to be planned, where some variables are known or absent.
    """
    L = np.atleast_2d(smooth(L))[:, first - 1:last]
    S, D = L.shape
    _check_budget(budget, S, D)
    starts = [[] for _ in range(S)]                          # (D+1,) for each call of each stage
    for _, (s, _, start) in zip(range(budget), _hand_out(L)):
        starts[s].append(start)
    calls = []
    for s in reversed(range(S)):                             # walk the best path back from D to 0
        j = D
        for start in reversed(starts[s]):
            i = int(start[j])
            calls.append((s + 1, first + i, j - i))
            j = i
    return calls[::-1]


def costs(L, budgets=None):
    """{budget: cost of the best plan}, for the budgets given or for all from S to S*D."""
    L = np.atleast_2d(smooth(L))
    S, D = L.shape
    budgets = range(S, S * D + 1) if budgets is None else list(budgets)
    for budget in budgets:
        _check_budget(budget, S, D)
    curve = {n: cost for n, (_, cost, _) in zip(range(1, max(budgets) + 1), _hand_out(L))}
    return {budget: curve[budget] for budget in budgets}


def plan_cost(L, plan):
    """What a plan costs: the sum of k * L[s-1, t-1] over its calls, in the unit of L."""
    L = np.atleast_2d(L)
    return float(sum(k * L[s - 1, t - 1] for s, t, k in plan))


def full_plan(S, D):
    """One variable a call: S * D calls."""
    return [(s, t, 1) for s in range(1, S + 1) for t in range(1, D + 1)]


def uniform_plan(S, D, budget):
    """As even as integers allow: the calls over the stages, the variables over the calls."""
    return _by_curve(S, D, budget, lambda u: u)


def cosine_plan(S, D, budget):
    """Few variables in the first calls, many in the last: 1 - cos(pi u / 2) known after part u."""
    return _by_curve(S, D, budget, lambda u: 1 - np.cos(np.pi / 2 * u))


def order(rule, shape):
    """An order by its name: sigma (D,) int64, the step that writes each position.

    shape: D or (D,) of text, (C, H, W) of an image, whose D = C * H * W positions lie colour by
    colour.

    forward, backward   text from its ends; an image pixel by pixel, row by row, all colours at once
    random:SEED         a permutation that depends on SEED and D alone, on any machine
    spaced:G            G readers that march forward together, D/G apart: where G divides D, calls
                        of G variables keep them as far apart as can be
    coarse              every second position (and row) of every second of ... first, then those
                        halfway between them, one colour after the other

    ValueError for any other name.
    """
    name, _, number = rule.partition(":")
    C, *sides = (1, *np.ravel(shape)) if np.size(shape) == 1 else shape
    positions = np.arange(C * int(np.prod(sides)))
    turn = positions.reshape(C, -1).T.reshape(-1)            # the colours of a pixel together
    if rule == "backward":
        turn = turn[::-1]
    elif name == "random" and number.isdecimal():
        turn = sorted(positions, key=lambda i: hashlib.sha256(f"{number}:{i}".encode()).digest())
    elif name == "spaced" and number.isdecimal() and int(number) > 0:
        stride = -(-len(turn) // int(number))
        turn = turn[np.argsort(np.arange(len(turn)) % stride, kind="stable")]
    elif rule == "coarse":
        turn = np.argsort(np.tile(-_coarseness(sides), C), kind="stable")
    elif rule != "forward":
        raise ValueError(f"order {rule!r}: choose forward, backward, random:SEED, spaced:G or "
                         "coarse")
    sigma = np.empty(len(positions), dtype=np.int64)
    sigma[turn] = np.arange(1, len(positions) + 1)
    return sigma


def _coarseness(sides):
    """How early each position comes in the coarse order, flat: how often 2 divides its index; of
    two dimensions the smaller power counts, and the middle of four neighbours comes first."""
    i = np.indices(sides)
    i[i == 0] = 1 << 30
    powers = np.log2(i & -i).astype(int)                     # (1 or 2, *sides)
    middle = (powers.min(axis=0) == powers.max(axis=0)) & (len(sides) > 1)
    return (2 * powers.min(axis=0) + middle).reshape(-1)


def _check_budget(budget, S, D):
    if not S <= budget <= S * D:
        raise ValueError(f"{budget} network calls: choose {S} to {S * D}")


def _by_curve(S, D, budget, curve):
    """A plan from a curve u -> part known, u the part of a stage's calls that is done."""
    _check_budget(budget, S, D)
    calls = []
    for s in range(S):
        n = budget // S + (s < budget % S)
        done = [0]
        for i in range(1, n + 1):                            # at least one variable for every call
            done.append(min(max(round(D * float(curve(i / n))), done[-1] + 1), D - n + i))
        calls += [(s + 1, i + 1, j - i) for i, j in zip(done, done[1:])]
    return calls


def _hand_out(L):
    """Yields (stage index, total cost, starts) for every call handed out, the most useful first.

    The first S calls go to one stage each. starts is (D+1,): see `_one_more_call`.
    """
    stages = [_best_paths(row) for row in L]
    now, offers = [], []
    for s, stage in enumerate(stages):
        cost, start = next(stage)
        now.append(cost)
        yield s, float(sum(now)), start

    def offer(s):
        cost, start = next(stages[s], (None, None))
        if cost is not None:
            heapq.heappush(offers, (cost - now[s], s, cost, start))

    for s in range(len(stages)):
        offer(s)
    while offers:
        _, s, now[s], start = heapq.heappop(offers)
        yield s, float(sum(now)), start
        offer(s)


def _best_paths(L):
    """Yields (E_k[D], starts of the k-th call) for k = 1..D, one stage."""
    E = np.full(len(L) + 1, np.inf)
    E[0] = 0.0
    for k in range(1, len(L) + 1):
        E, start = _one_more_call(E, L, k)
        yield float(E[-1]), start


def _one_more_call(E, L, k):
    """E_{k-1} -> (E_k, start), both (D+1,): start[j] is the best i for the k-th call to end at j.

    Solves every h-th j before those halfway between them: the best i of j lies between those of
    j - h and j + h, so all candidates of one level are about D numbers, laid out in one array.
    """
    D = len(L)
    line = E[:-1] - np.arange(D) * L                       # E[i] + (j - i) L[i] = line[i] + j L[i]
    n = D - k + 1                                          # ends j = k..D, row q = j - k + 1 = 1..n
    h = 1 << n.bit_length() - 1
    start = np.full(n + h + 1, D - 1)                      # what bounds a row with none above it,
    start[0] = k - 1                                       # and a row with none below it
    cost = np.empty(n + 1)
    while h:
        q = np.arange(h, n + 1, 2 * h)
        j = q + k - 1
        low = start[q - h]
        width = np.minimum(start[q + h], j - 1) - low + 1  # candidates i = low..low + width - 1
        ends = np.cumsum(width)
        first = ends - width
        i = np.arange(ends[-1]) + np.repeat(low - first, width)
        value = line[i] + np.repeat(j, width) * L[i]
        cost[q] = np.minimum.reduceat(value, first)
        hits = np.flatnonzero(value == np.repeat(cost[q], width))
        start[q] = i[hits[np.searchsorted(hits, first)]]   # the first best candidate of each row
        h >>= 1
    unreachable = np.zeros(k, dtype=np.int32)              # fewer than k variables in k calls
    return (np.concatenate((np.full(k, np.inf), cost[1:])),
            np.concatenate((unreachable, start[1:n + 1].astype(np.int32))))
