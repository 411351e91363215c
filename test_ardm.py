"""The specification: the paper's claims on problems small enough to enumerate, networks, planner,
coder, and each script once. tests/ holds what the scripts promise. Run: python -m pytest -q

What must hold on a GPU is parametrised over the devices that are there. Every mistake in
exercises/mistakes.json makes a test of its exercise fail.
"""
import html
import itertools
import json
import math
import re
import zlib

from conftest import DEVICES, HERE, call, seeded, settings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import coder
import compress
import data as datasets
import nets
import planner
import sample
import train
from ardm import (ARDM, UpscaleARDM, bits_per_dim, draw, known_first, num_stages, pick,
                  sample_sigma, stratified_steps)
from exercises import check, make
from nets import MixtureARDM, UpscaleMixture, log_mass

ONE = torch.ones(1, dtype=torch.long)


class Table(nn.Module):
    """A network with a logit table of its own for every stage, input and mask: D and K tiny."""

    def __init__(self, D, K, outputs=None, S=1, dtype=torch.float64):
        super().__init__()
        self.D, self.K, self.num_outputs = D, K, outputs
        size = (S, (2 * K) ** D, D, outputs or K)
        table = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.logits = nn.Parameter(table)

    def forward(self, x, m, t, s):
        index = ((x + self.K * m) * (2 * self.K) ** torch.arange(self.D)).sum(dim=1)
        return self.logits[s - 1, index]


class Fixed(nn.Module):
    """The same logits whatever it is shown; remembers that."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen, self.num_outputs = nn.Parameter(logits), [], len(logits)

    def forward(self, x, m, t, s):
        self.seen.append((x.clone(), m.clone(), t.clone()))
        return self.logits.expand(*x.shape, -1)


def uniform(D, K):
    return ARDM(Fixed(torch.zeros(K)), D, K)


def all_x(D, K):
    return torch.tensor(list(itertools.product(range(K), repeat=D)))


def all_sigma(D):
    return torch.tensor(list(itertools.permutations(range(1, D + 1))))


def same(words, got, expected, rel=1e-9):
    """Fails in the words of the paper, with the first number that is wrong."""
    got, expected = (part.detach() if torch.is_tensor(part) else part for part in (got, expected))
    got, expected = np.broadcast_arrays(np.asarray(got), np.asarray(expected))
    for one, other in zip(got.flat, expected.flat):
        assert math.isclose(one, other, rel_tol=rel, abs_tol=1e-9), (
            f"{words}: expected {other:.10g}, got {one:.10g}")


def example(number, words, got, wanted):
    """The worked example of an exercise, from exercises/README.md."""
    got, wanted = (np.asarray(part).tolist() for part in (got, wanted))
    assert np.shape(got) == np.shape(wanted) and np.allclose(got, wanted, atol=1e-3), (
        f"the example of exercise {number}: {words} should be {wanted}, is {got}")


def by_hand(net, x, sigma, plan):
    """-log p(x | sigma) in nats, one datapoint, with plain loops: the chain rule over a plan."""
    nats = 0.0
    for _, t, k in plan:
        m = torch.tensor([[step < t for step in sigma]])
        log_p = torch.log_softmax(net(torch.tensor([x]) * m, m, None, ONE)[0], dim=-1)
        nats -= sum(log_p[i, x[i]].item() for i, step in enumerate(sigma) if t <= step < t + k)
    return nats


def assert_drawn_with(model, plan, p):
    """Samples (40,000) have the probabilities p of all x, in the order of `all_x`."""
    drawn = model.sample(40000, plan, generator=seeded())
    place = model.K ** torch.arange(model.D - 1, -1, -1)
    share = (drawn * place).sum(dim=1).bincount(minlength=len(p)) / 40000
    assert (share - p).abs().max() < 5 * math.sqrt(0.25 / 40000)


# -- ardm.py: the order-agnostic model -------------------------------------------------------------

QUARTER = torch.tensor([0.75, 0.25]).log()                 # of the examples: p(1) = 1/4
X, SIGMA, PLAN = torch.tensor([[1, 0, 1]]), torch.tensor([[2, 3, 1]]), [(1, 1, 1), (1, 2, 2)]


def test_exercise_01_example():
    found = known_first(SIGMA, torch.tensor([[False, True, False]]))
    example(1, "sigma = (2, 3, 1) with variable 2 known", found, [[3, 0, 2]])
    example(1, "a row of sample_sigma, sorted", sample_sigma(1, 3).sort(dim=1).values, [[1, 2, 3]])


def test_exercise_01_sigma_is_a_uniform_permutation():
    sigma = sample_sigma(6000, 3, generator=seeded())
    same("each row of sigma holds every step 1..D once", sigma.sort(dim=1).values,
         torch.arange(1, 4))
    orders, counts = sigma.unique(dim=0, return_counts=True)
    assert len(orders) == 6, f"sigma ~ U(S_3) takes 6 values, not {len(orders)}"
    one, two, again = (sample_sigma(9, 9, generator=seeded(i)) for i in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, two), "the generator is not used"
    same("each of the 6 orders comes 1 time in 6", counts / 6000, 1 / 6, rel=0.15)


def test_exercise_01_what_is_known_has_step_0_the_others_keep_order():
    known = torch.tensor([[True, False, False, True, False, False], [True] * 5 + [False]])
    sigma = known_first(sample_sigma(2, 6), known)
    same("sigma is 0 where x is known", sigma[known], 0)
    same("2 of 6 known leave the steps 3..6", sigma[0].sort().values, torch.tensor(
        [0, 0, 3, 4, 5, 6]))
    order = known_first(torch.tensor([[5, 3, 1, 4, 2]]), torch.tensor([[0, 1, 0, 0, 0]]) > 0)
    same("the others keep their order", order, torch.tensor([[5, 0, 2, 4, 3]]))
    stages = torch.tensor([[[5, 3, 1, 4, 2]], [[1, 2, 3, 4, 5]]])        # (S, B, D)
    order = known_first(stages, torch.tensor([[0, 1, 0, 0, 0]]) > 0)
    same("and so in every stage", order, torch.tensor([[[5, 0, 2, 4, 3]], [[2, 0, 3, 4, 5]]]))


def test_t_reaches_1_and_D_and_every_batch_covers_all_steps():
    for seed in range(20):
        t, s = stratified_steps(24, 2, 6, generator=seeded(seed))
        pairs = sorted(zip(s.tolist(), t.tolist()))
        assert pairs == sorted(2 * list(itertools.product(range(1, 3), range(1, 7))))
    first = torch.stack([stratified_steps(3, 1, 5)[0] for _ in range(2000)])
    for column in first.T:                                 # each row alone is uniform
        assert (column.bincount(minlength=6)[1:] - 400).abs().max() < 100


def test_exercise_02_example():
    model, x = ARDM(Fixed(QUARTER), 3, 2), X.expand(9, 3)
    loss = model.loss(X, 2 * ONE, ONE, SIGMA).detach()
    example(2, "the loss of x = (1, 0, 1) with sigma = (2, 3, 1) at t = 2", loss, [2.511])
    one, two = (model.loss(x, generator=seeded()) for _ in range(2))
    assert torch.equal(one, two), "t, s and sigma come from the generator that is given"


def test_exercise_02_the_loss_at_t_is_D_times_the_mean_over_the_unknown():
    model, x, sigma = ARDM(Table(4, 2), 4, 2), torch.tensor([[1, 0, 0, 1]]), torch.arange(1, 5)
    for t in range(1, 5):
        m = sigma[None] < t
        log_p = pick(model.log_probs(x, m, t * ONE, ONE), x)[~m]         # of the unknown
        same(f"the loss at t = {t} is D times the mean over the {len(log_p)} unknown variables",
             model.loss(x, t * ONE, ONE, sigma[None]), -4 * log_p.mean())


def test_exercise_02_exactly_D_minus_t_plus_1_variables_are_masked():
    model = uniform(7, 5)
    model.loss(torch.randint(5, (100, 7)))
    _, m, t = model.net.seen[0]
    same("at step t the network does not see D - t + 1 variables", (~m).sum(dim=1), 7 - t + 1)
    assert set(t.tolist()) == set(range(1, 8)), "t is drawn from 1..D, and all of them come"


@pytest.mark.parametrize("D, K", [(1, 2), (7, 5), (64, 27)])
def test_exercise_02_uniform_network_costs_D_log_K_on_every_draw(D, K):
    model, x = uniform(D + 3, K), torch.randint(K, (50, D))              # x may be shorter
    loss = model.loss(x)
    same("a uniform network costs D log K on every draw", loss, D * math.log(K), rel=1e-6)
    model.S = 2
    same("and S times that with S stages", model.loss(x, s=ONE.expand(50)), 2 * loss, rel=1e-6)
    assert math.isclose(bits_per_dim(loss[0].item(), D), math.log2(K), rel_tol=1e-6)


def test_masked_values_never_reach_the_network():
    model, x = uniform(6, 4), torch.randint(1, 4, (8, 6))
    m, t = torch.rand(8, 6) < 0.5, ONE.expand(8)
    model.log_probs(x, m, t, t)
    model.log_probs(torch.where(m, x, 4 - x), m, t, t)
    (one, _, _), (two, _, _) = model.net.seen
    assert torch.equal(one, two) and torch.equal(one, m * x)


def test_exercise_02_mean_loss_over_orders_and_steps_is_the_bound_of_eq_2():
    D, K = 3, 2
    model = ARDM(Table(D, K), D, K)
    for x in all_x(D, K):
        losses = [model.loss(x[None], t=torch.tensor([t]), sigma=sigma[None]).item()
                  for sigma in all_sigma(D) for t in range(1, D + 1)]
        chain = [by_hand(model.net, x.tolist(), sigma.tolist(), planner.full_plan(1, D))
                 for sigma in all_sigma(D)]
        same("the mean loss over all t and sigma is the mean of -log p(x | sigma)",
             np.mean(losses), np.mean(chain))
    draws = model.loss(x.expand(40000, 3), generator=seeded())
    assert abs(draws.mean().item() - np.mean(chain)) < 5 * draws.std().item() / 200


def test_exercise_03_example():
    model, seen = ARDM(Fixed(QUARTER), 3, 2), []
    model.generate(X, PLAN, SIGMA, lambda log_p, where, s: seen.append(where) or X[where])
    example(3, "the variables that the two calls generate", torch.cat(seen),
            [[False, False, True], [True, True, False]])
    example(3, "-log p(x | sigma)", model.nll(X, PLAN, SIGMA), [3.060])


@pytest.mark.parametrize("plan", [
    [(1, 1, 1), (1, 2, 1), (1, 3, 1)], [(1, 1, 1), (1, 2, 2)], [(1, 1, 3)]])
def test_exercise_03_nll_is_the_chain_rule_and_sums_to_one(plan):
    model, x = ARDM(Table(3, 3), 3, 3), all_x(3, 3)
    for sigma in all_sigma(3):
        nll = model.nll(x, plan, sigma.expand(len(x), 3))
        hand = [by_hand(model.net, row.tolist(), sigma.tolist(), plan) for row in x]
        same(f"-log p(x | sigma) is the sum over the {len(plan)} calls of the plan", nll, hand)
        same("the probabilities of all x sum to 1", (-nll).exp().sum(), 1.0)


@pytest.mark.parametrize("plan", [None, [(1, 1, 2), (1, 3, 1)]])
def test_exercise_03_samples_have_the_probabilities_that_nll_says(plan):
    model, x = ARDM(Table(3, 2), 3, 2), all_x(3, 2)
    p = [(-model.nll(x, plan, order.expand(len(x), 3))).exp() for order in all_sigma(3)]
    assert_drawn_with(model, plan, torch.stack(p).mean(dim=0))


def test_exercise_03_generate_writes_every_variable_once():
    model, written = uniform(10, 3), torch.zeros(5, 10)
    plan = [(1, 1, 4), (1, 5, 1), (1, 6, 5)]

    def choose(log_p, where, s):
        written[:, :where.shape[1]] += where
        assert log_p.shape == (int(where.sum()), 3)
        return torch.full((len(log_p),), 2)

    x = model.generate(torch.zeros(5, 10, dtype=torch.long), plan, sample_sigma(5, 10), choose)
    same("each variable is generated once", written, 1)
    same("x takes what `choose` gives", x, 2)
    assert [m.sum(dim=1).unique().tolist() for _, m, _ in model.net.seen] == [[0], [4], [5]]
    model.net.seen.clear()                                 # a shorter x cuts the plan
    x = model.generate(torch.zeros(5, 6, dtype=torch.long), plan, sample_sigma(5, 6), choose)
    assert (x == 2).all() and len(model.net.seen) == 3


def test_exercise_03_known_variables_stay_and_are_seen_by_every_call():
    x = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    known = torch.tensor([[True, False, False, True, False, False], [True] * 5 + [False]])
    model = uniform(6, 2)
    drawn = model.sample(2, x=x, known=known)
    assert (drawn[known] == x[known]).all() and len(model.net.seen) == 4
    for i, (_, m, t) in enumerate(model.net.seen):         # the first row knows least
        assert m[known].all(), "every call sees what is known"
        same("t - 1 variables are known", t, torch.tensor([3 + i] * 2))
        same("the network sees t - 1 variables", m[0].sum(), t[0] - 1)


def test_exercise_03_nll_and_samples_given_what_is_known_are_conditional():
    model, x = ARDM(Table(3, 2), 3, 2), all_x(3, 2)
    forward = torch.tensor([[1, 2, 3]]).expand(8, 3)
    given = model.nll(x, sigma=torch.tensor([[0, 2, 3]]).expand(8, 3))   # x_1 is given
    nothing = torch.zeros(8, 3, dtype=torch.bool)
    first = pick(model.log_probs(x, nothing, ONE.expand(8), ONE.expand(8)), x)[:, 0]
    same("-log p of the rest given x_1", given, model.nll(x, sigma=forward) + first)
    known = torch.tensor([True, True, False]).expand(20000, 3)
    drawn = model.sample(20000, x=x[6:7].expand(20000, 3), known=known)
    p = model.log_probs(x[6:7], known[:1], 3 * ONE, ONE)[0, 2].exp()
    assert abs(drawn[:, 2].float().mean() - p[1]) < 5 * math.sqrt(0.25 / 20000)


def test_plans_that_leave_something_out_and_foreign_values_are_refused():
    model, x = uniform(4, 3), torch.zeros(2, 4, dtype=torch.long)
    for plan in ([], [(1, 1, 3)], [(1, 2, 3)], [(1, 3, 2), (1, 1, 2)], [(1, 1, 3), (1, 3, 2)],
                 [(2, 1, 4)]):
        for use in (lambda: model.nll(x, plan), lambda: model.sample(2, plan)):
            with pytest.raises(ValueError, match="must generate steps 1..4 of stages 1..1"):
                use()
    for sigma in ([[1, 2, 3, 3]], [[0, 1, 2, 3]], [[2, 3, 4, 5]], [[-1, -2, -3, -4]]):
        with pytest.raises(ValueError, match="each row of sigma"):
            model.nll(x, sigma=torch.tensor(sigma).expand(2, 4))
    calls = planner.uniform_plan(1, 4, 2)
    same("a plan may be an iterator", model.nll(x, iter(calls)), 4 * math.log(3), rel=1e-6)
    assert model.sample(0).shape == (0, 4) and model.nll(x[:0]).shape == (0,)
    known = torch.tensor([True, True, False, False]).expand(2, 4)
    assert model.sample(2, [(1, 3, 2)], x=x, known=known).shape == (2, 4)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="they must be 0 to 2"):
            model.nll(x + wrong)
        with pytest.raises(ValueError, match="they must be 0 to 2"):
            model.sample(2, x=x + wrong, known=known)
        model.sample(2, x=x + wrong * ~known, known=known)               # what is not read


def test_a_symbol_is_drawn_with_its_probability_and_never_with_0():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(40000, 4)
    for temperature in (1.0, 0.5):
        drawn = draw(p.log(), temperature, seeded()).bincount(minlength=4) / 40000
        wanted = p[0] ** (1 / temperature) / (p[0] ** (1 / temperature)).sum()
        assert drawn[1] == 0 and (drawn - wanted).abs().max() < 0.01
    for temperature in (0, 1e-45, 1e-4):
        assert (draw(p.log(), temperature) == 0).all(), "the likeliest symbol"
    model = UpscaleARDM(Fixed(torch.randn(5)), 1, 5, 3)    # 12 and 2x lead nowhere in base 3
    assert model.sample(2000, generator=seeded()).max() == 4


def test_bfloat16_logits_still_give_probabilities_that_sum_to_one():
    model, x = uniform(3, 256).to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    log_p = model.log_probs(x, x == 0, ONE.expand(2), ONE.expand(2))
    total = log_p.exp().sum(dim=-1)
    assert log_p.dtype == torch.float32 and torch.allclose(total, torch.ones(2, 3), atol=1e-6)


# -- planner.py ------------------------------------------------------------------------------------

def cheapest_by_force(L, budget):
    """Over every way to split the calls over the stages and the steps over the calls."""
    S, D = L.shape
    cost = [{} for _ in range(S)]
    for n in range(1, D + 1):
        starts = [(0, *cuts) for cuts in itertools.combinations(range(1, D), n - 1)]
        for row, best in zip(L, cost):
            best[n] = min(sum(row[i] * (j - i) for i, j in zip(start, (*start[1:], D)))
                          for start in starts)
    splits = [s for s in itertools.product(range(1, D + 1), repeat=S) if sum(s) == budget]
    return min(sum(best[n] for best, n in zip(cost, split)) for split in splits)


def falling(rng, S, D, ties=False):
    L = rng.random((S, D)) * rng.random((S, 1)) * 8
    return -np.sort(-(np.round(L) if ties else L), axis=1)


def assert_plan(plan, S, D, budget):
    assert len(plan) == budget, f"a plan of {budget} calls has {len(plan)} entries"
    assert all(k >= 1 for _, _, k in plan), f"a call with no variable: {plan}"
    assert [s for s, _, _ in plan] == sorted(s for s, _, _ in plan), "stages come in order"
    for stage in range(1, S + 1):
        calls, end = [(t, k) for s, t, k in plan if s == stage], 0
        for t, k in calls:
            assert calls[0][0] == 1, f"steps count from 1: {calls} begins at {calls[0][0]}"
            assert t == end + 1, f"calls must join: behind step {end} comes {end + 1}, not {t}"
            end += k
        assert end == D, f"{calls} generates {end} variables of {D}"


def test_exercise_04_example():
    example(4, "the cost of [(1, 1, 1), (1, 2, 2)]", planner.plan_cost([1.0, 0.6, 0.2], PLAN), 2.2)
    fit = planner.isotonic(np.array([1.0, 0.2, 0.6]), np.ones(3))
    example(4, "isotonic of (1.0, 0.2, 0.6)", fit, [1.0, 0.4, 0.4])
    example(4, "smooth of (1, 2), met once and three times", planner.smooth([1.0, 2.0], [1, 3]),
            [1.75, 1.75])


def test_exercise_04_expected_nll_under_a_plan_is_its_cost_by_L():
    """Eq. 3: over random orders, k variables generated together at step t cost k L_t."""
    net, x = Table(4, 2), [1, 0, 0, 1]
    orders = all_sigma(4).tolist()
    L = [np.mean([by_hand(net, x, order, [(1, t, 1)]) for order in orders]) for t in range(1, 5)]
    for plan in ([(1, 1, 1), (1, 2, 3)], [(1, 1, 2), (1, 3, 2)], planner.full_plan(1, 4)):
        nll = np.mean([by_hand(net, x, order, plan) for order in orders])
        same(f"Eq. 3: the plan {plan} costs the sum of k L_t", planner.plan_cost(L, plan), nll)
    same("each stage has its own L", planner.plan_cost([[4, 3], [2, 1]], [
        (1, 1, 2), (2, 1, 1), (2, 2, 1)]), 11)


def test_exercise_04_isotonic_fit_is_the_nearest_one():
    rng = np.random.default_rng(3)
    for L in rng.normal(size=(20, 9)):
        w = rng.integers(1, 4, 9)
        fit = [min(max(np.average(L[a:b + 1], weights=w[a:b + 1]) for b in range(i, 9))
                   for a in range(i + 1)) for i in range(9)]
        same("the nearest non-increasing fit in weighted squares", planner.isotonic(L, w), fit)


def test_exercise_04_smooth_fits_lines_and_never_rises():
    t, rng, gap = np.arange(1, 401), np.random.default_rng(0), [np.nan] * 3
    line = 30 - 0.05 * t
    same("a straight line is smooth as it is", planner.smooth(line), line)
    noisy, counts = line + rng.normal(0, 0.3, 400), rng.integers(0, 3, 400)
    same("NaN is a step that was not met", planner.smooth(np.where(counts, noisy, np.nan)),
         planner.smooth(noisy, counts > 0))
    for L in (noisy, 1.0 * (t < 50)):                      # a line overshoots behind a step
        rises = np.diff(planner.smooth(L)).max()
        assert rises <= 0, f"Eq. 4: a smooth L_t does not increase, this one by {rises:.3g}"
    fits = planner.smooth(noisy), planner.isotonic(noisy, np.ones(400))
    errors = [np.abs(fit - line).mean() for fit in fits]
    assert errors[0] < 0.6 * errors[1], "isotonic alone is as near to the line: where is local_fit?"
    fit = planner.smooth(line + (t == 50), np.where(t == 50, 1, 10 ** 6))
    assert np.abs(fit - line).max() < 1e-3, "what was met once weighs as much as the others"
    same("L_5, met alone: what is filled in weighs nothing",
         planner.smooth([3, *gap, 1, *gap, 0.9])[4], 1, rel=1e-6)
    same("a straight line where no step was met", planner.smooth([3, *gap * 6, 1])[9], 2 + 1 / 19)
    same("L is not read where it was not met", planner.smooth([1, np.inf], [1, 0]), 1)
    same("stage by stage", planner.smooth([noisy, line]), [*map(planner.smooth, (noisy, line))])
    for bad in ([[np.nan] * 2], [[np.inf, 1]], [[]], [[1, 1], [1]], [[[[1]]]], [[[1], [np.nan]]]):
        with pytest.raises(ValueError):
            planner.smooth(*bad)


def test_plans_from_a_smoothed_L_lose_little():
    """On noisy measurements the excess over the best plan is half of what isotonic regression
    alone leaves."""
    t, excess = np.arange(1, 785), np.zeros(2)
    curve = 4 / np.sqrt(t) + 0.5
    for seed in range(3):
        noise = np.random.default_rng(seed).normal(size=784)
        L = curve * (1 + noise * np.sqrt(2 / (785 - t) + 0.005) / 2)
        for i, fit in enumerate((planner.isotonic(L, np.ones(784)), planner.smooth(L))):
            excess[i] += planner.plan_cost(curve, planner.plan(fit, 20))
    best = 3 * planner.costs(curve, [20])[20]
    assert excess[1] - best < (excess[0] - best) / 2


def test_exercise_05_example():
    L = np.array([1.0, 0.5, 0.2])
    for programme in (planner.one_more_call, planner.one_more_call_fast):
        E, start = programme(np.array([np.inf, 1, 2, 3]), L)
        example(5, "E_2", E, [np.inf, np.inf, 1.5, 2.0])
        example(5, "start[3]", start[3], 1)
    example(5, "the best path of two calls", planner.best_path(L, 2), [(1, 1), (2, 2)])


def test_exercise_05_the_fast_programme_is_the_plain_one():
    D, L, j = 60, falling(np.random.default_rng(1), 1, 60)[0], np.arange(61)
    E = fast = np.r_[0.0, np.full(D, np.inf)]
    for n in range(1, D + 1):
        before = E
        E, start = planner.one_more_call(E, L)
        fast, fast_start = planner.one_more_call_fast(fast, L)
        same(f"E_{n}", fast, E)
        for i in (start, fast_start):                      # several i may be equally good
            same(f"E_{n} by its best i", (before[i] + (j - i) * L[np.minimum(i, D - 1)])[n:], E[n:])
        assert_plan(planner.plan(L, n), 1, D, n)
        same("the cheapest plan", planner.plan_cost(L, planner.plan(L, n)), E[D])


@pytest.mark.parametrize("S, D, ties", [
    (1, 1, False), (1, 7, False), (1, 7, True), (2, 5, False), (3, 3, True)])
def test_exercise_05_plan_is_the_cheapest_of_all(S, D, ties):
    rng = np.random.default_rng(0)
    for _ in range(5):
        L = falling(rng, S, D, ties)
        curve = planner.costs(L)
        for budget in range(S, S * D + 1):
            plan, best = planner.plan(L, budget), cheapest_by_force(L, budget)
            assert_plan(plan, S, D, budget)
            same(f"the cheapest plan of {budget} calls", planner.plan_cost(L, plan), best)
            same(f"E_n[D] for n = {budget} calls", curve[budget], best)


def test_exercise_05_costs_of_the_papers_own_example_and_of_flat_components():
    assert np.allclose(list(planner.costs([5, 4, 3, 2.85, 2.8]).values()),
                       [25, 19, 18, 17.7, 17.65])
    assert_plan(planner.plan(np.full(20, 2.0), 7), 1, 20, 7)             # no empty call
    L = falling(np.random.default_rng(2), 3, 30)
    curve = np.array(list(planner.costs(L).values()))
    assert (np.diff(curve) <= 1e-9).all() and (np.diff(curve, 2) >= -1e-9).all()
    assert math.isclose(curve[-1], L.sum()) and list(planner.costs(L, [5, 90])) == [5, 90]
    for function in (lambda L: planner.plan(L, 2), planner.costs):
        with pytest.raises(ValueError, match="smooth"):
            function([1.0, 2.0])


@pytest.mark.parametrize("make", [planner.uniform_plan, planner.cosine_plan])
def test_simple_plans_have_the_calls_and_the_steps(make):
    for S, D, budget in [(1, 1, 1), (1, 10, 3), (1, 10, 10), (3, 7, 11), (2, 50, 2)]:
        assert_plan(make(S, D, budget), S, D, budget)
    assert_plan(planner.full_plan(2, 4), 2, 4, 8)
    sizes = [k for _, _, k in planner.cosine_plan(1, 100, 10)]
    assert sizes == sorted(sizes)
    assert [k for _, _, k in planner.uniform_plan(1, 100, 10)] == [10] * 10
    assert list(planner.cut([(1, 1, 4), (1, 5, 4)], 3, 6)) == [(1, 3, 2), (1, 5, 2)]
    for budget in (0, 1, 21, -3):
        for plan in (lambda: planner.plan(np.ones((2, 10)), budget), lambda: make(2, 10, budget),
                     lambda: planner.costs(np.ones((2, 10)), [budget])):
            with pytest.raises(ValueError, match="2 to 20"):
                plan()


@pytest.mark.parametrize("T", [1, 2, 4, 7])
@pytest.mark.parametrize("q", [lambda u: u, lambda u: 1 - math.cos(math.pi / 2 * u)],
                         ids=["linear", "cosine"])
def test_absorbing_bound_equals_enumeration_of_the_whole_chain(T, q):
    """Every way in which three variables may be absorbed, each at a step of its own."""
    D, x, at = 3, torch.tensor([[1, 0, 1]]), [q(i / T) for i in range(T + 1)]
    model, nats = ARDM(Table(D, 2), D, 2), 0.0
    for absorbed in itertools.product(range(1, T + 1), repeat=D):
        log_q = sum(math.log(at[i] - at[i - 1]) for i in absorbed)
        log_p = 0.0
        for i in range(1, T + 1):
            m = torch.tensor([[step > i for step in absorbed]])          # not yet at i
            appears = (at[i] - at[i - 1]) / at[i]
            log_x = pick(model.log_probs(x, m, ONE, ONE), x)[0]
            for j, step in enumerate(absorbed):
                if step == i:
                    log_p += math.log(appears) + log_x[j].item()
                elif step < i:
                    log_p += math.log(1 - appears)
        nats += math.exp(log_q) * (log_q - log_p)
    L = [np.mean([model.loss(x, t * ONE, sigma=s[None]).item() for s in all_sigma(D)]) / D
         for t in (1, 2, 3)]
    same("bound", planner.absorbing_bound(L, T, q), nats / D)


def test_absorbing_bound_becomes_the_ardms_with_many_steps():
    L = np.geomspace(4, 0.5, 300)
    found = [planner.absorbing_bound(L, T, lambda u: u) for T in (1, 10, 100, 10_000)]
    assert found == sorted(found, reverse=True) and abs(found[0] - 4) < 1e-9
    assert abs(found[-1] - L.mean()) < 0.001 < found[-2] - L.mean()


def test_orders_by_name():
    for shape in (1, 13, 64, (1, 4, 4), (3, 4, 6), (2, 5, 3)):
        for rule in ("forward", "backward", "random:7", "spaced:1", "spaced:5", "halves"):
            assert sorted(planner.order(rule, shape)) == list(range(1, int(np.prod(shape)) + 1))
    assert planner.order("forward", 4).tolist() == [1, 2, 3, 4]
    assert planner.order("backward", (4,)).tolist() == [4, 3, 2, 1]
    assert planner.order("spaced:2", 6).tolist() == [1, 3, 5, 2, 4, 6]
    assert planner.order("random:1", 8).tolist() == [7, 8, 5, 6, 2, 4, 3, 1]
    assert np.argsort(planner.order("halves", 8)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    turns = np.argsort(planner.order("halves", 100))
    assert all(np.diff(np.sort(turns[:n])).max() <= 256 / n for n in (4, 8, 16, 32, 64))
    assert (np.diff(np.argsort(planner.order("spaced:4", 64)).reshape(16, 4)) == 16).all()
    forward = planner.order("forward", (3, 2, 4)).reshape(3, 8)
    assert (forward == 3 * np.arange(8) + np.arange(3)[:, None] + 1).all()
    for rule in ("sideways", "random", "random:x", "spaced:0", "spaced:-1", ""):
        with pytest.raises(ValueError, match="choose forward"):
            planner.order(rule, 5)


# -- ardm.py: the upscale model --------------------------------------------------------------------

BASES = [(256, 2), (256, 4), (256, 16), (27, 3), (27, 2), (5, 3), (8, 2), (125, 5)]


@pytest.mark.parametrize("K, b, S", [
    (256, 2, 8), (256, 16, 2), (256, 256, 1), (27, 3, 3), (28, 27, 2), (125, 5, 3), (243, 3, 5),
    (65536, 4, 8), (3, 2, 2), (2, 2, 1)])
def test_125_classes_in_digits_of_5_are_3_stages_not_4(K, b, S):
    """ceil(log(125) / log(5)) is 4 in floats."""
    assert num_stages(K, b) == S
    for bad in (0, 1, K + 1):
        with pytest.raises(ValueError, match=f"2 to K = {K}"):
            num_stages(K, bad)


def test_exercise_06_example():
    model, x = UpscaleARDM(None, 1, 8, 2), 5 * ONE[None]
    coarse = [model.coarsen(x, s).item() for s in range(4)]
    example(6, "x^(0), .., x^(3) of 5", coarse, [0, 4, 4, 5])
    example(6, "the digits of 5", [model.symbol(x, s).item() for s in (1, 2, 3)], [1, 0, 1])
    example(6, "refine(4, 1, 3)", model.refine(4 * ONE[None], ONE[None], 3), [[5]])


@pytest.mark.parametrize("K, b", BASES)
def test_exercise_06_stages_lead_from_nothing_to_x_by_its_digits(K, b):
    model, x = UpscaleARDM(None, 4, K, b), torch.arange(K).view(1, -1)
    same("x^(0) is constant", model.coarsen(x, 0), 0)
    same("x^(S) is x", model.coarsen(x, model.S), x)
    digits = 0
    for s in range(1, model.S + 1):
        a = model.symbol(x, s)
        assert 0 <= a.min() and a.max() < b == model.A, f"a digit in base {b} is 0..{b - 1}"
        digits = digits * b + a
        same(f"x^({s}) has the {s} most significant digits, that of stage 1 first",
             model.coarsen(x, s), digits * b ** (model.S - s))
        same(f"refine gives x^({s}) from x^({s - 1})",
             model.refine(x, a, s), model.coarsen(x, s))   # and reads no finer digit of x
    s = torch.tensor([0, model.S])
    assert torch.equal(model.coarsen(x.expand(2, -1), s)[1:], x)


def summed(model, logits, x, s):
    """p of the digits by `sum_values`, which gives log p up to a constant."""
    return model.sum_values(logits, x, s).softmax(dim=-1)


def test_exercise_07_example():
    model, logits = UpscaleARDM(None, 1, 4, 2), torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()
    for s, wanted in ((1, [[[0.3, 0.7]]]), (2, [[[0.429, 0.571]]])):
        example(7, f"p of the digits of stage {s}, x^(1) = 2", summed(
            model, logits, 2 * ONE[None], s * ONE), wanted)


@pytest.mark.parametrize("K, b", [(8, 2), (27, 3), (5, 3)])
def test_exercise_07_every_row_has_its_stage_and_every_variable_its_digits(K, b):
    model, p = UpscaleARDM(None, 2, K, b), torch.rand(40, 2, K, generator=seeded())
    x, s = torch.randint(K, (40, 2), generator=seeded(1)), torch.arange(40) % model.S + 1
    logits = p.log().requires_grad_()
    got = summed(model, logits, x, s)
    for i, d in itertools.product(range(40), range(2)):
        unit = b ** (model.S - s[i].item())
        mine = [v for v in range(K) if v // unit // b == x[i, d].item() // unit // b]
        sums = torch.stack([p[i, d, [v for v in mine if v // unit % b == a]].sum()
                            for a in range(b)])
        same(f"row {i} at stage {s[i]}, variable {d}", got[i, d], sums / sums.sum(), rel=1e-4)
    assert got.requires_grad, "no gradient reaches the network"
    got[..., 0].sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad != 0).any(), "the gradient is not finite"
    shift = 400.0 * (torch.arange(40) % 3 - 1)[:, None, None]            # a constant for each row
    moved = summed(model, p.log() + shift, x, s)
    assert torch.allclose(moved, got, atol=1e-4), "the largest logit must be taken out of exp"


@pytest.mark.parametrize("K, b", BASES)
def test_exercise_07_of_one_fixed_output_stages_multiply_to_its_softmax(K, b):
    logits = 3 * torch.randn(K, dtype=torch.float64)
    model, x, t = UpscaleARDM(Fixed(logits), 1, K, b), torch.arange(K)[:, None], ONE.expand(K)
    log_p = sum(pick(model.log_probs(x, x < 0, t, s * t), model.symbol(x, s))
                for s in range(1, model.S + 1))
    same("the digits' probabilities multiply to the value's", log_p[:, 0],
         torch.log_softmax(logits, dim=-1))


def test_exercise_07_data_parametrisation_is_the_papers_matrices():
    """P^(s) (K x K) takes a distribution over values to one over what stage s knows of them."""
    K, b, S = 8, 2, 3
    logits = torch.randn(K, dtype=torch.float64)
    theta = torch.softmax(logits, dim=-1).numpy()
    model, values = UpscaleARDM(Fixed(logits), 1, K, b), np.arange(K)
    for s in range(1, S + 1):
        unit = b ** (S - s)
        P = (values[:, None] // unit * unit == values[None]).astype(float)   # x -> x^(s)
        parent = values // (unit * b) * unit * b           # x^(s-1) of x^(s)
        for x in values:
            p = (theta @ P) * (parent == parent[x])
            log_p = model.log_probs(torch.tensor([[x]]), torch.zeros(1, 1) > 0, ONE, s * ONE)
            digits = p[parent[x] + unit * np.arange(b)] / p.sum()
            same(f"stage {s}: p of a digit is P^(s) theta given x^(s-1)", log_p[0, 0].exp(), digits)


@pytest.mark.parametrize("parametrization", ["data", "direct"])
def test_digits_that_lead_nowhere_have_probability_zero(parametrization):
    K, b, S = 5, 3, 2                                      # 4 is 11 in base 3; 12 and 2x are none
    outputs = K if parametrization == "data" else S * b
    model = UpscaleARDM(Fixed(torch.randn(outputs)), 1, K, b, parametrization)
    x, t = torch.arange(K)[:, None], ONE.expand(K)
    first, second = (model.log_probs(x, x < 0, t, s * t).exp()[:, 0] for s in (1, 2))
    assert (first[:, 2] == 0).all() and (second[3:, 2] == 0).all()
    assert (first[:, :2] > 0).all() and (second[:3] > 0).all() and (second[3:, :2] > 0).all()
    assert torch.allclose(first.sum(dim=1), torch.ones(K))
    model.loss(x).sum().backward()
    assert torch.isfinite(model.net.logits.grad).all()


@pytest.mark.parametrize("parametrization", ["data", "direct", "mixture"])
@pytest.mark.parametrize("K, b", [(3, 2), (4, 2), (5, 3)])
def test_upscale_loss_over_all_orders_and_stages_is_the_bound(K, b, parametrization):
    S, x = num_stages(K, b), all_x(2, K)
    outputs = dict(data=K, direct=S * b, mixture=6)[parametrization]
    table = Table(2, K, outputs, S)
    model = (UpscaleMixture(table, 2, K, b) if parametrization == "mixture" else
             UpscaleARDM(table, 2, K, b, parametrization))
    same = ONE.expand(len(x))
    losses = [model.loss(x, t * same, s * same, sigma.expand(len(x), 2))
              for s in range(1, S + 1) for t in (1, 2) for sigma in all_sigma(2)]
    chains = [model.nll(x, sigma=torch.stack(orders)[:, None].expand(S, len(x), 2))
              for orders in itertools.product(all_sigma(2), repeat=S)]
    exact = torch.stack(chains).mean(dim=0)
    assert torch.allclose(torch.stack(losses).mean(dim=0), exact)
    log_p = [model.log_probs(x, x < 0, same, s * same) for s in range(1, S + 1)]
    where = torch.rand(x.shape) < 0.5                      # the same for some variables alone
    stages = torch.arange(len(x)) % S + 1                  # and rows in other stages
    some = torch.stack(log_p)[stages - 1, torch.arange(len(x))]
    assert torch.allclose(model.log_probs(x, x < 0, same, stages, where), some[where])
    for nll in chains:
        assert math.isclose((-nll).exp().sum().item(), 1.0, rel_tol=1e-9)
    drawn = model.loss(x[-1:].expand(40000, 2), generator=seeded())
    assert abs(drawn.mean().item() - exact[-1]) < 5 * drawn.std().item() / 200


@pytest.mark.parametrize("plan", [None, [(1, 1, 2), (2, 1, 1), (2, 2, 1)]])
def test_upscale_samples_have_the_probabilities_that_nll_says(plan):
    model, x = UpscaleARDM(Table(2, 3, 3, 2), 2, 3, 2), all_x(2, 3)
    p = [(-model.nll(x, plan, torch.stack(orders)[:, None].expand(2, 9, 2))).exp()
         for orders in itertools.product(all_sigma(2), repeat=2)]
    assert_drawn_with(model, plan, torch.stack(p).mean(dim=0))


def test_one_stage_of_base_K_is_the_order_agnostic_model():
    one, other = ARDM(Table(3, 4), 3, 4), UpscaleARDM(Table(3, 4), 3, 4, b=4)
    x, sigma, t = torch.randint(4, (20, 3)), sample_sigma(20, 3), torch.randint(1, 4, (20,))
    assert torch.allclose(one.loss(x, t, sigma=sigma), other.loss(x, t, sigma=sigma))
    assert torch.allclose(one.nll(x, sigma=sigma), other.nll(x, sigma=sigma))
    for s in (0, 1, torch.tensor([0, 1] * 10)):
        assert torch.equal(one.coarsen(x, s), other.coarsen(x, s))


def test_finer_digits_never_reach_the_network_before_their_stage():
    model, x = UpscaleARDM(Fixed(torch.zeros(27)), 6, 27, 3), torch.randint(27, (9, 6))
    m, s = torch.rand(9, 6) < 0.5, torch.arange(9) % 3 + 1
    unit = 3 ** (3 - torch.where(m, s[:, None], s[:, None] - 1))
    other = x // unit * unit + (x + torch.randint(1, 3, (9, 6))) % unit  # other digits below
    model.log_probs(x, m, s, s)
    model.log_probs(other, m, s, s)
    (one, _, _), (two, _, _) = model.net.seen
    assert torch.equal(one, two) and (x != other).any()


# -- coder.py --------------------------------------------------------------------------------------

def message(K, n, seed=0, peaked=1.0):
    """cdf of log-probabilities (n, K), symbols drawn from them, and their ideal length in bits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, K)) * peaked
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    symbols = (np.exp(log_p).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=K - 1)
    ideal = -log_p[np.arange(n), symbols].sum() / math.log(2)
    return coder.quantize(log_p), symbols, ideal


def coded(cdf, symbols, state=0):
    return coder.encode(*coder.intervals(cdf, symbols), state)


def test_exercise_08_example(monkeypatch):
    cdf = coder.quantize(np.log([[0.25, 0.75]]))
    assert cdf.tolist() == [[0, 1040135, 1 << 22]], f"the example of exercise 8: cdf is {cdf}"
    monkeypatch.setattr(coder, "P", 2)
    example(8, "pushing symbol 1 onto x = 5", [*coder.encode([1], [3], 5)], [7])
    decoder = coder.Decoder(b"\x07")
    example(8, "the symbol popped from x = 7", decoder.pop(np.array([[0, 1, 4]])), [1])
    example(8, "x after the pop", decoder.end, 5)


@pytest.mark.parametrize("K, n, peaked", [
    (2, 5000, 3), (27, 5000, 1), (27, 5000, 6), (256, 3000, 2), (1, 10, 1), (27, 0, 1), (27, 1, 1)])
def test_exercise_08_coder_gives_back_every_symbol_at_the_ideal_length(K, n, peaked):
    cdf, symbols, ideal = message(K, n, peaked=peaked)
    assert cdf.dtype == np.int64 and (np.diff(cdf, axis=1) > 0).all(), "a frequency is 0"
    same("cdf goes from 0 to 2^22", cdf[:, [0, -1]], [0, 1 << 22])
    for state in (0, 1, (1 << 32) - 1):
        data = coded(cdf, symbols, state)
        decoder = coder.Decoder(data)
        halves = [decoder.pop(cdf[:n // 3]), decoder.pop(cdf[n // 3:])]
        same("pop gives back what push took, in reading order", np.concatenate(halves), symbols)
        assert decoder.end == state, "the decoder ends at the encoder's first state"
        most = ideal + 32 * (1 + (state > 0)) + 3e-4 * ideal + 1e-4 * n
        assert 8 * len(data) <= most, f"{8 * len(data)} bits where log2 p is {ideal:.0f}"


def test_the_coarse_grid_costs_next_to_nothing():
    cdf, symbols, ideal = message(27, 20000, peaked=3)
    assert (22 - np.log2(coder.intervals(cdf, symbols)[1])).sum() < 1.0002 * ideal
    assert coder.WEIGHTS[0] == 1 << 40 and len(coder.WEIGHTS) == 1025 and coder.WEIGHTS[-1] == 0
    exact = np.exp(-np.arange(1024) / 64) * 2.0 ** 40
    assert np.abs(coder.WEIGHTS[:-1] - exact).max() < 1.01
    assert coder.WEIGHTS[64] == 404487723187               # 2^40 / e, rounded down


def test_exercise_08_rare_and_impossible_symbols_can_be_coded():
    cdf = coder.quantize(np.log(np.array([[1e-9, 1 - 2e-9, 1e-9]] * 100)))
    symbols = np.array([0, 2] * 50)
    assert np.array_equal(coder.Decoder(coded(cdf, symbols)).pop(cdf), symbols)
    with np.errstate(divide="ignore"):
        cdf = coder.quantize(np.log(np.array([[1.0, 0, 0], [0, 0, 1.0], [0.5, 0.5, 0]])))
    assert (np.diff(cdf) >= 1).all() and (cdf[:, -1] == 1 << 22).all()


def test_exercise_08_messages_survive_and_wrong_bytes_are_noticed():
    for n in range(60):
        cdf, symbols, _ = message(5, n, seed=n, peaked=4)
        decoder = coder.Decoder(coded(cdf, symbols))
        assert np.array_equal(decoder.pop(cdf), symbols) and decoder.end == 0
    assert coder.encode([], []) == b"", "a state of 0 takes no byte"
    data = coded(cdf, symbols, 12345)
    wrong = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1:] for i in range(len(data))]
    for bad in (*wrong, data + bytes(8)):
        decoder = coder.Decoder(bad)
        decoder.pop(cdf)
        assert decoder.end != 12345


@pytest.mark.parametrize("state, f", [
    (7 << 42, 7), ((7 << 42) - 1, 7), ((1 << 64) - (1 << 32) + 5, 1 << 21), (1 << 42, 1)])
def test_exercise_08_push_and_pop_agree_where_a_word_moves(state, f):
    cdf = np.array([[0, 9, 9 + f, 1 << 22]])
    decoder = coder.Decoder(coder.encode([9], [f], state))
    assert decoder.pop(cdf).tolist() == [1] and decoder.end == state


def test_exercise_08_safe_grids_survive_any_difference_below_the_margin():
    """Where `safe` says yes, values moved by MARGIN give the same integers; elsewhere they do not
    always, and another shift helps."""
    rng, level = np.random.default_rng(0), 1 / coder.GRID
    near = -(rng.integers(0, 900, 300) + 0.5) * level + rng.uniform(-3, 3, 300) * coder.MARGIN
    for value in near:
        row = np.array([[value, np.log1p(-np.exp(value))]]) if value < -1e-3 else None
        if row is None or not coder.safe(row):
            assert coder.safe(np.array([[value]]), 1)
            continue
        for sign in (-1, 1):
            assert np.array_equal(coder.quantize(row + sign * coder.MARGIN), coder.quantize(row))
    assert not all(coder.safe(np.array([[value]])) for value in near)
    exact = np.array([[-0.5 * level, np.log1p(-np.exp(-0.5 * level))]])
    assert not coder.safe(exact) and coder.safe(np.array([[-np.inf, 0.0]]))
    moved = [coder.quantize(exact + sign * 1e-12)[0, 1] for sign in (-1, 1)]
    assert moved[0] != moved[1]
    assert not np.array_equal(coder.quantize(exact, 0), coder.quantize(exact, 255))


def test_exercise_08_what_is_no_distribution_or_interval_is_refused():
    for row in ([-0.7, -0.9], [np.nan, 0], [np.inf, 0], [-0.69, -0.69], [0.1, -3]):
        with pytest.raises(ValueError, match="not log-probabilities"):
            coder.quantize(np.array([row]))
    for bad in (np.zeros((2, 1), np.float32), np.zeros(3)):
        with pytest.raises(ValueError, match="float64"):
            coder.quantize(bad)
    for starts, freqs in (([0], [0]), ([-1], [2]), ([1 << 22], [1])):
        with pytest.raises(ValueError, match="interval"):
            coder.encode(np.array(starts), np.array(freqs))


# -- compress.py: from the loop to bytes -----------------------------------------------------------

def codec(model, order="backward", ks=((1, 2),), block=30):
    """A codec that notes how many symbols it was told of."""
    found = compress.Codec(model, dict(shape=[model.D]), order, [[*k] for k in ks], block)
    found.done = []
    found.tick = found.done.append
    return found


def test_exercise_09_example():
    found = codec(ARDM(Fixed(QUARTER), 3, 2))
    block, bits = found.encode(X.numpy().astype(np.uint8), 0)
    example(9, "-log2 p of x = (1, 0, 1)", bits, 3.060 / math.log(2))
    example(9, "the symbols of the two calls", found.done, [1, 2])
    example(9, "what comes back", found.decode(block, 1, 3, 0), [[1, 0, 1]])


def test_exercise_09_all_x_come_back_at_their_ideal_length(monkeypatch):
    for model, ks in ((ARDM(Table(3, 3), 3, 3), ((1, 2),)),
                      (UpscaleARDM(Table(3, 3, 4, 2), 3, 3, 2, "direct"), ((1, 2), (3,)))):
        x = all_x(3, 3).numpy().astype(np.uint8)
        sigma = torch.tensor([[3, 2, 1]]).expand(27, 3)
        plan = [(s, t, k) for s, stage in enumerate(ks, 1)
                for t, k in zip(itertools.accumulate((1, *stage)), stage)]
        nats = model.nll(all_x(3, 3), plan, sigma).sum()
        for margin in (coder.MARGIN, 5e-4):
            monkeypatch.setattr(coder, "MARGIN", margin)
            found = codec(model, ks=ks)
            block, bits = found.encode(x, 7)
            same("-log2 p", bits, nats / math.log(2), rel=1e-6)
            assert 8 * len(block) < bits + 8 * (5 + 8) + 0.01 * bits, "the stream is too long"
            assert sum(found.done) == 81 * model.S, "tick is told of every symbol in encode"
            got = found.decode(block, 27, 3, 7)
            assert got is not None and np.array_equal(got, x), "the block does not come back"
            assert sum(found.done) == 2 * 81 * model.S, "tick is told of every symbol in decode"
        if model.S == 1:
            assert block[4] > 0 and found.decode(block[:4] + b"\0" + block[5:], 27, 3, 7) is None, (
                "decode does not read the shift")
        assert found.decode(block, 27, 3, 8) is None, "a block at another place is noticed"


def test_exercise_09_what_cannot_be_packed_is_stored_raw_with_a_checksum():
    model = ARDM(Fixed(6 * torch.randn(256, generator=seeded())), 24, 256)
    found = codec(model, "forward", ((24,),))
    x = np.frombuffer(np.random.default_rng(0).bytes(48), np.uint8).reshape(2, 24)
    block, _ = found.encode(x, 0)
    assert len(block) == 5 + 4 + 48 and block[0] & 128, "longer than its symbols: store it raw"
    found.done.clear()
    got = found.decode(block, 2, 24, 0)
    assert got is not None and np.array_equal(got, x), "a raw block does not come back"
    assert sum(found.done) == 48, "tick is told of the symbols of a raw block"
    for i in range(5, len(block)):
        flipped = block[:i] + bytes([block[i] ^ 1]) + block[i + 1:]
        assert found.decode(flipped, 2, 24, 0) is None, f"byte {i} of a raw block is checked"
    three, _ = found.encode(np.concatenate((x, x[:1])), 0)
    for other in (block + b"x", block[:-1], three):
        assert found.decode(other, 2, 24, 0) is None, "a raw block of another length is noticed"


def test_exercise_09_a_digit_that_leads_nowhere_is_damage():
    """K = 5, b = 4: the digits 1, 2 would be the value 6. The stream and its checksum are right."""
    model = UpscaleARDM(Table(1, 5, 8, 2), 1, 5, 4, "direct")
    found, notes = codec(model, "forward", ((1,), (1,))), []

    def choose(log_p, where, s):
        a = torch.tensor([s])                              # the digits 1, 2
        notes.append(coder.intervals(coder.quantize(log_p.double().numpy()), a.numpy()))
        return a

    found.generate(torch.zeros(1, 1, dtype=torch.long), choose)
    stream = coder.encode(*map(np.concatenate, zip(*notes)), zlib.crc32(b"\x06"))
    block = len(stream).to_bytes(4, "big") + b"\0" + stream
    assert found.decode(block, 1, 1, 0) is None, "a symbol of probability 0 came out of the stream"


# -- nets.py ---------------------------------------------------------------------------------------

class Watch(TorchDispatchMode):
    """Notes the sizes of all tensors that are made, and by what those of float32."""

    def __init__(self):
        super().__init__()
        self.sizes, self.float32 = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if torch.is_tensor(out):
            self.sizes.append(out.numel())
            self.float32 |= {function.__name__} if out.dtype == torch.float32 else set()
        return out


@pytest.mark.parametrize("recipe", ["ours", "paper"])
@pytest.mark.parametrize("kind, K, shape, branch, way", [
    ("text", 27, [16], 3, "data"), ("text", 256, [16], 0, None),
    ("image", 256, [3, 4, 4], 0, None), ("image", 256, [3, 4, 4], 4, "data"),
    ("image", 256, [3, 4, 4], 4, "direct"), ("audio", 65536, [32], 16, "mixture"),
    ("audio", 65536, [32], 16, "direct")])
def test_nothing_is_computed_in_float32_for_an_archive(kind, K, shape, branch, way, recipe):
    c = dict(kind=kind, K=K, shape=shape, recipe=recipe, branch=branch, parametrization=way)
    model = nets.build(c | dict(dim=8, depth=1, heads=2)).double()
    x, m = torch.randint(K, (2, model.D)), torch.rand(2, model.D) < 0.5
    with Watch() as watch, torch.no_grad():
        for s in range(1, model.S + 1):
            model.log_probs(x, m, torch.full((2,), 3), torch.full((2,), s))
    exact = {"scalar_tensor.default", "where.self", "mul.Tensor"}        # 0.02 where it is known
    assert watch.float32 <= (exact if kind == "audio" else set())


def text_net(ours=True, **options):
    """A small Transformer in float64 in which nothing is zero."""
    torch.manual_seed(0)
    kind = nets.OurTransformer if ours else nets.Transformer
    net = kind(7, 12, dim=16, depth=2, heads=2, **options).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def picture_net(ours, K=6, shape=(2, 5, 6), stages=1, outputs=None):
    """A U-Net whose zero-initialised layers say something."""
    torch.manual_seed(0)
    kind = nets.OurUNet if ours else nets.UNet
    net = kind(K, shape, outputs, dim=8, depth=1, heads=1, stages=stages, b=2,
               **dict(values=outputs is None) if ours else {})
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return net


def moved(net, x, i, m):
    """(D,) bool: where the output changes if variable i of x (1, D) does."""
    other = x.clone()
    other[0, i] = (other[0, i] + 1) % 6
    return ((net(other, m, ONE, ONE) - net(x, m, ONE, ONE)).abs().amax(dim=2) > 1e-9)[0]


def test_a_call_without_gradients_is_split_over_rows_and_changes_nothing():
    net = text_net()
    x = torch.randint(7, (1000, 12))
    m, t = torch.rand(1000, 12) < 0.5, ONE.expand(1000)
    whole = net(x, m, t, t)
    sizes = []
    net.register_forward_hook(lambda net, inputs, out: sizes.append(len(out)))
    with torch.no_grad():
        assert torch.allclose(net(x, m, t, t), whole, atol=1e-12)
    assert sizes == [341, 341, 318]


@pytest.mark.parametrize("ours", [True, False])
def test_transformer_sees_what_is_known_on_both_sides_and_no_more(ours):
    net, x = text_net(ours), torch.randint(6, (1, 12))
    m = torch.arange(12)[None] % 3 == 0
    logits = net(x, m, ONE, ONE)
    assert torch.equal(net(torch.where(m, x, 6 - x), m, ONE, ONE), logits)
    assert moved(net, x, 0, m).all() and moved(net, x, 9, m).all()
    hidden = m & (torch.arange(12) > 0)                    # no value looks like an unknown one
    assert ((net(x, hidden, ONE, ONE) - logits).abs().amax(dim=2) > 1e-9).all()
    assert net(x[:, :5], m[:, :5], ONE, ONE).shape == (1, 5, 7)          # shorter data will do


def test_blocks_of_neighbours_see_two_positions_on_either_side():
    """With extras, a block without attention; at the ends of the text too."""
    net, m = text_net(), torch.ones(1, 12, dtype=torch.bool)
    nn.init.zeros_(net.blocks[1].attention.out.weight)
    nn.init.zeros_(net.blocks[1].down.weight)
    assert [type(block.attention) is nets.Attention for block in net.blocks] == [False, True]
    for j in range(12):
        near = [abs(i - j) <= 2 for i in range(12)]
        assert moved(net, torch.randint(6, (1, 12)), j, m).tolist() == near


def test_rotary_network_cannot_tell_where_a_window_begins():
    net, (q, k) = text_net(), torch.randn(2, 1, 8).double()
    q, k = (nets.rotate(each.expand(12, 8), net.cos, net.sin) for each in (q, k))
    scores = q @ k.T                                       # (12, 12), of any two positions
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-6)
    assert (scores[2, 5] - scores[2, 6]).abs() > 1e-3
    assert torch.allclose(q.norm(dim=1), q[0].norm())


def test_attention_is_softmax_attention_in_both_kernels():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    exact = torch.softmax(q @ k.mT / 8 ** 0.5, dim=-1) @ v
    assert torch.allclose(nets.attention(q, k, v), exact, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(nets.attention(q, k, v).float(), exact, atol=0.05)


def test_attention_of_images_is_between_all_pixels():
    layer, x = nets.PixelAttention(8, 2), torch.randn(2, 8, 3, 5)
    assert torch.equal(layer(x, None), x)                  # begins as nothing
    nn.init.normal_(layer.out.weight)
    pixels = x.flatten(2).mT                               # (B, pixels, dim)
    q, k, v = layer.qkv(layer.norm(pixels)).view(2, 15, 3, 2, 4).unbind(2)       # heads, d
    p = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 2, dim=-1)
    seen = layer.out(torch.einsum("bhij,bjhd->bihd", p, v).reshape(2, 15, 8))
    assert torch.allclose(layer(x, None), x + seen.mT.view(2, 8, 3, 5), atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_an_embedding_by_products_is_a_lookup(device, monkeypatch):
    table = nets.Embedding(7, 5).to(device)
    x = torch.randint(7, (3, 4), device=device)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    one, other = table(x), table.eval()(x)                 # in training, and not
    assert torch.equal(one, other)
    weight = torch.randn_like(one)
    assert torch.allclose(*(torch.autograd.grad((weight * found).sum(), table.weight)[0]
                            for found in (one, other)), atol=1e-6)


def test_paper_size_and_recipe_are_the_papers():
    c = settings(datasets.load("pydoc", 250), size="paper", recipe="paper")
    assert (c["dim"], c["depth"], c["heads"], c["batch"]) == (768, 12, 12, 512)
    with torch.device("meta"):
        net = nets.build(c).net
    assert type(net) is nets.Transformer
    assert abs(sum(p.numel() for p in net.parameters()) - 85.1e6) < 0.2e6
    paper = train.PAPER["text"] | train.SIZES["text"]["paper"]
    assert [paper[k] for k in ("lr", "warmup", "clip", "steps")] == [5e-4, 5000, 0.25, 3_000_000]
    c = settings(datasets.load("glyphs"), size="paper", recipe="paper", branch=4)
    assert (c["dim"], c["depth"], c["heads"], c["batch"]) == (256, 32, 1, 128)
    assert c["parametrization"] == "data"
    with torch.device("meta"):
        net = nets.build(c | dict(shape=[3, 32, 32])).net
    assert (len(net.down), len(net.middle), len(net.up)) == (32, 3, 32)
    assert isinstance(net.time, nets.Time) and type(net) is nets.UNet
    assert (net.first.out_channels, net.mix.out_channels, net.first.in_channels) == (192, 64, 10)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("branch", [None, 2])
def test_unet_sees_what_is_known_and_nothing_else(ours, branch):
    net = picture_net(ours, stages=3 if branch else 1)
    model = UpscaleARDM(net, 60, 6, branch) if branch else ARDM(net, 60, 6)
    x, m, t = torch.randint(6, (1, 60)), torch.rand(1, 60) < 0.5, 30 * ONE
    before = model.log_probs(x, m, t, ONE)
    hidden = torch.where(m, x, (x + 3) % 6)
    assert torch.equal(before, model.log_probs(hidden, m, t, ONE))
    if branch is None:                                     # whatever stands where nothing is known
        assert torch.equal(net(x, m, t, ONE), net(hidden, m, t, ONE))
    i = int(m[0].nonzero()[0])
    shown = x.clone()
    shown[0, i] = (x[0, i] + 4) % 8 if branch else (x[0, i] + 1) % 6     # another first digit
    assert not torch.allclose(before, model.log_probs(shown.clamp(max=5), m, t, ONE))


@pytest.mark.parametrize("ours", [True, False])
def test_unet_keeps_pixels_and_colours_where_they_are(ours, monkeypatch):
    """Without its body, a value is seen in the 3 x 3 pixels around it alone (and in the windows of
    the means), and each colour of each pixel gets its own logits."""
    net = picture_net(ours)
    monkeypatch.setattr(net, "body", lambda h, time: h)
    monkeypatch.setattr(net, "norm", nn.Identity())
    monkeypatch.setattr(nets, "local_means", lambda v, seen: (torch.zeros(4, *v.shape),) * 2)
    x, m = torch.zeros(1, 60).long(), torch.ones(1, 60).bool()
    for c, i, j in [(0, 0, 5), (1, 4, 0), (1, 2, 3)]:
        around = torch.zeros(5, 6, dtype=torch.bool)
        around[max(0, i - 1):i + 2, max(0, j - 1):j + 2] = True
        changed = moved(net, x, 30 * c + 6 * i + j, m).view(2, 5, 6)
        assert torch.equal(changed, around.expand(2, 5, 6))
    before = net(x, m, ONE, ONE).view(2, 30, 6)
    with torch.no_grad():
        net.bias[1] += torch.arange(6)
    after = net(x, m, ONE, ONE).view(2, 30, 6) - before
    assert not after[0].any() and torch.allclose(after[1], torch.arange(6.0), atol=1e-4)


def test_local_means_are_means_of_what_is_seen():
    v, seen = torch.randn(2, 3, 7, 9), (torch.rand(2, 3, 7, 9) < 0.4).float()
    means, counts = nets.local_means(v, seen)
    B, C, i, j = 1, 2, 3, 0
    mean = (v * seen)[B, C].sum() / (seen[B, C].sum() + 0.3)
    for width, got, count in zip(nets.WINDOWS, means[:, B, C, i, j], counts[:, B, C, i, j]):
        r = width // 2
        here = (slice(max(0, i - r), i + r + 1), slice(max(0, j - r), j + r + 1))
        n = seen[B, C][here].sum()
        mean = ((v * seen)[B, C][here].sum() + 0.3 * mean) / (n + 0.3)
        assert torch.allclose(got, mean, atol=1e-5)
        assert torch.allclose(count.mul(3).exp() - 1, n, atol=1e-4)


def test_later_stages_see_the_middle_of_what_is_not_yet_refined():
    net = nets.OurUNet(16, (1, 2, 2), 8, dim=8, depth=1, stages=2, b=4, values=False)
    v, m = torch.tensor([[[[4.0, 8.0], [0.0, 12.0]]]]) / 16 - 0.5, torch.zeros(1, 1, 2, 2).bool()
    m[0, 0, 0, 0] = True
    first, later = (net.planes(v, m, torch.tensor([s]))[2] / nets.MEAN for s in (1, 2))
    assert abs(later.mean().item() - ((4 + 10 + 2 + 14) / 4 / 16 - 0.5)) < 0.02
    assert torch.allclose(first, torch.tensor(-0.25), atol=0.1)          # what is known alone


def test_logistic_is_the_density_of_the_logistic_distribution():
    location, width = torch.tensor([[0.1], [-0.4]]), torch.tensor([[0.3], [-0.2]])
    scale = torch.exp(2 * width - 3)
    z = (torch.arange(16) / 16 - 0.5 - location) / scale
    density = torch.exp(-z) / (1 + torch.exp(-z)) ** 2
    assert torch.allclose(nets.logistic(location, width, 16), torch.log(density), atol=1e-4)


EXTREMES = list(itertools.product([-9e4, -3.0, 0.0, 32768.2, 65535.0, 2e5], [-7.0, 0.0, 3.0, 14.0]))


def mixtures(dtype=torch.float64):
    """Parameters of mixtures of two logistics, (n, 7): every pair of extremes, anchored at 100."""
    pairs = torch.tensor(list(itertools.product(EXTREMES, repeat=2)), dtype=dtype)       # (n, 2, 2)
    first = torch.tensor([100.0, 0.3, -0.4], dtype=dtype).expand(len(pairs), 3)
    return torch.cat((first, pairs[..., 0] - 100, pairs[..., 1]), dim=1)


def test_the_mass_of_an_interval_is_a_difference_of_sigmoids():
    mixture = torch.tensor([3.0, 0.2, -0.5, 0.1, 1.0, -0.3, 0.4]).double()
    weight, centre, scale = mixture[1:3].softmax(0), 3 + mixture[3:5], mixture[5:].exp()
    for low, high in itertools.combinations(range(9), 2):
        below = [0.0 if i == 0 else 1.0 if i == 8 else torch.sigmoid((i - 0.5 - centre) / scale)
                 for i in (low, high)]
        expected = (weight * (below[1] - below[0])).sum()
        found = log_mass(mixture, torch.tensor(low), torch.tensor(high), 8).exp()
        same(f"mass of {low}..{high - 1}", found, expected)


def test_masses_sum_to_one_over_all_values_and_over_all_digits():
    x, some = torch.arange(1 << 16), mixtures()
    for row in some[::29]:
        assert abs(log_mass(row, x, x + 1, 1 << 16).exp().sum().item() - 1) < 1e-6
    for b, unit in ((2, 32768), (16, 4096), (16, 1), (256, 1), (4, 64)):
        low = torch.randint(65536 // (b * unit), (len(some),), generator=seeded()) * b * unit
        digits = low[:, None] + unit * torch.arange(b)
        parts = log_mass(some[:, None], digits, digits + unit, 1 << 16)
        whole = log_mass(some, low, low + b * unit, 1 << 16)
        assert torch.allclose(parts.logsumexp(1), whole, rtol=1e-9, atol=1e-9)


def test_mixtures_have_finite_gradients_in_float32_whatever_they_are():
    for x in (0, 1, 32768, 65534, 65535):
        mixture = mixtures(torch.float32).requires_grad_()
        low = torch.full((len(mixture),), x)
        loss = -log_mass(mixture, low, low + 1, 1 << 16)
        loss.sum().backward()
        assert loss.isfinite().all() and (loss > -1e-6).all() and mixture.grad.isfinite().all()


def test_nll_of_an_upscale_mixture_is_the_sum_of_digits_log_masses():
    mixture = torch.tensor([4.0, 0.2, -0.5, -0.9, 5.0, -0.3, 0.9]).double()
    model, x = UpscaleMixture(Fixed(mixture), 3, 16, 4), torch.tensor([[3, 0, 14]])
    nats = 0.0
    for value in x[0]:
        for low, unit, before in ((value // 4 * 4, 4, 16), (value, 1, 4)):
            above = value // before * before
            nats -= (log_mass(mixture, low, low + unit, 16)
                     - log_mass(mixture, above, above + before, 16)).item()
    same("nll", model.nll(x), nats)
    m, t, s = torch.ones(1, 3).bool(), torch.tensor([2]), torch.tensor([2])
    log_p = pick(model.log_probs(x, m, t, s), model.symbol(x, s))
    same("log p of the digits", model.true_log_p(x, m, t, s), log_p)


def test_an_order_agnostic_mixture_draws_and_has_an_exact_nll():
    K, D, x = 5, 2, all_x(2, 5)
    model = MixtureARDM(Table(D, K, 7), D, K)
    for plan in (None, [(1, 1, 2)]):
        p = [(-model.nll(x, plan, sigma.expand(25, 2))).exp() for sigma in all_sigma(2)]
        for each in p:
            same("sum of p(x)", each.sum(), 1.0)
        assert_drawn_with(model, plan, torch.stack(p).mean(dim=0))
    losses = [model.loss(x, t * ONE.expand(25), sigma=sigma.expand(25, 2))
              for t in (1, 2) for sigma in all_sigma(2)]
    nll = torch.stack([model.nll(x, sigma=sigma.expand(25, 2)) for sigma in all_sigma(2)])
    assert torch.allclose(torch.stack(losses).mean(dim=0), nll.mean(dim=0))
    where, t = torch.rand(25, 2) < 0.5, ONE.expand(25)
    assert torch.equal(model.log_probs(x, x < 0, t, t)[where],
                       model.log_probs(x, x < 0, t, t, where))


def wave_net(branch, recipe="ours", K=1 << 16):
    c = dict(kind="audio", K=K, shape=[64], recipe=recipe, branch=branch, dim=8, depth=3, heads=1,
             parametrization="mixture" if recipe == "ours" else "direct")
    torch.manual_seed(0)
    model = nets.build(c).double()
    for p in model.parameters():                           # what begins as zeros speaks, too
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("recipe, branch", [("ours", 0), ("ours", 16), ("paper", 0), ("paper", 16)])
def test_wavenet_sees_both_sides_and_nothing_that_is_masked(recipe, branch):
    model = wave_net(branch, recipe)
    x, m = torch.randint(65536, (2, 64), generator=seeded()), torch.rand(2, 64) < 0.5
    t, s = torch.tensor([20, 40]), torch.tensor([1, model.S])
    unit = 1 << 16 if model.S == 1 else model.unit(s - 1)
    unit = torch.where(m, 1 if model.S == 1 else model.unit(s), unit)
    finer = x // unit * unit + torch.randint(1 << 16, (2, 64)) % unit    # other digits below
    one, other = model.logits(x, m, t, s), model.logits(finer, m, t, s)
    assert torch.equal(one, other) and (x != finer).any()
    for i in torch.nonzero(m[1])[[0, -1], 0]:
        changed = x.clone()
        changed[1, i] = (x[1, i] + 9000) % 65536
        differs = (model.logits(changed, m, t, s) != one).any(dim=2)
        assert differs[1, max(i - 4, 0):i + 5].all() and not differs[0].any()
    assert model.logits(x[:, :10], m[:, :10], t, s).shape[1] == 10       # shorter data will do


@pytest.mark.parametrize("branch", [0, 2, 16, 256])
def test_nothing_of_the_size_of_all_values_is_made_in_training(branch):
    model, x = wave_net(branch), torch.randint(65536, (2, 64))
    with Watch() as watch:
        model.loss(x).sum().backward()
    assert max(watch.sizes) <= 2 * 64 * 24 * 3             # not even the digits
    with watch:
        model.nll(x, planner.uniform_plan(model.S, 64, 2 * model.S))
    of_a_call = 2 * 32 << 16
    assert max(watch.sizes) <= (2 * 64 * 16 * 300 if branch else of_a_call)


def test_the_integer_nearest_to_zero_is_found():
    low, unit = torch.meshgrid(torch.arange(-20, 20), torch.arange(1, 9), indexing="ij")
    expected = [min(range(i, i + n), key=abs) for i, n in zip(low.flatten(), unit.flatten())]
    assert nets.nearest_to_zero(low, unit).flatten().tolist() == expected


def test_what_machines_differ_by_is_not_multiplied_by_thousands(monkeypatch):
    """Loud sound, quiet digits: a centre in units of the sample would make 1e-14 ten thousandths of
    a narrow scale."""
    model, body, noise = wave_net(16), nets.WaveNet.body, 0.0
    ramps = (torch.arange(4 * 64) * 257).view(4, 64) % 65536
    x = torch.cat((ramps, torch.randint(-3, 3, (4, 64), generator=seeded()) + 62000))
    model.net.head.bias.data[6:] = -99.0                   # as narrow as can be
    monkeypatch.setattr(nets.WaveNet, "body", lambda net, *how: body(net, *how) + noise)
    for s in range(1, model.S + 1):
        t, s = torch.full((2, 8), s)
        m = torch.rand(x.shape, generator=seeded()) < 0.5
        one, noise = model.log_probs(x, m, t, s), 1e-14
        other, noise = model.log_probs(x, m, t, s), 0.0
        deep = -18                                         # below, all is alike to the coder
        assert (one.clamp(min=deep) - other.clamp(min=deep)).abs().max() < coder.MARGIN / 10


def test_logistics_begin_in_the_interval_that_the_digits_so_far_leave():
    model, half = wave_net(16), 1 << 15
    model.net.head.weight.data.zero_()
    x, m = torch.randint(half, (1, 64), generator=seeded()) + half, torch.zeros(1, 64).bool()
    for width in (0.0, -99.0):
        model.net.head.bias.data = torch.tensor([0.0] * 6 + [width] * 3).double()
        for s in range(2, model.S + 1):
            s = torch.tensor([s])
            before = model.coarsen(x, s - 1)
            mixture = model.logits(x, m, s, s)
            mass = log_mass(mixture, before, before + model.unit(s - 1), 1 << 16)
            assert (mass.exp() > 0.3).all()
    bits = -model.log_probs(x, m, s, s).max(dim=2).values / math.log(2)
    assert bits.mean() < 0.1                               # one value of the last sixteen


def test_sound_of_8_bits_is_noticed_and_has_a_logistic_of_its_own(monkeypatch):
    model, planes, plain = wave_net(256), [], nets.with_stage
    monkeypatch.setattr(nets, "with_stage", lambda p, *how: planes.append(p[10]) or plain(p, *how))
    x = 256 * torch.randint(256, (1, 64), generator=seeded())
    m, s = torch.rand(x.shape, generator=seeded()) < 0.5, torch.tensor([model.S])
    for clip in (x, x + 1):                                # its last digits are 0, or 1
        mixture, low = model.logits(clip, m, s, s)[~m], model.coarsen(x, s - 1)[~m]
        point = log_mass(mixture[:, [0, 1, 4, 7]], low, low + 1, 1 << 16)
        assert (point > -1e-3).all()                       # all further digits are 0
    assert (planes[0] > 0.9).all() and not planes[1].any()               # known digits that are 0


@pytest.mark.parametrize("branch, recipe", [(0, "paper"), (0, "ours"), (16, "ours")])
def test_a_mixture_that_wants_no_bounds_still_has_finite_gradients(branch, recipe):
    """A uniform interval wants an endless scale, of which float32 would make a loss of NaN."""
    model, x = wave_net(branch, recipe).float(), torch.randint(65536, (2, 64), generator=seeded())
    for width in (-1e3, 1e3):
        model.net.head.bias.data.chunk(3)[2][:] = width
        model.loss(x, generator=seeded()).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_paper_audio_network_is_the_papers():
    data = datasets.load("tones")
    c = settings(data, size="paper", recipe="paper")
    net = nets.build(c).net
    assert (c["batch"], c["branch"], c["parametrization"]) == (256, 16, "direct")
    assert [block.gates.dilation[0] for block in net.blocks] == [2 ** i for i in range(12)] * 3
    assert net.embed.weight.shape == (65536, 64) and net.first.weight.shape == (192, 6, 3)
    model = nets.build(settings(data, size="tiny", recipe="paper", branch=0))
    assert model.net.num_outputs == 91 and model.S == 1
    bits = bits_per_dim(model.loss(data.batch(2, seeded()), generator=seeded()), data.D)
    assert (abs(bits - 16) < 0.3).all()                    # begins as nearly uniform


# -- The scripts -----------------------------------------------------------------------------------

def test_training_prints_and_writes_what_it_promises(folder, gallery):
    printed = (folder / "printed").read_text()
    for words in ("bits/char, standard error", "loss components L_t", "network calls", "samples",
                  "single symbols", "bz2", "python sample.py --ckpt", "python compress.py encode"):
        assert words in printed
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["bits_per_dim"] < math.log2(27) and results["seed"] == 0
    assert [row["calls"] for row in results["calls"]] == [5, 10, 20, 24]
    for row in results["calls"]:
        assert abs(row["predicted"] - row["bits"]) < 5 * row["stderr"] + 0.02
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    assert checkpoint["L"].shape == checkpoint["counts"].shape == (1, 24)
    assert json.loads((gallery / "results.json").read_text())["params"] > 0
    assert np.load(gallery / "test.npy").shape == (16, 6, 5, 3)
    assert (gallery / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluating_a_checkpoint_gives_the_same_number(folder, capsys):
    assert call(train, "--evaluate", folder / "ckpt.pt", "--device", "cpu") == 0
    lines = (folder / "printed").read_text().splitlines()
    assert next(line for line in lines if line.startswith("test:")) in capsys.readouterr().out


def test_the_bound_agrees_with_enumeration_and_counts_every_character():
    model = uniform(10, 27)
    x = torch.zeros(7, 10, dtype=torch.uint8)
    found = train.bound(model, x, passes=20)
    assert math.isclose(found["bits"], math.log2(27), rel_tol=1e-6)
    assert sum(x.numel() for x, _, _ in model.net.seen) == 20 * 70
    model, x = ARDM(Table(3, 2, dtype=torch.float32), 3, 2), torch.tensor([[1, 0, 1], [0, 0, 1]])
    nll = torch.stack([model.nll(x, sigma=s.expand(2, 3)) for s in all_sigma(3)]).mean().item()
    found = train.bound(model, x.to(torch.uint8), passes=5000)
    assert math.isclose(found["bits"], bits_per_dim(nll, 3), rel_tol=0.02)


def test_where_time_is_short_the_bound_is_of_datapoints_from_all_over(monkeypatch):
    model, clock = ARDM(Fixed(torch.tensor([2.0, 0.0])), 10, 2), itertools.count(step=30)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(nets, "rows_per_call", lambda device, D: 50)
    x = (torch.arange(400) >= 200)[:, None].expand(400, 10)
    found = train.bound(model, x.to(torch.uint8))
    assert found["chunks"] == 50
    one, other = (-torch.tensor([2.0, 0.0]).log_softmax(0) / math.log(2)).tolist()
    assert abs(found["bits"] - (one + other) / 2) < 4 * found["stderr"]


def test_components_agree_with_enumeration_on_the_same_chunks():
    model, x = ARDM(Table(3, 2, dtype=torch.float32), 3, 2), torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected = [torch.stack([model.loss(x, t * ONE.expand(2), sigma=s.expand(2, 3)).mean()
                             for s in all_sigma(3)]).mean().item() / 3 for t in (1, 2, 3)]
    L, counts = train.components(model, x.repeat(400, 1).to(torch.uint8))
    assert counts.tolist() == [[2400, 1600, 800]]
    for t, nats in enumerate(expected):
        same(f"L_{t + 1}", L[0, t], bits_per_dim(nats, 1), rel=0.1)
    model = UpscaleARDM(Fixed(torch.zeros(4)), 100, 4, 2)
    L, counts = train.components(model, torch.arange(300).view(3, 100) % 4)
    assert L.shape == (2, 100) and (L[counts > 0] - 1).abs().max() < 1e-6
    met = counts[0].nonzero()[:, 0] + 1
    assert met[0] == 1 and met[-1] == 100 and (met.diff() <= 1 + met[:-1] / 4).all()
    masks = [m for _, m, _ in model.net.seen]
    assert all((a <= b).all() for a, b in zip(masks[:len(met)], masks[1:len(met)]))


def test_sampling_fills_in_blanks_and_is_repeatable(folder, tmp_path, capsys):
    found = []
    for seed in (4, 4, 5):
        assert call(sample, "--ckpt", folder / "ckpt.pt", "--n", 40, "--calls", 5, "--seed", seed,
                    "--out", tmp_path / "a") == 0
        found.append((tmp_path / "a" / "samples.txt").read_text().splitlines())
    assert found[0] == found[1] != found[2]
    assert all(re.fullmatch("[a-z ]{24}", line) for line in found[1]) and len(set(found[1])) > 30
    for order in ("random", "forward", "backward", "random:3", "spaced:4", "halves"):
        assert call(sample, "--ckpt", folder / "ckpt.pt", "--prompt", "the ____ of", "--frames",
                    "--order", order, "--n", 2, "--out", tmp_path) == 0
        assert "4 network calls" in capsys.readouterr().out
        for line in (tmp_path / "samples.txt").read_text().splitlines():
            assert len(line) == 11 and line[:4] == "the " and line[8:] == " of" and "_" not in line
        frames = [line[-11:] for line in (tmp_path / "frames.txt").read_text().splitlines()]
        assert [frame.count("_") for frame in frames] == [4, 3, 2, 1, 0] * 2
        assert frames[0] == "the ____ of" and (order != "forward" or frames[1][5:] == "___ of")


def test_compress_on_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "in").write_bytes((folder / "test.txt").read_bytes()[:2000])
    ckpt = ("--ckpt", folder / "ckpt.pt", "--device", "cpu")
    assert call(compress, "encode", *ckpt, tmp_path / "in", tmp_path / "a") == 0
    assert "spaced:8" in capsys.readouterr().out
    assert call(compress, "decode", *ckpt, tmp_path / "a", tmp_path / "back") == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "in").read_bytes()
    assert call(compress, "info", tmp_path / "a") == 0
    assert "length   2000" in capsys.readouterr().out
    assert call(compress, "bench", *ckpt, tmp_path / "in") == 0
    printed = capsys.readouterr().out
    assert "decoded and identical" in printed and "exact nll" in printed and "xz" in printed


def test_every_script_explains_itself_and_readme_names_what_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for script in (train, sample, compress):
        assert call(script, "--help") == 0 and len(capsys.readouterr().out.splitlines()) < 80
    readme = (HERE / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .*? \| (`.*?`) \| (`.*?`) \|$", readme, re.M)
    functions, tests = (re.findall(r"`([\w.]+)`", " ".join(column)) for column in zip(*rows))
    for name in functions:
        thing, *path = name.split(".")
        thing = __import__(thing)
        for part in path:
            thing = getattr(thing, part)
    assert len(tests) > 8 and all(name in globals() for name in tests)


# -- exercises/: the course ------------------------------------------------------------------------

@pytest.mark.skipif((HERE / make.MARK).exists(), reason="this is an assignment itself")
def test_an_assignment_holds_no_line_of_a_solution_and_links_that_lead_somewhere(tmp_path):
    make.make(tmp_path / "copy", page=True)
    page = (HERE / "results" / "page.html").read_text("utf-8")
    gone = "\n".join(re.findall(r"solution \*/(.*?)/\* (?:end|instead)", page, re.S)).split("\n")
    for name in {name for name, _ in make.EXERCISES.values()}:
        kept = (tmp_path / "copy" / name).read_text("utf-8").split("\n")
        gone += {*(HERE / name).read_text("utf-8").split("\n")} - {*kept}
    gone = {line.strip() for line in gone if len(line.strip()) > 24}
    for path in (tmp_path / "copy").rglob("*.*"):
        if path.suffix in (".py", ".md", ".html", ".json", ".txt"):
            lines = html.unescape(re.sub(r"</?\w[^<>]*>", "", path.read_text("utf-8"))).split("\n")
            assert not gone & {line.strip() for line in lines}, path
    readme = (tmp_path / "copy" / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", readme):
        assert len(gone) > 100 and (tmp_path / "copy" / link).exists(), link


def test_only_what_ran_and_passed_counts_and_faults_stay_apart(tmp_path):
    make.make(tmp_path / "done", [1])
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --bad\n")
    file = tmp_path / "done" / "ardm.py"
    text = file.read_text("utf-8")
    blanks = re.findall("raise NotImplementedError.*", text)
    for old, new in zip(blanks, ('import pytest; pytest.skip("later")',
                                 "rank = torch.where(known, 0, sigma).argsort(-1).argsort(-1) + 1\n"
                                 "    return rank * ~known")):
        text = text.replace(old, new)
    file.write_text("\ufeff" + text, "utf-8")
    rows = check.grade(tmp_path / "done", [1])
    assert [row[1:4] for row in rows[:2]] == [("sample_sigma", 0, 4), ("known_first", 6, 6)]
    assert "skipped: later" in rows[0][4] and check.as_junit(rows).count("<failure") == 2
    assert [test["score"] for test in json.loads(check.as_json(rows))["tests"]] == [0, 6, 0]
