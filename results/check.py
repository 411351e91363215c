"""python -m results.bench check: does every figure of README.md follow from bench.json?

A claim is a piece of a sentence, with the figures that the rows give it. It must stand in README.md
or in a conclusion of results/README.md. Then every figure of README.md with a decimal point must
stand in a claim, or be one of the OTHERS. Blocks of code and of output do not count.
"""
import re

from results.common import HERE

OTHERS = {"1.43", "1.35", "2.69", "2.64"}                  # the paper's


def claims(f):
    """Yields the claims. f(section, column, name=value) is a figure of the row with this value."""
    first, last = (f("compress", "exact nll", at=f"{n} calls, spaced:{g}")
                   for n, g in ((16, 16), (125, 2)))
    yield f"16 calls for 250 letters cost {first / last - 1:.1%} more bits than 125 calls"
    ours = dict(run="recipe ours, 4 blocks of 128")
    left, bits = f("prices", "bits", at="the same, all chunks"), f("text8", "bits", **ours)
    yield f"right came to {left:.2f} bits/char, any order to {bits:.2f}"
    yield f"A model of any order costs {bits - left:.2f} bits a character more"
    bz2, xz = (f("text8", "bits", run=f"{name}, the whole test text") for name in ("bz2", "xz"))
    yield f"{bits:.3f} ± {f('text8', 'stderr', **ours):.3f} | 1.43 | bz2 {bz2:.2f}, xz {xz:.2f}"
    bits, error, bz2, xz = (f("english", column, bytes=341_151)
                            for column in ("ours", "stderr", "bzip2 -9", "xz -9"))
    yield f"| {bits:.3f} ± {error:.3f} | | bz2 {bz2:.2f}, xz {xz:.2f}"
    for section, run in (("mnist", "order-agnostic"), ("cifar10", "order-agnostic"),
                         ("cifar10", "upscale-4")):
        yield f"| {f(section, 'bits', run=run):.3f} ± {f(section, 'stderr', run=run):.3f} |"
    for data in ("mnist", "cifar10"):
        png, webp = (f("packers", name, data=data) for name in ("PNG", "WebP"))
        yield f"PNG {png:.2f}, WebP {webp:.2f}"
    files = [f("clips", name, data="fsdd") for name in ("archive", "FLAC -8", "WavPack -hhx6")]
    yield "| {:.3f} | | FLAC {:.2f}, WavPack {:.2f} |".format(*files)
    margin = max(f("portable", "float64", model=name)
                 for name in ("text8-ours", "mnist", "cifar10-order-agnostic", "fsdd"))
    yield f"differed by up to {margin * 1e13:.1f} · 10⁻¹³"
    full, few = (f("calls", "planned", calls=n) for n in (4096, 64))
    yield f"by L_t, 64 cost {few / full - 1:.1%} more bits than all 4,096"
    ardm = f("absorbing", "bits", at="ARDM, planned", steps=250)
    diffusion = f("absorbing", "bits", at="absorbing diffusion, linear", steps=1000)
    yield f"within {diffusion / ardm - 1:.1%} of the bits of an ARDM in 250 calls"
    planned, spaced = (f("plans", "exact", model="text8-ours", calls=20, plan=plan)
                       for plan in ("planned", "spaced:13"))
    yield f"`spaced` costs {1 - spaced / planned:.1%} less"
    text, image = ({name: f(section, "it gains", without=row) for name, row in (
        ("muon", "Muon, Adam alone"), ("rate", "the rate that falls"),
        ("mean", "the average of the weights"))} for section in ("text", "images"))
    yield f"Muon and Adam ({text['muon']:.2f} text, {image['muon']:.2f} images)"
    yield f"falls to 0 ({text['rate']:.2f}, {image['rate']:.2f})"
    yield f"averaged weights ({abs(text['mean']):.2f}, {image['mean']:.2f})"
    for words, section, row in (
            ("between neighbours", "text", "neighbour convolutions, one thread"),
            ("second block only", "text", "blocks without attention"),
            ("known neighbours", "images", "means of neighbours"),
            ("to the logits", "images", "the logistic distribution")):
        yield f"{words} ({f(section, 'it gains', without=row):.2f})"


def check(kept, conclusions):
    """ValueError for a claim that stands nowhere, and for a figure that is in no claim."""
    def figure(section, column, at=None, **named):
        named |= {} if at is None else {"": at}
        for row in kept[section]["rows"]:
            if named.items() <= row.items() and column in row:
                return row[column]
        raise ValueError(f"bench.json has no {column} of {named} in section {section}")

    readme = (HERE.parent / "README.md").read_text("utf-8")
    readme = " ".join(re.sub(r"(?s)```.*?```", "", readme).split())
    missing = [claim for claim in claims(figure) if claim not in f"{readme} {conclusions}"]
    if missing:
        raise ValueError("these claims stand nowhere, by bench.json: " + "; ".join(missing))
    for claim in claims(figure):
        readme = readme.replace(claim, "")
    stray = set(re.findall(r"(?<!Sec\. )(?<!Python )\b\d{1,3}\.\d+\b", readme)) - OTHERS
    if stray:
        raise ValueError(f"README.md has figures that are in no claim: {', '.join(sorted(stray))}")
    print("every figure of README.md follows from bench.json")
