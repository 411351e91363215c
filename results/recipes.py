"""Recipes, by validation data and three seeds: what each ingredient of ours gains."""
import contextlib
import statistics
from unittest import mock

import torch

import data as datasets
import nets
import train
from results.common import CIFAR, median_seconds, trained


def adam_alone(net, c, hyper, make=train.make_optimizers):
    return make(net, c | dict(recipe="paper"), dict(hyper, lr=2e-3))


def constant_rate(c, hyper, step, progress):
    return min(1.0, (step + 1) / hyper["warmup"])


WITHOUT = {                          # in the code: every ingredient, and how it is taken away
    "Muon, Adam alone": mock.patch.object(train, "make_optimizers", adam_alone),
    "the rate that falls": mock.patch.object(train, "learning_rate", constant_rate),
    "the average of the weights": mock.patch.dict(train.OURS["tiny"], ema=0.0)}
WITHOUT_TEXT = WITHOUT | {
    "neighbour convolutions": mock.patch.object(nets, "CONV", 1),
    "blocks without attention": mock.patch.object(nets, "EVERY", 1)}
WITHOUT_IMAGES = WITHOUT | {
    "zeros at first: outputs, and the last convolution of each block": mock.patch.object(
        nets.nn.init, "zeros_", lambda x: x if x.ndim > 1 else x.detach().zero_()),    # biases stay
    "the logistic distribution": mock.patch.object(nets, "logistic", lambda place, width, K: 0),
    "means of neighbours": mock.patch.object(
        nets, "local_means", lambda v, seen: torch.zeros(2, 4, *v.shape))}


def steps_in(minutes, variants, data):
    """Training steps that each variant does in these minutes; a step is timed in turns."""
    def stepper(patch):
        with patch:
            run = train.Run(*train.complete(dict(size="tiny", steps=1), data))

        def step():
            with patch:
                train.train_step(run, data.batch(run.c["batch"]))
        return step

    seconds = median_seconds(*map(stepper, variants.values()), repeats=100)
    return {name: int(60 * minutes / each) for name, each in zip(variants, seconds)}


def without(ingredients, args, data, minutes, steps=None):
    """Bits of validation data with the recipe, and without each of its ingredients. steps: of every
    run; if not given, as many as it makes in these minutes."""
    variants, bits = {"nothing": contextlib.nullcontext(), **ingredients}, {}
    steps = dict.fromkeys(variants, steps) if steps else steps_in(minutes, variants, data)
    for seed in range(args.seeds):
        for name, patch in variants.items():
            run, _ = trained(patches=[patch], seed=seed, data=data, steps=steps[name])
            with patch:
                found = train.bound(run.ema, data.chunks("valid"), passes=args.passes)
            bits.setdefault(name, []).append(found["bits"])
            print(f"  seed {seed} without {name}: {found['bits']:.4f}", flush=True)
    for name, each in bits.items():
        gains = [a - b for a, b in zip(each, bits["nothing"])]
        yield {"without": name, "steps": steps[name], "seeds": len(each),
               "bits": statistics.mean(each), "it gains": statistics.mean(gains),
               "+-": statistics.stdev(gains) if len(gains) > 1 else 0.0}


def bench_text(args):
    """Default text run, in equal time, bits/char of its validation split."""
    return without(WITHOUT_TEXT, args, datasets.load("pydoc"), args.minutes or 2.75)


def bench_images(args):
    """CIFAR-10 (20,000 images), in equal time, bits/dim of the last tenth of them."""
    return without(WITHOUT_IMAGES, args, datasets.load(str(CIFAR)), args.minutes or 5)


def weighted(factor):
    """A patch of training alone: the loss of a datapoint times factor(the share of its variables
    that is unknown)."""
    plain = train.train_step

    def train_step(run, x):
        def loss(x, t, s, sigma):
            return factor((run.model.D - t + 1) / run.model.D) * run.model.loss(x, t, s, sigma)

        with mock.patch.object(run, "loss", loss):
            return plain(run, x)

    return mock.patch.object(train, "train_step", train_step)


def bench_weights(args):
    """Other losses than Eq. 2's for the default text run, bits/char of its validation split after
    as many steps (a step takes the same time with each): the sum over the unknown variables
    without the weight 1/(D-t+1), as BERT has it (times 2, so that it is as large), and Eq. 2's with
    1e-4 of this sum, as the paper's runs had it (App. D: no substantial difference)."""
    losses = {"the sum without a weight": weighted(lambda unknown: 2 * unknown),
              "Eq. 2 and 1e-4 of the sum": weighted(lambda unknown: 1 + 1e-4 * unknown)}
    for row in without(losses, args, datasets.load("pydoc"), None, 10 if args.minutes else 3600):
        name = row.pop("without")
        yield {"loss": "Eq. 2" if name == "nothing" else name} | row
