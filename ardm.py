"""Autoregressive diffusion models: Algorithms 1 to 4 of Hoogeboom et al. (ICLR 2022, 2110.02037).

An ARDM generates the D variables of x in any order sigma. One network sees what is known so far
and predicts all the rest at once. Training asks it about one random step of one random order.

Symbols, as in the paper (all counted from 1):

    B, D, K        datapoints in a batch, variables in a datapoint, values of a variable
    x              (B, D) integers 0..K-1, flat; only the network and the data know a shape
    sigma          (B, D) each row a permutation of 1..D; sigma[:, i] is the step at which variable
                   i is generated (the inverse of the paper's sigma(t)); 0: known beforehand
    t              (B,) step 1..D: t - 1 variables are known, D - t + 1 are not
    m = sigma < t  (B, D) True where x is known
    s, S           stage 1..S of S (order-agnostic model: S = 1)
    x^(s)          x with its s most significant base-b digits: x^(0) is constant, x^(S) = x
    a, A           the symbol of a stage, 0..A-1 (order-agnostic model: the value itself, A = K;
                   upscale model: a digit, A = b). The paper's a, the absorbing state, is each
                   network's own affair
    L_t            loss component of step t: what a variable costs that is predicted at step t
    plan           [(s, t, k), ...]: in stage s the network sees the variables with sigma < t, and
                   the k variables with t <= sigma < t + k are generated together. One entry is one
                   network call (Sec. 3.1)

Losses and likelihoods are in nats per datapoint. This file never builds a network: any function
net(x, m, t, s) -> (B, D, outputs) of logits will do.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import planner


def bits_per_dim(nats, D):
    """Nats per datapoint of D variables -> bits per variable: the one place where units change."""
    return nats / (D * math.log(2))


def num_stages(K, b):
    """S = ceil(log_b K) (Sec. 3.2), in integers: in floats log_5 125 is a little above 3."""
    if not 2 <= b <= K:
        raise ValueError(f"branching factor {b}: choose 2 to K = {K}")
    S = 1
    while b ** S < K:
        S += 1
    return S


def sample_sigma(B, D, device=None, generator=None):
    """sigma ~ U(S_D), a fresh order for each row: (B, D), rows are permutations of 1..D."""
    # Sorting D independent uniform numbers gives a uniform permutation.
    return torch.rand(B, D, device=device, generator=generator).argsort(dim=1) + 1


def known_first(sigma, known):
    """sigma with what is known (bool, (B, D)) at 0; the others keep their order, behind it.

    n known variables leave the steps n + 1..D, so that t - 1 is still the number of known ones.
    """
    rank = torch.where(known, 0, sigma).argsort(dim=-1, stable=True).argsort(dim=-1) + 1
    return torch.where(known, 0, rank)


def stratified_steps(B, S, D, device=None, generator=None):
    """t ~ U(1..D) and s ~ U(1..S), (B,) each; the pairs of a batch are spread evenly.

    Each row by itself is uniform, so the loss stays unbiased; most of the noise of t is gone.
    """
    u = torch.rand(1, device=device, generator=generator)
    i = torch.rand(B, device=device, generator=generator).argsort()      # 0..B-1, shuffled
    step = (S * D * ((u + i / B) % 1)).long()
    step = step.clamp(max=S * D - 1)                       # rounding may reach S * D
    return step % D + 1, step // D + 1


class ARDM(nn.Module):
    """Order-agnostic ARDM (Sec. 3): one stage, in which each variable takes its value.

    net(x, m, t, s) -> (B, D, K) logits; x (B, D) int64, m (B, D) bool, t and s (B,) int64.
    D is the largest number of variables; where the network allows it, x may be shorter.
    """

    def __init__(self, net, D, K):
        super().__init__()
        self.net = net
        self.D = D
        self.K = K
        self.S = 1
        self.A = K

    # -- What a stage does: the s-th of S digits in base A. Here there is one, the value itself. ---

    def unit(self, s):
        """The place value of digit s, A^(S-s), for s an int or (B,)."""
        s = s[:, None] if torch.is_tensor(s) else s
        return self.A ** (self.S - s)

    def coarsen(self, x, s):
        """x^(s), (B, D): the digits after the s-th are zero (Sec. 3.2)."""
        return x // self.unit(s) * self.unit(s)

    def symbol(self, x, s):
        """What stage s generates, (B, D) in 0..A-1: the s-th digit of x."""
        return x // self.unit(s) % self.A

    def refine(self, x, a, s):
        """x^(s) from x^(s-1) and the symbols a (B, D): the inverse of `symbol`."""
        return self.coarsen(x, s - 1) + a * self.unit(s)

    def net_input(self, x, m, s):
        """m * x^(s) + (1 - m) * x^(s-1): nothing finer, so that full data x cannot leak.

        With one stage what is unknown is 0 here, and the network puts its absorbing state there.
        """
        return torch.where(m, self.coarsen(x, s), self.coarsen(x, s - 1))

    def logits(self, x, m, t, s, outputs):
        """The network's (B, D, outputs), in float32 or better: bfloat16 would not sum to 1."""
        logits = self.net(x, m, t, s)
        assert logits.shape == (*x.shape, outputs), f"net gave {tuple(logits.shape)}, not {outputs}"
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_probs(self, x, m, t, s):
        """log p of every symbol at step t of stage s: (B, D, A) nats, normalised over A."""
        x = self.net_input(x, m, s)
        return self.logits(x, m, t, s, self.K).log_softmax(dim=-1)

    # -- The algorithms ----------------------------------------------------------------------------

    def loss(self, x, t=None, s=None, sigma=None, generator=None):
        """Algorithm 2 (Algorithm 4 with stages): an unbiased estimate of Eq. 2, (B,) nats.

        x: (B, D). What is not given is drawn. loss / (S * D) is a sample of L_t.
        """
        B, D = x.shape
        drawn_t, drawn_s = stratified_steps(B, self.S, D, x.device, generator)
        t = drawn_t if t is None else t                    # t ~ U(1, ..., D)
        s = drawn_s if s is None else s                    # s ~ U(1, ..., S)
        if sigma is None:
            sigma = sample_sigma(B, D, x.device, generator)              # sigma ~ U(S_D)
        m = sigma < t[:, None]                             # (B, D) True where x is known
        log_p = self.log_probs(x, m, t, s)                 # (B, D, A) all variables at once
        log_p = pick(log_p, self.symbol(x, s))             # (B, D) of the true symbols
        log_p = torch.where(m, 0, log_p)                   # no product: -inf * 0 is NaN
        calL_t = log_p.sum(dim=1) / (D - t + 1)            # (B,) mean over the unknown variables
        return -self.S * D * calL_t

    @torch.no_grad()
    def generate(self, x, plan, sigma, choose):
        """Algorithm 1 (Algorithm 3 with stages) for any plan: one network call per entry.

        x: (B, D); what the plan does not generate must be in it, the rest is not read.
        sigma: (B, D), or (S, B, D) for an order per stage. A plan is cut to what is unknown.
        choose(log_p, where, s) -> (n,) gives the symbols of the n variables in `where` (B, D) from
        log_p (n, A): it draws them, reads them from data, or takes them from a decoder.
        Rows that know more beforehand wait for the others, and are told the others' t.
        """
        B, D = x.shape
        sigma = sigma.expand(self.S, B, D)
        n_known = int((sigma == 0).sum(dim=-1).min())
        for s, t, k in planner.cut(plan, n_known + 1, D):
            m = sigma[s - 1] < t                           # (B, D) known
            where = ~m & (sigma[s - 1] < t + k)            # (B, D) generated by this call
            ones = torch.ones(B, dtype=torch.long, device=x.device)
            log_p = self.log_probs(x, m, t * ones, s * ones)[where]      # (n, A)
            a = torch.zeros_like(x)
            a[where] = choose(log_p, where, s)             # (n,)
            x = torch.where(where, self.refine(x, a, s), x)
        return x

    def sample(self, B, plan=None, sigma=None, x=None, known=None, generator=None,
               temperature=1.0):
        """Algorithm 1: draws (B, D) datapoints; one variable per call where no plan is given.

        x, known: (B, D) values and a bool mask of those that stay as they are (infilling).
        temperature: draws from p^(1/temperature), renormalised; 0 takes the most probable symbol.
        """
        if x is None:
            device = next(self.parameters()).device
            x = torch.zeros(B, self.D, dtype=torch.long, device=device)
        plan, sigma = self.defaults(x, plan, sigma, generator)
        if known is not None:
            sigma = known_first(sigma, known)

        def draw(log_p, where, s):
            if temperature < 1e-6:
                return log_p.argmax(dim=-1)
            p = torch.softmax(log_p / temperature, dim=-1)
            return torch.multinomial(p, 1, generator=generator)[:, 0]

        return self.generate(x, plan, sigma, draw)

    def nll(self, x, plan=None, sigma=None, generator=None):
        """-log p(x | sigma), (B,) nats: exact for the process that the plan describes.

        Variables generated by one call are independent given what is known before it. Where
        sigma = 0 x is given: the result is conditional on it.
        """
        plan, sigma = self.defaults(x, plan, sigma, generator)
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        nats = torch.zeros(len(x), dtype=exact, device=x.device)

        def read(log_p, where, s):
            a = self.symbol(x, s)[where]
            row = where.nonzero()[:, 0]
            nats.index_add_(0, row, -pick(log_p, a).to(exact))
            return a

        self.generate(x, plan, sigma, read)
        return nats

    def defaults(self, x, plan, sigma, generator):
        """The plan of Algorithm 1 and an order for every stage, where they are not given."""
        B, D = x.shape
        if plan is None:
            plan = planner.full_plan(self.S, D)
        if sigma is None:
            sigma = sample_sigma(self.S * B, D, x.device, generator).view(self.S, B, D)
        return plan, sigma


class UpscaleARDM(ARDM):
    """Upscale ARDM (Sec. 3.2, App. A.1): S stages, each generates a base-b digit, highest first.

    net: "data": (B, D, K) logits of the values, summed up to those of a digit;
    "direct": (B, D, S * b) logits of the digits, those of stage s at [(s-1)b, sb).
    """

    def __init__(self, net, D, K, b, parametrization="data"):
        super().__init__(net, D, K)
        if parametrization not in ("data", "direct"):
            raise ValueError(f"parametrization {parametrization!r}: choose data or direct")
        self.S = num_stages(K, b)
        self.A = b
        self.parametrization = parametrization

    def log_probs(self, x, m, t, s):
        """log p of every digit of stage s: (B, D, b) nats, normalised over b."""
        x = self.net_input(x, m, s)
        if self.parametrization == "data":
            digits = self.sum_values(self.logits(x, m, t, s, self.K), x, s)
        else:
            logits = self.logits(x, m, t, s, self.S * self.A)
            digits = logits.unflatten(-1, (self.S, self.A))              # (B, D, S, b)
            digits = gather_row(digits, (s[:, None] - 1).expand(x.shape))
        a = torch.arange(self.A, device=x.device)
        value = self.coarsen(x, s - 1)[..., None] + a * self.unit(s)[..., None]
        return digits.masked_fill(value >= self.K, -torch.inf).log_softmax(dim=-1)

    def sum_values(self, logits, x, s):
        """Data parametrisation: logits of values (B, D, K) -> of the digits of stage s (B, D, b).

        From the last stage to the first: the values that share x^(s-1) are a row of b; stage s
        picks the row that x is in, and the sum over each row is what the stage before it sees.
        """
        none = -1e30                                       # not -inf, whose gradient is NaN
        logits = F.pad(logits, (0, self.A ** self.S - self.K), value=none)
        digits = 0.0
        for stage in range(self.S, 0, -1):
            rows = logits.unflatten(-1, (-1, self.A))      # (B, D, values of x^(stage-1), b)
            row = gather_row(rows, x // self.unit(stage - 1))
            digits = torch.where(s[:, None, None] == stage, row, digits)
            logits = rows.logsumexp(dim=-1)
        return digits


def pick(log_p, a):
    """log_p (..., A), a (...) -> (...): the log-probability of each given symbol."""
    return log_p.gather(-1, a[..., None])[..., 0]


def gather_row(rows, i):
    """rows (B, D, n, b), i (B, D) in 0..n-1 -> (B, D, b): one row for each variable."""
    i = i[..., None, None].expand(*i.shape, 1, rows.shape[-1])
    return rows.gather(2, i)[:, :, 0]
