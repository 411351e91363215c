"""The paper's claims as oracles, then every script end to end. Run with: python -m pytest -q

ARDM_DATA names a folder with real data (text8/text8_prefix.zip); tests that need it skip without.
"""
import gzip
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bench
import coder
import compress
import data as datasets
import nets
import planner
import sample
import train
from ardm import (ARDM, UpscaleARDM, bits_per_dim, late_steps, num_stages, pick, rerank,
                  sample_sigma, stratified_steps)
from data import UserError

HERE = Path(__file__).parent
README = HERE / "README.md"


class Table(nn.Module):
    """A network with a logit table of its own for every input it can be shown: D and K tiny."""

    def __init__(self, D, K, seed=0, dtype=torch.float32):
        super().__init__()
        self.D, self.K = D, K
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn((K + 1) ** D, D, K, generator=generator).to(dtype))

    def forward(self, x, m, t, s):
        seen = torch.where(m, x, self.K)
        index = (seen * (self.K + 1) ** torch.arange(self.D)).sum(dim=1)
        return self.logits[index]


class Spy(nn.Module):
    """Uniform predictions; remembers what it was shown."""

    def __init__(self, K):
        super().__init__()
        self.K, self.seen = K, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, m, t, s):
        self.seen.append((x.clone(), m.clone(), t.clone()))
        return torch.zeros(*x.shape, self.K) + self.weight


def all_x(D, K):
    return torch.tensor(list(itertools.product(range(K), repeat=D)))


def all_sigma(D):
    return torch.tensor(list(itertools.permutations(range(1, D + 1))))


def by_hand(net, x, sigma, plan):
    """-log p(x | sigma) in nats, one datapoint, with plain loops: the chain rule over a plan."""
    nats = 0.0
    for _, t, k in plan:
        m = torch.tensor([[step < t for step in sigma]])
        log_p = torch.log_softmax(net(torch.tensor([x]), m, None, None)[0].double(), dim=-1)
        nats -= sum(log_p[i, x[i]].item() for i, step in enumerate(sigma) if t <= step < t + k)
    return nats


# -- ardm.py ---------------------------------------------------------------------------------------

def test_sigma_is_a_uniform_permutation():
    sigma = sample_sigma(6000, 3, generator=torch.Generator().manual_seed(0))
    orders, counts = sigma.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and (sigma.sort(dim=1).values == torch.arange(1, 4)).all()
    assert counts.min() > 850 and counts.max() < 1150                  # +- 5 standard deviations


@pytest.mark.parametrize("K, b, S", [
    (256, 2, 8), (256, 4, 4), (256, 16, 2), (256, 256, 1), (27, 3, 3), (27, 27, 1), (28, 27, 2),
    (125, 5, 3), (216, 6, 3), (243, 3, 5), (65536, 4, 8), (3, 2, 2), (2, 2, 1)])
def test_125_classes_in_digits_of_5_are_3_stages_not_4(K, b, S):
    """ceil(log(125) / log(5)) is 4 in floats."""
    assert num_stages(K, b) == S
    for bad in (0, 1, K + 1):
        with pytest.raises(ValueError, match=f"2 to K = {K}"):
            num_stages(K, bad)


def test_t_reaches_1_and_D_and_every_batch_covers_all_steps():
    for seed in range(20):
        t, s = stratified_steps(24, 2, 6, generator=torch.Generator().manual_seed(seed))
        pairs = sorted(zip(s.tolist(), t.tolist()))
        assert pairs == sorted(2 * list(itertools.product(range(1, 3), range(1, 7))))
    first = torch.stack([stratified_steps(3, 1, 5)[0] for _ in range(2000)])
    for column in first.T:                                             # each alone: uniform
        assert (column.bincount(minlength=6)[1:] - 400).abs().max() < 100


def test_late_steps_are_weighted_back_to_uniform():
    t, s, weight = (torch.cat(parts) for parts in zip(*(
        late_steps(50, 2, 5, generator=torch.Generator().manual_seed(i)) for i in range(2000))))
    for stage, step in itertools.product((1, 2), range(1, 6)):
        n = 5 - step + 1
        here = (t == step) & (s == stage)
        q = math.sqrt(n / 5) - math.sqrt((n - 1) / 5)
        assert abs(here.float().mean().item() - q / 2) < 0.005
        assert torch.allclose(weight[here], torch.tensor(1 / (5 * q)), rtol=1e-4)


def test_exactly_D_minus_t_plus_1_variables_are_masked():
    model = ARDM(Spy(5), D=7, K=5)
    model.loss(torch.randint(5, (100, 7)))
    _, m, t = model.net.seen[0]
    assert ((~m).sum(dim=1) == 7 - t + 1).all() and set(t.tolist()) == set(range(1, 8))


@pytest.mark.parametrize("D, K", [(1, 2), (7, 5), (64, 27)])
def test_uniform_network_costs_exactly_D_log_K_on_every_draw(D, K):
    model = ARDM(Spy(K), D, K)
    loss = model.loss(torch.randint(K, (50, D)))
    assert torch.allclose(loss, torch.full((50,), D * math.log(K)), rtol=1e-6)
    assert math.isclose(bits_per_dim(loss[0].item(), D), math.log2(K), rel_tol=1e-6)


def test_masked_values_never_reach_the_network():
    model, x = ARDM(Spy(4), 6, 4), torch.randint(1, 4, (8, 6))
    m = torch.rand(8, 6) < 0.5
    t = s = torch.ones(8, dtype=torch.long)
    model.log_probs(x, m, t, s), model.log_probs(torch.where(m, x, 3 - x + 1), m, t, s)
    (one, _, _), (two, _, _) = model.net.seen
    assert torch.equal(one, two) and (one[~m] == 0).all() and torch.equal(one[m], x[m])


def test_mean_loss_over_all_orders_and_steps_is_the_bound_of_eq_2():
    D, K = 3, 2
    model = ARDM(Table(D, K, dtype=torch.float64), D, K)
    for x in all_x(D, K):
        losses = [model.loss(x[None], t=torch.tensor([t]), sigma=sigma[None]).item()
                  for sigma in all_sigma(D) for t in range(1, D + 1)]
        chain = [by_hand(model.net, x.tolist(), sigma.tolist(), planner.full_plan(1, D))
                 for sigma in all_sigma(D)]
        assert math.isclose(np.mean(losses), np.mean(chain), rel_tol=1e-12)


def test_random_draws_of_the_loss_average_to_the_bound():
    model = ARDM(Table(3, 2, dtype=torch.float64), 3, 2)
    x = torch.tensor([[1, 0, 1]])
    exact = np.mean([by_hand(model.net, [1, 0, 1], s.tolist(), planner.full_plan(1, 3))
                     for s in all_sigma(3)])
    draws = model.loss(x.expand(40000, 3), generator=torch.Generator().manual_seed(0))
    assert abs(draws.mean().item() - exact) < 5 * draws.std().item() / 200


@pytest.mark.parametrize("plan", [
    [(1, 1, 1), (1, 2, 1), (1, 3, 1)], [(1, 1, 1), (1, 2, 2)], [(1, 1, 3)]])
def test_nll_is_the_chain_rule_and_sums_to_one(plan):
    D, K = 3, 3
    model, x = ARDM(Table(D, K, dtype=torch.float64), D, K), all_x(3, 3)
    for sigma in all_sigma(D):
        nll = model.nll(x, plan, sigma.expand(len(x), D))
        assert math.isclose((-nll).exp().sum().item(), 1.0, rel_tol=1e-12)
        hand = [by_hand(model.net, row.tolist(), sigma.tolist(), plan) for row in x]
        assert torch.allclose(nll, torch.tensor(hand, dtype=torch.float64))


@pytest.mark.parametrize("plan", [None, [(1, 1, 2), (1, 3, 1)]])
def test_samples_have_the_probabilities_that_nll_says(plan):
    D, K, n = 3, 2, 40000
    model, x = ARDM(Table(D, K), D, K), all_x(3, 2)
    sigma = all_sigma(D)
    p = torch.stack([(-model.nll(x, plan, order.expand(len(x), D))).exp()
                     for order in sigma]).mean(dim=0)
    drawn = model.sample(n, plan, generator=torch.Generator().manual_seed(0))
    share = (drawn * torch.tensor([4, 2, 1])).sum(dim=1).bincount(minlength=8) / n
    assert (share - p).abs().max() < 5 * math.sqrt(0.25 / n)


def test_expected_nll_under_a_plan_is_its_cost_by_L():
    """Eq. 3: over random orders, k variables written together at step t cost k L_t."""
    D, K = 4, 2
    model, x = ARDM(Table(D, K, dtype=torch.float64), D, K), torch.tensor([[1, 0, 0, 1]])
    sigma = all_sigma(D)
    L = [np.mean([model.loss(x, t=torch.tensor([t]), sigma=order[None]).item() / D
                  for order in sigma]) for t in range(1, D + 1)]
    for plan in ([(1, 1, 1), (1, 2, 3)], [(1, 1, 2), (1, 3, 2)], planner.full_plan(1, D)):
        nll = model.nll(x.expand(len(sigma), D), plan, sigma).mean().item()
        assert math.isclose(nll, planner.plan_cost(L, plan), rel_tol=1e-12)


def test_walk_writes_every_variable_once_with_one_call_an_entry():
    model = ARDM(Spy(3), 10, 3)
    plan, written = [(1, 1, 4), (1, 5, 1), (1, 6, 5)], torch.zeros(5, 10)

    def choose(log_p, where, s):
        written.add_(where)
        return torch.full((5, 10), 2)
    x = model.walk(torch.zeros(5, 10, dtype=torch.long), plan, sample_sigma(5, 10), choose)
    assert (written == 1).all() and (x == 2).all() and len(model.net.seen) == 3
    assert [m.sum(dim=1).unique().tolist() for _, m, _ in model.net.seen] == [[0], [4], [5]]


def test_known_variables_stay_and_absent_ones_are_never_touched():
    model, D = ARDM(Table(6, 2, seed=1), 6, 2), 6
    x = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1]])
    known = torch.tensor([[True, False, False, True, False, False], [True] * 5 + [False]])
    drawn = model.sample(2, x=x, known=known)
    assert (drawn[known] == x[known]).all()
    absent = torch.tensor([False] * 4 + [True] * 2).expand(2, D)
    sigma = rerank(sample_sigma(2, D), known & ~absent, absent)
    assert (sigma[known & ~absent] == 0).all() and (sigma[absent] == D + 1).all()
    model.net = Spy(2)
    drawn = model.sample(2, sigma=sigma, x=x)
    assert (drawn[absent] == 0).all() and (drawn[known & ~absent] == x[known & ~absent]).all()
    assert not any((m & absent).any() for _, m, _ in model.net.seen)


def test_rerank_keeps_the_order_of_the_others():
    sigma = torch.tensor([[5, 3, 1, 4, 2]])
    known = torch.tensor([[False, True, False, False, False]])
    absent = torch.tensor([[False, False, True, False, False]])
    assert rerank(sigma, known, absent).tolist() == [[4, 0, 6, 3, 2]]


def test_nll_of_the_unknown_given_the_known_is_conditional():
    model, x = ARDM(Table(3, 2, dtype=torch.float64), 3, 2), all_x(3, 2)
    sigma = torch.tensor([[0, 2, 3]]).expand(8, 3)                     # x_1 is given
    nll = model.nll(x, [(1, 2, 1), (1, 3, 1)], sigma)
    whole = model.nll(x, sigma=torch.tensor([[1, 2, 3]]).expand(8, 3))
    first = model.nll(x, [(1, 1, 1)], torch.tensor([[1, 2, 3]]).expand(8, 3))
    assert torch.allclose(nll, whole - first)


def test_infilling_runs_no_call_for_what_is_known():
    model = ARDM(Spy(3), 8, 3)
    known = torch.arange(8) < 5
    model.sample(4, x=torch.ones(4, 8, dtype=torch.long), known=known.expand(4, 8))
    assert len(model.net.seen) == 3


def test_infilling_has_the_conditional_distribution_of_the_model():
    model, n = ARDM(Table(2, 2), 2, 2), 20000
    known = torch.tensor([False, True]).expand(n, 2)
    drawn = model.sample(n, x=torch.ones(n, 2, dtype=torch.long), known=known)
    m = torch.tensor([[False, True]])
    p = torch.softmax(model.net(torch.tensor([[0, 1]]), m, None, None)[0, 0], dim=-1)
    assert abs(drawn[:, 0].float().mean() - p[1]) < 5 * math.sqrt(0.25 / n)


def test_low_temperature_takes_the_likeliest_value():
    model = ARDM(Table(3, 4), 3, 4)
    plan, sigma = [(1, 1, 3)], sample_sigma(5, 3)
    best = model.log_probs(torch.zeros(1, 3, dtype=torch.long),
                           torch.zeros(1, 3, dtype=torch.bool), *torch.ones(2, 1).long())
    assert (model.sample(5, plan, sigma, temperature=1e-4) == best.argmax(dim=-1)).all()


def test_bfloat16_logits_still_give_probabilities_that_sum_to_one():
    model = ARDM(Spy(256).to(torch.bfloat16), 3, 256)
    x = torch.zeros(2, 3, dtype=torch.long)
    log_p = model.log_probs(x, x == 0, *torch.ones(2, 2).long())
    assert log_p.dtype == torch.float32
    assert torch.allclose(log_p.exp().sum(dim=-1), torch.ones(2, 3), atol=1e-6)


def test_order_agnostic_model_is_one_stage():
    model, x = ARDM(Spy(5), 4, 5), torch.randint(5, (3, 4))
    assert (model.S, model.A) == (1, 5)
    assert (model.coarse(x, 0) == 0).all() and torch.equal(model.coarse(x, 1), x)
    assert torch.equal(model.write(model.coarse(x, 0), model.symbol(x, 1), 1), x)
    assert torch.equal(model.coarse(x, torch.tensor([0, 1, 0]))[1], x[1])


# -- UpscaleARDM -----------------------------------------------------------------------------------

class StageTable(Table):
    """A table as above for every state of an upscale model: a value, and whether it is written."""

    def __init__(self, D, K, outputs, S, seed=0):
        super().__init__(D, K, seed)
        generator = torch.Generator().manual_seed(seed)
        size = (S, (2 * K) ** D, D, outputs)
        self.logits = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))

    def forward(self, x, m, t, s):
        index = ((x + self.K * m) * (2 * self.K) ** torch.arange(self.D)).sum(dim=1)
        return self.logits[s - 1, index]


class Fixed(nn.Module):
    """The same logits whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x, m, t, s):
        return self.logits.expand(len(x), *self.logits.shape)


BASES = [(256, 2), (256, 4), (256, 16), (27, 3), (27, 2), (5, 3), (8, 2), (125, 5)]


@pytest.mark.parametrize("K, b", BASES)
def test_stages_lead_from_nothing_to_x_and_symbols_are_its_digits(K, b):
    model, x = UpscaleARDM(None, 4, K, b), torch.arange(K).view(1, -1)
    assert (model.coarse(x, 0) == 0).all() and torch.equal(model.coarse(x, model.S), x)
    digits = 0
    for s in range(1, model.S + 1):
        a = model.symbol(x, s)
        assert 0 <= a.min() and a.max() < b == model.A
        assert torch.equal(model.write(model.coarse(x, s - 1), a, s), model.coarse(x, s))
        digits = digits * b + a
        assert torch.equal(model.coarse(x, s), digits * b ** (model.S - s))
    s = torch.tensor([0, model.S])
    assert torch.equal(model.coarse(x.expand(2, -1), s)[1:], x)


@pytest.mark.parametrize("K, b", BASES)
def test_with_one_fixed_output_the_stages_multiply_to_its_softmax(K, b):
    logits = 3 * torch.randn(1, K, dtype=torch.float64)
    model, x = UpscaleARDM(Fixed(logits), 1, K, b), torch.arange(K)[:, None]
    log_p, t = 0, torch.ones(K, dtype=torch.long)
    for s in range(1, model.S + 1):
        log_p = log_p + pick(model.log_probs(x, x < 0, t, s * t), model.symbol(x, s))
    assert torch.allclose(log_p[:, 0], torch.log_softmax(logits[0], dim=-1))


def test_data_parametrisation_is_the_papers_matrices_written_out():
    """P^(s) (K x K) takes a distribution over values to one over what stage s knows of them."""
    K, b, S = 8, 2, 3
    logits = torch.randn(1, K, dtype=torch.float64)
    theta = torch.softmax(logits[0], dim=-1).numpy()
    model = UpscaleARDM(Fixed(logits), 1, K, b)
    values = np.arange(K)
    for s in range(1, S + 1):
        unit = b ** (S - s)
        P = (values[:, None] // unit * unit == values[None]).astype(float)   # x -> x^(s)
        parent = values // (unit * b) * unit * b                              # x^(s-1) of x^(s)
        for x in values:
            p = (theta @ P) * (parent == parent[x])
            t = torch.ones(1, dtype=torch.long)
            log_p = model.log_probs(torch.tensor([[x]]), torch.zeros(1, 1) > 0, t, s * t)
            digits = p[parent[x] + unit * np.arange(b)] / p.sum()
            assert np.allclose(log_p[0, 0].exp().detach().numpy(), digits)


@pytest.mark.parametrize("parametrization", ["data", "direct"])
def test_digits_that_lead_nowhere_have_probability_zero(parametrization):
    K, b, S = 5, 3, 2                                                  # 5 = 12 in base 3: 12, 2x no
    outputs = K if parametrization == "data" else S * b
    model = UpscaleARDM(Fixed(torch.randn(1, outputs)), 1, K, b, parametrization)
    x, t = torch.arange(K)[:, None], torch.ones(K, dtype=torch.long)
    first, second = (model.log_probs(x, x < 0, t, s * t).exp()[:, 0] for s in (1, 2))
    assert (first[:, 2] == 0).all() and (second[3:, 2] == 0).all()
    assert (first[:, :2] > 0).all() and (second[:3] > 0).all() and (second[3:, :2] > 0).all()
    assert torch.allclose(first.sum(dim=1), torch.ones(K))
    model.loss(x).sum().backward()
    assert torch.isfinite(model.net.logits.grad).all()


def upscale_with_tables(K, b, parametrization, D=2):
    S = num_stages(K, b)
    outputs = K if parametrization == "data" else S * b
    return UpscaleARDM(StageTable(D, K, outputs, S), D, K, b, parametrization)


@pytest.mark.parametrize("parametrization", ["data", "direct"])
@pytest.mark.parametrize("K, b", [(3, 2), (4, 2), (5, 3)])
def test_upscale_loss_over_all_orders_steps_and_stages_is_the_bound(K, b, parametrization):
    model, x = upscale_with_tables(K, b, parametrization), all_x(2, K)
    S, pairs = model.S, list(itertools.product(range(1, model.S + 1), (1, 2), all_sigma(2)))
    full = lambda value: torch.full((len(x),), value)
    losses = [model.loss(x, full(t), full(s), sigma.expand(len(x), 2)) for s, t, sigma in pairs]
    chains = [model.nll(x, sigma=torch.stack(orders)[:, None].expand(S, len(x), 2))
              for orders in itertools.product(all_sigma(2), repeat=S)]
    assert torch.allclose(torch.stack(losses).mean(dim=0), torch.stack(chains).mean(dim=0))
    for nll in chains:
        assert math.isclose((-nll).exp().sum().item(), 1.0, rel_tol=1e-9)
    drawn = model.loss(x[-1:].expand(40000, 2), generator=torch.Generator().manual_seed(0))
    exact = torch.stack(chains).mean(dim=0)[-1].item()                 # stages mixed in one batch
    assert abs(drawn.mean().item() - exact) < 5 * drawn.std().item() / 200


@pytest.mark.parametrize("plan", [None, [(1, 1, 2), (2, 1, 1), (2, 2, 1)]])
def test_upscale_samples_have_the_probabilities_that_nll_says(plan):
    model, x, n = upscale_with_tables(3, 2, "data"), all_x(2, 3), 40000
    p = torch.stack([(-model.nll(x, plan, torch.stack(orders)[:, None].expand(2, 9, 2))).exp()
                     for orders in itertools.product(all_sigma(2), repeat=2)]).mean(dim=0)
    drawn = model.sample(n, plan, generator=torch.Generator().manual_seed(0))
    share = (drawn * torch.tensor([3, 1])).sum(dim=1).bincount(minlength=9) / n
    assert (share - p).abs().max() < 5 * math.sqrt(0.25 / n)


def test_one_stage_of_base_K_is_the_order_agnostic_model():
    one, other = ARDM(Table(3, 4), 3, 4), UpscaleARDM(Table(3, 4), 3, 4, b=4)
    x, sigma, t = torch.randint(4, (20, 3)), sample_sigma(20, 3), torch.randint(1, 4, (20,))
    assert torch.equal(one.loss(x, t, sigma=sigma), other.loss(x, t, sigma=sigma))
    assert torch.equal(one.nll(x, sigma=sigma), other.nll(x, sigma=sigma))


def test_finer_digits_never_reach_the_network_before_their_stage():
    seen, K, b = [], 27, 3

    class Watch(Spy):
        def forward(self, x, m, t, s):
            seen.append(x)
            return super().forward(x, m, t, s)

    model, x = UpscaleARDM(Watch(K), 6, K, b), torch.randint(K, (9, 6))
    m, s = torch.rand(9, 6) < 0.5, torch.arange(9) % 3 + 1
    fine = torch.randint(1, 3, (9, 6))
    unit = model.unit(x, torch.where(m, s[:, None], s[:, None] - 1).view(-1)).view(9, 6)
    other = x // unit * unit + (x + fine) % unit                       # other digits below
    model.log_probs(x, m, s, s), model.log_probs(other, m, s, s)
    assert torch.equal(*seen) and (x != other).any()


MEMORY = """
import resource, torch
from ardm import UpscaleARDM
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
logits, t = torch.randn(16, 3072, 256), torch.ones(16, dtype=torch.long)
x, begin = torch.zeros(16, 3072, dtype=torch.long), peak()
for b in (2, 4, 16):
    model = UpscaleARDM(lambda x, m, t, s: logits, 3072, 256, b)
    for s in (t, model.S * t, 1 + torch.arange(16) % model.S):
        with torch.no_grad():
            model.log_probs(x, x < 0, t, s)
print((peak() - begin) / (4 * logits.numel()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
def test_data_parametrisation_needs_no_matrices():
    """At K = 256 on 32x32x3: at most one and a half times the memory of the logits themselves."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 1.5, done.stdout + done.stderr


# -- nets.py ---------------------------------------------------------------------------------------

def filled_transformer(**options):
    """A small Transformer in float64 in which nothing is zero."""
    torch.manual_seed(0)
    net = nets.Transformer(7, 12, dim=16, depth=2, heads=2, **options).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


PAPER = dict(positions="sinusoidal", pairs=False, conv=0, every=1, zero_init=False)


def test_new_transformer_gives_exactly_D_log_K():
    model = ARDM(nets.Transformer(27, 16, dim=32, depth=2), 16, 27)
    assert torch.allclose(model.loss(torch.randint(27, (20, 16))), torch.tensor(16 * math.log(27)))


@pytest.mark.parametrize("options", [{}, PAPER, dict(time=True)])
def test_transformer_sees_all_that_is_known_in_both_directions_and_no_more(options):
    net, x = filled_transformer(**options), torch.randint(7, (2, 12))
    m = torch.arange(12).expand(2, 12) % 3 == 0
    t, s = m.sum(dim=1) + 1, torch.ones(2, dtype=torch.long)
    logits = net(x, m, t, s)
    assert torch.equal(net(torch.where(m, x, 6 - x), m, t, s), logits)
    for i in (0, 9):
        other = x.clone()
        other[:, i] = (other[:, i] + 1) % 7
        assert ((net(other, m, t, s) - logits).abs().amax(dim=2) > 1e-9).all()
    hidden = m.clone()
    hidden[:, 0] = False
    assert ((net(x, hidden, t, s) - logits).abs().amax(dim=2) > 1e-9).all()
    assert options != dict(time=True) or (net(x, m, t - 1, s) - logits).abs().max() > 1e-9


@pytest.mark.parametrize("options", [{}, PAPER, dict(time=True)])
def test_transformer_at_some_places_says_what_it_says_at_all(options):
    net, x, m = filled_transformer(**options), torch.randint(7, (3, 12)), torch.rand(3, 12) < 0.4
    t, s = m.sum(dim=1) + 1, torch.ones(3, dtype=torch.long)
    whole, part = net(x, m, t, s), net.at(x, m, t, s, ~m)
    assert whole.shape == (3, 12, 7) and torch.allclose(whole[~m], part, atol=1e-6)
    assert net.at(x, m, t, s, x < 0).shape == (0, 7)


def test_absorbed_is_a_class_of_its_own():
    """The released code's embedding had no row for it: "unknown" looked like the letter z."""
    net, x = filled_transformer(), torch.full((1, 12), 6)
    m, s = torch.ones(1, 12, dtype=torch.bool), torch.ones(1, dtype=torch.long)
    assert (net(x, m, s, s) - net(x, ~m, s, s)).abs().max() > 1e-3


@pytest.mark.parametrize("pairs", [True, False])
def test_pairs_show_two_known_neighbours_on_either_side(pairs):
    """Blocks apart, a position sees i-2..i+2 and nothing beyond, at the ends of the text too."""
    net, m = filled_transformer(pairs=pairs), torch.ones(1, 12, dtype=torch.bool)
    for p in net.blocks.parameters():                                  # now each is the identity
        nn.init.zeros_(p)
    x, s = torch.randint(7, (1, 12)), torch.ones(1, dtype=torch.long)
    nothing = net(x, ~m, s, s)                                         # the end looks unknown too
    assert torch.equal(nothing, nothing[:, :1].expand_as(nothing))
    for j in range(12):
        other = x.clone()
        other[0, j] = (other[0, j] + 1) % 7
        moved = ((net(other, m, s, s) - net(x, m, s, s)).abs().amax(dim=2) > 1e-9)[0].tolist()
        assert moved == [abs(i - j) <= (2 if pairs else 0) for i in range(12)]
        m[0, j] = False                                                # unknown: changes nothing
        assert torch.equal(net(other, m, s, s), net(x, m, s, s))
        m[0, j] = True


def test_pairs_of_bytes_share_rows():
    net = nets.Transformer(256, 8, dim=8, depth=1)
    assert {embed.num_embeddings for embed in net.pairs} == {8191}
    x, m = torch.full((1, 8), 255), torch.arange(8)[None] % 2 == 0
    assert net(x, m, *torch.ones(2, 1).long()).shape == (1, 8, 256)


@pytest.mark.parametrize("depth, every, where", [
    (5, 2, [0, 2, 4]), (4, 2, [1, 3]), (3, 1, [0, 1, 2]), (1, 2, [0]), (6, 3, [2, 5])])
def test_the_last_block_has_attention_and_every_so_many_before_it(depth, every, where):
    net = nets.Transformer(7, 12, dim=16, depth=depth, heads=2, every=every)
    assert [i for i, block in enumerate(net.blocks) if block.attention is not None] == where


def test_rotary_network_cannot_tell_where_a_window_begins():
    net = filled_transformer(conv=0)
    q, k = torch.randn(2, 1, 2, 1, 8).double()
    at = lambda x, i: nets.rotate(x, net.cos[i:i + 1], net.sin[i:i + 1])
    score = lambda i, j: (at(q, i) * at(k, j)).sum().item()
    assert math.isclose(score(2, 5), score(7, 10), rel_tol=1e-6)
    assert not math.isclose(score(2, 5), score(2, 6), rel_tol=1e-3)
    assert torch.allclose(at(q, 3).norm(), q.norm())


def test_plain_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = nets.attention(q, k, v)
    assert torch.allclose(plain.float(), F.scaled_dot_product_attention(q, k, v), atol=0.05)


def test_paper_network_has_the_papers_size():
    with torch.device("meta"):
        net = nets.Transformer(27, 250, dim=768, depth=12, heads=12, mlp=3072, **PAPER)
    assert abs(sum(p.numel() for p in net.parameters()) - 85.1e6) < 0.2e6
    with torch.device("meta"):
        model = train.build_model(train.complete(dict(size="paper", device="cpu")), 27, (250,))
    assert [*map(str, model.net.modules())] == [*map(str, net.modules())]


@pytest.mark.parametrize("width, D", [(5, 9), (3, 1), (5, 2)])
def test_neighbour_convolution_in_float64_is_the_convolution(width, D):
    layer = nets.NeighbourConv(4, width)
    h = torch.randn(2, D, 4)
    assert torch.allclose(layer(h), layer.double()(h.double()).float(), atol=1e-6)


PICTURES = [dict(dim=8, depth=1, levels=2), dict(dim=8, depth=2, levels=3, heads=2),
            dict(dim=8, depth=1, levels=1, heads=1, neighbours=False, logistic=False, time=True)]


def picture_net(options, K=6, shape=(2, 5, 6), stages=1, outputs=None):
    """A U-Net whose zero-initialised layers say something."""
    torch.manual_seed(0)
    net = nets.UNet(K, shape, outputs, stages=stages, **options)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("options", PICTURES)
@pytest.mark.parametrize("stages, outputs", [(1, None), (3, None), (3, 6)])
def test_unet_at_some_places_says_what_it_says_at_all(options, stages, outputs):
    net = picture_net(options, stages=stages, outputs=outputs)
    x, m = torch.randint(6, (3, 60)), torch.rand(3, 60) < 0.4
    t, s = torch.tensor([1, 20, 60]), torch.tensor([1, stages, 1])
    whole, part = net(x, m, t, s), net.at(x, m, t, s, ~m)
    assert whole.shape == (3, 60, outputs or 6)
    assert torch.allclose(whole[~m], part, atol=1e-5)


def test_unet_gives_each_colour_of_each_pixel_its_own_logits(monkeypatch):
    net = picture_net(PICTURES[2])
    h = torch.randn(3 * 30, 8)
    monkeypatch.setattr(net, "body", lambda *inputs: (h, None))
    x = torch.zeros(3, 60, dtype=torch.long)
    expected = torch.einsum("bpd,cdk->bcpk", h.view(3, 30, 8), net.head) + net.bias[None]
    assert torch.allclose(net(x, x > 0, x[:, 0], x[:, 0]), expected.reshape(3, 60, 6), atol=1e-5)


@pytest.mark.parametrize("options", PICTURES)
def test_unet_keeps_pixels_where_they_are(options, monkeypatch):
    """Without what is in the middle, a value is seen in the 3 x 3 pixels around it alone, and in
    the windows of the means where those are shown."""
    net = picture_net(options)
    monkeypatch.setattr(net, "pyramid", lambda h, time: h)
    monkeypatch.setattr(net, "norm", nn.Identity())
    monkeypatch.setattr(nets, "local_means", lambda v, known: (torch.zeros(4, *v.shape),) * 2)
    x, m = torch.zeros(1, 60, dtype=torch.long), torch.ones(1, 60, dtype=torch.bool)
    t = torch.tensor([5])
    before = net(x, m, t, t // t)
    for c, i, j in [(0, 0, 5), (1, 4, 0), (1, 2, 3)]:
        other = x.view(1, 2, 5, 6).clone()
        other[0, c, i, j] = 3
        changed = (net(other.view(1, 60), m, t, t // t) != before).any(dim=2).view(2, 5, 6)
        around = torch.zeros(5, 6, dtype=torch.bool)
        around[max(0, i - 1):i + 2, max(0, j - 1):j + 2] = True
        assert torch.equal(changed, around.expand(2, 5, 6))


@pytest.mark.parametrize("options", PICTURES)
@pytest.mark.parametrize("branch", [None, 2])
def test_unet_sees_what_is_known_and_nothing_else(options, branch):
    net = picture_net(options, stages=3 if branch else 1)
    model = UpscaleARDM(net, 60, 6, branch) if branch else ARDM(net, 60, 6)
    x, m = torch.randint(6, (1, 60)), torch.rand(1, 60) < 0.5
    t, s = torch.tensor([30]), torch.tensor([1])
    before = model.log_probs(x, m, t, s)
    hidden = torch.where(m, x, (x + 3) % 6)
    assert torch.equal(before, model.log_probs(hidden, m, t, s))
    if branch is None:                                   # whatever stands where nothing is known
        assert torch.equal(net(x, m, t, s), net(hidden, m, t, s))
    i = int(m[0].nonzero()[0])
    shown = x.clone()
    shown[0, i] = (x[0, i] + 4) % 8 if branch else (x[0, i] + 1) % 6   # another first digit
    assert not torch.allclose(before, model.log_probs(shown.clamp(max=5), m, t, s))


def test_unet_with_a_zero_head_is_uniform():
    model = ARDM(nets.UNet(6, (1, 4, 4), dim=8, depth=1, levels=2, logistic=False), 16, 6)
    assert torch.allclose(model.loss(torch.randint(6, (4, 16))), torch.tensor(16 * math.log(6)))


def test_paper_unet_has_the_papers_blocks():
    c = train.complete(dict(size="paper", data="cifar10", device="cpu"))
    with torch.device("meta"):
        net = train.build_model(c, 256, (3, 32, 32)).net
    blocks = [len(level) for part in (net.down, net.up) for level in part]
    attention = [m for m in net.modules() if isinstance(m, nets.PixelAttention)]
    assert blocks == [32, 32] and len(attention) == 1 and net.time is not None
    assert (net.first.out_channels, net.mix.out_channels, net.first.in_channels) == (192, 64, 6)
    assert (c.lr, c.batch, c.clip, c.ema, c.optimizer) == (1e-4, 128, 100.0, 0.9999, "adam")
    assert c.flips and not c.turns


def test_local_means_are_means_of_what_is_known():
    v, known = torch.randn(2, 3, 7, 9), (torch.rand(2, 3, 7, 9) < 0.4).float()
    means, counts = nets.local_means(v, known, prior=0.3)
    B, C, i, j = 1, 2, 3, 0
    mean = (v * known)[B, C].sum() / (known[B, C].sum() + 0.3)
    for width, got, count in zip(nets.WINDOWS, means[:, B, C, i, j], counts[:, B, C, i, j]):
        r = width // 2
        here = (slice(max(0, i - r), i + r + 1), slice(max(0, j - r), j + r + 1))
        n = known[B, C][here].sum()
        mean = ((v * known)[B, C][here].sum() + 0.3 * mean) / (n + 0.3)
        assert torch.allclose(got, mean, atol=1e-5)
        assert torch.allclose(count.mul(3).exp() - 1, n, atol=1e-4)


def test_logistic_is_the_density_of_the_logistic_distribution():
    location, width = torch.tensor([[0.1], [-0.4]]), torch.tensor([[0.3], [-0.2]])
    got = nets.logistic(location, width, 16)
    scale = torch.exp(2 * width - 3)
    z = (torch.arange(16) / 16 - 0.5 - location) / scale
    density = torch.exp(-z) / (scale * (1 + torch.exp(-z)) ** 2)
    assert torch.allclose(got - torch.log(density), torch.log(scale).expand(2, 16), atol=1e-4)


# -- planner.py ------------------------------------------------------------------------------------

def compositions(n, parts):
    return [tuple(b - a for a, b in zip((0, *cuts), (*cuts, n)))
            for cuts in itertools.combinations(range(1, n), parts - 1)]


def cheapest_by_force(L, budget):
    """Over every way to split the calls over the stages and the steps over the calls."""
    S, D = L.shape
    cost = [{n: min(sum(k * row[sum(ks[:i])] for i, k in enumerate(ks))
                    for ks in compositions(D, n))
             for n in range(1, D + 1)} for row in L]
    splits = [s for s in itertools.product(range(1, D + 1), repeat=S) if sum(s) == budget]
    return min(sum(c[n] for c, n in zip(cost, split)) for split in splits)


def falling(rng, S, D, ties=False):
    L = rng.random((S, D)) * rng.random((S, 1)) * 8
    return -np.sort(-(np.round(L) if ties else L), axis=1)


def assert_plan(plan, S, D, budget):
    assert len(plan) == budget and all(k >= 1 for _, _, k in plan)
    assert [s for s, _, _ in plan] == sorted(s for s, _, _ in plan)
    for stage in range(1, S + 1):
        t = 1
        for start, k in [(t, k) for s, t, k in plan if s == stage]:
            assert start == t
            t += k
        assert t == D + 1


@pytest.mark.parametrize("S, D, ties", [
    (1, 1, False), (1, 7, False), (1, 7, True), (2, 5, False), (3, 3, True)])
def test_plan_is_the_cheapest_of_all(S, D, ties):
    rng = np.random.default_rng(0)
    for _ in range(5):
        L = falling(rng, S, D, ties)
        curve = planner.costs(L)
        for budget in range(S, S * D + 1):
            plan = planner.plan(L, budget)
            assert_plan(plan, S, D, budget)
            best = cheapest_by_force(L, budget)
            assert math.isclose(planner.plan_cost(L, plan), best, abs_tol=1e-9)
            assert math.isclose(curve[budget], best, abs_tol=1e-9)


def test_plan_equals_the_plain_programme_at_a_size_that_has_many_levels():
    D, L = 150, falling(np.random.default_rng(1), 1, 150)[0]
    edge = (np.arange(1, D + 1)[None] - np.arange(D)[:, None]) * L[:, None]    # i -> j = column + 1
    edge[np.arange(D)[:, None] >= np.arange(1, D + 1)[None]] = np.inf
    E = np.r_[0.0, np.full(D, np.inf)]
    for budget in range(1, 40):
        E = np.r_[np.inf, (E[:-1, None] + edge).min(axis=0)]
        assert math.isclose(planner.plan_cost(L, planner.plan(L, budget)), E[-1], rel_tol=1e-12)


def test_costs_of_the_papers_own_example():
    L = [5, 4, 3, 2.85, 2.8]
    assert np.allclose(list(planner.costs(L).values()), [25, 19, 18, 17.7, 17.65])


def test_flat_components_waste_no_call():
    """The released planner repeats starts on ties: calls that write nothing."""
    assert_plan(planner.plan(np.full(20, 2.0), 7), 1, 20, 7)


def test_costs_fall_and_are_convex():
    L = falling(np.random.default_rng(2), 3, 30)
    curve = np.array(list(planner.costs(L).values()))
    assert (np.diff(curve) <= 1e-9).all() and (np.diff(curve, 2) >= -1e-9).all()
    assert math.isclose(curve[-1], L.sum()) and list(planner.costs(L, [5, 90])) == [5, 90]


def test_smooth_is_the_isotonic_fit():
    rng = np.random.default_rng(3)
    for L in rng.normal(size=(20, 9)):
        fit = [min(max(L[a:b + 1].mean() for b in range(i, 9)) for a in range(i + 1))
               for i in range(9)]
        assert np.allclose(planner.smooth(L), fit)
    L = falling(rng, 2, 6)
    assert np.array_equal(planner.smooth(L), L)
    with pytest.raises(ValueError):
        planner.smooth([1.0, np.nan])


def test_part_of_the_steps_can_be_planned():
    L = falling(np.random.default_rng(4), 1, 12)[0]
    plan = planner.plan(L, 3, first=5, last=10)
    assert plan[0][1] == 5 and sum(k for _, _, k in plan) == 6
    assert planner.plan_cost(L, plan) == pytest.approx(cheapest_by_force(L[None, 4:10], 3))


@pytest.mark.parametrize("make", [planner.uniform_plan, planner.cosine_plan])
def test_simple_plans_have_the_calls_and_the_steps(make):
    for S, D, budget in [(1, 1, 1), (1, 10, 3), (1, 10, 10), (3, 7, 11), (2, 50, 2)]:
        assert_plan(make(S, D, budget), S, D, budget)
    assert_plan(planner.full_plan(2, 4), 2, 4, 8)
    sizes = [k for _, _, k in planner.cosine_plan(1, 100, 10)]
    assert sizes == sorted(sizes)
    assert [k for _, _, k in planner.uniform_plan(1, 100, 10)] == [10] * 10


@pytest.mark.parametrize("budget", [0, 1, 21, -3])
def test_impossible_budgets_are_refused(budget):
    for make in (lambda: planner.plan(np.ones((2, 10)), budget),
                 lambda: planner.uniform_plan(2, 10, budget),
                 lambda: planner.costs(np.ones((2, 10)), [budget])):
        with pytest.raises(ValueError, match="2 to 20"):
            make()


@pytest.mark.parametrize("rule", [
    "forward", "backward", "random:0", "random:7", "spaced:1", "spaced:5", "spaced:99"])
def test_orders_are_permutations(rule):
    for D in (1, 2, 13, 64):
        assert sorted(planner.order(rule, D)) == list(range(1, D + 1))


def test_orders_by_name():
    assert planner.order("forward", 4).tolist() == [1, 2, 3, 4]
    assert planner.order("backward", 4).tolist() == [4, 3, 2, 1]
    assert planner.order("spaced:2", 6).tolist() == [1, 3, 5, 2, 4, 6]
    assert planner.order("random:1", 64).tolist() != planner.order("random:2", 64).tolist()
    turns = np.argsort(planner.order("spaced:4", 64)).reshape(16, 4)
    assert (np.diff(turns, axis=1) == 16).all()
    for rule in ("sideways", "random", "random:x", "spaced:0", "spaced:-1", ""):
        with pytest.raises(ValueError):
            planner.order(rule, 5)


# -- coder.py --------------------------------------------------------------------------------------

def message(K, n, seed=0, peaked=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, K)) * peaked
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    symbols = np.array([rng.choice(K, p=row) for row in probs], dtype=np.int64)
    return probs, symbols


def test_exponentials_are_the_exponential_function():
    table = coder.exponentials()
    assert table[0] == 1 << 40 and len(table) == coder.DEEPEST + 1 and table[-1] == 0
    exact = np.exp(-np.arange(coder.DEEPEST) / 1024) * 2.0 ** 40
    assert np.abs(table[:-1] - exact).max() < 1.01 and (np.diff(table) <= 0).all()
    assert table[1024] == 404487723187                                   # 2^40 / e, rounded down


@pytest.mark.parametrize("K", [2, 27, 256])
def test_levels_give_tables_as_good_as_probabilities(K):
    probs, symbols = message(K, 300, peaked=4.0)
    levels = np.minimum(np.rint(-np.log(probs) * 1024), 1e6).astype(np.int64)
    cdf = coder.quantize_levels(levels)
    assert cdf.dtype == np.int32 and (np.diff(cdf, axis=1) > 0).all()
    assert (cdf[:, 0] == 0).all() and (cdf[:, -1] == 1 << 22).all()
    bits = {name: -np.log2(np.diff(table, axis=1)[np.arange(300), symbols] / 2 ** 22).mean()
            for name, table in (("levels", cdf), ("probs", coder.quantize(probs)))}
    assert abs(bits["levels"] - bits["probs"]) < 1e-4
    decoder = coder.Decoder(coder.encode(*coder.intervals(cdf, symbols)))
    assert np.array_equal(decoder.pop(cdf), symbols) and decoder.done
    for bad in (levels - 10 ** 7, levels + 10 ** 9):
        with pytest.raises(ValueError):
            coder.quantize_levels(bad)


def test_safe_levels_survive_any_difference_below_the_margin():
    rng, margin = np.random.default_rng(0), compress.MARGIN
    log_p = -np.concatenate([rng.exponential(2, 1000), rng.integers(0, 2000, 1000) / 1024 +
                             0.5 / 1024 + rng.uniform(-3, 3, 1000) * margin])[:, None]
    levels, safe = compress.to_levels(log_p, np.zeros(len(log_p)))
    assert safe[:1000].mean() > 0.99 and 0.4 < safe[1000:].mean() < 0.8
    for sign in (-1, 1):
        others, _ = compress.to_levels(log_p + sign * margin, np.zeros(len(log_p)))
        assert (others == levels)[safe].all() and not (others == levels)[~safe].all()


@pytest.mark.parametrize("K, n, precision, peaked", [
    (2, 5000, 22, 3), (27, 5000, 22, 1), (27, 5000, 22, 6), (256, 3000, 22, 2),
    (65536, 60, 26, 3), (1, 10, 22, 1), (27, 0, 22, 1), (27, 1, 22, 1), (256, 2, 22, 1)])
def test_coder_gives_back_every_symbol_at_the_ideal_length(K, n, precision, peaked):
    probs, symbols = message(K, n, peaked=peaked)
    cdf = coder.quantize(probs.reshape(n, K), precision)
    data = coder.encode(*coder.intervals(cdf, symbols), precision)
    decoder = coder.Decoder(data, precision)
    halves = [decoder.pop(cdf[:n // 3]), decoder.pop(cdf[n // 3:])]
    assert np.array_equal(np.concatenate(halves), symbols) and decoder.done
    ideal = -np.log2(probs[np.arange(n), symbols]).sum() if n else 0.0
    assert 8 * len(data) <= ideal + 32 + 1e-4 * n and (n or data == b"")


def test_rare_symbols_cost_what_they_must():
    cdf = np.array([[0, 1, (1 << 22) - 1, 1 << 22]] * 100)
    symbols = np.array([0, 2] * 50)                                    # probability 2^-22 each
    data = coder.encode(*coder.intervals(cdf, symbols))
    assert np.array_equal(coder.Decoder(data).pop(cdf), symbols)
    assert 100 * 22 / 8 <= len(data) <= 100 * 22 / 8 + 4


@pytest.mark.parametrize("K, T, M", [
    (2, 50, 3), (27, 300, 40), (256, 40, 5), (27, 0, 4), (27, 1, 1)])
def test_many_streams_are_the_same_bytes_as_one_by_one(K, T, M):
    probs, symbols = message(K, T * M, seed=1)
    cdf = coder.quantize(probs.reshape(T * M, K)).reshape(T, M, K + 1)
    symbols = symbols.reshape(T, M)
    starts, freqs = (a.reshape(T, M) for a in coder.intervals(
        cdf.reshape(T * M, K + 1), symbols.reshape(-1)))
    streams = coder.encode_streams(starts, freqs)
    assert streams == [coder.encode(starts[:, i], freqs[:, i]) for i in range(M)]
    decoder = coder.DecoderStreams(streams)
    assert np.array_equal(decoder.pop(cdf), symbols) and decoder.done


def test_random_messages_of_every_length_survive():
    for n in range(60):
        probs, symbols = message(5, n, seed=n, peaked=4)
        cdf = coder.quantize(probs.reshape(n, 5))
        decoder = coder.Decoder(coder.encode(*coder.intervals(cdf, symbols)))
        assert np.array_equal(decoder.pop(cdf), symbols) and decoder.done


@pytest.mark.parametrize("T, M", [(0, 1), (1, 3), (300, 2), (1, 50), (40, 50)])
def test_a_decoder_ends_where_its_encoder_started(T, M):
    probs, symbols = message(27, T * M, seed=2)
    cdf = coder.quantize(probs.reshape(T * M, 27))
    starts, freqs = (a.reshape(T, M) for a in coder.intervals(cdf, symbols))
    states = [0, (1 << 32) - 1, 1] + np.random.default_rng(0).integers(0, 1 << 32, M).tolist()
    states = states[:M]
    streams = coder.encode_streams(starts, freqs, states=states)
    for decoder in (coder.decoders(streams), coder.FewDecoders(streams)):
        assert np.array_equal(decoder.pop(cdf.reshape(T, M, 28)), symbols.reshape(T, M))
        assert decoder.ends == states
    if T > 1:
        decoder = coder.decoders([stream + bytes(4 * T + 4) for stream in streams])
        decoder.pop(cdf.reshape(T, M, 28))
        assert decoder.ends == [None] * M
    ideal = -np.log2(probs.reshape(T * M, 27)[np.arange(T * M), symbols]).reshape(T, M).sum(axis=0)
    for stream, bits in zip(streams, ideal):
        assert len(stream) <= (32 + bits + 1e-4 * T) / 8 + 1


def test_a_wrong_byte_is_noticed_almost_always():
    probs, symbols = message(27, 200)
    cdf = coder.quantize(probs)
    data = coder.encode(*coder.intervals(cdf, symbols))
    clean = 0
    for i in range(len(data)):
        decoder = coder.Decoder(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:])
        decoder.pop(cdf)
        clean += decoder.done
    assert clean <= len(data) / 10


def test_quantize_leaves_no_symbol_without_an_interval():
    probs = np.array([[1.0, 0, 0], [0, 0, 1.0], [1 / 3] * 3, [0.5, 0.5, 0], [1e-30, 1, 0]])
    for precision in (2, 8, 22, 26):
        cdf = coder.quantize(probs, precision)
        assert (np.diff(cdf) >= 1).all()
        assert (cdf[:, 0] == 0).all() and (cdf[:, -1] == 1 << precision).all()
    exact = coder.quantize(np.array([[0.25, 0.75]]), 22)
    assert abs(exact[0, 1] - (1 << 20)) <= 1


@pytest.mark.parametrize("row", [
    [0.5, 0.4], [0.5, 0.6], [-0.1, 1.1], [-1e-9, 1], [5000, -4999], [np.nan, 1], [np.inf, 0],
    [0.5, 0.500003]])
def test_what_is_no_distribution_is_refused(row):
    with pytest.raises(ValueError):
        coder.quantize(np.array([row]))


@pytest.mark.parametrize("symbol", [-1, 3])
def test_what_is_no_symbol_is_refused(symbol):
    with pytest.raises(AssertionError):
        coder.intervals(coder.quantize(np.full((2, 3), 1 / 3)), np.array([0, symbol]))


def test_empty_intervals_are_refused():
    for starts, freqs in (([0], [0]), ([-1], [2]), ([1 << 22], [1]), ([0, 1], [1])):
        with pytest.raises(ValueError):
            coder.encode(np.array(starts), np.array(freqs))


# -- data.py ---------------------------------------------------------------------------------------

def test_symbols_and_bytes_are_inverse():
    text = b"the quick brown fox jumps over the lazy dog"
    symbols = datasets.to_symbols(text, 27)
    assert symbols.max() <= 26 and symbols[3] == 0 and datasets.to_bytes(symbols, 27) == text
    every = bytes(range(256))
    assert datasets.to_bytes(datasets.to_symbols(every, 256), 256) == every
    with pytest.raises(UserError, match="'Q' at position 4"):
        datasets.to_symbols(b"the Quick", 27)
    with pytest.raises(UserError, match="'é' at position 3"):
        datasets.to_symbols("caféx".encode(), 27)


def test_pydoc_is_real_english_in_27_symbols():
    data = datasets.load("pydoc", 64)
    assert data.K == 27 and data.kind == "text" and len(data.splits["train"]) > 200_000
    text = datasets.show(data.splits["train"][:20000], 27)
    assert " the " in text and "  " not in text


def test_splits_are_by_position_and_lose_nothing(tmp_path):
    stream = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(stream)
    data = datasets.load(str(tmp_path / "f"), 30)
    assert (data.K, data.kind) == (256, "bytes")
    assert b"".join(datasets.to_bytes(part, 256) for part in data.splits.values()) == stream
    assert [len(part) for part in data.splits.values()] == [1152, 64, 64]
    chunks, rest = data.chunks("test")
    assert chunks.shape == (2, 30)
    assert torch.equal(torch.cat((chunks.flatten(), rest)), data.splits["test"])


def test_training_windows_come_from_everywhere_in_the_training_text(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(200)))
    data = datasets.load(str(tmp_path / "f"), 10)
    x = data.batch(5000, generator=torch.Generator().manual_seed(0))
    assert x.dtype == torch.int64 and (x.diff(dim=1) == 1).all()
    assert x[:, 0].min() == 0 and x[:, 0].max() == 170 and x.max() == 179


def test_a_zip_with_one_member_is_read_through(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "some text " * 100)
    assert datasets.load(str(tmp_path / "a.zip"), 20).kind == "text"
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("b", "x")
    with pytest.raises(UserError, match="2 files"):
        datasets.load(str(tmp_path / "a.zip"), 20)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:60])
    datasets.read_stream(tmp_path / "cut.zip")                         # no zip file any more: bytes


def test_text8_that_is_not_the_whole_text8_is_refused(tmp_path):
    (tmp_path / "text8").write_text("not the real thing " * 100)
    with pytest.raises(UserError, match="md5"):
        datasets.load("text8", 20, tmp_path)


def test_a_download_that_is_something_else_is_not_kept(tmp_path, monkeypatch):
    """A login page instead of the file must not stay behind under the file's name."""
    (tmp_path / "page").write_text("please log in " * 100)
    monkeypatch.setitem(datasets.URLS, "text8.zip", (tmp_path / "page").as_uri())
    with pytest.raises(UserError, match="md5") as error:
        datasets.load("text8", 20, tmp_path / "data")
    assert "remove it" not in str(error.value)                         # it is gone already
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(UserError, match="is not there"):
        datasets.load("text8", 20, tmp_path / "data", fetch=False)


def test_a_download_is_complete_or_not_there(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    datasets.download(source.as_uri(), tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"x" * 1000
    with pytest.raises(UserError, match=r"nowhere.*put it at .*copy2"):
        datasets.download((tmp_path / "nowhere").as_uri(), tmp_path / "copy2")
    with mock.patch("urllib.request.urlopen", side_effect=http.client.BadStatusLine("hello")):
        with pytest.raises(UserError, match="put it at .*copy3"):
            datasets.download("http://localhost/file", tmp_path / "copy3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]


def test_real_text8_prefix():
    path = Path(os.environ.get("ARDM_DATA", "")) / "text8" / "text8_prefix.zip"
    if "ARDM_DATA" not in os.environ or not path.is_file():
        pytest.skip("ARDM_DATA has no text8/text8_prefix.zip")
    data = datasets.load(str(path), 250)
    assert data.K == 27
    assert datasets.show(data.splits["train"][:30], 27) == " anarchism originated as a ter"


# -- train.py --------------------------------------------------------------------------------------

SMALL = dict(data="pydoc", size="tiny", length=16, dim=16, depth=1, heads=1, mlp=32, batch=4,
             device="cpu", bf16=False)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    c = train.complete(dict(SMALL, steps=8, warmup=2))
    data = train.load_data(c, "cpu")

    def go(run, upto):
        return [train.train_step(run, data.batch(c.batch, generator=run.generator)).item()
                for _ in range(run.step, upto)]
    whole, part = train.Run(c, 27, "text", (c.length,)), train.Run(c, 27, "text", (c.length,))
    losses = go(whole, 8)
    assert go(part, 5) == losses[:5]
    part.L = np.arange(16.0)[None]
    part.save(tmp_path / "ckpt.pt")
    again = train.Run(c, 27, "text", (c.length,))
    again.restore(train.read_checkpoint(tmp_path / "ckpt.pt"))
    assert np.array_equal(again.L, part.L)                             # plans go on too
    assert go(again, 8) == losses[5:]
    for a, b in zip(whole.ema.parameters(), again.ema.parameters()):
        assert torch.equal(a, b)


def test_learning_rate_rises_and_falls_to_zero():
    c = train.complete(dict(SMALL, steps=100, warmup=10))
    rates = [train.learning_rate(c, step, step / 100) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] and rates[-1] == 0 and rates[50] == 0.5
    c.decay = 0.0
    assert train.learning_rate(c, 90, 0.9) == 1


def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths():
    for shape in [(2, 5, 9), (2, 9, 5)]:
        X = torch.randn(shape, dtype=torch.float64)
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        S = U.mT @ train.orthogonal(X) @ Vh.mT                         # diagonal, all near 1
        lengths = S.diagonal(dim1=1, dim2=2)
        assert torch.allclose(S, torch.diag_embed(lengths), atol=1e-6)
        assert lengths.min() > 0.65 and lengths.max() < 1.15


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("bf16", [False, True])
def test_muon_goes_where_torchs_muon_goes(bf16):
    """torch's rounds to bfloat16, so only nearly."""
    ours, theirs = (nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    pair = [(ours, train.Muon([ours], lr=0.1, weight_decay=0.2, bf16=bf16)),
            (theirs, torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2))]
    for seed in range(3):
        gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        for p, optimizer in pair:
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=0.02) and (ours - 1).abs().max() > 0.1


def test_muon_treats_queries_keys_and_values_one_by_one():
    whole = nn.Parameter(torch.zeros(12, 4))
    parts = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    whole.grad = torch.randn(12, 4) * torch.tensor([1.0, 10, 100]).repeat_interleave(4)[:, None]
    for p, gradient in zip(parts, whole.grad.chunk(3)):
        p.grad = gradient.clone()
    for p in [[whole], parts]:
        train.Muon(p, lr=0.1, weight_decay=0.0, parts=3 if len(p) == 1 else 1).step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_is_left_out():
    c = train.complete(SMALL)
    net = train.build_model(c, 27, (c.length,)).net
    groups = [[p for g in o.param_groups for p in g["params"]]
              for o in train.make_optimizers(net, c)]
    assert sum(map(len, groups)) == len(list(net.parameters()))
    assert len(groups[1]) == 2 * c.depth + 2                           # one block with attention
    qkv = train.make_optimizers(net, c)[1].param_groups[0]
    assert qkv["parts"] == 3 and qkv["params"][0] is net.blocks[0].attention.qkv.weight
    c.optimizer = "adam"
    assert len(train.make_optimizers(net, c)) == 1


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    c = train.complete(dict(SMALL, steps=30))
    data = train.load_data(c, "cpu")
    monkeypatch.setattr(train, "train_step", lambda run, x: (
        setattr(run, "step", run.step + 1), torch.tensor(math.nan))[1])
    with pytest.raises(UserError, match="smaller --lr"):
        train.train(train.Run(c, 27, "text", (c.length,)), data, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_bound_of_a_uniform_model_counts_every_character():
    model = ARDM(Spy(27), 10, 27)
    result = train.bound(model, torch.zeros(7, 10, dtype=torch.uint8),
                         torch.zeros(3, dtype=torch.uint8), passes=2)
    assert math.isclose(result["bits"], math.log2(27), rel_tol=1e-6) and result["rest"] == 3
    assert np.allclose(result["L"], math.log2(27)) and result["L"].shape == (1, 10)
    assert sum(x.numel() for x, _, _ in model.net.seen) == 2 * 73


def test_bound_and_L_agree_with_enumeration():
    model, x = ARDM(Table(3, 2), 3, 2), torch.tensor([[1, 0, 1], [0, 0, 1]])
    nll = torch.stack([model.nll(x, sigma=s.expand(2, 3)) for s in all_sigma(3)]).mean().item()
    result = train.bound(model, x.to(torch.uint8), passes=20000)
    assert math.isclose(result["bits"], bits_per_dim(nll, 3), rel_tol=0.01)
    assert math.isclose(result["L"].sum() / 3, result["bits"], rel_tol=0.01)


def test_steps_that_were_never_met_take_their_neighbours_value():
    L = train.components(torch.tensor([2.0, 0, 1, 0]) * math.log(2), torch.tensor([1, 0, 1, 0]), 1)
    assert np.allclose(L, [[2, 1.5, 1, 1]])


def test_references_are_what_the_standard_library_gives():
    symbols = datasets.to_symbols(b"abracadabra" * 30, 27)
    bits = train.references(symbols, "text", 27, (11,))
    assert math.isclose(bits["uniform"], math.log2(27)) and bits["bz2"] < 2 < bits["bz2 in chunks"]
    share = np.array([5, 2, 2, 1, 1]) / 11
    assert math.isclose(bits["single letters"], -(share * np.log2(share)).sum())


def test_paper_size_is_the_papers_recipe():
    c = train.complete(dict(size="paper", device="cpu"))
    assert (c.length, c.dim, c.depth, c.heads, c.mlp, c.batch, c.steps) == (
        250, 768, 12, 12, 3072, 512, 3_000_000)
    assert (c.optimizer, c.lr, c.warmup, c.clip, c.ema, c.positions) == (
        "adam", 5e-4, 5000, 0.25, 0.995, "sinusoidal")
    assert not c.late and not c.short and not c.decay and c.branch is None


# -- Images ----------------------------------------------------------------------------------------

def images(n=40, shape=(6, 5), seed=0, top=256):
    """Grey or coloured squares on a slope: something that can be learnt."""
    rng = np.random.default_rng(seed)
    x = np.arange(shape[1])[:, None].reshape(-1, *[1] * (len(shape) - 2)) * 9
    return ((rng.integers(0, 200, (n, *[1] * len(shape))) + x + rng.integers(0, 9, (n, *shape)))
            % top).astype(np.uint8)


def test_npy_files_are_split_and_flattened_colour_by_colour(tmp_path):
    pixels = images(40, (6, 5, 3))
    np.save(tmp_path / "a.npy", pixels)
    data = datasets.load(str(tmp_path / "a.npy"))
    assert (data.shape, data.D, data.K, data.kind) == ((3, 6, 5), 90, 256, "image")
    assert [len(data.splits[part]) for part in ("train", "valid", "test")] == [32, 4, 4]
    back = datasets.to_images(torch.cat([data.splits[part] for part in ("test", "train", "valid")]),
                              data.shape)
    assert np.array_equal(back, pixels)
    assert torch.equal(data.splits["test"][0].view(3, 6, 5)[2], torch.from_numpy(pixels[0, ..., 2]))
    few = datasets.load(str(tmp_path / "a.npy"), bits=3)
    assert few.K == 8 and torch.equal(few.splits["test"], data.splits["test"] // 32)
    assert "3 of 8 bits" in few.name


def test_batches_are_training_images_mirrored_and_turned_where_asked(tmp_path):
    np.save(tmp_path / "a.npy", images(20, (4, 4)))
    for flips, turns in itertools.product((False, True), repeat=2):
        data = datasets.load(str(tmp_path / "a.npy"), flips=flips, turns=turns)
        originals = data.splits["train"].view(-1, 4, 4)
        made = {tuple(p.rot90(n, (1, 2)).flatten(1)[i].tolist())
                for p in ([originals, originals.flip(2)] if flips else [originals])
                for n in (range(4) if turns else [0]) for i in range(len(originals))}
        batch = {tuple(x.tolist()) for x in data.batch(500)}
        assert batch <= made and len(batch) > len(made) / 2


def test_glyphs_depend_on_the_seed_alone():
    one, two = datasets.draw_glyphs(20, 0), datasets.draw_glyphs(20, 0)
    assert np.array_equal(one, two) and not np.array_equal(one, datasets.draw_glyphs(20, 1))
    assert one.shape == (20, 1, 16, 16) and one.std() > 20


def unfiltered(content, W, step):
    """What the PNG specification says of rows and their filters, one value at a time."""
    rows, up = [], bytes(W)
    for at in range(0, len(content), W + 1):
        kind, row = content[at], bytearray(content[at + 1:at + 1 + W])
        for i in range(W):
            a, b, c = (row[i - step] if i >= step else 0, up[i],
                       up[i - step] if i >= step else 0)
            near = min((a, b, c), key=lambda v: abs(a + b - c - v))
            row[i] = row[i] + (0, a, b, (a + b) // 2, near)[kind] & 255
        rows.append(row)
        up = row
    return rows


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3), (1, 1)])
def test_png_holds_the_pixels_in_every_frame(shape):
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    frames = [noise, images(1, shape)[0]]
    for count in (1, 2):
        content = datasets.png(*frames[:count])
        at, parts = 8, []
        while at < len(content):
            size, kind = int.from_bytes(content[at:at + 4], "big"), content[at + 4:at + 8]
            parts.append((kind, content[at + 8:at + 8 + size]))
            check = int.from_bytes(content[at + 8 + size:at + 12 + size], "big")
            assert check == zlib.crc32(content[at + 4:at + 8 + size])
            at += 12 + size
        pixels = [part[4:] if kind == b"fdAT" else part for kind, part in parts
                  if kind in (b"IDAT", b"fdAT")]
        step = 1 if len(shape) == 2 else 3
        for frame, part in zip(frames, pixels, strict=count == 2):
            rows = unfiltered(zlib.decompress(part), shape[1] * step, step)
            assert np.array_equal(np.array([list(row) for row in rows]).reshape(shape), frame)


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def cifar(path, batches, gz="w:gz"):
    with tarfile.open(path, gz) as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar_is_read_from_a_partial_tarball(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3072)).astype(np.uint8)
    cifar(tmp_path / "c.tar.gz", {
        "data_batch_2": pickle.dumps({b"data": pixels[10:20], b"labels": [1] * 10}, 2),
        "data_batch_1": pickle.dumps({b"data": pixels[:10]}), "readme.html": b"hello",
        "test_batch": pickle.dumps({b"data": pixels[20:]})})
    data = datasets.load(str(tmp_path / "c.tar.gz"))
    assert "data_batch_1, data_batch_2 and 10 test images" in data.name
    whole = torch.cat([data.splits[part] for part in ("train", "valid", "test")])
    assert np.array_equal(whole.numpy(), pixels) and data.shape == (3, 32, 32)


def test_pickles_that_ask_for_more_are_refused_by_name(tmp_path, capsys):
    good = pickle.dumps({b"data": np.zeros((10, 3072), np.uint8)})
    for bad, match in ((pickle.dumps({b"data": Evil()}), "builtins.print"),
                       (pickle.dumps(Path("x")), "pathlib"), (good[:50], "damaged"),
                       (pickle.dumps({b"data": np.zeros((10, 3072))}), "float64"),
                       (pickle.dumps([1, 2]), "damaged"), (b"", "damaged")):
        cifar(tmp_path / "c.tar.gz", {"data_batch_1": bad, "test_batch": good})
        with pytest.raises(UserError, match=match):
            datasets.load(str(tmp_path / "c.tar.gz"))
    assert "never" not in capsys.readouterr().out
    cifar(tmp_path / "d.tar.gz", {"data_batch_1": good})
    with pytest.raises(UserError, match="no test_batch"):
        datasets.load(str(tmp_path / "d.tar.gz"))
    cut = (tmp_path / "c.tar.gz").read_bytes()
    for n in (0, 10, len(cut) // 2):
        (tmp_path / "cut.tar.gz").write_bytes(cut[:n])
        with pytest.raises(UserError, match="no tarball|damaged|no data_batch"):
            datasets.load(str(tmp_path / "cut.tar.gz"))


def test_damaged_mnist_is_refused(tmp_path):
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"short"))
    with pytest.raises(UserError, match="not the whole upstream file"):
        datasets.load("mnist", data_dir=tmp_path)


def test_real_images_are_read():
    folder = os.environ.get("ARDM_DATA", "")
    if not (Path(folder) / "cifar10" / "cifar-10-python.partial.tar.gz").is_file():
        pytest.skip("ARDM_DATA has no cifar10/cifar-10-python.partial.tar.gz")
    mnist = datasets.load("mnist", data_dir=folder)
    assert [len(part) for part in mnist.splits.values()] == [54000, 6000, 10000]
    assert 33 < mnist.splits["train"].float().mean() < 34                # 0.1307 of 255
    cifar10 = datasets.load(f"{folder}/cifar10/cifar-10-python.partial.tar.gz")
    assert [len(part) for part in cifar10.splits.values()] == [18000, 2000, 1017]


@pytest.mark.parametrize("shape", [5, (1, 4, 4), (3, 4, 6), (2, 5, 3), (1, 1, 1)])
def test_orders_of_images_are_permutations(shape):
    for rule in ("forward", "backward", "random:1", "spaced:4", "coarse"):
        assert sorted(planner.order(rule, shape)) == list(range(1, int(np.prod(shape)) + 1))


def test_orders_of_images_go_pixel_by_pixel_or_from_coarse_to_fine():
    forward = planner.order("forward", (3, 2, 4)).reshape(3, 8)
    assert (forward == 3 * np.arange(8) + np.arange(3)[:, None] + 1).all()
    coarse = planner.order("coarse", (1, 4, 4)).reshape(4, 4)
    assert coarse[0, 0] == 1 and coarse[2, 2] == 2 and set(coarse[::2, ::2].flat) == {1, 2, 3, 4}
    assert set(coarse[1::2, 1::2].flat) == {5, 6, 7, 8}
    assert planner.order("coarse", 8).tolist() == [1, 5, 3, 6, 2, 7, 4, 8]


# -- The scripts -----------------------------------------------------------------------------------

def run(script, *arguments, **options):
    return subprocess.run([sys.executable, HERE / script, *map(str, arguments)],
                          capture_output=True, text=True, timeout=600, **options)


QUICK = ["--steps", 30, "--report", 10, "--length", 24, "--dim", 32, "--depth", 1, "--heads", 2,
         "--mlp", 64, "--batch", 16, "--device", "cpu"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What `train.py` leaves behind after a very short run."""
    folder = tmp_path_factory.mktemp("run")
    done = run("train.py", *QUICK, "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Calls a script that must refuse: code 2, one matching line on stderr, nothing written."""
    def call(module, *arguments, match):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.command_line(module.main)
        line = capsys.readouterr().err.split("\r")[-1].strip()
        assert stop.value.code == 2 and "\n" not in line and match in line, line
        assert sorted(tmp_path.rglob("*")) == before
    return call


def test_training_prints_what_it_promises(folder):
    printed = (folder / "printed").read_text()
    for part in ("bits/char, standard error", "loss components L_t", "network calls", "samples:",
                 "single letters", "in the same chunks: bz2", "python sample.py --ckpt",
                 "python compress.py encode"):
        assert part in printed
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["bits_per_dim"] < math.log2(27) and results["seed"] == 0
    assert [row["calls"] for row in results["calls"]] == [5, 10, 20, 24]
    assert all(abs(row["predicted"] - row["measured"]) < 5 * row["stderr"] + 0.02
               for row in results["calls"])
    assert len((folder / "log.csv").read_text().splitlines()) == 4
    L = train.read_checkpoint(folder / "ckpt.pt")["L"]
    assert L.shape == (1, 24) and L.dtype == torch.float64


def test_evaluating_a_checkpoint_gives_the_same_number(folder):
    done = run("train.py", "--evaluate", folder / "ckpt.pt", "--device=cpu")
    printed = (folder / "printed").read_text().splitlines()
    line = next(line for line in printed if line.startswith("test:"))
    assert done.returncode == 0 and line in done.stdout


def test_ctrl_c_saves_and_the_run_can_be_resumed(tmp_path):
    arguments = [sys.executable, HERE / "train.py", *map(str, QUICK), "--steps", "100000",
                 "--out", str(tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, log = time.monotonic() + 60, tmp_path / "log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume --out" in out and "Traceback" not in err
    step = train.read_checkpoint(tmp_path / "ckpt.pt")["step"]
    done = run("train.py", "--resume", "--out", tmp_path, "--steps", step + 10, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert train.read_checkpoint(tmp_path / "ckpt.pt")["step"] == step + 10


def test_a_run_without_numbers_is_not_saved(refused, folder, tmp_path):
    done = run("train.py", *QUICK, "--steps", 5, "--lr", 1e38, "--optimizer", "adam", "--out",
               tmp_path / "out")
    assert done.returncode == 2 and "step 5: the loss is not a number" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "ckpt.pt").exists()
    changed = train.read_checkpoint(folder / "ckpt.pt")
    changed["settings"] = vars(changed["settings"])
    changed["ema"]["net.head.bias"] += math.nan
    torch.save(changed, tmp_path / "nan.pt")
    refused(train, "--evaluate", tmp_path / "nan.pt", match="gives no numbers")


@pytest.mark.parametrize("name", ["test.txt", "log.csv", "ckpt.pt"])
def test_a_run_does_not_write_over_its_data(refused, tmp_path, name):
    (tmp_path / name).write_text("some text " * 100)
    refused(train, *QUICK, "--data", f"{tmp_path}/../{tmp_path.name}/{name}", "--out", tmp_path,
            match=f"writes its own {name}")
    assert (tmp_path / name).read_text() == "some text " * 100


def test_a_second_run_keeps_the_first_ones_checkpoint(folder, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    done = run("train.py", *QUICK, "--steps", 2, "--passes", 2, "--out", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "ckpt.1.pt").read_bytes() == (folder / "ckpt.pt").read_bytes()
    train.set_aside(tmp_path)
    assert (tmp_path / "ckpt.2.pt").exists() and (tmp_path / "results.2.json").exists()
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "results.json").exists()


def test_samples_are_repeatable_and_obey_the_budget(folder, tmp_path):
    one, two = (run("sample.py", "--ckpt", folder / "ckpt.pt", "--n", 3, "--calls", 5,
                    "--seed", 4, "--out", tmp_path) for _ in range(2))
    assert one.returncode == 0 and one.stdout == two.stdout and "5 network calls" in one.stdout
    lines = (tmp_path / "samples.txt").read_text().splitlines()
    assert len(lines) == 3
    assert all(len(line) == 24 and datasets.is_text(line.encode()) for line in lines)


@pytest.mark.parametrize("order", ["forward", "backward", "random:3", "spaced:4"])
def test_blanks_are_filled_and_the_rest_stays(folder, tmp_path, order):
    done = run("sample.py", "--ckpt", folder / "ckpt.pt", "--prompt", "the ____ of", "--frames",
               "--order", order, "--n", 2, "--out", tmp_path)
    assert done.returncode == 0 and "4 network calls" in done.stdout
    for line in (tmp_path / "samples.txt").read_text().splitlines():
        assert len(line) == 11 and line[:4] == "the " and line[8:] == " of" and "_" not in line
    frames = [line[len("t =    1  "):]
              for line in (tmp_path / "frames.txt").read_text().splitlines() if line]
    assert [frame.count("_") for frame in frames] == [4, 3, 2, 1, 0] * 2
    assert frames[0] == "the ____ of" and (order != "forward" or frames[1][5:] == "___ of")


def content(text, D=24):
    return compress.Content.of(torch.from_numpy(datasets.to_symbols(text, 27)), "text", 27, (D,))


def unpack(archive):
    """Header and [(stream, offset)] of an archive in memory."""
    header, blocks = compress.unpack(io.BytesIO(archive), "archive")
    return header, [(archive[at:at + size], at) for size, at in blocks]


def pack(header, streams):
    compress.write_archive(file := io.BytesIO(), header, streams)
    return file.getvalue()


def decoded(*args):
    """The text that an archive holds."""
    return datasets.to_bytes(compress.decode(*args), 27)


@pytest.mark.parametrize("n", [0, 1, 23, 24, 25, 700])
def test_files_of_any_length_come_back(folder, tmp_path, n):
    text = (folder / "test.txt").read_bytes()[:n]
    (tmp_path / "in").write_bytes(text)
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    for calls, order in ((24, "forward"), (5, "spaced:5")):
        likeliest, plan = compress.candidates(model, checkpoint["L"], calls)[0]
        assert likeliest == order
        archive, bits = compress.encode(model, content(text), order, plan)
        assert decoded(model, checkpoint, archive, "archive") == text
        payload = sum(len(part) for part, _ in unpack(archive)[1])
        assert 8 * payload <= bits * 1.001 + 64


def test_several_blocks_and_their_ideal_length(folder):
    text = (folder / "test.txt").read_bytes()[:1001]
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    plan = planner.uniform_plan(1, 24, 6)
    archive, bits = compress.encode(model, content(text), "forward", plan, block=10)
    header, blocks = unpack(archive)
    assert len(blocks) == 5 and decoded(model, checkpoint, archive, "archive") == text
    whole = torch.from_numpy(datasets.to_symbols(text, 27)).long()[:984].view(-1, 24)
    sigma = torch.from_numpy(planner.order("forward", 24)).expand(whole.shape)
    nll = bits_per_dim(model.nll(whole, plan, sigma).sum().item(), 1)
    assert nll < bits < nll + 17 * math.log2(27) + 30


def test_compress_on_the_command_line(folder, tmp_path):
    (tmp_path / "in").write_bytes((folder / "test.txt").read_bytes()[:2000])
    ckpt = ("--ckpt", folder / "ckpt.pt", "--device", "cpu")
    done = run("compress.py", "encode", *ckpt, "--calls", 8, tmp_path / "in", tmp_path / "archive")
    assert done.returncode == 0, done.stderr
    assert "bits/char" in done.stdout and "spaced:" in done.stdout, done.stderr
    done = run("compress.py", "decode", *ckpt, tmp_path / "archive", tmp_path / "out",
               env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
    done = run("compress.py", "bench", *ckpt, "--order", "forward", tmp_path / "in")
    assert done.returncode == 0 and "identical" in done.stdout and "lzma in chunks" in done.stdout


def test_bytes_are_trained_on_and_coded(tmp_path):
    source = b"".join(path.read_bytes() for path in HERE.glob("*.py"))
    (tmp_path / "source").write_bytes(source)
    done = run("train.py", *QUICK, "--steps", 10, "--passes", 2, "--data", tmp_path / "source",
               "--out", tmp_path / "out")
    assert done.returncode == 0 and "K = 256" in done.stdout, done.stderr
    model, checkpoint = train.load_model(tmp_path / "out" / "ckpt.pt", "cpu")
    (tmp_path / "part").write_bytes(source[:3000])
    part = compress.open_input(tmp_path / "part", checkpoint)
    archive, _ = compress.encode(model, part, "forward", planner.full_plan(1, 24))
    back = compress.decode(model, checkpoint, archive, "archive")
    assert back.numpy().tobytes() == source[:3000]
    check_other_machine(tmp_path / "out", tmp_path / "part", tmp_path)


def test_headers_of_text_are_short():
    """At most 200 bytes, whatever number of calls the plan has."""
    rng = np.random.default_rng(0)
    for D in (64, 250):
        L = np.linspace(4.5, 1.5, D) ** 1.5 + rng.normal(0, 0.02, D)
        source = compress.Content.of(torch.zeros(10 ** 6, dtype=torch.uint8), "text", 27, (D,))
        codec = SimpleNamespace(model=SimpleNamespace(K=27), block=256, weights="0123456789abcdef",
                                fast=False)
        for calls in range(1, D + 1):
            codec.plan = planner.plan(L, calls)
            header = compress.make_header(codec, source, "spaced:16")
            text = compress.deflate(json.dumps(header, separators=(",", ":")).encode())
            assert len(text) + 9 <= 200, (D, calls, len(text))


def test_the_encoder_reads_ahead_and_the_decoder_in_any_batch(folder, gallery):
    """Portable: the same bytes whatever goes through the network together."""
    for place in (folder, gallery):
        model, checkpoint = train.load_model(place / "ckpt.pt", "cpu")
        source = compress.open_input("test", checkpoint)
        source.length = min(source.length, 13 * model.D + (7 if place == folder else 0))
        plan = planner.plan(checkpoint["L"], 12)
        flags = dict(verify=False, block=2)
        archives = [compress.encode(model, source, "random:1", plan, **flags, batch=batch)
                    for batch in (1, 5, 1000)]
        assert archives[0][0] == archives[1][0] == archives[2][0]
        assert archives[0][1] == pytest.approx(archives[2][1], abs=1e-6)
        for batch in (1, 4, 1000):
            back = compress.decode(model, checkpoint, archives[0][0], "archive", batch=batch)
            assert torch.equal(back, source.symbols)


def test_files_are_coded_as_a_stream(folder):
    """Neither side ever holds more than a batch, and one pass over each file is enough."""
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    symbols, asked = torch.arange(5000, dtype=torch.uint8) % 27, []
    source = compress.Content(lambda start, stop: asked.append((start, stop)) or
                              symbols[start:stop], 5000, "text", 27, (24,))
    plan = planner.uniform_plan(1, 24, 3)
    archive, _ = compress.encode(model, source, "forward", plan, block=2, batch=4)
    assert asked[:2] == [(0, 96), (96, 192)] and asked[-1] == (4992, 5000) and len(asked) == 53
    file, sizes = io.BytesIO(archive), []
    file.read = lambda n: sizes.append(n) or io.BytesIO.read(file, n)
    parts = list(compress.decode_file(file, model, checkpoint, "archive", batch=4))
    assert torch.equal(torch.cat(parts), symbols) and max(len(part) for part in parts) == 48
    assert sizes[-1] < 48 and len(sizes) == 4 + 105      # 4: header and index


@pytest.mark.parametrize("seed", range(8))
def test_any_content_in_any_blocks_comes_back(folder, gallery, tmp_path, monkeypatch, seed):
    """The whole command on random sizes, blocks, batches, orders and budgets; whole and in part."""
    rng = np.random.default_rng(seed)
    place = gallery if seed % 3 == 2 else folder
    model, checkpoint = train.load_model(place / "ckpt.pt", "cpu")
    D, n = model.D, int(rng.integers(0, 40))
    if place == gallery:
        np.save(tmp_path / "in.npy", rng.integers(256, size=(n + 1, 6, 5, 3), dtype=np.uint8))
    else:
        n = n * D + int(rng.integers(D))
        letters = np.frombuffer(b" abcdefghijklmnopqrstuvwxyz", np.uint8)
        (tmp_path / "in.npy").write_bytes(rng.choice(letters, size=n).tobytes())

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, arguments)])
        compress.main()
        return (tmp_path / str(arguments[-1])).read_bytes()

    monkeypatch.chdir(tmp_path)
    ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
    order = rng.choice(["forward", "backward", "random:5", "spaced:3", "coarse"])
    mode = ["--fast"] if rng.random() < 0.3 else []
    call("encode", *ckpt, "--calls", rng.integers(model.S, 21), "--order", order, *mode, "--block",
         rng.integers(1, 9), "--batch", rng.integers(1, 30), "in.npy", "archive")
    assert call("decode", *ckpt, "archive", "out") == Path("in.npy").read_bytes()
    if n:
        item = int(rng.integers(-(-n // D) if place == folder else n))
        part = call("decode", *ckpt, "--item", item, "archive", "part")
        if place == folder:
            assert part == Path("in.npy").read_bytes()[item * D:(item + 1) * D]
        else:
            assert np.array_equal(np.load("part"), np.load("in.npy")[item:item + 1])


def killed_while_writing(arguments, part):
    """Starts compress.py and kills it, by -9, once it has begun to write."""
    child = subprocess.Popen([sys.executable, HERE / "compress.py", *map(str, arguments)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and not part.exists():
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_a_killed_command_leaves_the_old_file(folder, refused, tmp_path):
    text = (folder / "test.txt").read_bytes()[:4000]
    (tmp_path / "in").write_bytes(text)
    ckpt = ("--ckpt", folder / "ckpt.pt", "--device", "cpu")
    (tmp_path / "a").write_text("old")
    encode = ("encode", *ckpt, "--order", "forward", tmp_path / "in", tmp_path / "a")
    killed_while_writing(encode, tmp_path / "a.part")
    assert (tmp_path / "a").read_text() == "old"
    refused(compress, "decode", *ckpt, tmp_path / "a.part", tmp_path / "out", match="a.part is")
    assert run("compress.py", *encode).returncode == 0
    (tmp_path / "out").write_text("old")
    decode = ("decode", *ckpt, tmp_path / "a", tmp_path / "out")
    killed_while_writing(decode, tmp_path / "out.part")
    assert (tmp_path / "out").read_text() == "old"
    assert run("compress.py", *decode).returncode == 0 and (tmp_path / "out").read_bytes() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_that_does_not_fit_on_the_disk(folder, tmp_path):
    import resource
    text = (folder / "test.txt").read_bytes()[:4000]
    model, _ = train.load_model(folder / "ckpt.pt", "cpu")
    archive, _ = compress.encode(model, content(text), "forward", planner.uniform_plan(1, 24, 6))
    (tmp_path / "a").write_bytes(archive)
    (tmp_path / "out").write_text("old")
    done = run("compress.py", "decode", "--ckpt", folder / "ckpt.pt", tmp_path / "a",
               tmp_path / "out", preexec_fn=lambda: resource.setrlimit(
                   resource.RLIMIT_FSIZE, (3000, 3000)))
    assert done.returncode == 2 and "cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and (tmp_path / "out").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_every_damaged_archive_is_refused(folder):
    """All truncations, and one changed bit at every position."""
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    text = (folder / "test.txt").read_bytes()[:40]
    archive, _ = compress.encode(model, content(text), "forward", planner.uniform_plan(1, 24, 3))
    for i in range(len(archive)):
        flipped = archive[:i] + bytes([archive[i] ^ 1 << i % 8]) + archive[i + 1:]
        for bad in (archive[:i], flipped):
            with pytest.raises(UserError):
                compress.decode(model, checkpoint, bad, "archive")
    with pytest.raises(UserError, match="follow"):
        compress.decode(model, checkpoint, archive + b"x", "archive")


class Perturbed(nn.Module):
    """A network on another machine: its numbers differ by up to `size`."""

    def __init__(self, net, size):
        super().__init__()
        self.net, self.size, self.rng = net, size, torch.Generator().manual_seed(0)

    def forward(self, *inputs):
        logits = self.net(*inputs)
        noise = torch.rand(logits.shape, dtype=logits.dtype, generator=self.rng)
        return logits + self.size * (2 * noise - 1)


def test_portable_archives_decode_where_other_numbers_come_out(folder, monkeypatch):
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    text = (folder / "test.txt").read_bytes()[:2000]
    archive, _ = compress.encode(model, content(text), "forward", planner.uniform_plan(1, 24, 6))
    weights = unpack(archive)[0]["weights"]
    monkeypatch.setattr(compress, "digest", lambda model: weights)
    for size, same in ((0, True), (4e-11, True), (1e-5, False)):
        model.net = Perturbed(train.load_model(folder / "ckpt.pt", "cpu")[0].net, size)
        if same:
            back = compress.decode(model, checkpoint, archive, "archive", batch=16)
            assert datasets.to_bytes(back, 27) == text
        else:
            with pytest.raises(UserError, match="does not decode"):
                compress.decode(model, checkpoint, archive, "archive", batch=16)


def test_a_grid_is_shifted_where_a_value_lies_on_a_boundary(folder):
    model, _ = train.load_model(folder / "ckpt.pt", "cpu")
    codec = compress.Codec(model, (24,), "forward", planner.full_plan(1, 24), 4, 4)
    log_p = torch.full((3, 27), -3.0, dtype=torch.float64)
    assert codec._tables(log_p, 1)[1] == [0]
    log_p[1, 5] -= 0.5 / 1024
    cdf, shift = codec._tables(log_p, 1)
    assert shift == [1] and np.array_equal(cdf, codec._tables(log_p, 1, shift)[0])
    for n, most in ((81, 82), (27 << 20, 2 ** 20 + 1)):
        log_p = torch.empty(2 * n // 27, 27, device="meta")
        sizes = np.diff(compress.shift_table(log_p, 2))
        assert sizes.tolist() == [2 ** 22 - most - 254, most] + 254 * [1]
    x = torch.zeros(3, dtype=torch.uint8)
    assert len({compress.checksum(*key) for key in ((0, x), (1, x), (0, x + 1), (0, x[:2]))}) == 4


def test_archives_with_shifted_grids_come_back(folder, monkeypatch):
    monkeypatch.setattr(compress, "MARGIN", 1e-6)        # many values are too near a boundary now
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    source = content((folder / "test.txt").read_bytes()[:1000])
    plan = planner.uniform_plan(1, 24, 6)
    tables, seen = compress.Codec._tables, []
    monkeypatch.setattr(compress.Codec, "_tables",
                        lambda *args: (seen.append((out := tables(*args))[1]), out)[1])
    archive, bits = compress.encode(model, source, "spaced:4", plan, block=8, batch=8,
                                    verify=False)
    shifts, blocks = np.concatenate(seen), unpack(archive)[1]
    assert len(shifts) == 6 * len(blocks) and np.count_nonzero(shifts) > 20
    sizes = np.diff(compress.shift_table(torch.empty(8 * 4, 27), 1))     # of a block, of a call
    bits += (22 - np.log2(sizes[shifts])).sum()
    size = 8 * sum(len(stream) for stream, _ in blocks)
    assert 0 < size - bits < 48 * len(blocks)            # checksums, and rest of the state
    for batch in (8, 96, 512):                           # call by call, two calls, all of them
        assert compress.encode(model, source, "spaced:4", plan, block=8, batch=batch)[0] == archive
        assert torch.equal(compress.decode(model, checkpoint, archive, "a", batch=batch),
                           source.symbols)
    unread = lambda self, log_p, streams, shift=None: tables(        # noqa: E731
        self, log_p, streams, shift if shift is None else 0 * shift)
    monkeypatch.setattr(compress.Codec, "_tables", unread)
    with pytest.raises(UserError, match="does not decode"):
        compress.decode(model, checkpoint, archive, "archive")


@pytest.mark.parametrize("fast", [False, True])
def test_a_network_that_gives_no_numbers_is_refused(folder, fast):
    model, _ = train.load_model(folder / "ckpt.pt", "cpu")
    model.net.head.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="no numbers"):
        compress.encode(model, content(b"text"), "forward", planner.full_plan(1, 24), fast=fast)


def test_what_does_not_decode_is_not_written(folder, tmp_path, monkeypatch):
    decode = compress.Codec.decode

    def other(self, *args):
        parts = decode(self, *args)
        return [*parts[:-1], parts[-1] ^ 1]
    model, _ = train.load_model(folder / "ckpt.pt", "cpu")
    for broken in (other, lambda self, streams, *args: [None] * len(streams)):
        monkeypatch.setattr(compress.Codec, "decode", broken)
        with pytest.raises(UserError, match="does not decode to what went in"):
            with train.replacing(tmp_path / "a") as file:
                compress.encode_file(file, model, content(b"text"), "forward",
                                     planner.full_plan(1, 24))
    assert list(tmp_path.iterdir()) == []


def numpy_features():
    """Vector instructions that NumPy uses here and can be told not to."""
    core = np._core._multiarray_umath
    return " ".join(name for name in core.__cpu_dispatch__ if core.__cpu_features__[name])


ELSEWHERE = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", ONEDNN_MAX_CPU_ISA="SSE41",
                 NPY_DISABLE_CPU_FEATURES=numpy_features())


def check_other_machine(place, source, tmp_path, threads="1", modes=([],)):
    """Encodes here, decodes with old instructions, so many threads and other batches."""
    ckpt = ("--ckpt", place / "ckpt.pt", "--device", "cpu")
    for mode in modes:
        done = run("compress.py", "encode", *ckpt, "--calls", 20, "--order", "forward",
                   "--no-verify", *mode, source, tmp_path / "a")
        assert done.returncode == 0, done.stderr
        done = run("compress.py", "decode", *ckpt, "--batch", 3, tmp_path / "a", tmp_path / "b",
                   env={**os.environ, **ELSEWHERE, "OMP_NUM_THREADS": threads})
        if not mode:
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "b").read_bytes() == source.read_bytes()
        else:                                            # refused, or the very same numbers
            assert done.returncode in (0, 2) and (done.returncode == 0 or
                                                  "other probabilities" in done.stderr)


def test_text_decodes_on_a_simulated_other_machine(folder, tmp_path):
    check_other_machine(folder, folder / "test.txt", tmp_path, modes=([], ["--fast"]))
    done = run("compress.py", "info", tmp_path / "a")
    assert done.returncode == 0 and "order forward, 20 network calls" in done.stdout


def test_images_decode_on_a_simulated_other_machine(gallery, tmp_path):
    check_other_machine(gallery, gallery / "test.npy", tmp_path, threads="2")


def test_damaged_archives_of_upscale_models_are_refused():
    """A wrong digit may lead to a value that does not exist."""
    model = UpscaleARDM(StageTable(2, 5, 5, 2), 2, 5, 4)
    codec = compress.Codec(model, (2,), "forward", planner.full_plan(2, 2), 4, 4)
    source = compress.Content.of(torch.zeros(7, dtype=torch.uint8), "bytes", 5, (2,))
    archive = pack(compress.make_header(codec, source, "forward"), [b"x" * 7])
    noises = [np.random.default_rng(seed).bytes(7) for seed in range(100)]
    for noise in noises + [b"\0" + b"\xff" * 6, b"\0" * 7]:
        with pytest.raises(UserError, match="block 0"):
            compress.decode(model, dict(kind="bytes", shape=[2]), archive[:-7] + noise,
                            "archive", batch=4)


def repacked(archive, **change):
    """An archive with another header, its checksum made right again."""
    header, blocks = unpack(archive)
    text = compress.deflate(json.dumps(header | change).encode())
    start = 9 + int.from_bytes(archive[5:9], "big")
    end = start + len(blocks) * compress.index_width(header)
    head = archive[:5] + len(text).to_bytes(4, "big") + text + archive[start:end]
    return head + zlib.crc32(head).to_bytes(4, "big") + archive[end + 4:]


def test_a_machine_that_computes_other_numbers_refuses(folder):
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    archive, _ = compress.encode(model, content(b"some text"), "forward", planner.full_plan(1, 24))
    bad = repacked(archive, fast=True, probe=1, threads=1, torch="2", device="cpu", batch=256)
    with pytest.raises(UserError, match="other probabilities"):
        compress.decode(model, checkpoint, bad, "archive")


def test_headers_that_ask_for_too_much_are_refused(folder, tmp_path):
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    archive, _ = compress.encode(model, content(b"some text"), "forward", planner.full_plan(1, 24))
    assert decoded(model, checkpoint, repacked(archive), "archive") == b"some text"
    for change in (dict(length=10 ** 12), dict(block=0), dict(block=10 ** 9), dict(length=-1),
                   dict(plan=[[1, 0, 24]]), dict(plan=[[1, 1, 10 ** 12]]), dict(plan="x"),
                   dict(shape=[9] * 10 ** 6), dict(length=10 ** 4000),
                   dict(order="sideways"), dict(fast=1), dict(fast=True), dict(shape="x"),
                   dict(K=26), dict(kind="image"), dict(shape=[10 ** 9]), dict(weights="0"),
                   dict(plan=[[1.0, 1, 24]]), dict(plan=[[1, 0.5, 1], [1, 23.5, 1]]), dict(plan=[]),
                   dict(order="random:" + 10 ** 6 * "1"), dict(shape=[2 ** 40, 2 ** 40, 1])):
        bad = repacked(archive, **change)
        with pytest.raises(UserError):
            compress.decode(model, checkpoint, bad, "archive")
        (tmp_path / "bad").write_bytes(bad)
        with suppress(UserError):                        # never anything else
            compress.run_info(SimpleNamespace(input=tmp_path / "bad"))


def test_keep_going_delivers_what_is_whole(gallery, tmp_path, monkeypatch, capsys):
    ckpt = ("--ckpt", gallery / "ckpt.pt", "--device", "cpu")
    source = np.load(gallery / "test.npy")[:5]
    np.save(tmp_path / "in.npy", source)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, arguments)])
        compress.main()
    call("encode", *ckpt, "--calls", 20, "--order", "forward", "--no-verify", "--block", 1,
         tmp_path / "in.npy", tmp_path / "a")
    archive = bytearray((tmp_path / "a").read_bytes())
    archive[unpack(archive)[1][3][1]] ^= 4
    (tmp_path / "a").write_bytes(archive)
    with pytest.raises(UserError, match="block 3 of 5"):
        call("decode", *ckpt, tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(SystemExit) as stop:
        call("decode", *ckpt, "--keep-going", tmp_path / "a", tmp_path / "b")
    printed = capsys.readouterr()
    assert stop.value.code == 1 and "4 images, these checksums match" in printed.out
    assert "block 3 of 5" in printed.err and "blocks left out: 1" in printed.err
    assert np.array_equal(np.load(tmp_path / "b"), source[[0, 1, 2, 4]])


SMALL_PICTURES = ["--steps", 25, "--report", 10, "--dim", 8, "--depth", 1, "--levels", 2,
                  "--passes", 2, "--device", "cpu"]


@pytest.fixture(scope="session", params=[None, 4], ids=["order-agnostic", "upscale"])
def gallery(tmp_path_factory, request):
    """What `train.py` leaves behind after a very short run on small colour images."""
    folder = tmp_path_factory.mktemp("gallery")
    np.save(folder / "a.npy", images(200, (6, 5, 3)))
    branch = ["--branch", request.param] if request.param else []
    done = run("train.py", *SMALL_PICTURES, *branch, "--data", folder / "a.npy", "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def test_training_on_images_prints_what_it_promises(gallery):
    printed = (gallery / "printed").read_text()
    for part in ("bits/dim, standard error", "20 images of 3 x 6 x 5", "single values", "PNG",
                 "samples.png", "--inpaint top", "python compress.py encode"):
        assert part in printed
    results = json.loads((gallery / "results.json").read_text())
    assert all(abs(row["predicted"] - row["measured"]) < 5 * row["stderr"] + 0.05
               for row in results["calls"]) and len(results["calls"]) >= 3
    assert np.load(gallery / "test.npy").shape == (16, 6, 5, 3)
    assert (gallery / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_images_are_sampled_completed_and_shown(gallery, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(datasets, "png",
                        lambda *frames: shown.setdefault(len(shown), frames) and b"")
    for arguments in (["--frames", "--calls", 20], ["--inpaint", "top", "--calls", 20],
                      ["--inpaint", "random:0.5", "--calls", 20]):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(gallery / "ckpt.pt"), "--n",
                                          "3", "--out", str(tmp_path), *map(str, arguments)])
        sample.main()
    names = ["frames.png", "inpaint.png", "process.png", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    film = shown[2]
    assert len(film) == 12 and (film[0] == 128).all(axis=2).sum() > 1000
    assert np.array_equal(film[-1], shown[0][0])
    enlarged, pixels = 13, shown[3][0]                                   # 64 / 5, up
    rows = [[pixels[i:i + 6 * enlarged, j:j + 5 * enlarged] for j in
             range(0, pixels.shape[1], 6 * enlarged)] for i in
            range(0, pixels.shape[0], 7 * enlarged)]
    test = np.load(gallery / "a.npy")[:20]
    assert len(rows) == 3 and all(len(row) == 6 for row in rows)
    for row, original in zip(rows, test[[0, 6, 13]]):
        small = [part[::enlarged, ::enlarged] for part in row]
        assert np.array_equal(small[0], original) and (small[1][3:] == 128).all()
        assert all(np.array_equal(part[:3], original[:3]) for part in small[1:])


def test_images_are_compressed_one_by_one(gallery, tmp_path):
    ckpt = ("--ckpt", gallery / "ckpt.pt", "--device", "cpu")
    pixels = images(23, (6, 5, 3), seed=1)
    np.save(tmp_path / "in.npy", pixels)
    done = run("compress.py", "encode", *ckpt, "--calls", 20, tmp_path / "in.npy", tmp_path / "a")
    assert done.returncode == 0 and "23 images" in done.stdout, done.stderr
    done = run("compress.py", "decode", *ckpt, tmp_path / "a", tmp_path / "out.npy")
    assert done.returncode == 0 and np.array_equal(np.load(tmp_path / "out.npy"), pixels)
    done = run("compress.py", "decode", *ckpt, "--item", 17, tmp_path / "a", tmp_path / "one.npy")
    assert done.returncode == 0 and np.array_equal(np.load(tmp_path / "one.npy"), pixels[17:18])
    done = run("compress.py", "bench", *ckpt, "--calls", 20, "--order", "coarse")
    assert done.returncode == 0 and "identical" in done.stdout and "PNG" in done.stdout


@pytest.mark.parametrize("order", ["coarse", "random:1"])
def test_damage_to_one_image_leaves_the_others(gallery, order):
    model, checkpoint = train.load_model(gallery / "ckpt.pt", "cpu")
    source = compress.open_input("test", checkpoint)
    source.length = 8 * 90
    plan = planner.uniform_plan(model.S, 90, 12)
    archive, bits = compress.encode(model, source, order, plan, block=1, batch=3)
    header, blocks = unpack(archive)
    assert len(blocks) == 8 and header["block"] == 1
    sizes = [len(stream) for stream, _ in blocks]
    assert 8 * sum(sizes) < bits * 1.001 + 8 * 48           # checksum, whole bytes, no shifts
    at = blocks[4][1] + 2                                                # in image 4
    bad = archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1:]
    whole = compress.decode(model, checkpoint, archive, "archive").view(8, 90)
    assert torch.equal(whole, source.symbols.view(8, 90))
    for i in (0, 3, 5, 7):
        assert torch.equal(compress.decode(model, checkpoint, bad, "a", i), whole[i])
    for item in (4, None):
        with pytest.raises(UserError, match="block 4 of 8"):
            compress.decode(model, checkpoint, bad, "archive", item)
    damaged = []
    kept = compress.decode(model, checkpoint, bad[:-1], "archive", damaged=damaged)
    assert torch.equal(kept.view(6, 90), whole[[0, 1, 2, 3, 5, 6]])
    streams = [stream for stream, _ in blocks]
    for moved in (streams[:2] + streams[3:1:-1] + streams[4:], streams[:2] * 4):
        with pytest.raises(UserError, match="block 2 of 8"):             # right, in a wrong place
            compress.decode(model, checkpoint, pack(header, moved), "archive")
    assert [f"block {i} of 8" in line for i, line in zip((4, 7), damaged)] == [True, True]
    with pytest.raises(UserError, match="has 8, counted from 0"):
        compress.decode(model, checkpoint, archive, "archive", 8)


def test_images_that_do_not_fit_are_refused(refused, gallery, tmp_path):
    ckpt, out = ("--ckpt", gallery / "ckpt.pt"), tmp_path / "out"
    bad = {"shape": images(3, (5, 6, 3)), "grey": images(3, (6, 5)),
           "float": np.zeros((3, 6, 5, 3)),
           "none": np.zeros((0, 6, 5, 3), np.uint8), "flat": np.zeros(90, np.uint8)}
    for name, pixels in bad.items():
        np.save(tmp_path / f"{name}.npy", pixels)
    (tmp_path / "cut.npy").write_bytes((gallery / "test.npy").read_bytes()[:300])
    (tmp_path / "void.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([Evil()]), allow_pickle=True)
    for name, match in (("shape", "the model codes (3, 6, 5)"), ("grey", "the model codes"),
                        ("float", "float64"), ("none", "is empty"), ("flat", "images are uint8"),
                        ("cut", "cannot be read"), ("void", "cannot be read"),
                        ("objects", "cannot be read")):
        refused(compress, "encode", *ckpt, tmp_path / f"{name}.npy", out, match=match)
        if name not in ("shape", "grey"):
            refused(train, "--data", tmp_path / f"{name}.npy", "--out", out, match=match)
    for branch in (0, 1, 257):
        refused(train, "--data", gallery / "a.npy", *SMALL_PICTURES, "--branch", branch,
                "--out", out, match=f"branching factor {branch}: choose 2 to K = 256")
    refused(train, "--data", gallery / "a.npy", "--bits", 9, "--out", out, match="--bits: choose")
    refused(train, "--data", gallery / "a.npy", "--turns", "--out", out, match="not square")
    np.save(tmp_path / "many.npy", images(30, (6, 5)))
    refused(train, "--evaluate", gallery / "ckpt.pt", "--data", tmp_path / "many.npy",
            match="the checkpoint was")
    refused(sample, *ckpt, "--prompt", "a_", "--out", out, match="--prompt is for text")
    for rule in ("bottom", "random:", "random:2", "random:x"):
        refused(sample, *ckpt, "--inpaint", rule, "--out", out, match="choose top, left or random")


def test_train_refuses_bad_input(refused, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("too short " * 20)
    out = ("--out", tmp_path / "out")
    refused(train, "--data", "tex8", *out,
            match="no such file, and none of the names pydoc, text8, enwik8")
    refused(train, "--data", tmp_path / "empty", *out, match="is empty")
    refused(train, "--data", tmp_path / "short", *out,
            match="200 characters are too few for chunks of 64")
    refused(train, "--size", "huge", *out, match="choose tiny, small, paper")
    refused(train, "--steps", 0, *out, match="--steps or --minutes must be positive")
    refused(train, "--heads", 0, *out, match="must be positive")
    refused(train, "--lr", -1, *out, match="--lr, --muon-lr and --clip must be positive")
    refused(train, "--seed", 1 << 70, *out, match="--seed must be")
    refused(train, *QUICK, "--out", tmp_path / "empty", match="File exists")
    refused(train, "--dim", 30, "--heads", 4, *out, match="multiple of")
    refused(train, "--device", "abacus", *out, match="--device abacus")
    refused(train, "--resume", *out, match="no such checkpoint")
    refused(train, "--stepz", 3, *out, match="unrecognized arguments")
    refused(train, "--steps", "many", *out, match="invalid int value")


def test_resume_and_evaluate_refuse_what_does_not_fit(refused, folder, tmp_path):
    evaluate = ("--evaluate", folder / "ckpt.pt")
    refused(train, *evaluate, "--length", 32, match="leave out --length")
    refused(train, *evaluate, "--passes", -1, match="--passes must be at least 1")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 10)
    other = "K = 256 and shape (24,), the checkpoint was"
    refused(train, *evaluate, "--data", tmp_path / "bytes", match=other)
    resume = ("--resume", "--out", folder)
    refused(train, *resume, "--dim", 64, match="cannot be resumed with another")
    refused(train, *resume, "--report", 0, match="must be positive")
    changed = train.read_checkpoint(folder / "ckpt.pt")
    changed["settings"] = vars(changed["settings"]) | dict(data=str(tmp_path / "bytes"))
    torch.save(changed, tmp_path / "ckpt.pt")
    refused(train, "--resume", "--out", tmp_path, match=other)
    refused(compress, "bench", "--ckpt", tmp_path / "ckpt.pt", match=other)


def test_foreign_and_damaged_checkpoints_are_refused(refused, folder, tmp_path):
    good = (folder / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save(Path, tmp_path / "code.pt")
    (tmp_path / "in").write_text("text")
    for name in ("cut.pt", "text.pt", "other.pt", "code.pt"):
        refused(train, "--evaluate", tmp_path / name, match="is no checkpoint")
        refused(sample, "--ckpt", tmp_path / name, "--out", tmp_path / "out",
                match="is no checkpoint")
        refused(compress, "encode", "--ckpt", tmp_path / name, tmp_path / "in", tmp_path / "out",
                match="is no checkpoint")
    refused(sample, "--ckpt", tmp_path / "none.pt", match="no such checkpoint")


@pytest.mark.parametrize("K, b", [(16, 4), (27, 2), (32, 2), (256, 4)])
def test_what_is_blank_is_a_value_that_every_model_has(K, b):
    x, known, absent = sample.read_prompt("_" * 6, UpscaleARDM(None, 6, K, b))
    assert not x.any() and not known.any() and not absent.any()


def test_sample_refuses_bad_input(refused, folder, tmp_path):
    ckpt = ("--ckpt", folder / "ckpt.pt", "--out", tmp_path / "out")
    refused(sample, *ckpt, "--calls", 0, match="--calls 0: choose 1 to 24")
    refused(sample, *ckpt, "--calls", 25, match="--calls 25: choose 1 to 24")
    refused(sample, *ckpt, "--prompt", "the ____ of", "--calls", 5, match="choose 1 to 4")
    refused(sample, *ckpt, "--prompt", "The ____", match="'T' at position 0")
    refused(sample, *ckpt, "--prompt", "_" * 25, match="25 characters, the model takes 24")
    refused(sample, *ckpt, "--prompt", "nothing to do", match="no blank")
    refused(sample, *ckpt, "--order", "sideways", match="choose forward, backward")
    refused(sample, *ckpt, "--n", 0, match="--n must be")
    for temperature in (0, 1e-40, math.inf, math.nan):
        refused(sample, *ckpt, "--temperature", temperature, match="--temperature 1e-6 to 1e6")
    refused(sample, *ckpt, "--device", "meta", match="choose cuda, mps or cpu")


def test_compress_refuses_bad_input(refused, folder, tmp_path):
    ckpt = ("--ckpt", folder / "ckpt.pt")
    (tmp_path / "in").write_text("Hello")
    (tmp_path / "foreign").write_bytes(os.urandom(300))
    out = tmp_path / "out"
    refused(compress, "encode", *ckpt, tmp_path / "in", out, match="'H' at position 0")
    refused(compress, "encode", *ckpt, tmp_path / "none", out, match="cannot be read")
    refused(compress, "encode", *ckpt, "--calls", 0, tmp_path / "in", out,
            match="--calls 0: choose 1 to 24")
    refused(compress, "encode", *ckpt, "--calls", 99, tmp_path / "in", out,
            match="--calls 99: choose 1 to 24")
    refused(compress, "encode", *ckpt, "--order", "up", tmp_path / "in", out,
            match="choose forward, backward")
    refused(compress, "encode", *ckpt, tmp_path / "in", tmp_path / "in", match="the same file")
    refused(compress, "encode", *ckpt, tmp_path / "in", tmp_path, match="is a folder")
    refused(compress, "encode", *ckpt, "--batch", 0, tmp_path / "in", out, match="choose 1 or more")
    refused(compress, "encode", *ckpt, "--block", 0, tmp_path / "in", out, match="choose 1 to")
    refused(compress, "encode", *ckpt, "--fast", "--batch", 10 ** 6, tmp_path / "in", out,
            match="with --fast up to")
    (tmp_path / "new.part").write_bytes(b"some text")
    refused(compress, "encode", *ckpt, tmp_path / "new.part", tmp_path / "new", match="rename IN")
    refused(compress, "encode", *ckpt, f"{tmp_path}/../{tmp_path.name}/new.part", tmp_path / "new",
            match="rename IN")
    assert (tmp_path / "new.part").read_bytes() == b"some text"
    (tmp_path / "my.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    refused(compress, "encode", "--ckpt", tmp_path / "my.pt", tmp_path / "new.part",
            tmp_path / "my.pt", match="--ckpt and OUT are the same file")
    assert (tmp_path / "my.pt").read_bytes() == (folder / "ckpt.pt").read_bytes()
    refused(compress, "decode", *ckpt, tmp_path / "foreign", out, match="is no archive")
    refused(compress, match="required")
    model, checkpoint = train.load_model(folder / "ckpt.pt", "cpu")
    archive, _ = compress.encode(model, content(b"some text"), "forward", planner.full_plan(1, 24))
    (tmp_path / "cut").write_bytes(archive[:-1])
    refused(compress, "decode", *ckpt, tmp_path / "cut", out, match="cut off")
    other = train.read_checkpoint(folder / "ckpt.pt")
    other["ema"]["net.head.bias"] += 1
    other["settings"] = vars(other["settings"])
    torch.save(other, tmp_path / "other.pt")
    (tmp_path / "archive").write_bytes(archive)
    refused(compress, "decode", "--ckpt", tmp_path / "other.pt", tmp_path / "archive", out,
            match="another checkpoint")


def test_devices_are_no_files_to_write():
    with pytest.raises(UserError, match="cannot write"), train.replacing(os.devnull):
        pass
    assert not Path(os.devnull).is_file()


def test_grey_images_are_read_as_they_are_used(tmp_path):
    np.save(tmp_path / "grey.npy", images(4, (6, 5)))
    source = compress.open_images(tmp_path / "grey.npy", 256, (1, 6, 5))
    with warnings.catch_warnings(action="error"):
        part = source.read(30, 90)
    assert np.array_equal(part.numpy().reshape(2, 6, 5), images(4, (6, 5))[1:3])


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="No space left"):
        with train.replacing(tmp_path / "file"):
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit for files")
def test_a_checkpoint_that_has_no_room_leaves_the_old_one(folder, tmp_path):
    code = (f"import resource, sys, signal, train; run = train.Run(train.complete(dict(steps=1, "
            f"device='cpu')), 27, 'text', (64,)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
            f"train.command_line(lambda: run.save({str(tmp_path / 'ckpt.pt')!r}))")
    (tmp_path / "ckpt.pt").write_text("old")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 2 and "too large" in done.stderr and done.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_text() == "old"


def test_every_script_explains_itself():
    for script in ("train.py", "sample.py", "compress.py"):
        done = run(script, "--help")
        assert done.returncode == 0 and "--help" in done.stdout
    assert run("sample.py").returncode == 2
    fields = {field.name: field for field in train.dataclasses.fields(train.Settings)}
    assert train.default_words(fields["muon_lr"]) == "0.02; text: tiny 0.03; image: tiny 0.03"
    assert train.default_words(fields["mlp"]) == "text: tiny 512, small 2048, paper 3072"
    assert train.default_words(fields["seed"]) == "0" and not train.default_words(fields["out"])


def test_readme_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\| .*? \| (`.*?`) \| (`.*?`) \|$", README.read_text("utf-8"), re.M)
    functions, tests = (re.findall(r"`([\w.]+)`", " ".join(column)) for column in zip(*rows))
    assert len(functions) > 8 and len(tests) > 8
    for name in functions:
        if "." in name.strip("."):                                     # module.function
            module, *path = name.split(".")
            thing = __import__(module)
            for part in path:
                thing = getattr(thing, part)
    assert all(name in globals() for name in tests)


def test_readme_shows_the_figures_that_were_measured():
    readme, kept = README.read_text("utf-8"), (HERE / "assets" / "bench.json").read_text()
    assert bench.fill(readme, json.loads(kept)) == readme and "| the recipe |" in readme


def test_tables_leave_out_what_was_not_measured():
    rows = [dict(name="one", bits=1.23456), dict(name="two", bits=2.0)]
    columns = {"": "{name}", "bits": "{bits:.2f}", "GPU": "{share:.0%}"}
    lines = ["|  | bits |", "| --- | --- |", "| one | 1.23 |", "| two | 2.00 |"]
    assert bench.markdown(rows, columns).splitlines() == lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_and_coding_on_cuda(tmp_path):
    done = run("train.py", "--steps", 20, "--report", 10, "--size", "tiny", "--out", tmp_path)
    assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr
    model, checkpoint = train.load_model(tmp_path / "ckpt.pt", "cuda")
    text = (tmp_path / "test.txt").read_bytes()[:1000]
    archive, _ = compress.encode(model, content(text), "forward", planner.full_plan(1, 64))
    assert decoded(model, checkpoint, archive, "archive") == text
    there, _ = train.load_model(tmp_path / "ckpt.pt", "cpu")           # and across devices
    assert decoded(there, checkpoint, archive, "archive") == text
    archive, _ = compress.encode(there, content(text), "forward", planner.full_plan(1, 64))
    assert decoded(model, checkpoint, archive, "archive") == text
