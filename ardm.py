"""Autoregressive diffusion models: Algorithms 1 to 4 of Hoogeboom et al. (ICLR 2022, 2110.02037).

An ARDM generates the D variables of a datapoint in any order sigma. One network sees the variables
that are known so far, and predicts all the others at once. A training step draws one order and one
step of it, and asks the network to predict what is unknown at that step.

The symbols are the paper's. Steps and stages count from 1, values count from 0.

    B, D, K        datapoints in a batch, variables in a datapoint, values of a variable
    x              (B, D) integers 0..K-1. This file never needs the shape of an image
    sigma          (B, D) each row a permutation of 1..D: sigma[:, i] is the step of variable i (the
                   inverse of the paper's sigma(t)). If n variables are known: n zeros, n + 1..D
    t              (B,) the step, 1..D: t - 1 variables are known, D - t + 1 are not
    m = sigma < t  (B, D) the mask: True where x is known
    s, S           the stage, 1..S, and the number of stages (order-agnostic model: S = 1)
    x^(s)          x with its s most significant base-b digits: x^(0) is constant, x^(S) = x
    a, A           the symbol that a stage generates, 0..A-1: the value itself (A = K), or a digit
                   of it (A = b). The paper's absorbing state a is in nets.py: `absorbed`
    L_t            loss component of step t: the cost of a variable that is predicted at step t
    plan           [(s, t, k), ...], one entry for each network call: in stage s the network sees
                   x^(s) of the variables with sigma < t, and x^(s-1) of the others. It generates
                   the k variables with t <= sigma < t + k together (Sec. 3.1)

Losses and likelihoods are in nats per datapoint here; train.py measures L_t in bits. For an
order-agnostic model any net(x, m, t, s) -> (B, D, K) logits will do.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import planner


def sample_sigma(B, D, device=None, generator=None):
    """sigma ~ U(S_D), a fresh order for each row: (B, D), rows are permutations of 1..D."""
    # Sorting D independent uniform numbers gives a uniform permutation.
    return torch.rand(B, D, device=device, generator=generator).argsort(dim=1) + 1


def draw(log_p, temperature=1.0, generator=None):
    """Draws (n,) symbols from p^(1/temperature), renormalised; log_p is (n, A)."""
    if temperature < 1e-6:
        return log_p.argmax(dim=-1)
    p = torch.softmax(log_p / temperature, dim=-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


class ARDM(nn.Module):
    """The order-agnostic ARDM (Sec. 3). It has one stage, in which each variable takes its value.

    net(x, m, t, s) -> (B, D, K) logits, with x (B, D) int64, m (B, D) bool, t and s (B,) int64.
    D is the largest number of variables. If the network allows it, x may be shorter."""

    def __init__(self, net, D, K):
        super().__init__()
        self.net, self.D, self.K = net, D, K
        self.S, self.A = 1, K
        self.outputs = getattr(net, "num_outputs", None) or K            # numbers for a variable

    def loss(self, x, t=None, s=None, sigma=None, generator=None):
        """Algorithm 2 (with stages Algorithm 4): an unbiased estimate of Eq. 2, (B,) nats.

        -log p(x) <= E_t[D * L_t], where L_t = E_sigma[mean over the unknown of -log p(x_i | m * x)]
        x: (B, D). t, s (B,) and sigma (B, D) are drawn if they are not given."""
        B, D = x.shape
        drawn_t, drawn_s = stratified_steps(B, self.S, D, x.device, generator)
        t = drawn_t if t is None else t                    # t ~ U(1, ..., D)
        s = drawn_s if s is None else s                    # s ~ U(1, ..., S)
        if sigma is None:
            sigma = sample_sigma(B, D, x.device, generator)              # sigma ~ U(S_D)
        m = sigma < t[:, None]                             # (B, D) True where x is known
        log_p = self.true_log_p(x, m, t, s)                # (B, D) log p(x_i | m * x), all at once
        log_p = torch.where(m, 0, log_p)                   # no product: -inf * 0 is NaN
        calL_t = log_p.sum(dim=1) / (D - t + 1)            # (B,) mean over what is unknown
        return -self.S * D * calL_t

    def net_input(self, x, m, s):
        """What the network is shown, (B, D): m * x. Unknown values cannot leak."""
        return m * x

    def logits(self, x, m, t, s):
        """The network's answer to m * x: (B, D, outputs), in float32 or better."""
        logits = self.net(self.net_input(x, m, s), m, t, s)
        wanted = (*x.shape, self.outputs)
        assert logits.shape == wanted, f"net gave {tuple(logits.shape)}, {wanted} is wanted"
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_probs(self, x, m, t, s, where=None):
        """log p of every symbol, normalised over A: (B, D, A) nats, or (n, A) of those in where."""
        logits = self.logits(x, m, t, s)
        return (logits if where is None else logits[where]).log_softmax(dim=-1)

    def true_log_p(self, x, m, t, s):
        """log p of the symbols that x has, (B, D) nats."""
        return pick(self.log_probs(x, m, t, s), self.symbol(x, s))

    @torch.no_grad()
    def generate(self, x, plan, sigma, choose):
        """Algorithm 1 (with stages Algorithm 3) under any plan: one network call for each entry.

        x: (B, D). It must hold what the plan does not generate. Nothing else in x is read.
        sigma: (B, D), or (S, B, D) for an order per stage. Where it is 0, x is known.
        choose(log_p, where, s) -> (n,): symbols of the n variables in `where` (B, D), drawn from
        log_p (n, A), or read from data or a decoder. A plan lists its stages in order. The loop
        starts at the first call that any row needs. Rows that know more join later."""
        B, D = x.shape
        sigma = sigma.expand(self.S, B, D)
        n_known = fewest_known(sigma)
        ones = torch.ones(B, dtype=torch.long, device=x.device)
        for s, t, k in planner.cut(plan, n_known + 1, D):                # for t = 1, .., D
            m = sigma[s - 1] < t                           # (B, D) known
            where = ~m & (sigma[s - 1] < t + k)            # (B, D) generated by this call
            log_p = self.log_probs(x, m, t * ones, s * ones, where)      # (n, A)
            a = torch.zeros_like(x)
            a[where] = choose(log_p, where, s)             # (n,) a sampler draws x_sigma(t)
            x = torch.where(where, self.refine(x, a, s), x)
        return x

    def sample(self, B, plan=None, sigma=None, x=None, known=None, generator=None,
               temperature=1.0):
        """Draws (B, D) datapoints. Without a plan: one variable per call, as in Algorithm 1.

        x, known: (B, D) values, and a bool mask of those that stay (infilling); no others are read.
        temperature: draws from p^(1/temperature), renormalised. 0 takes the likeliest symbol.
        ValueError for a plan that leaves something out, and for known values outside 0..K-1."""
        if x is None:
            x = torch.zeros(B, self.D, dtype=torch.long, device=next(self.parameters()).device)
        x = torch.zeros_like(x) if known is None else known * x
        plan, sigma = self.complete(x, plan, sigma, generator, known)

        def choose(log_p, where, s):
            return draw(log_p, temperature, generator)

        return self.generate(x, plan, sigma, choose)

    def symbol(self, x, s):
        """The symbol of stage s, (B, D) in 0..A-1: the value itself."""
        return x

    def refine(self, x, a, s):
        """x^(s) from x^(s-1) and the symbols a (B, D) of stage s: the inverse of `symbol`."""
        return a

    def nll(self, x, plan=None, sigma=None, generator=None):
        """-log p(x | sigma), (B,) nats: exact for the process that the plan describes.

        Variables of one call are independent, given what is known before it. Where sigma = 0, x is
        given, and the result is conditional on it. ValueError as in `sample`."""
        plan, sigma = self.complete(x, plan, sigma, generator)
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        nats = torch.zeros(len(x), dtype=exact, device=x.device)

        def read(log_p, where, s):
            a = self.symbol(x, s)[where]
            row = where.nonzero()[:, 0]
            nats.index_add_(0, row, -pick(log_p, a).to(exact))
            return a

        self.generate(x, plan, sigma, read)
        return nats

    def complete(self, x, plan, sigma, generator, known=None):
        """plan and sigma, checked. Without them: one variable per call, an order for each stage."""
        B, D = x.shape
        if x.numel() and not 0 <= x.min() <= x.max() < self.K:
            raise ValueError(f"x has values {x.min()} to {x.max()}, they must be 0 to {self.K - 1}")
        plan = planner.full_plan(self.S, D) if plan is None else list(plan)
        if sigma is None:
            sigma = sample_sigma(self.S * B, D, x.device, generator).view(self.S, B, D)
        if known is not None:
            sigma = known_first(sigma, known)
        if not torch.equal(known_first(sigma, sigma == 0), sigma):       # a valid one is unchanged
            raise ValueError("each row of sigma must hold n zeros, and the steps n + 1..D once")
        planner.check(plan, self.S, fewest_known(sigma) + 1, D)
        return plan, sigma

    def coarsen(self, x, s):
        """x^(s), (B, D), s an int or (B,): x for s = 1, zeros for s = 0."""
        return x * ((s[:, None] if torch.is_tensor(s) else s) > 0)


class UpscaleARDM(ARDM):
    """The upscale ARDM (Sec. 3.2): S stages. Each generates one base-b digit, the highest first.
    `generate` and `loss` with these digits are Algorithms 3 and 4. With "data" the network gives
    (B, D, K) logits of values, and `sum_values` turns them into those of digits (App. A.1). With
    "direct" it gives (B, D, S * b) logits of digits: stage s owns [(s-1)b, sb)."""

    def __init__(self, net, D, K, b, parametrization="data"):
        super().__init__(net, D, K)
        if parametrization not in ("data", "direct"):
            raise ValueError(f"parametrization {parametrization!r}: choose data or direct")
        self.S, self.A = num_stages(K, b), b
        self.parametrization = parametrization
        self.outputs = getattr(net, "num_outputs", None) or (
            K if parametrization == "data" else self.S * b)

    def unit(self, s):
        """The place value of the s-th of S digits, b^(S-s); s is an int or (B,)."""
        return self.A ** (self.S - (s[:, None] if torch.is_tensor(s) else s))

    def coarsen(self, x, s):
        """x^(s), (B, D): the digits after the s-th are zero."""
        return x // self.unit(s) * self.unit(s)

    def net_input(self, x, m, s):
        """m * x^(s) + (1 - m) * x^(s-1), (B, D): finer digits cannot leak."""
        return torch.where(m, self.coarsen(x, s), self.coarsen(x, s - 1))

    def symbol(self, x, s):
        """The s-th digit of x, (B, D) in 0..b-1."""
        return x // self.unit(s) % self.A

    def refine(self, x, a, s):
        """x^(s) from x^(s-1) and the digits a (B, D)."""
        return self.coarsen(x, s - 1) + a * self.unit(s)

    def log_probs(self, x, m, t, s, where=None):
        """log p of every digit of stage s, in nats: (B, D, b), or (n, b) of the n in `where`."""
        logits = self.logits(x, m, t, s)
        if where is None:
            return self.digits(logits, x, s)
        s = s[where.nonzero()[:, 0]]                       # each of the n becomes a row with D = 1
        return self.digits(logits[where][:, None], x[where][:, None], s)[:, 0]

    def digits(self, logits, x, s):
        """log p of the digits of stage s (B, D, b), from what net gives (B, D, outputs)."""
        if self.parametrization == "data":
            logits = self.sum_values(logits, x, s)
        else:
            stage = (s[:, None] - 1).expand(x.shape)
            logits = pick_row(logits.unflatten(-1, (self.S, self.A)), stage)
        unit = self.unit(s)[..., None]
        low = self.coarsen(x, s - 1)[..., None] + unit * torch.arange(self.A, device=x.device)
        return logits.masked_fill(low >= self.K, -torch.inf).log_softmax(dim=-1)

    def sum_values(self, logits, x, s):
        """App. A.1: logits of the values (B, D, K) -> of the digits of stage s (B, D, b).

        The values that share x^(s) add up their p. The loop goes from the last stage to the first.
        At stage s it reads the b sums below x^(s-1). Then it adds up each group of b sums.
        Example: K = 4, b = 2, p = (0.1, 0.2, 0.3, 0.4). Stage 1 gives log 0.3 and log 0.7. Stage 2
        gives log 0.3 and log 0.4 where x^(1) = 2."""
        none = -1e30                                       # not -inf, whose gradient is NaN
        logits = F.pad(logits, (0, self.A ** self.S - self.K), value=none)
        digits = 0.0
        for stage in range(self.S, 0, -1):
            branches = logits.unflatten(-1, (-1, self.A))  # (B, D, values of x^(stage-1), b)
            at_x = pick_row(branches, x // self.unit(stage - 1))
            digits = torch.where(s[:, None, None] == stage, at_x, digits)
            logits = branches.logsumexp(dim=-1)
        return digits


# -- Skip on a first reading: steps, known variables, small helpers --------------------------------

def stratified_steps(B, S, D, device=None, generator=None):
    """t ~ U(1..D) and s ~ U(1..S), (B,) each. Each row alone is uniform, so the loss stays
    unbiased. The rows of a batch are spread evenly, so most of the noise of t is gone."""
    u = torch.rand(1, device=device, generator=generator)
    i = torch.rand(B, device=device, generator=generator).argsort()      # 0..B-1, shuffled
    step = (S * D * ((u + i / B) % 1)).long()
    step = step.clamp(max=S * D - 1)                       # rounding may reach S * D
    return step % D + 1, step // D + 1


def known_first(sigma, known):
    """sigma ((B, D) or (S, B, D)) with the n known variables (bool, (B, D)) at step 0. The others
    keep their order, at n + 1..D. So at step t still t - 1 are known."""
    rank = torch.where(known, 0, sigma).argsort(dim=-1, stable=True).argsort(dim=-1) + 1
    return torch.where(known, 0, rank)


def fewest_known(sigma):
    """The number of known variables in the row that knows least. An empty batch gives D."""
    return int((sigma == 0).sum(dim=-1).min()) if sigma.numel() else sigma.shape[-1]


def num_stages(K, b):
    """S = ceil(log_b K) (Sec. 3.2), in integers: in floats log_5 125 is a little above 3."""
    if not 2 <= b <= K:
        raise ValueError(f"branching factor {b}: choose 2 to K = {K}")
    S = 1
    while b ** S < K:
        S += 1
    return S


def bits_per_dim(nats, D):
    """Nats per datapoint of D variables -> bits per variable."""
    return nats / (D * math.log(2))


def pick(log_p, a):
    """log_p (..., A), a (...) -> (...): the log-probability of each given symbol."""
    return log_p.gather(-1, a[..., None])[..., 0]


def pick_row(rows, i):
    """rows (B, D, n, b), i (B, D) in 0..n-1 -> (B, D, b): one row for each variable."""
    return torch.take_along_dim(rows, i[..., None, None], dim=2)[:, :, 0]
