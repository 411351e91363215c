"""Plans: which variables in which network call, for a budget of calls. And orders by name.

If one call at step t generates k variables together, each of them costs L_t (Eq. 3). So a call that
leads from i known variables to j costs (j - i) L_{i+1}. E_n[j] is the least cost of n calls that
lead from 0 to j. The best plan of n calls is the path behind E_n[D] (Sec. 3.1, App. A.2):

    E_n[j] = min over i < j of  E_{n-1}[i] + (j - i) L_{i+1}

L is (S, D), or (D,) for one stage, in any unit. L[s-1, t-1] belongs to step t of stage s. This file
needs NumPy alone.
"""
import hashlib
import itertools

import numpy as np


# -- Loss components ------------------------------------------------------------------------------

def smooth(L, counts=None):
    """A non-increasing L, stage by stage: a local fit, then isotonic regression (Eq. 4).

    Measured L_t are noisy, and a plan would pick out those that are low by luck. counts: how often
    each step was measured. Where that is 0 or L is NaN, L is filled in from the steps around."""
    L = np.asarray(L, dtype=np.float64)
    counts = np.ones_like(L) if counts is None else np.asarray(counts, dtype=np.float64)
    if L.ndim not in (1, 2) or L.size == 0 or counts.shape != L.shape:
        raise ValueError(f"L and counts must be (S, D) or (D,), not {L.shape} and {counts.shape}")
    if L.ndim == 2:
        return np.stack([smooth(*row) for row in zip(L, counts)])
    met = np.flatnonzero((counts > 0) & ~np.isnan(L))
    if len(met) == 0 or not np.isfinite(L[met]).all():
        raise ValueError("L must be finite, and known at one step or more")
    weights = np.full(len(L), 1e-9)                        # what is filled in weighs nothing
    weights[met] = counts[met]
    L = np.interp(np.arange(len(L)), met, L[met])
    return isotonic(local_fit(L, weights), weights)


def local_fit(L, weights):
    """A straight line around every step t: Gaussian weights of standard deviation t/8, times the
    given ones. L is steep for small t, and noisy for large t. (D,) -> (D,). The fit is a smooth
    curve, so we compute it at a few centres, and interpolate between them."""
    D = len(L)
    centres = [0]
    while centres[-1] < D - 1:
        centres.append(min(centres[-1] + 1 + centres[-1] // 128, D - 1))
    fit = [line_at(i, L, weights) for i in centres]
    return np.interp(np.arange(D), centres, fit)


def line_at(i, L, weights):
    """The height at step t = i + 1 of the line that fits L around it."""
    near = np.arange(i // 2, min(i + i // 2 + 2, len(L)))  # four standard deviations on each side
    distance = near - i
    w = weights[near] * np.exp(-0.5 * (8 * distance / (i + 1)) ** 2)
    w /= w.sum()
    centre, mean = w @ distance, w @ L[near]
    slope = w @ ((distance - centre) * (L[near] - mean)) / max(w @ (distance - centre) ** 2, 1e-9)
    return mean - slope * centre


def isotonic(L, weights):
    """The non-increasing fit nearest in weighted squares. (D,) -> (D,)

    Pool adjacent violators: a step above the one before it is merged with it at their mean."""
    pools = []                                             # [mean, weight, steps], means decrease
    for mean, weight in zip(L, weights):
        steps = 1
        while pools and pools[-1][0] < mean:
            other, w, n = pools.pop()
            mean = (mean * weight + other * w) / (weight + w)
            weight += w
            steps += n
        pools.append([mean, weight, steps])
    means, _, steps = zip(*pools)
    return np.repeat(means, steps)


# -- Plans -----------------------------------------------------------------------------------------

def one_more_call(E, L):
    """App. A.2: E_{n-1} -> E_n and start, (D+1,) each. start[j] is the best i before the last call.

    Example: L = (1.0, 0.5, 0.2), E_1 = (inf, 1, 2, 3). E_2[3] is the smaller one of
    E_1[1] + 2 * 0.5 = 2.0 and E_1[2] + 1 * 0.2 = 2.2. So E_2[3] = 2.0, and start[3] = 1."""
    D = len(L)
    E_n = np.full(D + 1, np.inf)
    start = np.zeros(D + 1, dtype=int)
    for j in range(1, D + 1):
        cost = [E[i] + (j - i) * L[i] for i in range(j)]   # L[i] is L_{i+1}
        start[j] = np.argmin(cost)
        E_n[j] = cost[start[j]]
    return E_n, start


def best_path(L, n):
    """[(t, k)] of the cheapest n calls of one stage. `paths` runs the dynamic programme n times, in
    its faster form. Then we follow `start` back from D to 0."""
    starts = [start for _, start in itertools.islice(paths(L), n)]
    calls, j = [], len(L)
    for start in reversed(starts):
        i = int(start[j])
        calls.append((i + 1, j - i))
        j = i
    return calls[::-1]


def plan(L, budget):
    """The cheapest plan with exactly `budget` network calls, S..S*D, split over the stages. L must
    not increase: see `smooth`."""
    stages = [s for s, _ in hand_out(L, [budget])]
    return [(s, t, k) for s, row in enumerate(np.atleast_2d(L), start=1)
            for t, k in best_path(row, stages.count(s))]


def plan_cost(L, plan):
    """What a plan costs (Eq. 3): the sum of k * L_t over its calls, in the unit of L."""
    return float(sum(k * np.atleast_2d(L)[s - 1, t - 1] for s, t, k in plan))


def costs(L, budgets=None):
    """{budget: cost of the cheapest plan}, for the given budgets or all from S to S*D."""
    budgets = range(len(np.atleast_2d(L)), np.size(L) + 1) if budgets is None else list(budgets)
    curve = [cost for _, cost in hand_out(L, budgets)]
    return {budget: curve[budget - 1] for budget in budgets}


def full_plan(S, D):
    """One variable per call: S * D calls, as in Algorithms 1 and 3."""
    return uniform_plan(S, D, S * D)


def uniform_plan(S, D, budget):
    """Calls spread evenly over the stages, variables over the calls, as far as integers allow."""
    return by_curve(S, D, budget, lambda u: u)


def cosine_plan(S, D, budget):
    """Few variables first, as in MaskGIT: after the part u of calls, 1 - cos(pi u/2) is known."""
    return by_curve(S, D, budget, lambda u: 1 - np.cos(np.pi / 2 * u))


# -- Orders ----------------------------------------------------------------------------------------

def order(rule, shape):
    """An order by its name: sigma (D,) int64. shape: D or (D,), or (C, H, W) colour by colour.

    forward, backward   text from one end; an image row by row, the colours of a pixel together
    random:SEED         a permutation that depends on SEED and D alone, the same on every machine
    spaced:G            at most G stretches: the first variable of each, then the second of each, ..
    halves              halves every gap between known variables, again and again"""
    name, _, number = rule.partition(":")
    C, D = shape[0] if np.size(shape) == 3 else 1, int(np.prod(shape))
    turn = np.arange(D).reshape(C, -1).T.reshape(-1)       # turn[i]: the variable at step i + 1
    if name == "random" and number.isdecimal() and len(number) < 20:     # sorted by hashes
        turn = sorted(range(D), key=lambda i: hashlib.sha256(f"{number}:{i}".encode()).digest())
    elif name == "spaced" and number.isdecimal() and int(number) > 0:
        turn = turn[np.argsort(np.arange(D) % -(-D // int(number)), kind="stable")]
    elif rule == "halves":
        turn = turn[np.argsort([int(f"{i:032b}"[::-1], 2) for i in range(D)])]
    elif rule == "backward":
        turn = turn[::-1]
    elif rule != "forward":
        raise ValueError(f"order {rule!r}: choose forward, backward, random:SEED, spaced:G, halves")
    sigma = np.empty(D, dtype=np.int64)
    sigma[turn] = np.arange(1, D + 1)
    return sigma


# -- Skip on a first reading: the same, faster; the split over stages; absorbing diffusion ---------

def one_more_call_fast(E, L):
    """The same as `one_more_call`, in O(D log D). L must not increase (Eq. 4).

    Then the best i does not fall as j grows. So we solve the middle j first: its best i bounds that
    of every smaller and every larger j. Then we solve both halves in the same way. Each level of
    halving tries about D pairs (i, j), all at once."""
    D = len(L)
    h = 1 << D.bit_length() - 1                            # this level: j = h, 3h, 5h, ..
    E_n = np.full(D + 1, np.inf)
    start = np.full(D + h + 1, D - 1)                      # behind D: bounds from above
    start[0] = 0
    while h:
        j = np.arange(h, D + 1, 2 * h)
        low = start[j - h]
        width = np.minimum(start[j + h], j - 1) - low + 1  # i = low..low + width - 1
        first = np.cumsum(width) - width                   # where the pairs of each j begin
        i = np.arange(width.sum()) + np.repeat(low - first, width)
        value = E[i] + (np.repeat(j, width) - i) * L[i]    # L[i] is L_{i+1}
        E_n[j] = np.minimum.reduceat(value, first)
        best = np.flatnonzero(value == np.repeat(E_n[j], width))[::-1]
        start[np.repeat(j, width)[best]] = i[best]         # of equal ones the first is written last
        h >>= 1
    return E_n, start[:D + 1]


def paths(L):
    """Yields E_n and start of one stage for n = 1, 2, .."""
    E = np.append(0.0, np.full(len(L), np.inf))            # nothing is known without a call
    for _ in L:
        E, start = one_more_call_fast(E, L)
        yield E, start


def hand_out(L, budgets):
    """Gives calls to stages one by one, up to the largest budget. First each stage gets one call.
    Each further call goes to the stage whose cost it lowers most. The cost of a stage is convex in
    its calls, so this split is the best. Yields (stage, total cost) for each call."""
    L = np.atleast_2d(np.asarray(L, dtype=np.float64))
    if not (np.diff(L, axis=1) <= 0).all() or not np.isfinite(L).all():
        raise ValueError("L must be finite and must not increase: see planner.smooth")
    for budget in budgets:
        check_budget(budget, *L.shape)
    stages = [(E[-1] for E, _ in paths(row)) for row in L]
    now = np.full(len(L), np.inf)                          # what each stage costs with its calls
    offers = np.array([next(stage) for stage in stages])   # and with one more
    for _ in range(max(budgets)):
        s = int(np.argmin(offers - now))
        now[s] = offers[s]
        yield s + 1, float(now.sum())
        offers[s] = next(stages[s], np.inf)


def by_curve(S, D, budget, curve):
    """A plan by a curve: after a part u of a stage's calls, the part curve(u) is known."""
    check_budget(budget, S, D)
    calls = []
    for s in range(1, S + 1):
        n, done = budget // S + (s <= budget % S), 0       # the remainder to the early stages
        for i in range(1, n + 1):                          # every call generates something
            j = min(max(round(D * float(curve(i / n))), done + 1), D - n + i)
            calls.append((s, done + 1, j - done))
            done = j
    return calls


def cut(plan, first, last):
    """Yields what generates steps first..last: for data that is partly known, or shorter."""
    for s, t, k in plan:
        begin = max(t, first)
        end = min(t + k - 1, last)
        if begin <= end:
            yield s, begin, end - begin + 1


def check(plan, S, first, last):
    """ValueError unless the plan generates steps first..last of stages 1..S in order."""
    wanted = [(s, t) for s in range(1, S + 1) for t in range(first, last + 1)]
    steps = [(s, i) for s, t, k in cut(plan, first, last) for i in range(t, t + k)]
    if steps != wanted:
        raise ValueError(f"the plan must generate steps {first}..{last} of stages 1..{S} in order")


def check_budget(budget, S, D):
    if not S <= budget <= S * D:
        raise ValueError(f"{budget} network calls: choose {S} to {S * D}")


def absorbing_bound(L, T, q):
    """The bound of absorbing diffusion in T steps (App. C) per variable, by L (D,) of our network.

    q(u) is the part of the variables that is absorbed at time u: q(0) = 0, q(1) = 1. At step i the
    number n of absorbed variables is binomial, with probability q_i = q(i / T). The reverse step
    reveals each of the n with probability r_i = (q_i - q_{i-1}) / q_i. A revealed variable costs
    L_{D-n+1}, which is L[::-1][n-1]. The bound is the sum over i and n of r_i P(n) n L_{D-n+1}."""
    L, D, total = np.asarray(L), len(L), 0.0
    n = np.arange(1, D + 1)
    log_choose = np.log((D - n + 1) / n).cumsum()          # log of D choose n
    for i in range(1, T + 1):
        before, now = q((i - 1) / T), q(i / T)
        log_P = log_choose + n * np.log(now) + (D - n) * np.log(max(1 - now, 1e-300))
        total += (now - before) / now * (np.exp(log_P) * n * L[::-1]).sum()
    return total / D
