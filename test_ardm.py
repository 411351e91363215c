"""The paper's claims as oracles, the classic mistakes, then every script. Run: python -m pytest -q

ARDM_DATA names a folder with real data; tests that need it skip without. What must hold on a GPU
is parametrised over the devices that are there, so that a CPU runs the same lines.

Each classic mistake makes a test fail: a weight off by one, a t that never is D, a masked value
that leaks, a mask of sigma <= t, digits from the least significant end, symbols pushed in reading
order, a frequency of 0, a plan with a call of no variable, a decoder that reads another grid.
"""
import argparse
import bz2
import dataclasses
import gzip
import hashlib
import html
import io
import itertools
import json
import lzma
import math
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import wave
import xml.etree.ElementTree
import zipfile
import zlib
from pathlib import Path
from unittest import mock

os.environ["TORCHDYNAMO_DISABLE"] = "1"               # on a GPU each run would compile for long

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
from ardm import (ARDM, UpscaleARDM, bits_per_dim, drawing, known_first, num_stages, pick,
                  sample_sigma, stratified_steps)
from nets import MixtureARDM, UpscaleMixture, digit_log_p, log_mass
from exercises import make
from results import bench, page

HERE = Path(__file__).parent
ASSIGNMENT = (HERE / "exercises" / "assignment").exists()  # a copy without the solutions
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(words, got, expected, rel=1e-9):
    """Fails in the words of the paper, with the first number that is wrong."""
    got, expected = (part.detach() if torch.is_tensor(part) else part for part in (got, expected))
    got, expected = np.broadcast_arrays(np.asarray(got), np.asarray(expected))
    for one, other in zip(got.flat, expected.flat):
        assert math.isclose(one, other, rel_tol=rel, abs_tol=1e-9), (
            f"{words}: expected {other:.10g}, got {one:.10g}")


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

def test_exercise_01_sigma_is_a_uniform_permutation():
    sigma = sample_sigma(6000, 3, generator=seeded())
    same("each row of sigma holds every step 1..D once", sigma.sort(dim=1).values,
         torch.arange(1, 4))
    orders, counts = sigma.unique(dim=0, return_counts=True)
    assert len(orders) == 6, f"sigma ~ U(S_3) takes 6 values, not {len(orders)}"
    same("each of the 6 orders comes 1 time in 6", counts / 6000, 1 / 6, rel=0.15)


def test_exercise_01_what_is_known_has_step_0_and_the_others_keep_their_order():
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


@pytest.mark.parametrize("K, b, S", [
    (256, 2, 8), (256, 16, 2), (256, 256, 1), (27, 3, 3), (28, 27, 2), (125, 5, 3), (243, 3, 5),
    (65536, 4, 8), (3, 2, 2), (2, 2, 1)])
def test_125_classes_in_digits_of_5_are_3_stages_not_4(K, b, S):
    """ceil(log(125) / log(5)) is 4 in floats."""
    assert num_stages(K, b) == S
    for bad in (0, 1, K + 1):
        with pytest.raises(ValueError, match=f"2 to K = {K}"):
            num_stages(K, bad)


def test_t_reaches_1_and_D_and_every_batch_covers_all_steps():
    for seed in range(20):
        t, s = stratified_steps(24, 2, 6, generator=seeded(seed))
        pairs = sorted(zip(s.tolist(), t.tolist()))
        assert pairs == sorted(2 * list(itertools.product(range(1, 3), range(1, 7))))
    first = torch.stack([stratified_steps(3, 1, 5)[0] for _ in range(2000)])
    for column in first.T:                                 # each row alone is uniform
        assert (column.bincount(minlength=6)[1:] - 400).abs().max() < 100


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
def test_exercise_02_uniform_network_costs_exactly_D_log_K_on_every_draw(D, K):
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
    assert torch.equal(one, two) and (one[~m] == 0).all() and torch.equal(one[m], x[m])


def test_exercise_02_mean_loss_over_all_orders_and_steps_is_the_bound_of_eq_2():
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


def test_exercise_04_expected_nll_under_a_plan_is_its_cost_by_L():
    """Eq. 3: over random orders, k variables generated together at step t cost k L_t."""
    model, x, sigma = ARDM(Table(4, 2), 4, 2), torch.tensor([[1, 0, 0, 1]]), all_sigma(4)
    L = [np.mean([model.loss(x, t=torch.tensor([t]), sigma=order[None]).item() / 4
                  for order in sigma]) for t in range(1, 5)]
    for plan in ([(1, 1, 1), (1, 2, 3)], [(1, 1, 2), (1, 3, 2)], planner.full_plan(1, 4)):
        nll = model.nll(x.expand(len(sigma), 4), plan, sigma).mean()
        same(f"Eq. 3: the plan {plan} costs the sum of k L_t", planner.plan_cost(L, plan), nll)


def test_exercise_03_generate_writes_every_variable_once_with_one_call_an_entry():
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


def test_exercise_03_nll_and_samples_of_the_unknown_given_the_known_are_conditional():
    model, x = ARDM(Table(3, 2), 3, 2), all_x(3, 2)
    forward = torch.tensor([[1, 2, 3]]).expand(8, 3)
    given = model.nll(x, sigma=torch.tensor([[0, 2, 3]]).expand(8, 3))   # x_1 is given
    assert torch.allclose(given, model.nll(x, sigma=forward) - model.nll(x, [(1, 1, 1)], forward))
    known = torch.tensor([True, True, False]).expand(20000, 3)
    drawn = model.sample(20000, x=x[6:7].expand(20000, 3), known=known)
    p = model.log_probs(x[6:7], known[:1], 3 * ONE, ONE)[0, 2].exp()
    assert abs(drawn[:, 2].float().mean() - p[1]) < 5 * math.sqrt(0.25 / 20000)


def test_a_symbol_of_probability_0_is_never_drawn():
    model = UpscaleARDM(Fixed(torch.randn(5)), 1, 5, 3)    # 12 and 2x lead nowhere in base 3
    edges = torch.tensor([0.0, 0.5, 1 - 2 ** -24])
    u = torch.stack(torch.meshgrid(edges, edges, indexing="ij")).reshape(2, 9, 1)
    x = model.generate(torch.zeros(9, 1).long(), planner.full_plan(2, 1), torch.ones(9, 1).long(),
                       drawing(u))
    assert x.max() == 4 and x.min() == 0


def test_temperature_zero_takes_the_most_probable_symbol():
    model, plan, sigma = ARDM(Table(3, 4), 3, 4), [(1, 1, 3)], sample_sigma(5, 3)
    best = model.log_probs(torch.zeros(1, 3).long(), torch.zeros(1, 3).bool(), ONE, ONE)
    for temperature in (0, 1e-45, 1e-4):
        drawn = model.sample(5, plan, sigma, temperature=temperature)
        assert (drawn == best.argmax(dim=-1)).all()


def test_bfloat16_logits_still_give_probabilities_that_sum_to_one():
    model, x = uniform(3, 256).to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    log_p = model.log_probs(x, x == 0, ONE.expand(2), ONE.expand(2))
    assert log_p.dtype == torch.float32
    assert torch.allclose(log_p.exp().sum(dim=-1), torch.ones(2, 3), atol=1e-6)


# -- ardm.py: the upscale model --------------------------------------------------------------------

BASES = [(256, 2), (256, 4), (256, 16), (27, 3), (27, 2), (5, 3), (8, 2), (125, 5)]


@pytest.mark.parametrize("K, b", BASES)
def test_exercise_06_stages_lead_from_nothing_to_x_and_symbols_are_its_digits(K, b):
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
             model.refine(model.coarsen(x, s - 1), a, s), model.coarsen(x, s))
    s = torch.tensor([0, model.S])
    assert torch.equal(model.coarsen(x.expand(2, -1), s)[1:], x)


@pytest.mark.parametrize("K, b", BASES)
def test_exercise_07_with_one_fixed_output_the_stages_multiply_to_its_softmax(K, b):
    logits = 3 * torch.randn(K, dtype=torch.float64)
    model, x, t = UpscaleARDM(Fixed(logits), 1, K, b), torch.arange(K)[:, None], ONE.expand(K)
    log_p = sum(pick(model.log_probs(x, x < 0, t, s * t), model.symbol(x, s))
                for s in range(1, model.S + 1))
    same("the digits' probabilities multiply to the value's", log_p[:, 0],
         torch.log_softmax(logits, dim=-1))


def test_exercise_07_data_parametrisation_is_the_papers_matrices_written_out():
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


def test_finer_digits_never_reach_the_network_before_their_stage():
    model, x = UpscaleARDM(Fixed(torch.zeros(27)), 6, 27, 3), torch.randint(27, (9, 6))
    m, s = torch.rand(9, 6) < 0.5, torch.arange(9) % 3 + 1
    unit = 3 ** (3 - torch.where(m, s[:, None], s[:, None] - 1))
    other = x // unit * unit + (x + torch.randint(1, 3, (9, 6))) % unit  # other digits below
    model.log_probs(x, m, s, s)
    model.log_probs(other, m, s, s)
    (one, _, _), (two, _, _) = model.net.seen
    assert torch.equal(one, two) and (x != other).any()


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
    ("text", 27, [16], 3, "data"), ("bytes", 256, [16], 0, "data"),
    ("image", 256, [3, 4, 4], 0, "data"), ("image", 256, [3, 4, 4], 4, "data"),
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


def text_net(**options):
    """A small Transformer in float64 in which nothing is zero."""
    torch.manual_seed(0)
    net = nets.Transformer(7, 12, dim=16, depth=2, heads=2, **options).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def picture_net(extras, K=6, shape=(2, 5, 6), stages=1, outputs=None):
    """A U-Net whose zero-initialised layers say something."""
    torch.manual_seed(0)
    net = nets.UNet(K, shape, outputs, dim=8, depth=1, heads=1, stages=stages, b=2,
                    values=outputs is None, extras=extras)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return net


def moved(net, x, i, m):
    """(D,) bool: where the output changes if variable i of x (1, D) does."""
    other = x.clone()
    other[0, i] = (other[0, i] + 1) % 6
    return ((net(other, m, ONE, ONE) - net(x, m, ONE, ONE)).abs().amax(dim=2) > 1e-9)[0]


@pytest.mark.parametrize("extras", [True, False])
def test_transformer_sees_all_that_is_known_in_both_directions_and_no_more(extras):
    net, x = text_net(extras=extras), torch.randint(6, (1, 12))
    m = torch.arange(12)[None] % 3 == 0
    logits = net(x, m, ONE, ONE)
    assert torch.equal(net(torch.where(m, x, 6 - x), m, ONE, ONE), logits)
    assert moved(net, x, 0, m).all() and moved(net, x, 9, m).all()
    hidden = m & (torch.arange(12) > 0)
    assert ((net(x, hidden, ONE, ONE) - logits).abs().amax(dim=2) > 1e-9).all()
    assert net(x[:, :5], m[:, :5], ONE, ONE).shape == (1, 5, 7)          # shorter data will do


def test_absorbed_is_a_class_of_its_own():
    """The released code's embedding had no row for it: "unknown" looked like the letter z."""
    net, x, m = text_net(), torch.full((1, 12), 6), torch.ones(1, 12, dtype=torch.bool)
    assert (net(x, m, ONE, ONE) - net(x, ~m, ONE, ONE)).abs().max() > 1e-3


def test_blocks_of_neighbours_see_two_positions_on_either_side():
    """With extras, a block without attention; at the ends of the text too."""
    net, m = text_net(), torch.ones(1, 12, dtype=torch.bool)
    nn.init.zeros_(net.blocks[1].attention.out.weight)
    nn.init.zeros_(net.blocks[1].down.weight)
    assert [block.attention is not None for block in net.blocks] == [False, True]
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
    nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 15).unbind(1)    # (B, heads, d, pixels)
    p = torch.softmax(torch.einsum("bhdi,bhdj->bhij", q, k) / 2, dim=-1)
    seen = torch.einsum("bhij,bhdj->bhdi", p, v).reshape(2, 8, 3, 5)
    assert torch.allclose(layer(x, None), x + layer.out(seen), atol=1e-5)


def settings(data, **given):
    given = dict(size="tiny", device="cpu", steps=8) | given
    return train.complete(train.Settings(**given), data)


def test_paper_size_and_recipe_are_the_papers():
    c = settings(datasets.load("pydoc", 250), size="paper", recipe="paper")
    assert (c.dim, c.depth, c.heads, c.batch) == (768, 12, 12, 512)
    with torch.device("meta"):
        net = nets.build(vars(c) | dict(kind="text", K=27, shape=[250])).net
    assert abs(sum(p.numel() for p in net.parameters()) - 85.1e6) < 0.2e6
    assert train.SIZES["text"]["paper"]["steps"] == 3_000_000
    paper = train.PAPER["text"]
    assert [paper[k] for k in ("lr", "warmup", "clip", "ema")] == [5e-4, 5000, 0.25, 0.995]
    c = settings(datasets.load("glyphs"), size="paper", recipe="paper", branch=4)
    assert (c.dim, c.depth, c.heads, c.batch, c.parametrization) == (256, 32, 1, 128, "data")
    with torch.device("meta"):
        net = nets.build(vars(c) | dict(kind="image", K=256, shape=[3, 32, 32])).net
    assert (len(net.down), len(net.middle), len(net.up)) == (32, 3, 32) and net.time is not None
    assert (net.first.out_channels, net.mix.out_channels, net.first.in_channels) == (192, 64, 10)
    small = nets.Transformer(27, 8, dim=32, depth=1, heads=2, extras=False)
    assert 0.9 < small.blocks[0].attention.qkv.weight.std() / (1 / 32) ** 0.5 < 1.1   # Xavier
    assert not small.head.bias.any() and small.head.weight.any()


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("branch", [None, 2])
def test_unet_sees_what_is_known_and_nothing_else(extras, branch):
    net = picture_net(extras, stages=3 if branch else 1)
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


@pytest.mark.parametrize("extras", [True, False])
def test_unet_keeps_pixels_and_colours_where_they_are(extras, monkeypatch):
    """Without its body, a value is seen in the 3 x 3 pixels around it alone (and in the windows of
    the means), and each colour of each pixel gets its own logits."""
    net = picture_net(extras)
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
    means, counts = nets.local_means(v, seen, prior=0.3)
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
    net = nets.UNet(16, (1, 2, 2), 8, dim=8, depth=1, stages=2, b=4, values=False)
    v, m = torch.tensor([[[[4.0, 8.0], [0.0, 12.0]]]]) / 16 - 0.5, torch.zeros(1, 1, 2, 2).bool()
    m[0, 0, 0, 0] = True
    _, near = net.neighbours(v, m, torch.tensor([2]))
    assert abs(near.mean().item() - ((4 + 10 + 2 + 14) / 4 / 16 - 0.5)) < 0.02
    _, near = net.neighbours(v, m, torch.tensor([1]))      # in the first stage only what is known
    assert torch.allclose(near, torch.tensor(-0.25), atol=0.1)


def test_logistic_is_the_density_of_the_logistic_distribution():
    location, width = torch.tensor([[0.1], [-0.4]]), torch.tensor([[0.3], [-0.2]])
    scale = torch.exp(2 * width - 3)
    z = (torch.arange(16) / 16 - 0.5 - location) / scale
    density = torch.exp(-z) / (1 + torch.exp(-z)) ** 2
    assert torch.allclose(nets.logistic(location, width, 16), torch.log(density), atol=1e-4)


# -- nets.py: audio, a mixture of logistics over values that no softmax can hold -------------------

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


def test_masses_sum_to_one_over_all_values_and_over_the_digits_of_any_prefix():
    x, some = torch.arange(1 << 16), mixtures()
    for row in some[::29]:
        assert abs(log_mass(row, x, x + 1, 1 << 16).exp().sum().item() - 1) < 1e-6
    for b, unit in ((2, 32768), (16, 4096), (16, 1), (256, 1), (4, 64)):
        low = torch.randint(65536 // (b * unit), (len(some),), generator=seeded()) * b * unit
        digits = low[:, None] + unit * torch.arange(b)
        parts = log_mass(some[:, None], digits, digits + unit, 1 << 16)
        whole = log_mass(some, low, low + b * unit, 1 << 16)
        assert torch.allclose(parts.logsumexp(1), whole, rtol=1e-9, atol=1e-9)
        log_p = digit_log_p(some, low, unit, b, 1 << 16)
        assert torch.allclose(log_p, parts - whole[:, None], rtol=1e-9, atol=1e-9)


def test_mixtures_have_finite_losses_and_gradients_in_float32_whatever_they_are():
    for x in (0, 1, 32768, 65534, 65535):
        mixture = mixtures(torch.float32).requires_grad_()
        low = torch.full((len(mixture),), x)
        loss = -log_mass(mixture, low, low + 1, 1 << 16)
        loss.sum().backward()
        assert loss.isfinite().all() and (loss > -1e-6).all() and mixture.grad.isfinite().all()


def test_nll_of_an_upscale_mixture_is_the_sum_of_its_digits_log_masses():
    mixture = torch.tensor([4.0, 0.2, -0.5, -0.9, 5.0, -0.3, 0.9]).double()
    model, x = UpscaleMixture(Fixed(mixture), 3, 16, 4), torch.tensor([[3, 0, 14]])
    nats = 0.0
    for value in x[0]:
        for low, unit, before in ((value // 4 * 4, 4, 16), (value, 1, 4)):
            above = value // before * before
            nats -= (log_mass(mixture, low, low + unit, 16)
                     - log_mass(mixture, above, above + before, 16)).item()
    same("nll", model.nll(x), nats)
    t, s = torch.tensor([2]), torch.tensor([2])
    log_p = model.log_probs(x, torch.ones(1, 3).bool(), t, s)
    same("log p of the digits", model.true_log_p(x, torch.ones(1, 3).bool(), t, s),
         pick(log_p, model.symbol(x, s)))


def test_an_order_agnostic_mixture_draws_and_codes_its_values_digit_by_digit():
    K, D, x = 5, 2, all_x(2, 5)
    model = MixtureARDM(Table(D, K, 7), D, K)
    assert (model.S, model.A, model.draws) == (1, K, 1)
    model.base, model.draws = 2, 3                         # as K = 65,536 has 16 and 4
    plans = [None, [(1, 1, 2)]]
    for plan in plans:
        p = [(-model.nll(x, plan, sigma.expand(25, 2))).exp() for sigma in all_sigma(2)]
        for each in p:
            same("sum of p(x)", each.sum(), 1.0)
        assert_drawn_with(model, plan, torch.stack(p).mean(dim=0))
    losses = [model.loss(x, t * ONE.expand(25), sigma=sigma.expand(25, 2))
              for t in (1, 2) for sigma in all_sigma(2)]
    nll = torch.stack([model.nll(x, sigma=sigma.expand(25, 2)) for sigma in all_sigma(2)])
    assert torch.allclose(torch.stack(losses).mean(dim=0), nll.mean(dim=0))
    assert MixtureARDM(Fixed(torch.zeros(7)), 2, 1 << 16).draws == 4


def wave_net(branch, recipe="ours", K=1 << 16):
    c = dict(kind="audio", K=K, shape=[64], recipe=recipe, branch=branch, dim=8, depth=3, heads=1,
             parametrization="mixture" if recipe == "ours" else "direct")
    torch.manual_seed(0)
    model = nets.build(c).double()
    for p in model.parameters():                           # what begins as zeros speaks, too
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("recipe, branch", [("ours", None), ("ours", 16), ("paper", None),
                                            ("paper", 16)])
def test_wavenet_sees_both_sides_and_nothing_that_is_masked(recipe, branch):
    model = wave_net(branch, recipe)
    x, m = torch.randint(65536, (2, 64), generator=seeded()), torch.rand(2, 64) < 0.5
    t, s = torch.tensor([20, 40]), torch.tensor([1, model.S])
    unit = torch.where(m, model.unit(s), model.unit(s - 1))
    finer = x // unit * unit + torch.randint(1 << 16, (2, 64)) % unit    # other digits below
    one, other = model.predict(x, m, t, s), model.predict(finer, m, t, s)
    assert torch.equal(one, other) and (x != finer).any()
    for i in torch.nonzero(m[1])[[0, -1], 0]:
        changed = x.clone()
        changed[1, i] = (x[1, i] + 9000) % 65536
        differs = (model.predict(changed, m, t, s) != one).any(dim=2)
        assert differs[1, max(i - 4, 0):i + 5].all() and not differs[0].any()
    short = model.predict(x[:, :10], m[:, :10], t, s)
    assert short.shape[1] == 10


@pytest.mark.parametrize("branch", [None, 2, 16, 256])
def test_nothing_of_the_size_of_all_values_is_ever_made(branch):
    model, x = wave_net(branch), torch.randint(65536, (2, 64))
    with Watch() as watch:
        model.loss(x).sum().backward()
    assert max(watch.sizes) <= 2 * 64 * 24 * 3             # of training: not even the digits
    with watch:
        model.nll(x, planner.uniform_plan(model.S, 64, 2 * model.S))
    assert max(watch.sizes) < 2 * 64 * 16 * 300


def test_the_integer_nearest_to_zero_is_found():
    low, unit = torch.meshgrid(torch.arange(-20, 20), torch.arange(1, 9), indexing="ij")
    expected = [min(range(i, i + n), key=abs) for i, n in zip(low.flatten(), unit.flatten())]
    assert nets.nearest_to_zero(low, unit).flatten().tolist() == expected


def test_louder_sound_has_the_same_mixture_but_wider():
    net, (t, s) = wave_net(None).net, (torch.tensor([20]), ONE)
    m = torch.rand(1, 64, generator=seeded()) < 0.5
    sound = torch.randint(-2000, 2000, (1, 64), generator=seeded())
    soft, loud = (net(n * sound + 32768, m, t, s)[~m, 1:].chunk(3, dim=1) for n in (1, 8))
    apart = loud[1].diff(dim=1) / soft[1].diff(dim=1)      # the logistics of a variable
    assert torch.median((apart - 8).abs()) < 1.0
    assert torch.median((loud[2] - soft[2] - math.log(8)).abs()) < 0.2


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


def test_logistics_begin_in_the_interval_that_the_digits_so_far_leave_and_can_be_narrow_in_it():
    model, half = wave_net(16), 1 << 15
    model.net.head.weight.data.zero_()
    x, m = torch.randint(half, (1, 64), generator=seeded()) + half, torch.zeros(1, 64).bool()
    for width in (0.0, -99.0):
        model.net.head.bias.data = torch.tensor([0.0] * 6 + [width] * 3).double()
        for s in range(2, model.S + 1):
            s = torch.tensor([s])
            before = model.coarsen(x, s - 1)
            mixture = model.logits(x, m, s, s, model.net.num_outputs)
            mass = log_mass(mixture, before, before + model.unit(s - 1), 1 << 16)
            assert (mass.exp() > 0.3).all()
    bits = -model.log_probs(x, m, s, s).max(dim=2).values / math.log(2)
    assert bits.mean() < 0.1                               # one value of the last sixteen


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
    net = nets.build(vars(c) | dict(kind="audio", K=data.K, shape=data.shape)).net
    assert (c.batch, c.branch, c.parametrization) == (256, 16, "direct")
    dilations = [block.gates.dilation[0] for block in net.blocks]
    assert dilations == [2 ** i for i in range(12)] * 3
    assert net.embed.weight.shape == (65536, 64) and net.first.weight.shape == (192, 6, 3)
    assert net.time[0].out_features == net.time[2].out_features == 1024
    c = settings(data, size="tiny", recipe="paper", branch=0)
    model = nets.build(vars(c) | dict(kind="audio", K=data.K, shape=data.shape))
    assert model.net.num_outputs == 91 and (model.S, model.draws) == (1, 4)
    bits = bits_per_dim(model.loss(data.batch(2, seeded()), generator=seeded()), data.D)
    assert (abs(bits - 16) < 0.3).all()                    # begins as nearly uniform


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
    assert [s for s, _, _ in plan] == sorted(s for s, _, _ in plan)
    for stage in range(1, S + 1):
        calls = [(t, k) for s, t, k in plan if s == stage]
        ends = list(itertools.accumulate(k for _, k in calls))
        assert [t for t, _ in calls] == [1] + [end + 1 for end in ends[:-1]] and ends[-1] == D


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


def test_exercise_05_plan_equals_the_plain_programme_at_a_size_that_has_many_levels():
    D, L = 150, falling(np.random.default_rng(1), 1, 150)[0]
    edge = (np.arange(1, D + 1)[None] - np.arange(D)[:, None]) * L[:, None]    # i -> j = column + 1
    edge[np.arange(D)[:, None] >= np.arange(1, D + 1)[None]] = np.inf
    E = np.r_[0.0, np.full(D, np.inf)]
    for budget in range(1, 40):
        E = np.r_[np.inf, (E[:-1, None] + edge).min(axis=0)]
        assert math.isclose(planner.plan_cost(L, planner.plan(L, budget)), E[-1], rel_tol=1e-12)


def test_exercise_05_costs_of_the_papers_own_example_and_of_flat_components():
    assert np.allclose(list(planner.costs([5, 4, 3, 2.85, 2.8]).values()),
                       [25, 19, 18, 17.7, 17.65])
    assert_plan(planner.plan(np.full(20, 2.0), 7), 1, 20, 7)             # no empty call
    L = falling(np.random.default_rng(2), 3, 30)
    curve = np.array(list(planner.costs(L).values()))
    assert (np.diff(curve) <= 1e-9).all() and (np.diff(curve, 2) >= -1e-9).all()
    assert math.isclose(curve[-1], L.sum()) and list(planner.costs(L, [5, 90])) == [5, 90]


def test_exercise_04_isotonic_fit_is_the_nearest_one():
    rng = np.random.default_rng(3)
    for L in rng.normal(size=(20, 9)):
        w = rng.integers(1, 4, 9)
        fit = [min(max(np.average(L[a:b + 1], weights=w[a:b + 1]) for b in range(i, 9))
                   for a in range(i + 1)) for i in range(9)]
        same("the nearest non-increasing fit in weighted squares", planner.isotonic(L, w), fit)


def test_exercise_04_smooth_fits_lines_never_rises_and_does_not_read_what_was_not_met():
    t = np.arange(1, 101)
    same("a straight line is smooth as it is", planner.smooth(7 - 0.05 * t), 7 - 0.05 * t)
    noisy = 5 / np.sqrt(t) + np.random.default_rng(0).normal(0, 0.2, 100)
    counts = np.random.default_rng(1).integers(0, 3, 100)
    fit = planner.smooth(np.where(counts, noisy, np.nan), counts)
    assert (np.diff(fit) <= 0).all(), "Eq. 4: a smooth L_t does not increase"
    assert np.abs(fit - 5 / np.sqrt(t))[5:].mean() < 0.1
    assert planner.smooth([[3.0, 2.0], [1.0, 1.0]]).shape == (2, 2)
    for bad in ([np.nan, 1.0], [], np.zeros((2, 2, 2))):
        with pytest.raises(ValueError):
            planner.smooth(bad)
    for function in (lambda L: planner.plan(L, 2), planner.costs):
        with pytest.raises(ValueError, match="smooth"):
            function([1.0, 2.0])


@pytest.mark.parametrize("samples, share", [(1, 0.5), (4, 0.5), (16, 0.6)])
def test_plans_from_a_smoothed_L_lose_little(samples, share):
    """On noisy measurements of a known curve the excess over the best plan is about half of what
    isotonic regression alone leaves."""
    D, rng, excess = 784, np.random.default_rng(0), np.zeros(2)
    t = np.arange(1, D + 1)
    curve = 4 / np.sqrt(t) + 0.5
    noise = curve / 2 * np.sqrt((2 / (D - t + 1) + 0.005) / samples)
    for _ in range(3):
        L = curve + noise * rng.normal(size=D)
        fits = (planner.isotonic(L, np.ones(D)), planner.smooth(L))
        for budget in (10, 50):
            best = planner.costs(curve, [budget])[budget]
            excess += [planner.plan_cost(curve, planner.plan(fit, budget)) / best - 1
                       for fit in fits]
    assert excess[1] < share * excess[0]


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
        for rule in ("forward", "backward", "random:0", "random:7", "spaced:1", "spaced:5",
                     "halves"):
            assert sorted(planner.order(rule, shape)) == list(range(1, int(np.prod(shape)) + 1))
    assert planner.order("forward", 4).tolist() == [1, 2, 3, 4]
    assert planner.order("backward", (4,)).tolist() == [4, 3, 2, 1]
    assert planner.order("spaced:2", 6).tolist() == [1, 3, 5, 2, 4, 6]
    assert planner.order("random:1", 8).tolist() == [7, 8, 5, 6, 2, 4, 3, 1]
    assert np.argsort(planner.order("halves", 8)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    turns = np.argsort(planner.order("halves", 100))
    assert all(np.diff(np.sort(turns[:n])).max() <= 256 / n for n in (4, 8, 16, 32, 64))
    turns = np.argsort(planner.order("spaced:4", 64)).reshape(16, 4)
    assert (np.diff(turns, axis=1) == 16).all()
    forward = planner.order("forward", (3, 2, 4)).reshape(3, 8)
    assert (forward == 3 * np.arange(8) + np.arange(3)[:, None] + 1).all()
    for rule in ("sideways", "random", "random:x", "spaced:0", "spaced:-1", ""):
        with pytest.raises(ValueError, match="choose forward"):
            planner.order(rule, 5)


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


def test_the_coarse_grid_costs_next_to_nothing_and_its_weights_are_the_exponential_function():
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


def test_exercise_08_random_messages_of_every_length_survive_and_wrong_bytes_are_noticed():
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
def test_exercise_08_push_and_pop_agree_on_the_states_at_which_a_word_moves(state, f):
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


# -- data.py ---------------------------------------------------------------------------------------

def pictures(n=40, shape=(6, 5), seed=0):
    """Grey or coloured squares on a slope: something that can be learnt."""
    rng = np.random.default_rng(seed)
    x = np.arange(shape[1])[:, None].reshape(-1, *[1] * (len(shape) - 2)) * 9
    return (rng.integers(0, 200, (n, *[1] * len(shape))) + x
            + rng.integers(0, 9, (n, *shape))).astype(np.uint8)


def test_symbols_and_bytes_are_inverse():
    text = b"the quick brown fox jumps over the lazy dog"
    symbols = datasets.to_symbols(text, 27)
    assert symbols.max() <= 26 and symbols[3] == 0 and datasets.to_bytes(symbols, 27) == text
    every = bytes(range(256))
    assert datasets.to_bytes(datasets.to_symbols(every, 256), 256) == every
    for bad, match in (("the Quick", "'Q' at position 4"), ("caféx", "'é' at position 3")):
        with pytest.raises(ValueError, match=match):
            datasets.to_symbols(bad.encode(), 27)


def test_text_is_split_by_position_and_cut_into_windows_and_chunks(tmp_path):
    stream = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(stream)
    data = datasets.load(str(tmp_path / "f"), 30)
    assert (data.K, data.kind) == (256, "bytes")
    assert b"".join(datasets.to_bytes(part, 256) for part in data.splits.values()) == stream
    assert [len(part) for part in data.splits.values()] == [1152, 64, 64]
    assert torch.equal(data.chunks("test"), data.splits["test"][:60].view(2, 30))
    (tmp_path / "f").write_bytes(bytes(range(200)))
    x = datasets.load(str(tmp_path / "f"), 10).batch(5000)
    assert x.dtype == torch.int64 and (x.diff(dim=1) == 1).all()
    assert x[:, 0].min() == 0 and x[:, 0].max() == 170 and x.max() == 179
    text = datasets.show(datasets.load("pydoc").splits["train"][:20000], 27)
    assert " the " in text and "  " not in text


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, None])
def test_packed_text_is_read_through_whatever_its_name(tmp_path, pack):
    text, path = b"some text " * 100, tmp_path / "logs.npy"
    if pack:
        path.write_bytes(pack(text))
    else:
        with zipfile.ZipFile(path, "w") as archive:        # as a Mac makes one
            for name, content in (("a/", ""), ("a/b.txt", text), ("__MACOSX/a/._b.txt", b"x")):
                archive.writestr(name, content)
    data = datasets.load(str(path), 20)
    assert data.kind == "text" and sum(map(len, data.splits.values())) == 1000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is packed and cannot be read"):
        datasets.load(str(path), 20)


def test_what_is_not_packed_is_not_copied(folder, monkeypatch):
    """A text may be larger than half of the memory."""
    monkeypatch.setattr(datasets.io, "BytesIO", None)
    source = datasets.Source(folder / "test.txt", dict(kind="text", K=27, shape=[24]))
    assert datasets.unpack(source.array, "test.txt") is source.array


def test_what_is_neither_text_nor_images_is_refused_by_what_it_is(tmp_path):
    path = tmp_path / "file.txt"
    tar = b"name".ljust(257, b"\0") + b"ustar" + bytes(250)
    for start, words in ((b"\x89PNG\r\n", "a PNG"), (b"\xff\xd8\xff\xe0", "a JPEG"),
                         (b"RIFF", "WAV"), (b"%PDF-1.7", "PDF"), (b"\x28\xb5\x2f\xfd", "zstd"),
                         (tar, "a tar"), (b"SQLite format 3\0", "SQLite"), (b"\x80\x04", "pickle")):
        for content in (start + bytes(3000), gzip.compress(start + bytes(3000))):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{words}.* (not|cannot be) read"):
                datasets.load(str(path), 20)
    with pytest.raises(ValueError, match="is a folder or tar without"):
        datasets.load(str(tmp_path), 20)


def test_downloads_are_whole_or_not_there(tmp_path, monkeypatch):
    """A login page instead of the file must not stay behind under the file's name."""
    monkeypatch.setenv("ARDM_DATA", str(tmp_path / "data"))
    url, md5 = f"{tmp_path.as_uri()}/", datasets.hashlib.md5(b"good").hexdigest()
    monkeypatch.setitem(datasets.SOURCES, "text8.zip", (url, md5))
    for torn in (b"please log in " * 100, b"PK\3\4cut off"):
        (tmp_path / "text8.zip").write_bytes(torn)
        with pytest.raises(ValueError, match="not the whole upstream file"):
            datasets.load("text8", 20)
        assert not list((tmp_path / "data").iterdir())
    (tmp_path / "text8.zip").write_bytes(b"good")
    assert datasets.fetch("text8.zip").tobytes() == b"good"
    assert (tmp_path / "data" / "text8.zip").read_bytes() == b"good"
    (tmp_path / "data" / "text8.zip").write_bytes(b"torn")
    with pytest.raises(ValueError, match="remove it"):
        datasets.fetch("text8.zip")
    monkeypatch.setitem(datasets.SOURCES, "enwik8.zip", (url, md5))
    with pytest.raises(ValueError, match="cannot download .*put it into"):
        datasets.fetch("enwik8.zip")


def test_images_are_split_and_flattened_colour_by_colour_wherever_their_axes_are(tmp_path):
    pixels, path = pictures(40, (6, 5, 3)), tmp_path / "a.NPY"
    colour_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (40, 6, 5))
    digests = set()
    for array in (pixels, np.asfortranarray(pixels), colour_first):
        with open(path, "wb") as file:
            np.save(file, array)
        data = datasets.load(str(path))
        digests.add(data.digest)
        assert (data.shape, data.D, data.K, data.kind) == ((3, 6, 5), 90, 256, "image")
        assert [len(data.splits[part]) for part in ("train", "valid", "test")] == [32, 4, 4]
        back = torch.cat([data.splits[part] for part in ("test", "train", "valid")])
        assert np.array_equal(datasets.to_images(back, data.shape), pixels)
    assert len(digests) == 1                               # the same data
    np.save(tmp_path / "cifar.npy", pixels)
    assert not datasets.load(str(tmp_path / "cifar.npy")).flips          # by its name
    few = datasets.load(str(path), bits=3)
    assert few.K == 8 and torch.equal(few.splits["test"], data.splits["test"] // 32)
    np.savez(tmp_path / "b.npz", x=pixels, y=np.arange(40))
    assert datasets.load(f"{tmp_path / 'b.npz'}:x").digest == data.digest
    with pytest.raises(ValueError, match="x.npy, y.npy .*FILE.npz:NAME"):
        datasets.load(str(tmp_path / "b.npz"))
    path.write_bytes(gzip.compress(idx + pixels[..., 0].tobytes()))
    assert torch.equal(datasets.load(str(path)).splits["test"], data.splits["test"][:, :30])


def test_small_values_are_taken_as_they_are_and_what_is_no_image_is_refused(tmp_path):
    values, path = np.arange(2400).reshape(20, 10, 12), tmp_path / "a.npy"
    for array, bits, K, top in ((values % 2, 8, 2, 1), (values % 2 > 0, 8, 2, 1),
                                (values % 8, 3, 8, 7), (values % 256, 3, 8, 7),
                                (values % 3, 8, 256, 2)):
        np.save(path, array if array.dtype == bool else array.astype(np.uint8))
        data = datasets.load(str(path), bits=bits)
        assert data.K == K and max(part.max() for part in data.splits.values()) == top
    assert datasets.to_images(np.array([[0, 1]]), (1, 1, 2), 2).max() == 255
    for bad, match in ((np.zeros((9, 6, 5)), "holds float64.*astype"), (values[0], "shape"),
                       (np.zeros((60, 50, 3), np.uint8), "one picture is"),
                       (np.zeros((9, 3, 6, 3), np.uint8), "shape"), (values, "holds int64"),
                       (np.zeros((0, 6, 5), np.uint8), "shape"), ((-1, 8, 8), "shape")):
        if type(bad) is tuple:
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, dict(
                    descr="|u1", fortran_order=False, shape=bad))
        else:
            np.save(path, bad)
        with pytest.raises(ValueError, match=match):
            datasets.load(str(path))


def wav_bytes(samples, rate=8000, before=b"", after=b"", size=None, code=1, bits=16, riff=None):
    """A WAV file of samples (n, channels), by hand."""
    body = np.asarray(samples).astype("<i2").tobytes()
    n = np.shape(samples)[1]
    form = struct.pack("<HHIIHH", code, n, rate, 2 * n * rate, 2 * n, bits)
    if code == 0xFFFE:
        form += struct.pack("<HHIH", 22, 16, 0, 1) + b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    size = len(body) if size is None else size
    rest = b"WAVEfmt " + struct.pack("<I", len(form)) + form + before
    rest += b"data" + struct.pack("<I", size) + body + after
    return b"RIFF" + struct.pack("<I", len(rest) if riff is None else riff) + rest


LIST = b"LIST\x05\0\0\0INFOx\0"                           # an odd chunk, and its pad byte


@pytest.mark.parametrize("how", [
    dict(), dict(before=LIST), dict(after=LIST), dict(code=0xFFFE), dict(size=0, riff=0),
    dict(size=0xFFFFFFFF, riff=0xFFFFFFFF), dict(size=99999)])
def test_samples_are_found_in_every_16_bit_wav_file(how, tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, (50, 2))
    samples[:2] = [[-32768, 32767], [0, -1]]
    content = np.frombuffer(wav_bytes(samples, **how), np.uint8)
    found = datasets.array_in(content, "x.wav")[:, :50]
    assert np.array_equal(found, samples.T)
    assert datasets.wav_layout(content, "x.wav")[2] == 8000
    (tmp_path / "x.wav").write_bytes(content)
    if "size" not in how:                                  # the length is right: read by `wave`
        source = datasets.Source(tmp_path / "x.wav", dict(kind="audio", K=65536, shape=[8]))
        assert source.n == 100 and source.read(0, 2).tolist() == [0, 32768]
        assert source.read(40, 60).tolist() == (samples.T.reshape(-1)[40:60] + 32768).tolist()
        whole = wav_bytes(samples, **how)
        assert bytes(source.head) + samples.astype("<i2").tobytes() + bytes(source.tail) == whole


def clip(i, n=30):
    return np.full((n, 1), i)


def test_clips_are_read_from_folders_and_tars(tmp_path):
    place = tmp_path / "clips"
    place.mkdir()
    for i in range(20):
        (place / f"{i:02d}.wav").write_bytes(wav_bytes(clip(i)))
    (place / "._00.wav").write_bytes(b"a Mac's")
    (place / "00a.wav").write_bytes(wav_bytes(clip(0, 0)))               # no sample
    (place / "00b.WAV").write_bytes(wav_bytes(np.array([[5, -5]])))       # one, in two channels
    data = datasets.load(str(place), 10)
    assert (data.kind, data.K, data.D, data.rate) == ("audio", 65536, 10, 8000)
    parts = {name: part.numpy().astype(int) - 32768 for name, part in data.splits.items()}
    assert set(parts["test"]) == {7, 17} and set(parts["valid"]) == {18, 19}
    assert len(parts["train"]) == 488 and data.chunks("test").shape == (6, 10)
    assert data.batch(3).shape == (3, 10) and data.batch(3).dtype == torch.int64
    for name in ("clips", "my_batch1"):
        with tarfile.open(tmp_path / "clips.tgz", "w:gz", format=tarfile.GNU_FORMAT) as archive:
            archive.add(place, name)
        assert datasets.load(str(tmp_path / "clips.tgz"), 10).digest == data.digest
    (place / "testing_list.txt").write_text("03.wav\n")
    (place / "validation_list.txt").write_text("04.wav\n05.wav\n")
    for where in (place, tmp_path):                        # and where it is a folder in a folder
        listed = datasets.load(str(where), 10).splits
        assert set(listed["test"].tolist()) == {32771} and len(listed["valid"]) == 60


def test_of_a_sound_the_last_tenth_is_for_the_test_and_other_sound_is_refused(tmp_path):
    one, place = tmp_path / "one", tmp_path / "clips"
    one.write_bytes(gzip.compress(wav_bytes(np.arange(100)[:, None])))
    parts = datasets.load(str(one), 5).splits
    assert [len(part) for part in parts.values()] == [81, 9, 10] and parts["test"][0] == 32768 + 90
    one.write_bytes(wav_bytes(np.arange(100)[:, None] + [0, 500]))       # two channels
    parts = datasets.load(str(one), 5).splits
    assert [len(part) for part in parts.values()] == [162, 18, 20]
    assert set(parts["test"].tolist()) == {32768 + i + j for i in range(90, 100) for j in (0, 500)}
    place.mkdir()
    (place / "00.wav").write_bytes(wav_bytes(clip(0, 9000)))
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(place, "clips")
    torn = (tmp_path / "clips.tar").read_bytes()[:9000]
    for name, content, words in (
            ("rate.wav", wav_bytes(clip(1), rate=0), "0 samples a second"),
            ("8.wav", wav_bytes(clip(1), bits=8), "8 bits a sample, format 1, 1 channels"),
            ("float.wav", wav_bytes(clip(1), code=3, bits=32), "32 bits a sample, format 3"),
            ("torn.wav", wav_bytes(clip(1))[:30], "with a whole fmt chunk"),
            ("short.wav", wav_bytes(clip(1)), "too few for"),
            ("x.flac", b"fLaC" + bytes(900), "FLAC audio"),
            ("x.tar", torn, "cannot be read")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            datasets.load(str(tmp_path / name), 20)
    (place / "22.wav").write_bytes(b"RF64" + wav_bytes(clip(0))[4:])
    with pytest.raises(ValueError, match="22.wav is no RIFF WAV file"):
        datasets.load(str(place), 10)
    (place / "22.wav").write_bytes(wav_bytes(clip(0), rate=16000))
    with pytest.raises(ValueError, match="00.wav has 8000 samples a second, 22.wav has 16000"):
        datasets.load(str(place), 10)


def test_named_sounds_have_their_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_DATA", str(tmp_path))
    (tmp_path / "recordings").mkdir()
    for name, i in (("7_x_4", 4), ("7_x_5", 5), ("7_x_14", 14)):
        (tmp_path / "recordings" / f"{name}.wav").write_bytes(wav_bytes(np.full((40, 1), i)))
    parts = datasets.load("fsdd", 4).splits
    assert set(parts["test"].tolist()) == {32772} and 32782 in parts["train"]
    shutil.rmtree(tmp_path / "recordings")
    (tmp_path / "v1.0.10.tar.gz").touch()
    with pytest.raises(ValueError, match="not the whole upstream file"):
        datasets.load("fsdd")
    path = tmp_path / "speech_commands_v0.02.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("./one/a.wav", wav_bytes(np.full((9, 1), 1))),
                              ("bed/a.wav", b"RIFF"),
                              ("nine/b.wav", wav_bytes(np.full((9, 1), 2))),
                              ("zero/c.wav", wav_bytes(np.full((9, 1), 3))),
                              ("./testing_list.txt", b"nine/b.wav\nbed/a.wav\n"),
                              ("validation_list.txt", b"one/a.wav\n")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="not the whole upstream file .* by its sha256"):
        datasets.load("sc09")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SOURCES, path.name, ("", sha256))
    data = datasets.load("sc09")
    assert data.D == 16000 and [int(part[0]) - 32768 for part in data.splits.values()] == [3, 1, 2]
    assert all(len(part) == 16000 and part[9] == 32768 for part in data.splits.values())


def test_tones_are_sounds_under_noise():
    data = datasets.load("tones")
    assert [len(part) for part in data.splits.values()] == [3110400, 345600, 384000]
    sound = data.splits["test"].numpy().astype(int) - 32768
    quiet = min(part.std() for part in sound.reshape(-1, 400))
    assert 13 < quiet < 16.5 and np.abs(sound).max() < 20000
    assert len(np.unique(data.chunks("test").numpy(), axis=0)) == len(data.chunks("test"))


def test_batches_are_training_images_mirrored_and_turned_where_asked(tmp_path):
    np.save(tmp_path / "a.npy", pictures(20, (4, 4, 1)))
    data = datasets.load(str(tmp_path / "a.npy"))
    for data.flips, data.turns in itertools.product((False, True), repeat=2):
        originals = data.splits["train"].view(-1, 4, 4)
        made = {tuple(p.rot90(n, (1, 2)).flatten(1)[i].tolist())
                for p in ([originals, originals.flip(2)] if data.flips else [originals])
                for n in (range(4) if data.turns else [0]) for i in range(len(originals))}
        batch = {tuple(x.tolist()) for x in data.batch(500)}
        assert batch <= made and len(batch) > len(made) / 2


def cifar(path, batches):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar_is_read_from_a_partial_tarball_and_damaged_ones_are_refused(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (30, 3073)).astype(np.uint8)
    parts = {"data_batch_2.bin": records[10:20].tobytes(), "readme.html": b"hello",
             "data_batch_1.bin": records[:10].tobytes(), "test_batch.bin": records[20:].tobytes()}
    path = tmp_path / "c.tar.gz"
    cifar(path, parts)
    data = datasets.load(str(path))
    whole = torch.cat([data.splits[part] for part in ("train", "valid", "test")])
    assert np.array_equal(whole.numpy(), records[:, 1:]) and data.shape == (3, 32, 32)
    assert "part of cifar10" in data.name and data.flips
    (tmp_path / "code.py").write_bytes(b"PK, or def cifar_batch(x): return x\n" * 50)
    assert datasets.load(str(tmp_path / "code.py")).kind == "bytes"
    content = path.read_bytes()
    for bad in (parts | {"data_batch_1.bin": b"x" * 100}, {"test_batch.bin": records.tobytes()},
                {"data_batch_1.bin": records.tobytes()}, content[:len(content) // 2]):
        if type(bad) is dict:
            cifar(path, bad)
        else:
            path.write_bytes(bad)
        with pytest.raises(ValueError, match="no tarball of CIFAR-10|packed and cannot be read"):
            datasets.load(str(path))


def test_real_data_is_read():
    folder = Path(os.environ.get("ARDM_DATA", ""))
    if not (folder / "cifar10" / "cifar-10-binary.partial.tar.gz").is_file():
        pytest.skip("ARDM_DATA has no cifar10/cifar-10-binary.partial.tar.gz")
    text = datasets.load(str(folder / "text8" / "text8_prefix.zip"), 250)
    assert datasets.show(text.splits["train"][:30], 27) == " anarchism originated as a ter"
    mnist = datasets.load("mnist")
    assert [len(part) for part in mnist.splits.values()] == [54000, 6000, 10000]
    assert 33 < mnist.splits["train"].float().mean() < 34  # 0.1307 of 255
    images = datasets.load(str(folder / "cifar10" / "cifar-10-binary.partial.tar.gz"))
    assert [len(part) for part in images.splits.values()] == [18000, 2000, 1017]
    means = images.splits["train"].view(-1, 3, 1024).float().mean(dim=(0, 2))
    assert torch.allclose(means, torch.tensor([125.3, 122.9, 113.9]), atol=1.5)


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3), (1, 1)])
def test_png_holds_the_pixels_in_every_frame(shape):
    frames = [np.random.default_rng(i).integers(0, 256, shape).astype(np.uint8) for i in (0, 1, 2)]
    for count in (1, 3):
        content, at, parts = datasets.png(*frames[:count]), 8, []
        while at < len(content):
            size, kind = int.from_bytes(content[at:at + 4], "big"), content[at + 4:at + 8]
            body = content[at + 8:at + 8 + size]
            parts.append((kind, body))
            at += 12 + size
            assert zlib.crc32(kind + body).to_bytes(4, "big") == content[at - 4:at]
        numbers = [body[:4] for kind, body in parts if kind in (b"fcTL", b"fdAT")]
        assert numbers == [i.to_bytes(4, "big") for i in range(len(numbers))]
        pixels = [body[4:] if kind == b"fdAT" else body for kind, body in parts
                  if kind in (b"IDAT", b"fdAT")]
        for frame, part in zip(frames, pixels, strict=count == 3):
            rows = np.frombuffer(zlib.decompress(part), np.uint8).reshape(shape[0], -1)
            assert not rows[:, 0].any() and np.array_equal(rows[:, 1:].reshape(shape), frame)


# -- The scripts, in this process where a process of its own proves nothing more -------------------

def call(module, *arguments):
    """Runs a script's main as its command line does: the exit code."""
    old, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    try:
        datasets.run(module.main)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = old


def child(script, *arguments, **options):
    return subprocess.run([sys.executable, HERE / script, *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, **options)


QUICK = ["--steps", 30, "--length", 24, "--dim", 32, "--depth", 1, "--heads", 2, "--batch", 16]
SMALL = ["--steps", 25, "--dim", 8, "--depth", 1, "--passes", 2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What `train.py` leaves behind after a very short run on text."""
    folder = tmp_path_factory.mktemp("run")
    done = child("train.py", *QUICK, "--out", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session", params=[None, 4], ids=["order-agnostic", "upscale"])
def gallery(tmp_path_factory, request):
    """The same on small colour images."""
    folder = tmp_path_factory.mktemp("gallery")
    np.save(folder / "a.npy", pictures(200, (6, 5, 3)))
    branch = ["--branch", request.param] if request.param else []
    assert call(train, *SMALL, *branch, "--data", folder / "a.npy", "--out", folder / "run",
                "--device", "cpu") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    """The same on sound."""
    folder = tmp_path_factory.mktemp("studio")
    sound = 500 * np.sin(np.arange(3000) / 7) + 20 * np.random.default_rng(0).normal(size=3000)
    (folder / "a.wav").write_bytes(wav_bytes(sound[:, None]))
    assert call(train, "--steps", 60, "--dim", 8, "--depth", 3, "--passes", 2, "--length", 64,
                "--data", folder / "a.wav", "--out", folder / "run", "--device", "cpu") == 0
    return folder / "run"


@pytest.fixture
def refused(capsys, tmp_path):
    """Calls a script that must refuse: code 2, one matching line on stderr, nothing written."""
    def check(module, *arguments, match):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = call(module, *arguments)
        line = capsys.readouterr().err.split("\r")[-1].strip()
        assert code == 2 and "\n" not in line and match in line, line
        assert sorted(tmp_path.rglob("*")) == before
    return check


def test_training_prints_and_writes_what_it_promises(folder, gallery):
    printed = (folder / "printed").read_text()
    for part in ("bits/char, standard error", "loss components L_t", "network calls", "samples",
                 "single symbols", "bz2", "python sample.py --ckpt", "python compress.py encode"):
        assert part in printed
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, device, recipe, capsys):
    c = train.Settings(length=16, dim=16, depth=1, heads=1, batch=4, steps=8, recipe=recipe,
                       device=device, size="tiny", compile=False)
    data = train.load_data(c)
    c = train.complete(c, data)

    def go(run, upto):
        return [train.train_step(run, run.draw(data)).item() for _ in range(run.step, upto)]

    whole, part, again = (train.Run(c, data) for _ in range(3))
    first = whole.draw(data)
    losses = go(whole, 8)
    assert not torch.equal(first, whole.draw(data))        # every step has its own
    assert go(part, 5) == losses[:5]
    part.L = torch.arange(16.0)[None]
    part.save(tmp_path)
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    again.restore(checkpoint | dict(settings=checkpoint["settings"] | dict(device="mps")))
    assert "other random numbers" in capsys.readouterr().out
    again.restore(checkpoint)
    assert capsys.readouterr().out == ""
    assert torch.equal(again.L, part.L) and go(again, 8) == losses[5:]
    assert torch.stack([*again.losses]).tolist() == losses  # their mean is printed, and in log.csv
    for a, b in zip(whole.ema.parameters(), again.ema.parameters()):
        assert torch.equal(a, b)


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    data = datasets.load("pydoc", 16)
    run, old = train.Run(settings(data), data), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    x = run.draw(data)

    def draw(data):
        os.kill(os.getpid(), signal.SIGHUP)
        return x

    run.draw = draw
    assert train.train(run, data, tmp_path)
    signal.signal(signal.SIGHUP, old)


def test_hangup_saves_and_the_run_can_be_resumed(folder, tmp_path):
    flags = [*map(str, QUICK), "--steps", "100000", "--out", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags], text=True,
                               stdout=open(tmp_path / "words", "w"), stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process.stderr.close()                                 # nobody reads the bar any more
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.csv").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    (tmp_path / "log.csv").write_bytes(b"step,\0torn")      # is of no importance
    assert process.wait(60) == 130 and "--resume --out" in (tmp_path / "words").read_text()
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert call(train, "--resume", "--out", tmp_path, "--steps", step + 10, "--passes", 1) == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step + 10
    assert call(train, "--resume", "--out", tmp_path, "--steps", step + 11, "--passes", 1) == 0
    old = torch.load(tmp_path / "ckpt.1.pt", weights_only=True)          # a finished run is kept
    assert old["step"] == step + 10 and (tmp_path / "results.1.json").exists()


def test_a_run_without_numbers_is_not_saved(refused, folder, tmp_path):
    data = datasets.load("pydoc", 16)
    run = train.Run(settings(data), data)
    run.model.net.head.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="step 0: the weights are not numbers.* smaller --lr"):
        run.save(tmp_path)
    changed = torch.load(folder / "ckpt.pt", weights_only=True)
    changed["ema"]["net.head.bias"] += math.nan
    torch.save(changed, tmp_path / "nan.pt")
    refused(train, "--evaluate", tmp_path / "nan.pt", match="weights are not those that were saved")
    del changed["digest"]
    torch.save(changed, tmp_path / "nan.pt")
    refused(train, "--evaluate", tmp_path / "nan.pt", match="gives no numbers")


def test_without_a_compiler_a_run_goes_on(tmp_path, capsys):
    data = datasets.load("pydoc", 16)
    run = train.Run(settings(data), data)
    run.loss = torch.compile                               # raises what it raises
    assert train.train(run, data, tmp_path) and run.step == 8
    assert "going on without torch.compile" in capsys.readouterr().err


def test_rates_rise_and_fall_and_every_weight_has_one_optimiser():
    data = datasets.load("pydoc", 16)
    c, paper = settings(data), settings(data, recipe="paper")
    hyper = dict(warmup=10)
    rates = [train.learning_rate(c, hyper, step, step / 100) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] and rates[-1] == 0 and rates[50] == 0.5
    rates = [train.learning_rate(paper, dict(warmup=50), step, step / 100) for step in range(101)]
    assert rates[0] == 0.02 and rates[10:] == [1] * 91     # a tenth of the run
    for kind in (c, paper):
        run = train.Run(kind, data)
        groups = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
        assert len(groups) == len(set(groups)) == len(list(run.model.parameters()))
    assert len(run.optimizers) == 1
    muon = train.Run(c, data).optimizers[1].param_groups[0]["params"]
    assert {p.ndim for p in muon} == {2} and len(muon) == 2 * 4 + 2 * 2


def test_a_batch_in_parts_has_the_same_gradient(monkeypatch):
    monkeypatch.setattr(nets, "has_bf16", lambda device: False)
    data, found = datasets.load("pydoc", 16), []
    for fits in (12, 5, 1, 0):
        run = train.Run(settings(data, batch=12, dim=8, depth=1, heads=1), data)
        run.model.net.head.weight.data.normal_(generator=seeded())
        loss, sizes = run.loss, []

        def short(x, *how):
            sizes.append(len(x))
            if len(x) > fits:
                raise [torch.OutOfMemoryError("full"), RuntimeError("MPS backend out of memory")][
                    len(sizes) % 2]
            return loss(x, *how)

        run.loss = short
        if fits == 0:
            for _ in range(2):                             # the first one sets the parts
                with pytest.raises(RuntimeError):
                    train.train_step(run, run.draw(data))
        else:
            bits = train.train_step(run, run.draw(data))
            found.append([bits, *(p.grad for p in run.model.parameters())])
            assert sizes[-run.parts:] == [12 // run.parts] * run.parts
    for other in found[1:]:
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(found[0], other))


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
@pytest.mark.parametrize("branch", [0, 4])
@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_forward_loss_and_backward_are_one_graph(kind, branch, recipe, monkeypatch):
    """A break would be a synchronisation with the GPU in every step."""
    K, shape = dict(text=(27, [16]), image=(256, [3, 8, 8]), audio=(1 << 16, [64]))[kind]
    way = "mixture" if kind == "audio" and recipe == "ours" else "direct"
    depth = 9 if kind == "image" and recipe == "paper" else 2            # deep: by regions
    model = nets.build(dict(kind=kind, K=K, shape=shape, recipe=recipe, branch=branch, dim=8,
                            depth=depth, heads=2, parametrization=way))
    x, (t, s) = torch.randint(K, (3, model.D)), torch.ones(2, 3, dtype=torch.long)
    torch._dynamo.reset()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    found = torch._dynamo.explain(model.loss)(x, t, s, sample_sigma(3, model.D))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("device", DEVICES)
def test_an_embedding_by_products_is_a_lookup(device):
    table = nets.Embedding(7, 5).to(device)
    x = torch.randint(7, (3, 4), device=device)
    one, other = table.product(x), table.eval()(x)
    assert torch.equal(one, other)
    weight = torch.randn_like(one)
    assert torch.allclose(*(torch.autograd.grad((weight * found).sum(), table.weight)[0]
                            for found in (one, other)), atol=1e-6)


def test_a_run_ends_by_its_minutes_or_by_its_passes_whichever_comes_first():
    data = datasets.load("pydoc", 250)
    given = dict(device="cpu", size="small")
    c = train.complete(train.Settings(**given), data)
    assert c.minutes == 2.5
    assert c.steps * c.batch * data.D == pytest.approx(150 * len(data.splits["train"]), rel=0.01)
    assert train.complete(train.Settings(**given, steps=7), data).minutes is None
    assert train.complete(train.Settings(**given, minutes=7), data).steps is None
    assert train.complete(train.Settings(**given, batch=9999), data).steps == 100
    assert train.complete(train.Settings(**given | dict(size="paper")), data).steps == 3_000_000
    run = train.Run(settings(data), data)
    run.c, run.step, run.seconds = c, c.steps // 2, 30
    assert run.progress == pytest.approx(0.5, abs=0.01)
    run.seconds = 120
    assert run.progress == 0.8


def test_a_new_length_of_a_run_replaces_both_old_ones(folder, tmp_path):
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    checkpoint["settings"] |= dict(steps=50, minutes=2.0)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for given, expected in (({}, (50, 2.0)), (dict(steps=9), (9, None)),
                            (dict(minutes=3.0), (None, 3.0))):
        c = train.reopen(tmp_path / "ckpt.pt", given, {"steps", "minutes"})[2]
        assert (c.steps, c.minutes) == expected


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_step_which_compiles_takes_no_time_of_the_run(tmp_path, monkeypatch, fails):
    data, step = datasets.load("pydoc", 16), train.train_step
    run = train.Run(settings(data, steps=None, minutes=0.1, batch=2, depth=1, dim=16), data)
    clock = mock.Mock(perf_counter=lambda: clock.seconds, seconds=0.0)

    def timed(run, x):
        clock.seconds += 1 if run.step else 1000
        if fails and run.loss != run.model.loss:
            raise RuntimeError("no compiler")
        return step(run, x)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "train_step", timed)
    run.loss = None if fails else run.loss
    assert train.train(run, data, tmp_path)
    assert (run.step, run.seconds, clock.seconds) == (7, 6, 1006 + 1000 * fails)


PAIR = """
import os, signal, sys, torch, data as datasets, train
rank, folder = train.join(), sys.argv[1]
data = datasets.load("pydoc", 16)
c = train.Settings(size="tiny", device="cpu", steps=10, batch=6, dim=8, depth=1, heads=1)
run = train.Run(train.complete(c, data), data)
clip, kept = train.nn.utils.clip_grad_norm_, []
def keep(weights, most):
    weights = list(weights)
    kept.append(torch.cat([p.grad.flatten() for p in weights]).clone())
    clip(weights, most)
train.nn.utils.clip_grad_norm_ = keep
assert train.train(run, data, train.Path(folder))
run.c.steps = 10 ** 9
save = run.draw
def late(data):
    if rank == 0 and run.step == 15:
        os.kill(os.getpid(), signal.SIGTERM)               # the first process alone is told to stop
    return save(data)
run.draw = late
weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
assert not train.train(run, data, train.Path(folder))
torch.save([kept[0], weights, run.step], f"{folder}/{rank}.pt")
"""


def torchrun(script, *arguments):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script)
    return subprocess.run([sys.executable, *map(str, command + arguments)], capture_output=True,
                          text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(HERE),
                                                       "OMP_NUM_THREADS": "1"})


def test_two_processes_train_as_one_and_stop_together(tmp_path):
    (tmp_path / "pair.py").write_text(PAIR)
    done = torchrun(tmp_path / "pair.py", tmp_path)
    assert done.returncode == 0, done.stderr
    (first, weights, step), (second, other, step2) = (torch.load(tmp_path / f"{rank}.pt")
                                                      for rank in (0, 1))
    assert torch.equal(first, second) and torch.equal(weights, other) and step == step2 == 16
    assert nets.load(tmp_path / "ckpt.pt")[1]["step"] == 16              # an ordinary checkpoint
    data = datasets.load("pydoc", 16)
    c = settings(data, batch=6, dim=8, depth=1, heads=1)
    gradients = []
    for rank in (0, 1):
        run = train.Run(c, data)
        run.rank, run.processes = rank, 2
        x, g = run.draw(data), run.generator
        t, s = stratified_steps(3, 1, 16, generator=g)
        train.backward(run, x, t, s, sample_sigma(3, 16, generator=g))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert torch.allclose((gradients[0] + gradients[1]) / 2, first, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(*gradients, rtol=1e-2)       # each has drawn its own


def test_torchrun_trains_and_one_that_fails_ends_all(tmp_path, monkeypatch):
    flags = [*QUICK, "--passes", 1, "--device", "cpu", "--out", tmp_path / "run"]
    done = torchrun(HERE / "train.py", *flags)
    assert done.returncode == 0 and done.stdout.count("test:") == 1, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 30
    begin = time.monotonic()
    done = torchrun(HERE / "train.py", *flags, "--batch", 15)
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "--batch 15: take a multiple of 2 processes" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")                  # left over, and nobody else is there
    monkeypatch.setenv("RANK", "1")
    assert train.join() == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_goes_where_torchs_muon_goes(dtype):
    """torch's rounds to bfloat16, so only nearly."""
    for shape in ((6, 4), (4, 6)):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        pair = [(ours, train.Muon([ours], lr=0.1, decay=0.2, dtype=dtype)),
                (theirs, torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2))]
        for seed in range(3):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for p, optimizer in pair:
                p.grad = gradient.clone()
                optimizer.step()
        assert torch.allclose(ours, theirs, atol=0.02) and (ours - 1).abs().max() > 0.1


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
    model, clock = ARDM(Fixed(torch.tensor([2.0, 0.0])), 10, 2), itertools.count(step=20)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    model.rows, x = 50, (torch.arange(400) >= 200)[:, None].expand(400, 10)
    found = train.bound(model, x.to(torch.uint8))
    assert found["chunks"] == 50
    one, other = (-torch.tensor([2.0, 0.0]).log_softmax(0) / math.log(2)).tolist()
    assert abs(found["bits"] - (one + other) / 2) < 4 * found["stderr"]


def test_components_agree_with_enumeration_and_meet_every_step_with_the_same_chunks():
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


def test_samples_need_no_stdout(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)               # as after >&-
    assert call(sample, "--ckpt", folder / "ckpt.pt", "--n", 2, "--out", tmp_path) == 0


def test_samples_are_repeatable_and_blanks_are_filled(folder, tmp_path, capsys):
    found = []
    for n in (3, 40):
        assert call(sample, "--ckpt", folder / "ckpt.pt", "--n", n, "--calls", 5, "--seed", 4,
                    "--out", tmp_path / "a") == 0
        found.append((tmp_path / "a" / "samples.txt").read_text().splitlines())
        assert len(found[-1]) == n
    assert found[0] == found[1][:3]                        # sample i does not depend on --n
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


def test_a_terminal_shows_how_text_fills_in(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "16")
    monkeypatch.setenv("LINES", "6")                       # two samples and a place for the cursor
    flags = ("--ckpt", folder / "ckpt.pt", "--n", 3, "--calls", 4, "--out", tmp_path)
    assert call(sample, *flags, "--watch") == 0
    room, *states, printed = capsys.readouterr().out.split("\x1b8\x1b[J")
    assert room == "\n" * 4 + "\x1b[4A\x1b7" and len(states) == 4       # the terminal breaks lines
    states = [part.split("\n") for part in states]
    for row in range(2):
        shown = [re.sub(r"\x1b\[\dm", "", rows[row]) for rows in states]
        assert {len(text) for text in shown} == {24} and "\u00b7" not in shown[-1]
        dots = [24, *(text.count("\u00b7") for text in shown)]
        new = [rows[row].count("\x1b[1m") for rows in states]
        assert new == [before - after for before, after in zip(dots, dots[1:])]
        assert printed.splitlines()[row].startswith(shown[-1])           # then the whole of it
    assert call(sample, *flags) == 0 and printed == capsys.readouterr().out      # no terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert call(sample, *flags, "--watch") == 0
    shown = capsys.readouterr().out
    assert "\x1b[J" in shown and "\x1b[1m" not in shown
    monkeypatch.setenv("LINES", "2")                       # no room for one sample
    assert call(sample, *flags, "--watch") == 0 and printed == capsys.readouterr().out


def test_a_terminal_shows_no_letter_of_which_only_the_first_digit_is_known(capsys):
    model, nothing = UpscaleARDM(None, 8, 27, 6), torch.zeros(8).bool()
    show, _ = sample.watched(lambda log_p, where, s: torch.ones(8, dtype=torch.long), model,
                          torch.zeros(1, 8, dtype=torch.long), nothing)
    for s, text in ((1, "\u00b7" * 8), (2, "g" * 8)):                   # 1 * 6 + 1: the seventh
        show(None, ~nothing[None], s)
        assert re.sub(r"\x1b(\d|\[\d*\w)", "", capsys.readouterr().out).strip() == text


def test_letters_of_several_bytes_are_shown_whole():
    text = "aé漢\n".encode()
    x, known, new = torch.tensor(list(text)), torch.ones(7).bool(), torch.arange(7) == 2
    assert list(sample.characters(x, known, new, 256)) == [
        ("a", False), ("é", True), ("漢", False), (" ", False)]
    known[4] = False
    assert "".join(part for part, _ in sample.characters(x, known, new, 256)) == "aé··· "


def test_the_confident_order_takes_the_surest_first_and_keeps_what_is_known(folder, gallery,
                                                                            tmp_path):
    model, x = UpscaleARDM(Table(4, 4, S=2), 4, 4, 2), torch.tensor([[3, 1, 2, 0], [0, 2, 1, 1]])
    known, plan = torch.tensor([True, False, False, False]), [(1, 2, 1), (1, 3, 2), (2, 2, 3)]
    choose = drawing(torch.rand(2, 2, 4, generator=seeded()))
    found, sigma = model.generate_surest(x, plan, known, choose)
    for i in range(2):
        row, m = x[i:i + 1], known[None]
        for s, t, k in plan:
            m = known[None] if t == 2 else m
            log_p = model.log_probs(row, m, t * ONE, s * ONE)[0]
            order = [j for j in log_p.amax(dim=1).argsort(descending=True).tolist() if not m[0, j]]
            assert sorted(order[:k]) == (sigma[s - 1, i] == t).nonzero()[:, 0].tolist()
            m = m | (sigma[s - 1, i:i + 1] == t)
            row = torch.where(m, model.coarsen(found[i:i + 1], s), row)
    assert torch.equal(found[:, 0], x[:, 0]) and not sigma[:, :, 0].any()
    for place in (folder, gallery):
        assert call(sample, "--ckpt", place / "ckpt.pt", "--order", "confident", "--n", 2,
                    "--calls", 8, "--frames", "--out", tmp_path / "x") == 0


PROVERB = b"Whatever is worth doing at all, is worth doing well.\r\n\xff\x00"


def test_the_model_in_the_repository_writes_and_codes_any_bytes(tmp_path, monkeypatch, capsys):
    old = Path(nets.ENGLISH).with_suffix(".ardm")          # written once: it must stay readable
    monkeypatch.chdir(tmp_path)                            # no run in out/
    assert call(compress, "decode", old, "back") == 0 and Path("back").read_bytes() == PROVERB
    assert call(sample, "--n", 2, "--calls", 8) == 0 and "english.pt" in capsys.readouterr().out
    assert len(Path("out/english/samples.txt").read_bytes()) == 2 * (256 + 1)
    Path("noise").write_bytes(os.urandom(3_000))
    for name, most in (("noise", 3_000 * 1.002 + 200), ("back", len(PROVERB) + 200)):
        assert call(compress, "encode", name, "packed", "--calls", 8) == 0
        assert "english.pt" in capsys.readouterr().out and Path("packed").stat().st_size < most
        assert call(compress, "decode", "packed", "again") == 0
        assert Path("again").read_bytes() == Path(name).read_bytes()
    assert nets.ENGLISH.stat().st_size < 6e6


def test_sample_takes_the_newest_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("b", 2000), ("a", 1000)):
        path = tmp_path / "out" / name / "ckpt.pt"
        path.parent.mkdir(parents=True)
        shutil.copy(folder / "ckpt.pt", path)
        os.utime(path, (seconds, seconds))
    assert call(sample, "--n", 1) == 0
    assert f"by {Path('out/b/ckpt.pt')}\n" in capsys.readouterr().out
    assert Path("out/b/samples.txt").exists()


def test_settings_that_are_missing_or_unknown_are_one_line(folder, tmp_path, refused):
    names = {field.name for field in dataclasses.fields(train.Settings)}
    assert nets.SETTINGS == names | {"kind", "K", "shape", "rate", "sha256"}
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    for name in ("pairs", "dim", "rate"):
        settings = dict(whole["settings"])
        if settings.pop(name, 0) == 0:
            settings[name] = True
        torch.save(whole | dict(settings=settings), tmp_path / "ckpt.pt")
        for flags in ((sample, "--ckpt"), (train, "--evaluate")):
            refused(*flags, tmp_path / "ckpt.pt", match=f"of another version: {name}")


def test_in_a_prompt_an_underscore_is_a_blank_and_an_escaped_one_is_itself():
    x, known = sample.read_prompt(r"a\_b_\n_", 256)
    assert bytes(x.tolist()) == b"a_b \\n " and known.tolist() == [1, 1, 1, 0, 1, 1, 0]
    x, known = sample.read_prompt("é", 256, length=4)
    assert bytes(x.tolist()) == "é  ".encode() and known.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("T, n_known", [(24, 0), (25, 0), (60, 0), (60, 30), (61, 41), (7, 2)])
def test_windows_cover_what_is_unknown_once_and_see_what_came_before(T, n_known, capsys):
    model, known = ARDM(None, 24, 27), torch.arange(T) < n_known
    args = argparse.Namespace(order="forward", calls=None, frames=False)
    seen = known.clone()
    for part, m, plan, order in sample.windows(model, dict(settings=dict(shape=[24])), known, args):
        assert part.stop - part.start <= 24 and torch.equal(m, seen[part]) and not m.all()
        assert part.start == 0 or m[:12].all()
        assert part.start in (0, T - 24) or not m[12]      # the first blank is in the middle
        assert [t for _, t, _ in plan] == list(range(int(m.sum()) + 1, len(m) + 1))
        assert sorted(order.tolist()) == list(range(1, len(m) + 1))
        seen[part] = True
    assert seen.all()
    args.calls = 2
    list(sample.windows(model, dict(settings=dict(shape=[24])), known, args))
    assert capsys.readouterr().out.count("no measured L_t") == 1


def test_longer_text_and_sound_go_on_by_windows(folder, studio, tmp_path, capsys):
    text = ("--ckpt", folder / "ckpt.pt", "--out", tmp_path, "--calls", 6, "--n", 3)
    assert call(sample, *text, "--length", 70) == 0 and "window" in capsys.readouterr().out
    lines = (tmp_path / "samples.txt").read_text().splitlines()
    assert [len(line) for line in lines] == [70] * 3
    assert call(sample, *text, "--length", 70, "--prompt", "so long a prompt that it is cut") == 0
    for line in (tmp_path / "samples.txt").read_text().splitlines():
        assert len(line) == 70 and line.startswith("so long a prompt that it is cut")
    assert call(sample, *text, "--length", 9) == 0
    assert len((tmp_path / "samples.txt").read_text().splitlines()[0]) == 9
    assert call(sample, "--ckpt", studio / "ckpt.pt", "--out", tmp_path, "--length", 150, "--calls",
                8, "--n", 2) == 0
    assert call(sample, "--ckpt", studio / "ckpt.pt", "--out", tmp_path / "a", "--length", 3) == 0
    with wave.open(str(tmp_path / "samples.wav")) as file:
        assert file.getnframes() == 2 * (150 + 800)


def test_a_mask_says_what_is_known(gallery, tmp_path, monkeypatch, refused):
    shown = []
    monkeypatch.setattr(datasets, "png", lambda *frames: shown.append(frames) or b"")
    mask, flags = tmp_path / "mask.npy", ("--ckpt", gallery / "ckpt.pt", "--out", tmp_path / "out")
    known = np.arange(30).reshape(6, 5) % 3 == 0
    np.save(mask, known)
    assert call(sample, *flags, "--mask", mask, "--n", 2, "--from", gallery / "test.npy") == 0
    rows = shown[0][0][::13, ::13]
    original = np.load(gallery / "test.npy")[0]
    for j in range(2, 6):
        part = rows[:6, 6 * j:6 * j + 5]
        assert np.array_equal(part[known], original[known]) and not np.array_equal(part, original)
    for wrong, match in ((np.ones((6, 5), bool), "neither nothing"), (known * 1, "holds int"),
                         (known[0], "bool of shape (3, 6, 5) or (6, 5) is wanted"),
                         (known & False, "neither nothing"), (np.array([{}]), "is no .npy")):
        np.save(mask, wrong)
        refused(sample, *flags, "--mask", mask, match=match)
    for bad in (b"no array", mask.read_bytes().replace(b")", b" ")):
        mask.write_bytes(bad)
        refused(sample, *flags, "--mask", mask, match="is no .npy file")


def test_images_are_sampled_completed_and_shown(gallery, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(datasets, "png", lambda *frames: shown.append(frames) or b"")
    for flags in (["--frames"], ["--inpaint", "top"]):
        assert call(sample, "--ckpt", gallery / "ckpt.pt", "--n", 3, "--calls", 20, *flags,
                    "--out", tmp_path) == 0
    assert call(sample, "--ckpt", gallery / "ckpt.pt", "--n", 20, "--calls", 4, "--frames",
                "--out", tmp_path) == 0                    # two batches
    assert shown[5][0].shape[0] == 20 * shown[1][0].shape[0] / 3
    names = ["frames.png", "inpaint.png", "process.png", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    film = shown[2]
    assert len(film) == 12 and (film[0] == 128).all(axis=2).sum() > 1000
    assert np.array_equal(film[-1], shown[0][0])
    rows = shown[3][0][::13, ::13]                         # enlarged 13 times, with a gap of one
    for i, original in enumerate(np.load(gallery.parent / "a.npy")[[0, 6, 13]]):
        row = [rows[7 * i:7 * i + 6, 6 * j:6 * j + 5] for j in range(6)]
        assert np.array_equal(row[0], original) and (row[1][3:] == 128).all()
        assert all(np.array_equal(part[:3], original[:3]) for part in row[1:])


def test_sounds_are_drawn_completed_and_shown(studio, tmp_path, capsys):
    results = json.loads((studio / "results.json").read_text())
    assert results["rate"] == 8000 and {"xz", "uniform"} < results["references"].keys()
    assert results["bits_per_dim"] < 15 and "bits/sample" in train.describe(results)
    assert "0.00" in train.describe(results | dict(L_smooth=[[0.0] * 9]))
    ckpt = ("--ckpt", studio / "ckpt.pt", "--out", tmp_path)
    for n in (2, 20):
        assert call(sample, *ckpt, "--n", n, "--frames") == 0
        assert "64 network calls" in capsys.readouterr().out
        with wave.open(str(tmp_path / "samples.wav")) as file:
            assert file.getframerate() == 8000 and file.getnframes() == n * (64 + 800)
            drawn = np.frombuffer(file.readframes(64), "<i2")
        if n == 2:
            first = drawn
    assert np.array_equal(first, drawn) and len(set(drawn.tolist())) > 30
    assert call(sample, *ckpt, "--inpaint", "ends", "--n", 2, "--from", studio / "test.wav") == 0
    test = datasets.array_in(datasets.read(studio / "test.wav"), "test")[0]
    with wave.open(str(tmp_path / "inpaint.wav")) as file:
        found = np.frombuffer(file.readframes(8 * 864), "<i2").reshape(8, 864)
    assert np.array_equal(found[0, :16], test[:16]) and np.array_equal(found[3, 48:64], test[48:64])
    assert not np.array_equal(found[0, 16:48], found[1, 16:48])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frames.png", "inpaint.png", "inpaint.wav", "samples.png", "samples.wav"]


def test_waveforms_are_the_peaks_of_their_columns():
    x = np.array([[0, 0, 100, -100, 50, 50, -50, -50]])
    picture = datasets.waveforms(x, np.arange(8)[None] < 3, size=(5, 4))[0, :, :, 0]
    assert picture.tolist() == [[255, 0, 255, 255], [255, 0, 0, 255], [170, 0, 255, 255],
                                [255, 0, 255, 0], [255, 0, 255, 255]]


# -- compress.py -----------------------------------------------------------------------------------

def pack(model, text, order="spaced:4", calls=6, block=10, K=27):
    """An archive of a text, and its ideal length in bits."""
    file, plan = io.BytesIO(), [[k for _, _, k in planner.uniform_plan(1, 24, calls)]]
    codec = compress.Codec(model, dict(shape=[24]), order, plan, block)
    symbols, nothing = torch.from_numpy(datasets.to_symbols(text, K)), np.empty(0, np.uint8)
    source = argparse.Namespace(kind="text", path="text", n=len(text), head=nothing, tail=nothing,
                                read=lambda i, j: symbols[i:j])
    bits = compress.encode_file(file, model, codec, source)
    return file.getvalue(), bits


def unpack(model, archive, K=27, damaged=None, **flags):
    """The text in an archive. damaged: a list, which gets the numbers of blocks that are."""
    file = io.BytesIO(archive)
    header = compress.read_header(file, "archive")
    codec = compress.open_codec(header, model, dict(kind="text", shape=[24]), "archive")
    text = b""
    for i, part in compress.decode_file(file, codec, header["length"], **flags):
        if part is not None:
            text += datasets.to_bytes(part, K)
        elif damaged is None:
            raise ValueError(f"block {i} is damaged")
        else:
            damaged.append(i)
    return text


def blocks_of(archive):
    """[(place, length)] of the blocks of an archive."""
    at, found = 13 + int.from_bytes(archive[5:9], "big"), []
    while at < len(archive):
        found.append((at, 5 + int.from_bytes(archive[at:at + 4], "big") % (1 << 31)))
        at += found[-1][1]
    return found


@pytest.fixture(scope="session")
def model(folder):
    return nets.load(folder / "ckpt.pt", "cpu")[0]


@pytest.mark.parametrize("device", DEVICES)
def test_exercise_09_files_of_any_length_come_back_at_their_ideal_length(folder, device):
    model = nets.load(folder / "ckpt.pt", device)[0]
    text = (folder / "test.txt").read_bytes()
    for n, block, calls in ((0, 10, 6), (1, 10, 24), (23, 1, 6), (24, 1, 5), (25, 7, 24),
                            (1001, 10, 6), (700, 1, 6), (4000, 1000, 6)):
        archive, bits = pack(model, text[:n], block=block, calls=calls)
        assert unpack(model, archive) == text[:n], "the file does not come back"
        assert unpack(nets.load(folder / "ckpt.pt", "cpu")[0], archive) == text[:n]
        blocks = blocks_of(archive)
        assert len(blocks) == -(-(n // 24) // block) + (n % 24 > 0)
        payload = sum(length for _, length in blocks)
        assert payload <= bits / 8 * 1.001 + 10 * len(blocks)
    whole = torch.from_numpy(datasets.to_symbols(text[:960], 27)).long().view(-1, 24).to(device)
    sigma = torch.from_numpy(planner.order("spaced:4", 24)).to(device).expand(whole.shape)
    nll = model.double().nll(whole, planner.uniform_plan(1, 24, 6), sigma).sum().item()
    assert math.isclose(pack(model, text[:960])[1], bits_per_dim(nll, 1), rel_tol=1e-9)


def test_exercise_09_any_item_of_any_archive_is_found(model, folder):
    text = (folder / "test.txt").read_bytes()[:24 * 23 + 5]
    for block in (1, 5, 10):
        archive, _ = pack(model, text, block=block)
        for item in (0, 4, 5, 22, 23):
            assert unpack(model, archive, item=item) == text[24 * item:24 * (item + 1)]


def test_exercise_09_every_damaged_archive_is_refused_and_intact_blocks_delivered(model, folder):
    """All truncations, and one changed bit at every position. A changed shift may lead to the same
    integers: then the text is the right one."""
    text = (folder / "test.txt").read_bytes()[:80]
    archive, _ = pack(model, text, calls=3, block=1)
    blocks = blocks_of(archive)
    shifts = {at + 4 for at, _ in blocks}
    for i in range(len(archive)):
        flipped = archive[:i] + bytes([archive[i] ^ 1 << i % 8]) + archive[i + 1:]
        with pytest.raises(ValueError):
            unpack(model, archive[:i])
        if i in shifts and unpack(model, flipped, damaged=[]) == text:
            continue
        with pytest.raises(ValueError):
            unpack(model, flipped)
        if i >= blocks[0][0]:
            damaged, hit = [], max(n for n, (at, _) in enumerate(blocks) if at <= i)
            back = unpack(model, flipped, damaged=damaged)
            assert back.startswith(text[:24 * hit]) and damaged
            if i - blocks[hit][0] >= 4:                    # not in the length of a block
                assert back == text[:24 * hit] + text[24 * (hit + 1):]
                assert damaged == [hit]
    moved = archive[:blocks[0][0]] + b"".join(archive[at:at + n] for at, n in (
        blocks[1], blocks[0], *blocks[2:]))
    with pytest.raises(ValueError, match="block 0"):       # right bytes, in a wrong place
        unpack(model, moved)
    with pytest.raises(ValueError, match="block 4"):       # something follows the last one
        unpack(model, archive + b"x")


def test_archives_decode_where_other_numbers_come_out(folder):
    """On another machine numbers differ, here by up to `size`."""
    model = nets.load(folder / "ckpt.pt", "cpu")[0]
    text = (folder / "test.txt").read_bytes()[:2000]
    archive, _ = pack(model, text)
    model.rows = 17                                        # and other batches
    model.net.register_forward_hook(
        lambda net, inputs, logits: logits + size * (2 * torch.rand_like(logits) - 1))
    for size in (0, 4e-11):
        assert unpack(model, archive) == text
    size = 1e-4
    with pytest.raises(ValueError, match="block 0 is damaged"):
        unpack(model, archive)


def test_exercise_09_blocks_near_a_boundary_are_coded_on_a_shifted_grid(model, folder, monkeypatch):
    text = (folder / "test.txt").read_bytes()[:1000]
    plain, _ = pack(model, text, block=2)
    monkeypatch.setattr(coder, "MARGIN", 1e-5)             # many values are too near a boundary now
    archive, _ = pack(model, text, block=2)
    shifts = [archive[at + 4] for at, _ in blocks_of(archive)]
    assert len(set(shifts)) > 2 and {plain[at + 4] for at, _ in blocks_of(plain)} == {0}
    assert unpack(model, archive) == text
    at = blocks_of(archive)[int(np.argmax(shifts))][0] + 4
    with pytest.raises(ValueError, match="is damaged"):
        unpack(model, archive[:at] + b"\0" + archive[at + 1:])


def test_incompressible_blocks_are_stored_raw_with_their_checksum():
    logits = 6 * torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    model = ARDM(Fixed(logits), 24, 256)
    noise = np.random.default_rng(0).bytes(24 * 50 + 7)
    archive, _ = pack(model, noise, calls=24, block=50, K=256)
    assert len(archive) < len(noise) + 200 and archive[blocks_of(archive)[0][0]] >= 128
    assert unpack(model, archive, K=256) == noise
    with pytest.raises(ValueError, match="block 1"):
        unpack(model, archive[:-9] + b"x" + archive[-8:], K=256)
    codec = compress.Codec(model, dict(shape=[24]), "forward", [[24]], 2)
    x = torch.from_numpy(np.frombuffer(noise[:48], np.uint8).reshape(1, 2, 24).copy())
    (packed, _), = codec.encode(x, 0)
    found = codec.decode([packed, packed + b"x", packed[:-1]], 2, 24, 0)
    assert [part is not None for part in found] == [True, False, False]


def test_an_upscale_model_meets_no_impossible_digit_in_damaged_bytes():
    model = UpscaleARDM(Table(2, 5, 5, 2), 2, 5, 4)
    codec = compress.Codec(model, dict(shape=[2]), "forward", [[1, 1], [1, 1]], 3)
    x = torch.tensor([[[0, 4], [3, 1], [2, 2]]], dtype=torch.uint8)
    (packed, _), = codec.encode(x, 0)
    assert torch.equal(*codec.decode([packed], 3, 2, 0), x.flatten())
    for seed in range(60):
        noise = np.random.default_rng(seed).bytes(7)
        assert list(codec.decode([bytes(5) + noise], 3, 2, 0)) == [None]


def test_headers_are_short_and_those_that_ask_for_too_much_are_refused(model, tmp_path):
    archive, _ = pack(model, b"some text")
    size = int.from_bytes(archive[5:9], "big")
    assert 13 + size < 70
    inflate = zlib.decompressobj(-15, zdict=compress.TYPICAL)
    header = json.loads(inflate.decompress(archive[13:13 + size]))

    def repacked(**change):
        deflate = zlib.compressobj(wbits=-15, zdict=compress.TYPICAL)
        text = deflate.compress(json.dumps(header | change).encode()) + deflate.flush()
        head = archive[:5] + len(text).to_bytes(4, "big") + zlib.crc32(text).to_bytes(4, "big")
        return head + text + archive[13 + size:]

    assert unpack(model, repacked()) == b"some text"
    assert unpack(model, repacked(plan=[[4] * 6])) == b"some text"
    for change in (dict(length=10 ** 12), dict(block=0), dict(block=10 ** 9), dict(length=-1),
                   dict(plan=[[0, 24]]), dict(plan=[[10 ** 12]]), dict(plan=[[-1, 25]]),
                   dict(length=10 ** 4000), dict(order="sideways"), dict(length=9.0),
                   dict(weights="0"), dict(plan=[[24.0]]), dict(plan=[[0.5, 23.5]]), dict(plan=[]),
                   dict(plan=[[24], [24]]), dict(order="random:" + 10 ** 6 * "1"), dict(head=3),
                   dict(plan=6), dict(plan=[6]), dict(order=None), dict(block=1.0)):
        with pytest.raises(ValueError):
            unpack(model, repacked(**change))
        (tmp_path / "bad").write_bytes(repacked(**change))
        assert call(compress, "info", tmp_path / "bad") in (0, 2)        # and never a traceback


def there_and_back(place, path, *flags):
    """The archive of a file, which comes back byte for byte."""
    ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
    archive, back = path.with_suffix(".ardm"), path.with_suffix(".back")
    assert call(compress, "encode", *ckpt, *flags, path, archive) == 0
    assert call(compress, "decode", *ckpt, archive, back) == 0
    assert back.read_bytes() == path.read_bytes()
    return archive


def test_compress_on_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "in").write_bytes((folder / "test.txt").read_bytes()[:2000])
    ckpt = ("--ckpt", folder / "ckpt.pt", "--device", "cpu")
    for flags in ([], ["--calls", 8], ["--order", "auto", "--block", 3]):
        archive = there_and_back(folder, tmp_path / "in", *flags)
        assert "spaced:4" in capsys.readouterr().out or flags
    unfinished = torch.load(folder / "ckpt.pt", weights_only=True) | dict(L=None, counts=None)
    torch.save(unfinished, tmp_path / "u")
    assert call(compress, "encode", "--ckpt", tmp_path / "u", tmp_path / "in", tmp_path / "b") == 0
    assert "this run is not finished" in capsys.readouterr().err
    (tmp_path / "none").touch()
    for flags in ([], ["--order", "auto"]):
        there_and_back(folder, tmp_path / "none", *flags)
    assert call(compress, "info", archive) == 0
    assert "length   2000" in capsys.readouterr().out
    assert call(compress, "bench", *ckpt, tmp_path / "in") == 0
    printed = capsys.readouterr().out
    assert "decoded and identical" in printed and "exact nll" in printed and "xz" in printed


def test_images_are_compressed_whole_in_part_and_where_damaged(gallery, tmp_path, capsys):
    ckpt = ("--ckpt", gallery / "ckpt.pt", "--device", "cpu")
    pixels = pictures(9, (6, 5, 3), seed=1)
    np.save(tmp_path / "in.npy", pixels)
    path = there_and_back(gallery, tmp_path / "in.npy", "--calls", 20, "--block", 1)
    assert call(compress, "decode", *ckpt, "--item", 7, path, tmp_path / "one.npy") == 0
    assert np.array_equal(np.load(tmp_path / "one.npy"), pixels[7:8])
    assert call(compress, "encode", *ckpt, "--calls", 20, "--block", 1, "--order", "auto",
                tmp_path / "in.npy", tmp_path / "best") == 0             # random:1 was one of them
    archive = bytearray(path.read_bytes())
    assert (tmp_path / "best").stat().st_size <= len(archive) + 9
    (tmp_path / "cut").write_bytes(archive[:blocks_of(archive)[2][0] + 3])
    for item in (7, 2):
        assert call(compress, "decode", *ckpt, "--item", item, tmp_path / "cut",
                    tmp_path / "b") == 2 and not (tmp_path / "b").exists()
        assert "is damaged" in capsys.readouterr().err
    archive[blocks_of(archive)[3][0] + 6] ^= 4
    (tmp_path / "a").write_bytes(archive)
    assert call(compress, "decode", *ckpt, tmp_path / "a", tmp_path / "b") == 2
    assert "block 3" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert call(compress, "decode", *ckpt, "--keep-going", tmp_path / "a", tmp_path / "b") == 1
    assert "block 3" in capsys.readouterr().err
    assert np.array_equal(np.load(tmp_path / "b"), np.delete(pixels, 3, axis=0))


def test_image_files_come_back_byte_for_byte_whatever_is_around_the_pixels(gallery, tmp_path,
                                                                           monkeypatch):
    pixels, path, files = pictures(7, (6, 5, 3)), tmp_path / "a", []
    for array in (pixels, np.asfortranarray(pixels), pixels.transpose(0, 3, 1, 2).copy()):
        file = io.BytesIO()
        np.save(file, array)
        files += [file.getvalue(), file.getvalue() + b"behind" + file.getvalue()]
    file = io.BytesIO()
    np.lib.format.write_array(file, pixels, version=(2, 0))
    for content in (*files, file.getvalue()):
        path.write_bytes(content)
        there_and_back(gallery, path, "--calls", 20)
    np.save(tmp_path / "mask.npy", pixels > 200)
    archive, one = there_and_back(gallery, tmp_path / "mask.npy", "--calls", 20), tmp_path / "one"
    assert call(compress, "decode", "--ckpt", gallery / "ckpt.pt", archive, one, "--item", 1) == 0
    assert np.array_equal(np.load(one), (pixels > 200)[1:2]) and np.load(one).dtype == bool
    one.unlink()
    full = open("/dev/full", "wb", buffering=0)
    monkeypatch.setattr(os, "posix_fallocate", lambda *how: full.write(b"x"))
    assert call(compress, "decode", "--ckpt", gallery / "ckpt.pt", archive, one) == 2
    assert not list(tmp_path.glob("one*"))


def test_sound_files_come_back_byte_for_byte(studio, refused, tmp_path, capsys):
    ckpt = ("--ckpt", studio / "ckpt.pt")
    sound = np.frombuffer((studio / "test.wav").read_bytes()[44:], "<i2")[:200]
    stereo = np.stack((sound, sound[::-1]), axis=1)
    noise = np.random.default_rng(0).integers(-32768, 32768, (100, 1))
    for samples, how in ((stereo, dict(before=LIST, after=LIST)), (np.zeros((150, 1)), {}),
                         (sound[:0, None], {}), (sound[:1, None], dict(after=LIST)),
                         (sound[:, None], dict(size=0xFFFFFFFF)), (noise, {})):
        content = wav_bytes(samples, **how) + b"\0" * (samples is noise)
        (tmp_path / "a.wav").write_bytes(content)
        archive = there_and_back(studio, tmp_path / "a.wav", "--calls", 12)
        assert archive.stat().st_size < len(content) + 160
    (tmp_path / "a.wav").write_bytes(wav_bytes(stereo))
    assert call(compress, "encode", *ckpt, "--block", 1, tmp_path / "a.wav", tmp_path / "a") == 0
    assert call(compress, "decode", *ckpt, "--item", 1, tmp_path / "a", tmp_path / "b.wav") == 0
    item = datasets.array_in(datasets.read(tmp_path / "b.wav"), "b")
    assert np.array_equal(item, stereo.T.reshape(1, -1)[:, 64:128])
    capsys.readouterr()
    assert call(compress, "bench", *ckpt) == 0
    assert "exact nll" in capsys.readouterr().out
    for name, content in (("a.txt", b"some text"), ("a.npy", (HERE / "coder.py").read_bytes())):
        (tmp_path / name).write_bytes(content)
        refused(compress, "encode", *ckpt, tmp_path / name, tmp_path / "c", match="something else")
    assert call(train, "--steps", 2, "--dim", 8, "--depth", 1, "--passes", 1, "--length", 64,
                "--branch", 0, "--data", studio.parent / "a.wav", "--out", tmp_path / "run") == 0
    ckpt = ("--ckpt", tmp_path / "run" / "ckpt.pt")
    assert call(sample, *ckpt, "--n", 1, "--calls", 5, "--out", tmp_path / "drawn") == 0
    refused(compress, "encode", *ckpt, tmp_path / "a.wav", tmp_path / "c",
            match="order-agnostic model of audio cannot code")


def test_other_models_than_of_bytes_refuse_packed_files(folder, gallery, refused, tmp_path):
    path = tmp_path / "in"
    for place in (folder, gallery):
        for content, match in ((gzip.compress(b"some text"), "unpack it first"),
                               (b"\x89PNG\r\n" + bytes(99), "a PNG picture")):
            path.write_bytes(content)
            refused(compress, "encode", "--ckpt", place / "ckpt.pt", path, tmp_path / "out",
                    match=match)


def numpy_features():
    """Vector instructions that NumPy uses here and can be told not to."""
    core = np._core._multiarray_umath
    return " ".join(name for name in core.__cpu_dispatch__ if core.__cpu_features__[name])


ELSEWHERE = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41",
                 NPY_DISABLE_CPU_FEATURES=numpy_features(), OMP_NUM_THREADS="1")


def test_archives_decode_on_a_simulated_other_machine(folder, gallery, studio, tmp_path, request):
    places = [(gallery, "test.npy")]
    if request.node.callspec.id == "upscale":              # text and sound once
        places += [(folder, "test.txt"), (studio, "test.wav")]
    for place, name in places:
        ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
        assert call(compress, "encode", *ckpt, "--calls", 20, place / name,
                    tmp_path / "a") == 0
        done = child("compress.py", "decode", *ckpt, tmp_path / "a", tmp_path / "b",
                     env={**os.environ, **ELSEWHERE})
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "b").read_bytes() == (place / name).read_bytes()


def test_a_killed_command_and_a_full_disk_leave_the_old_file(folder, tmp_path):
    (tmp_path / "a").write_text("old")
    encode = ("encode", "--ckpt", folder / "ckpt.pt", "--device", "cpu", folder / "test.txt",
              tmp_path / "a")
    process = subprocess.Popen([sys.executable, HERE / "compress.py", *map(str, encode)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("a.*.part")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and (tmp_path / "a").read_text() == "old"
    for path in tmp_path.glob("a.*.part"):
        path.unlink()

    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = child("compress.py", *encode, preexec_fn=limit)
    assert done.returncode == 2 and "cannot write" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_writer_is_as_polite_as_the_shell_and_serves_pipes(folder, model, tmp_path):
    pack(model, b"some text")                              # what the processes below will do
    target, link, mask = tmp_path / "target", tmp_path / "link", os.umask(0o027)
    target.write_text("old")
    target.chmod(0o604)
    link.symlink_to(target)
    for path in (link, tmp_path / "new"):
        with datasets.write(path) as file:
            file.write(b"new")
    with datasets.write(tmp_path / "two", mode="w") as file:
        assert file.encoding == "utf-8"                    # whatever the machine prefers
    with datasets.write(tmp_path / "two") as slow:
        with datasets.write(tmp_path / "two") as fast:
            fast.write(b"fast")
        slow.write(b"slow")
    os.umask(mask)
    assert (tmp_path / "two").read_bytes() == b"slow" and len(list(tmp_path.iterdir())) == 4
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert [path.stat().st_mode & 0o777 for path in (target, tmp_path / "new")] == [0o604, 0o640]
    text, ckpt = folder / "test.txt", folder / "ckpt.pt"
    line = (f"{{0}} encode --ckpt {ckpt} <(head -c 500 {text}) - | {{0}} decode --ckpt {ckpt} "
            f"/dev/stdin - | cmp - <(head -c 500 {text})").format(f"{sys.executable} compress.py")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=HERE, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_users_is_written_over(folder, model, refused, tmp_path):
    pack(model, b"some text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.txt").write_text("my own")
    refused(train, *QUICK, "--out", tmp_path / "mine", match="choose another --out")
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(wav_bytes(np.arange(400)[:, None]))
    refused(train, *SMALL, "--length", 8, "--data", tmp_path / "sounds", "--out",
            tmp_path / "sounds" / "run", match="choose another --out")
    (tmp_path / "loop").symlink_to("loop")
    encode = ("encode", "--ckpt", folder / "ckpt.pt", folder / "test.txt")
    refused(compress, *encode, tmp_path / "loop", match="a loop of symbolic links")
    (tmp_path / "keep").write_text("my own")
    with open(tmp_path / "keep", "ab") as keep:            # as by >> keep
        subprocess.run([sys.executable, HERE / "compress.py", *map(str, encode), "/dev/stdout"],
                       stdout=keep, check=True, stderr=subprocess.DEVNULL)
    assert (tmp_path / "keep").read_bytes().startswith(b"my ownARDM\x08")
    refused(train, "--resume", "--out", folder, "--steps", 10, match="give it more --steps")


def test_a_second_run_in_one_folder_ends_before_it_begins(tmp_path):
    c = settings(datasets.load("pydoc", 16), out=str(tmp_path / "run"))
    folder, lock = train.prepare_folder(c, False)
    with pytest.raises(ValueError, match="another run is at work"):
        train.prepare_folder(c, False)
    lock.close()
    (folder / "log.csv").touch()                           # of a run that saved nothing yet
    train.prepare_folder(c, False)


def test_decode_finds_the_checkpoint_of_an_archive(folder, gallery, tmp_path, capsys, monkeypatch):
    for name, place in (("a", gallery), ("b", folder)):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "ckpt.pt").symlink_to(place / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("some text")
    assert call(compress, "encode", "--ckpt", folder / "ckpt.pt", "in", "archive") == 0
    assert call(compress, "decode", "archive", "back") == 0
    assert Path("back").read_text() == "some text" and "b/ckpt.pt" in capsys.readouterr().out
    assert call(compress, "decode", "--ckpt", gallery / "ckpt.pt", "archive", "back") == 2
    assert "another checkpoint, out/b/ckpt.pt" in capsys.readouterr().err
    Path("out/b/ckpt.pt").unlink()
    assert call(compress, "decode", "archive", "back") == 2
    assert "name it by --ckpt" in capsys.readouterr().err


def test_data_has_an_identity(studio, refused, tmp_path, capsys):
    path, ckpt, other = studio.parent / "a.wav", studio / "ckpt.pt", tmp_path / "other.wav"
    other.write_bytes(wav_bytes(np.random.default_rng(5).integers(-900, 900, (3000, 1))))
    refused(train, "--resume", "--out", studio, "--data", other, "--steps", 90,
            match="is not the data that")
    assert call(train, "--evaluate", ckpt, "--data", other, "--passes", 1) == 0
    assert "is not the data that" in capsys.readouterr().out         # on purpose
    (tmp_path / "moved").write_bytes(path.read_bytes())
    assert call(train, "--evaluate", ckpt, "--data", tmp_path / "moved", "--passes", 1) == 0
    assert "is not the data that" not in capsys.readouterr().out
    path.write_bytes(other.read_bytes())
    refused(train, "--evaluate", ckpt, match="is not the data that")
    path.write_bytes((tmp_path / "moved").read_bytes())


def test_what_does_not_decode_is_not_written(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compress.Codec, "decode", lambda self, packed, *args: [None] * len(packed))
    with pytest.raises(ValueError, match="does not decode to what went in"):
        with datasets.write(tmp_path / "a"):
            pack(model, b"some text")
    assert list(tmp_path.iterdir()) == []
    broken = nets.load(folder / "ckpt.pt", "cpu")[0]
    broken.net.head.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="weights damaged"):
        pack(broken, b"some text")


# -- Bad input: one line, exit code 2, nothing written ---------------------------------------------

def test_train_refuses_bad_input(refused, folder, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("too short " * 20)
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "ckpt.pt").write_text("some text " * 100)
    out, resume = ("--out", tmp_path / "out"), ("--resume", "--out", folder)
    for flags, match in (
            (("--data", "tex8", *out), "no such file, and none of the names pydoc, glyphs"),
            (("--data", tmp_path / "empty", *out), "is empty"),
            (("--data", tmp_path / "short", *out), "200 characters are too few for chunks of 64"),
            (("--data", tmp_path / "ckpt.pt", "--length", 9, "--out", tmp_path), "another --out"),
            (("--size", "huge", *out), "invalid choice"),
            (("--steps", 0, *out), "--steps 0: must be more than 0"),
            (("--minutes", "nan", *out), "--minutes nan: must be more than 0"),
            (("--heads", 0, *out), "--heads"), (("--dim", 30, "--heads", 4, *out), "multiple of"),
            (("--lr", "nan", *out), "--lr nan: must be more"),
            (("--branch", 1, *out), "choose 2 to K = 27"),
            (("--resume", "--evaluate", "x", *out), "not allowed with"),
            (("--seed", -1, *out), "--seed -1: choose"),
            (("--branch", -3, *out), "choose 2 to K = 27"), (("--bits", 9, *out), "invalid choice"),
            (("--steps", 3, "--minutes", 1, *out), "give --steps or --minutes, not both"),
            (("--bits", 5, *out), "--bits is for images"),
            (("--data", "glyphs", "--length", 5, *out), "--length is for text and audio"),
            (("--parametrization", "data", *out), "--parametrization is for an upscale model"),
            (("--data", "tones", "--parametrization", "data", *out), "data is not for audio"),
            (("--branch", 28, *out), "choose 2 to K = 27"),
            (("--device", "abacus", *out), "--device abacus"),
            (("--resume", *out), "no such checkpoint"), (("--stepz", 3, *out), "unrecognized"),
            ((*QUICK, "--out", tmp_path / "empty"), "File exists"),
            (("--evaluate", folder / "ckpt.pt", "--length", 32), "leave out --length"),
            (("--evaluate", folder / "ckpt.pt", "--data", tmp_path / "bytes"), "was trained on"),
            ((*resume, "--dim", 64), "leave out --dim"),
            ((*resume, "--steps", 99, "--minutes", 1), "give --steps or --minutes, not both"),
            ((*resume, "--data", tmp_path / "bytes"), "was trained on")):
        refused(train, *flags, match=match)


def test_foreign_and_damaged_checkpoints_are_refused(refused, folder, tmp_path):
    good = (folder / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(Path, tmp_path / "code.pt")
    (tmp_path / "in").write_text("text")
    out = tmp_path / "out"
    for name in ("cut.pt", "text.pt", "other.pt", "code.pt"):
        refused(train, "--evaluate", tmp_path / name, match="is no checkpoint")
        refused(sample, "--ckpt", tmp_path / name, "--out", out, match="is no checkpoint")
        refused(compress, "encode", "--ckpt", tmp_path / name, tmp_path / "in", out,
                match="is no checkpoint")
    refused(sample, "--ckpt", tmp_path / "none.pt", match="no such checkpoint")
    whole = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save({key: whole[key] for key in ("settings", "ema")}, tmp_path / "ckpt.pt")
    assert call(sample, "--ckpt", tmp_path / "ckpt.pt", "--calls", 5, "--out", out) == 0
    refused(train, "--resume", "--out", tmp_path, match="weights alone")


def test_sample_refuses_bad_input(refused, folder, gallery, tmp_path):
    text, image = (("--ckpt", place / "ckpt.pt", "--out", tmp_path / "out")
                   for place in (folder, gallery))
    for flags, match in (
            (("--calls", 0), "0 network calls: choose 1 to 24"),
            (("--calls", 25), "25 network calls: choose 1 to 24"),
            (("--prompt", "the ____ of", "--calls", 12), "choose 1 to 4"),
            (("--prompt", "the ____ of", "--length", 5), "--length 5: the prompt alone has 11"),
            (("--n", 10 ** 19), "1 to 10,000,000"),
            (("--prompt", "The ____"), "'T' at position 0"),
            (("--length", 30, "--frames"), "one window"), (("--length", 0), "--n and --length"),
            (("--prompt", "nothing to do"), "no blank"), (("--n", 0), "--n and --length"),
            (("--order", "sideways"), "choose forward, backward"),
            (("--from", "x"), "--mask and --from for"),
            (("--temperature", -1), "--temperature must be 0 or more"),
            (("--device", "meta"), "choose cuda, mps or cpu"),
            (("--inpaint", "top"), "--mask and --from for images")):
        refused(sample, *text, *flags, match=match)
    refused(sample, *image, "--prompt", "a_", match="--prompt is for text")
    refused(sample, *image, "--inpaint", "bottom", match="choose left or top")
    with pytest.raises(ValueError, match="there is nothing .* to keep"):
        sample.inpaint_mask("top", dict(kind="image", shape=[1, 1, 9]))
    refused(sample, *image, "--length", 9, match="--length is for text and sound")
    refused(sample, *image, "--mask", "m.npy", "--inpaint", "top", match="choose --inpaint or")


def test_compress_refuses_bad_input(refused, folder, gallery, model, tmp_path):
    ckpt, out = ("--ckpt", folder / "ckpt.pt"), tmp_path / "out"
    (tmp_path / "in").write_text("Hello")
    (tmp_path / "foreign").write_bytes(os.urandom(300))
    archive, _ = pack(model, b"some text")
    (tmp_path / "a").write_bytes(archive)
    (tmp_path / "cut").write_bytes(archive[:-1])
    (tmp_path / "old").write_bytes(archive[:4] + b"\x07" + archive[5:])
    other = torch.load(folder / "ckpt.pt", weights_only=True)
    other["ema"]["net.head.bias"] += 1
    del other["digest"]
    torch.save(other, tmp_path / "other.pt")
    source = tmp_path / "in"
    (tmp_path / "empty").touch()
    for flags, match in (
            (("encode", *ckpt, source, out), "'H' at position 0"),
            (("encode", *ckpt, tmp_path / "none", out), "none cannot be read: No such file"),
            (("encode", *ckpt, "--calls", 99, source, out), "99 network calls: choose 1 to 24"),
            (("encode", *ckpt, "--calls", 0, source, out), "0 network calls: choose 1 to 24"),
            (("bench", *ckpt, tmp_path / "empty"), "is empty"), (("bench",), "name a file"),
            (("encode", *ckpt, "--order", "up", source, out), "choose forward, backward"),
            (("encode", *ckpt, "--order", "random:" + 40 * "1", source, out), "choose forward"),
            (("encode", *ckpt, source, source), "the same file"),
            (("encode", *ckpt, source, tmp_path), "a folder"),
            (("encode", *ckpt, "--block", 0, source, out), "--block 0: choose 1 to"),
            (("encode", *ckpt, folder / "test.txt", folder / "ckpt.pt"), "the same file"),
            (("decode", *ckpt, tmp_path / "foreign", out), "is no archive"),
            (("decode", *ckpt, tmp_path / "old", out), "another format version than 8"),
            (("decode", *ckpt, tmp_path / "cut", out), "is damaged: block 0"),
            (("decode", *ckpt, tmp_path / "a", "--item", 1, out), "--item 1: "),
            (("decode", "--ckpt", tmp_path / "other.pt", tmp_path / "a", out),
             "another checkpoint"), ((), "required")):
        refused(compress, *flags, match=match)
    ckpt = ("--ckpt", gallery / "ckpt.pt")
    np.save(tmp_path / "objects.npy", np.array([Path("x")]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((gallery / "test.npy").read_bytes()[:300])
    bad = {"shape": (pictures(3, (5, 6, 3)), "the model codes (C, H, W) = (3, 6, 5)"),
           "grey": (pictures(3, (6, 5)), "the model codes"),
           "float": (np.zeros((3, 6, 5, 3)), "float64"),
           "flat": (np.zeros(90, np.uint8), "array of shape (90,)"),
           "objects": (None, "holds object"), "cut": (None, "is cut off")}
    for name, (pixels, match) in bad.items():
        if pixels is not None:
            np.save(tmp_path / f"{name}.npy", pixels)
        refused(compress, "encode", *ckpt, tmp_path / f"{name}.npy", out, match=match)
        if name not in ("shape", "grey"):
            refused(train, "--data", tmp_path / f"{name}.npy", "--out", out, match=match)


# -- The README ------------------------------------------------------------------------------------

def test_every_script_explains_itself_and_readme_names_what_exists(capsys):
    for script in (train, sample, compress):
        assert call(script, "--help") == 0 and len(capsys.readouterr().out.splitlines()) < 80
    readme = (HERE / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .*? \| (`.*?`) \| (`.*?`) \|$", readme, re.M)
    functions, tests = (re.findall(r"`([\w.]+)`", " ".join(column)) for column in zip(*rows))
    assert len(functions) > 8 and len(tests) > 8
    for name in functions:
        thing, *path = name.split(".")
        thing = __import__(thing)
        for part in path:
            thing = getattr(thing, part)
    assert all(name in globals() for name in tests)


# -- The page beside the paper ---------------------------------------------------------------------

class Browser:
    """Headless Chromium, driven through two pipes (its DevTools protocol)."""

    def __init__(self, program, folder):
        read, self.commands = os.pipe()
        self.answers, write = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', program, *flags,
             f"--user-data-dir={folder}"], pass_fds=(read, write), stderr=subprocess.DEVNULL)
        self.number, self.rest, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = dict(sessionId=found["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.rest:
            assert select.select([self.answers], [], [], 30)[0], "Chromium does not answer"
            self.rest += os.read(self.answers, 1 << 20)
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def call(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params, **self.session)
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self.read()
        while answer.get("id") != self.number:
            self.events.append(answer)
            answer = self.read()
        return answer["result"]

    def run(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=dict(Tab=9, ArrowRight=39)[key])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium")
    if ASSIGNMENT:
        pytest.skip("the page shows solutions")
    if program is None:
        pytest.skip("no chromium is installed: nobody looks at the page")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    size = dict(width=1280, height=2000, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    browser.call("Page.navigate", url=(page.HERE / "index.html").as_uri())
    while browser.run("document.readyState") != "complete":
        time.sleep(0.05)
    yield browser
    browser.process.kill()
    seen = [event["method"] for event in browser.events]
    assert seen.count("Network.requestWillBeSent") == 1    # the page itself
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & {*seen}


def test_an_ingredient_that_is_taken_away_is_away_in_the_evaluation_too(monkeypatch):
    found = []
    monkeypatch.setattr(bench, "trained", lambda **how: (mock.Mock(), None))
    monkeypatch.setattr(train, "bound", lambda *x, **how: found.append(nets.CONV) or {"bits": 1})
    list(bench.without({"it": mock.patch.object(nets, "CONV", 1)}, mock.Mock(seeds=1),
                       mock.Mock(), None, steps=1))
    assert found == [5, 1]


def test_a_training_that_was_told_to_stop_is_no_measurement(monkeypatch):
    monkeypatch.setattr(train, "train", lambda *how: False)
    with pytest.raises(KeyboardInterrupt):
        bench.trained(data=datasets.load("pydoc", 16), steps=1)


def test_a_network_that_sees_the_past_alone_gives_all_texts_a_sum_of_1():
    with bench.patched(bench.PAST):
        model = nets.build(dict(kind="text", K=2, shape=[5], recipe="ours", branch=0, dim=8,
                                depth=3, heads=1, parametrization="data")).double()
        for p in model.parameters():
            nn.init.normal_(p, generator=seeded())
        assert abs((-model.loss(all_x(5, 2))).exp().sum().item() - 1) < 1e-12


@pytest.mark.skipif(ASSIGNMENT, reason="this is an assignment itself")
def test_an_assignment_holds_no_line_of_a_solution(tmp_path):
    make.make(tmp_path / "copy")
    for name in {name for name, *_ in make.EXERCISES.values()}:
        kept = (tmp_path / "copy" / name).read_text("utf-8").split("\n")
        gone = {line.strip() for line in (HERE / name).read_text("utf-8").split("\n")} - {
            line.strip() for line in kept}
        gone = [line for line in gone if len(line) > 24]
        assert len(gone) > 5
        for path in (tmp_path / "copy").rglob("*.*"):
            if path.suffix in (".py", ".md", ".html", ".json", ".txt"):
                text = re.sub(r"</?\w[^<>]*>", "", path.read_text("utf-8"))
                assert not [line for line in gone if line in html.unescape(text)], path


@pytest.mark.skipif(ASSIGNMENT, reason="the page shows solutions")
def test_the_page_is_made_of_the_sources_and_the_recording():
    found = (page.HERE / "index.html").read_bytes()
    assert found == page.build().encode(), "run python -m results.page"
    film = (page.HERE / "text.svg").read_text("utf-8")
    assert film == page.film(**json.loads((page.HERE / "page.json").read_text())["film"])
    assert xml.etree.ElementTree.fromstring(film).tag.endswith("svg")
    assert len(found) < 1.5e6 and (page.HERE / "page.json").stat().st_size < 1e6
    assert not re.search(rb"https?://(?!www.w3.org)|src=|@import", found)


@pytest.mark.parametrize("way", page.ORDERS)
def test_what_is_recorded_of_a_sentence_is_what_the_model_says_of_it(way):
    model, checkpoint = nets.load(nets.ENGLISH)
    run = page.sentence(model, planner.smooth(checkpoint["L"], checkpoint["counts"])[0], way, 6, 24)
    x = torch.tensor([[10 if letter == "\u21b5" else ord(letter) for letter in run["x"]]])
    sigma, plan = torch.tensor([run["sigma"]]), [(1, t, k) for t, k in run["plan"]]
    assert run["bits"][-1] == pytest.approx(model.nll(x, plan, sigma).item() / math.log(2), abs=0.1)
    assert len(run["bits"]) == 7 and [len(top) for top in run["top"]] == [
        5 * (25 - t) for _, t, _ in plan]
    first = model.log_probs(x, sigma < 1, torch.ones(1).long(), torch.ones(1).long())[0]
    best = first.argmax(dim=1).tolist()
    assert run["top"][0][::5] == page.visible(torch.tensor(best))


def test_the_page_plans_as_the_planner_does(browser):
    L = np.array(browser.run("L"))
    D, wanted = len(L), planner.costs(L)
    assert np.abs(np.array(browser.run("best.costs")) - list(wanted.values())).max() < 1e-9
    for name, plan in (("planned", lambda n: planner.plan(L, n)),
                       ("even", lambda n: planner.uniform_plan(1, D, n)),
                       ("cosine", lambda n: planner.cosine_plan(1, D, n))):
        found = browser.run(f"L.map((_, n) => PLANS.{name}(n + 1))")
        for n, calls in enumerate(found, start=1):
            assert len(calls) == n and sum(k for _, k in calls) == D
            cost = planner.plan_cost(L, [(1, t, k) for t, k in calls])
            assert cost == pytest.approx(planner.plan_cost(L, plan(n)), abs=1e-9)


def test_every_symbol_and_step_of_the_boxes_lights_up_on_both_sides(browser):
    for name in browser.run("boxes.map(box => box.dataset.name)"):
        browser.run(f"document.querySelector('input[value={name}]').click()")
        places = browser.run("""[...document.querySelectorAll(".box:not(.away) ol [data-k]")].map(
            one => {
                const r = one.getClientRects()[0], y = r.y + 6;          // no symbol on top of it
                let x = r.x + 2;
                while (x < r.right && document.elementFromPoint(x, y) !== one) x++;
                return [one.dataset.k, x, y];
            })""")
        assert len(places) > 4
        for key, x, y in places:
            browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            lit = browser.run("""[...document.querySelectorAll(".box:not(.away) .lit")].map(
                one => [one.dataset.k, one.closest("pre") !== null])""")
            assert {(key, False), (key, True)} == {tuple(one) for one in lit}
    meanings = browser.run("Object.keys(MEANING)")
    assert {*meanings} == {*page.NAMES} == {*browser.run(
        "[...document.querySelectorAll('.legend button')].map(one => one.dataset.k)")}


def test_the_page_is_moved_by_the_keyboard(browser):
    reached = set()
    browser.run("document.querySelector('input[value=training]').click()")
    browser.run("document.body.tabIndex = -1; document.body.focus()")
    for _ in range(120):
        browser.press("Tab")
        place = browser.run("[...document.querySelectorAll('input, button')].indexOf("
                            "document.activeElement)")
        if place in reached or place < 0:
            continue
        reached.add(place)
        if browser.run("document.activeElement.type") != "range":
            continue
        before = browser.run("[document.activeElement.value, document.activeElement"
                             ".closest('section').textContent]")
        browser.run("document.activeElement.value < document.activeElement.max / 2 || "
                    "(document.activeElement.value = 1)")
        browser.press("ArrowRight")
        after = browser.run("[document.activeElement.value, document.activeElement"
                            ".closest('section').textContent]")
        assert before[0] != after[0] and before[1] != after[1]
    wanted = browser.run("[...document.querySelectorAll('input, button')].flatMap((one, i) => "
                         "one.disabled || one.type === 'radio' && !one.checked ? [] : [i])")
    assert reached == {*wanted} and len(wanted) > 20


def test_what_the_page_shows_is_what_was_recorded(browser):
    for i, run in enumerate(json.loads((page.HERE / "page.json").read_text())["sentences"]):
        browser.run(f"run = recording.sentences[{i}]; toCall(run.calls, run.calls)")
        assert browser.run("$('#letters').textContent") == run["x"]
        assert f"{run['bits'][-1]:.1f} bits so far for 64 letters" in browser.run(
            "$('#asked').textContent")
        browser.run("toCall(0)")
        assert browser.run("$('#letters').textContent") == "·" * 64
    states, popped = browser.run("Object.values(coded())")
    x, own = 77, dict(a=(0, 4), b=(4, 3), c=(7, 1))
    for symbol, found in zip(reversed("abacabab"), states[1:]):
        start, f = own[symbol]
        x = x // f * 8 + start + x % f
        assert found == x
    assert "".join(popped) == "abacabab" and states[-1] == 77
    for name in ("digit", "speech"):
        one = browser.run(f"({{...{name}, x: [...{name}.x], sigma: [...{name}.sigma]}})")
        x, sigma = torch.tensor([one["x"]]), torch.tensor(one["sigma"]).view(one["S"], 1, -1)
        model = UpscaleARDM(None, x.shape[1], one["K"], one["b"])
        for n in (0, len(one["plan"]) * 2 // 3, len(one["plan"])):
            s, t, _ = (one["plan"] + [[model.S, model.D + 1, 0]])[n]
            wanted = model.net_input(x, sigma[s - 1] < t, s)[0].tolist()
            assert browser.run(f"stateOf({name}, {n}).map(([low]) => low)") == wanted
        assert wanted == one["x"]                          # at the end all is known
