"""Autoregressive diffusion models: algorithms of Hoogeboom et al. (ICLR 2022, arXiv 2110.02037).

An ARDM writes the D variables of x in any order sigma. One network, shown the variables that are
known so far, predicts all the others at once; training asks it about one random step of one random
order (Algorithm 2), generation walks through the steps (Algorithm 1).

Symbols, as in the paper (everything is counted from 1):

    B, D, K        datapoints in a batch, variables in a datapoint, values a variable can take
    x              (B, D) integers 0..K-1, flat; only the network and the data know a shape
    sigma          (B, D) rows are permutations of 1..D; sigma[:, i] is the step that writes
                   variable i (0: known beforehand, D + 1: never written; see `rerank`)
    t              (B,)   step, 1..D.  t - 1 variables are known at step t, D - t + 1 are not
    m = sigma < t  (B, D) True where x is known
    s, S           stage 1..S, number of stages (order-agnostic model: S = 1)
    x^(s)          x at the end of stage s: x^(0) says nothing, x^(S) = x
    a, A           symbol that a stage writes, 0..A-1 (order-agnostic model: the value itself,
                   A = K). The paper's a, the absorbing state, is each network's own affair
    L_t            loss component of step t: what one variable costs that is predicted at step t,
                   in nats here, in bits where it is shown and kept
    plan           [(s, t, k), ...]: in stage s, show what sigma < t has written, write the
                   k variables with t <= sigma < t + k together. One entry is one network
                   call (Sec. 3.1)

Likelihoods and losses are in nats per datapoint; `bits_per_dim` converts. This file needs torch
alone and never builds a network: any net(x, m, t, s) -> (B, D, outputs) logits will do.
"""
import math

import torch
from torch import nn


def bits_per_dim(nats, D):
    """Nats per datapoint of D variables -> bits per variable. The one place where units change."""
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
    """sigma ~ U(S_D), one order a row: (B, D), each row a permutation of 1..D.

    The ranks of D independent uniform numbers are a uniform permutation.
    """
    return torch.rand(B, D, device=device, generator=generator).argsort(dim=1) + 1


def rerank(sigma, known=None, absent=None):
    """Takes variables out of the walk: sigma = 0 where `known`, D + 1 where `absent` ((B, D) bool).

    Known ones are written before the first step: every mask shows them, no plan can write them.
    Absent ones (what a short text lacks) come after the last step: never shown, never written.
    The others keep their order, right behind the known ones. So in-filling and short data need
    no code of their own.
    """
    D = sigma.shape[-1]
    sigma = sigma if known is None else torch.where(known, 0, sigma)
    sigma = sigma if absent is None else torch.where(absent, D + 1, sigma)
    rank = sigma.argsort(dim=-1, stable=True).argsort(dim=-1) + 1
    return torch.where((sigma == 0) | (sigma == D + 1), sigma, rank)


def strata(B, device=None, generator=None):
    """(B,) numbers in [0, 1), each uniform by itself, together evenly spread: (u + i/B) mod 1
    with one u ~ U(0, 1), i = 0..B-1 in shuffled order."""
    u = torch.rand(1, device=device, generator=generator)
    i = torch.rand(B, device=device, generator=generator).argsort()    # 0..B-1, shuffled
    return (u + i / B) % 1


def stratified_steps(B, S, D, device=None, generator=None):
    """(t, s), (B,) each: every pair uniform on {1..D} x {1..S}, evenly spread over the batch.

    Each datapoint alone sees a uniform step, so the bound stays unbiased, while a batch covers
    early and late steps alike: most of the noise that t brings is gone.
    """
    # clamped: rounding may reach S * D
    step = (S * D * strata(B, device, generator)).long().clamp(max=S * D - 1)
    return step % D + 1, step // D + 1


def late_steps(B, S, D, device=None, generator=None):
    """(t, s, weight), (B,) each: as `stratified_steps`, late steps drawn more often. For training.

    The loss at step t is D times a mean over the n = D - t + 1 unknown variables, so its noise
    falls as the root of n, and the gradient is least noisy where t is drawn in proportion to that
    noise: n = ceil(D v^2) with v ~ U(0, 1) has probability q(n) = sqrt(n/D) - sqrt((n-1)/D).
    Times the weight 1 / (D q(n)) the loss is unbiased as before.
    """
    part = S * strata(B, device, generator)                            # (B,) in [0, S)
    s = part.long().clamp(max=S - 1)
    n = (D * (part - s) ** 2).ceil().clamp(1, D)
    return D - n.long() + 1, s + 1, (n.sqrt() + (n - 1).sqrt()) / D ** 0.5


class ARDM(nn.Module):
    """Order-agnostic ARDM (Sec. 3): one stage, whose symbols are the values themselves.

    net: net(x, m, t, s) -> (B, D, K) logits, x (B, D) int64, m (B, D) bool, t and s (B,) int64.
    Data may be shorter than D where the network allows it (text: the last chunk of a file).
    """

    def __init__(self, net, D, K):
        super().__init__()
        self.net, self.D, self.K, self.S, self.A = net, D, K, 1, K

    # -- What a stage does. An upscale model overrides these four and nothing else. ----------------

    def coarse(self, x, s):
        """x^(s), (B, D): what is known of x at the end of stage s (int or (B,)); x^(0) is all 0."""
        s = torch.as_tensor(s, device=x.device).view(-1, 1)
        return torch.where(s > 0, x, 0)

    def symbol(self, x, s):
        """a, (B, D) in 0..A-1: what stage s writes, given full data x."""
        return x

    def write(self, x, a, s):
        """x^(s) from x^(s-1) and the symbols a of stage s: inverse of `symbol`."""
        return a

    def log_probs(self, x, m, t, s, where=None):
        """log p(a | what step t of stage s may see): (B, D, A) in nats, normalised over A.

        x: (B, D), full data or any state on the way to it; m: (B, D) bool; t, s: (B,).
        Full data cannot leak: the network is shown `state(x, m, s)`, nothing finer.
        where: (B, D) bool, only of these n variables, row by row: (n, A).
        """
        return log_softmax(self.logits(self.state(x, m, s), m, t, s, self.K, where))

    # -- What all of them share. -------------------------------------------------------------------

    def logits(self, x, m, t, s, outputs, where=None):
        """The network's (B, D, outputs), or (n, outputs) of the variables in `where` alone: a
        network with a method net.at(x, m, t, s, where) need not compute the others."""
        if where is None:
            logits = self.net(x, m, t, s)
        elif hasattr(self.net, "at"):
            logits = self.net.at(x, m, t, s, where)
        else:
            logits = self.net(x, m, t, s)[where]
        expected = (*(x if where is None else x[where]).shape, outputs)
        assert logits.shape == expected, f"net gave {tuple(logits.shape)}, not {expected}"
        return logits

    def state(self, x, m, s):
        """m * x^(s) + (1 - m) * x^(s-1), (B, D): x as it stands within stage s."""
        return torch.where(m, self.coarse(x, s), self.coarse(x, s - 1))

    def loss(self, x, t=None, s=None, sigma=None, generator=None):
        """Algorithm 2 (and 4): one-step estimate of the bound on -log p(x), in nats, (B,).

        Unbiased for Eq. 2 over t, s and sigma, which are drawn where they are not given. sigma:
        permutations of 1..D, nothing known beforehand or absent.
        loss / (S * D) is a sample of the loss component L_t of stage s, in nats.
        """
        B, D = x.shape
        t_drawn, s_drawn = stratified_steps(B, self.S, D, x.device, generator)
        t = t_drawn if t is None else t                                # t ~ U(1, ..., D)
        s = s_drawn if s is None else s                                # s ~ U(1, ..., S)
        if sigma is None:
            sigma = sample_sigma(B, D, x.device, generator)            # sigma ~ U(S_D)
        m = sigma < t[:, None]                                         # (B, D) already known
        log_p = self.log_probs(x, m, t, s, ~m)                         # (n, A) of all that is not
        log_p = pick(log_p, self.symbol(x, s)[~m])                     # (n,) of the true symbols
        log_p = log_p.new_zeros(B, D).masked_scatter(~m, log_p)        # (B, D) in their places
        calL_t = log_p.sum(dim=1) / (D - t + 1)                        # (B,) mean over the unknown
        return -self.S * D * calL_t

    @torch.no_grad()
    def walk(self, x, plan, sigma, choose):
        """Algorithm 1 (and 3) for any plan: the generative process, one network call per entry.

        x: (B, D) where the walk begins, x^(0) but for what is known beforehand (sigma = 0);
        sigma: (B, D), or (S, B, D) for one order a stage.
        choose(log_p, where, s) -> (B, D) gives the symbols for the variables in `where`
        (B, D bool); the rest of what it returns is ignored. Sampling draws them, likelihood reads
        them from the data, a decoder recovers them. log_p is (B, D, A), but only what is about to
        be written is computed: the rest of it is uniform.
        """
        sigma = sigma.expand(self.S, *x.shape)
        for s, t, k in plan:
            m = sigma[s - 1] < t                                       # (B, D) known
            where = ~m & (sigma[s - 1] < t + k)                        # (B, D) written in this call
            ts, ss = x.new_full((len(x),), t), x.new_full((len(x),), s)          # (B,)
            log_p = self.log_probs(x, m, ts, ss, where)                # (n, A)
            everywhere = log_p.new_full((*x.shape, self.A), -math.log(self.A))
            everywhere[where] = log_p
            a = choose(everywhere, where, ss)                          # (B, D) symbols
            x = torch.where(where, self.write(x, a, ss), x)
        return x

    def orders(self, B, D, device=None, generator=None):
        """sigma ~ U(S_D), a fresh one for every datapoint and stage: (S, B, D)."""
        return sample_sigma(self.S * B, D, device, generator).view(self.S, B, D)

    def every_step(self, D=None):
        """The plan of Algorithm 1: one variable a call, S * D calls."""
        return [(s, t, 1) for s in range(1, self.S + 1) for t in range(1, (D or self.D) + 1)]

    def sample(self, B, plan=None, sigma=None, x=None, known=None, generator=None, temperature=1.0):
        """Draws (B, D) datapoints, one variable a call where no plan is given.

        x, known: (B, D) values and a bool mask of those that are given and stay as they are. They
        count as written first, so plan entries for steps before the first unknown one are not run.
        temperature: draws from p^(1/temperature), renormalised.
        """
        device = next(self.parameters()).device
        x = torch.zeros(B, self.D, dtype=torch.long, device=device) if x is None else x
        plan = self.every_step() if plan is None else plan
        sigma = self.orders(B, self.D, device, generator) if sigma is None else sigma
        sigma = sigma.expand(self.S, B, self.D)
        if known is not None:
            sigma = rerank(sigma, known, absent=sigma > self.D)
        known = sigma[0] == 0
        done = int(known.sum(dim=1).min())             # steps at which nothing is left to write
        plan = (entry for entry in plan if entry[1] + entry[2] - 1 > done)

        def draw(log_p, where, s):
            p = torch.softmax(log_p[where] / temperature, dim=-1)      # (n, A) float32 or better
            a = torch.zeros_like(x)
            a[where] = torch.multinomial(p, 1, generator=generator)[:, 0]
            return a

        return self.walk(torch.where(known, x, self.coarse(x, 0)), plan, sigma, draw)

    def nll(self, x, plan=None, sigma=None):
        """-log p(x | sigma) in nats, (B,): exact for the process that `plan` describes.

        Variables written in one call are independent given what was known before it. Added up in
        float64, where the device has it.
        """
        plan = self.every_step(x.shape[1]) if plan is None else plan
        sigma = self.orders(*x.shape, x.device) if sigma is None else sigma
        known = sigma.expand(self.S, *x.shape)[0] == 0                 # beforehand: costs nothing
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        nats = torch.zeros(len(x), dtype=exact, device=x.device)

        def read(log_p, where, s):
            a = self.symbol(x, s)
            nats.sub_(torch.where(where, pick(log_p, a), 0).sum(dim=1))
            return a

        self.walk(torch.where(known, x, self.coarse(x, 0)), plan, sigma, read)
        return nats


class UpscaleARDM(ARDM):
    """Upscale ARDM (Sec. 3.2, App. A.1): S stages, each writes one base-b digit, highest first.

    net: net(x, m, t, s) -> (B, D, K) logits of the values, parametrization "data", which gives the
    digits by summing values; or (B, D, S * b), "direct": the digits of stage s at [(s-1)b, sb).
    Where K is no power of b, a digit that leads to no value below K has probability 0.
    """

    def __init__(self, net, D, K, b, parametrization="data"):
        super().__init__(net, D, K)
        if parametrization not in ("data", "direct"):
            raise ValueError(f"parametrization {parametrization!r}: choose data or direct")
        self.S, self.A, self.b, self.parametrization = num_stages(K, b), b, b, parametrization

    def unit(self, x, s):
        """b^(S-s), (1, 1) or (B, 1): what a step of the digit of stage s adds to a value of x."""
        return self.b ** (self.S - torch.as_tensor(s, device=x.device).view(-1, 1))

    def coarse(self, x, s):
        return x // self.unit(x, s) * self.unit(x, s)                  # the lower digits are 0

    def symbol(self, x, s):
        return x // self.unit(x, s) % self.b

    def write(self, x, a, s):
        return self.coarse(x, s - 1) + a * self.unit(x, s)

    def log_probs(self, x, m, t, s, where=None):
        """As in ARDM, of the digit that stage s writes: (B, D, b), or (n, b) of those in `where`.
        """
        outputs = self.K if self.parametrization == "data" else self.S * self.b
        x = self.state(x, m, s)
        logits = self.logits(x, m, t, s, outputs, where)               # (B, D, K) or (B, D, S * b)
        s = s[:, None].expand(x.shape)
        if where is not None:
            x, s = x[where], s[where]
        digits = self.digits(logits.flatten(0, -2), x.flatten(), s.flatten())
        a = torch.arange(self.b, device=x.device)
        below, unit = self.coarse(x.view(-1, 1), s.flatten() - 1), self.unit(x, s.flatten())
        impossible = below + a * unit >= self.K                        # (n, b)
        return log_softmax(digits.masked_fill(impossible, -torch.inf)).view(*x.shape, self.b)

    def digits(self, logits, x, s):
        """(n, outputs) logits, x and s (n,) -> (n, b) unnormalised log p(digit s | x^(s-1))."""
        if self.parametrization == "direct":
            a = torch.arange(self.b, device=s.device)
            return logits.gather(1, (s[:, None] - 1) * self.b + a)
        stages = s.unique().tolist()
        if len(stages) == 1:
            return self.digit_logits(logits, x, stages[0])
        rows = [(s == stage).nonzero()[:, 0] for stage in stages]
        digits = torch.cat([self.digit_logits(logits, x, stage, row)
                            for row, stage in zip(rows, stages)])
        return digits.index_select(0, torch.cat(rows).argsort())       # back in their places

    def digit_logits(self, logits, x, s, rows=None):
        """`digits` of the variables `rows`, (k,), which all are in stage s; None: of all n.

        Data parametrisation: K, filled up to b^S, is prefix x digit x suffix. The prefix is known,
        and the values that differ in the suffix alone are added up: no K x K matrix is needed.
        """
        unit, b, prefixes = self.b ** (self.S - s), self.b, self.b ** (s - 1)
        if b ** self.S > self.K:
            logits = nn.functional.pad(logits, (0, b ** self.S - self.K), value=-torch.inf)
        parts = logits.reshape(-1, b * unit)                   # (n * prefixes, b * unit)
        if prefixes > 1 or rows is not None:
            rows = torch.arange(len(x), device=x.device) if rows is None else rows
            parts = parts.index_select(0, rows * prefixes + x[rows] // (b * unit))       # (k, ...)
        # Digit by digit: all at once would need twice the memory of the logits.
        digits = [part.logsumexp(-1) for part in parts.unflatten(-1, (b, unit)).unbind(dim=1)]
        return torch.stack(digits, dim=-1)


def log_softmax(logits):
    """Over the last dimension, in float32 or better: bfloat16 logits would not sum to 1."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def pick(log_p, a):
    """(B, D, A), (B, D) -> (B, D): the log-probability of each given symbol."""
    return log_p.gather(-1, a[..., None])[..., 0]
