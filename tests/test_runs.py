"""Training: what a run saves, when it ends, how it goes on, on several processes."""
import math
import os
import signal
import subprocess
import sys
import time
from unittest import mock

from conftest import DEVICES, HERE, QUICK, call, seeded, settings, wav_bytes

import json
import numpy as np
import pytest
import torch
from torch import nn

import data as datasets
import nets
import train
from ardm import bits_per_dim, sample_sigma, stratified_steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, device, recipe):
    c, data = train.complete(dict(length=16, dim=16, depth=1, heads=1, batch=4, steps=8,
                                  recipe=recipe, device=device, size="tiny", compile=False))

    def go(run, upto):
        return [train.train_step(run, run.draw(data)).item() for _ in range(run.step, upto)]

    whole, part, again = (train.Run(c, data) for _ in range(3))
    first = whole.draw(data)
    losses = go(whole, 8)
    assert not torch.equal(first, whole.draw(data))        # every step has its own
    assert go(part, 5) == losses[:5]
    part.L = torch.arange(16.0)[None]
    train.save(part, tmp_path)
    train.restore(again, torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert torch.equal(again.L, part.L) and go(again, 8) == losses[5:]
    assert torch.stack([*again.losses]).tolist() == losses  # their mean is printed, and in log.csv
    for a, b in zip(whole.ema.parameters(), again.ema.parameters()):
        assert torch.equal(a, b)


def test_a_resumed_run_ends_with_the_samples_of_the_whole_one(tmp_path):
    c, data = train.complete(dict(length=16, dim=16, depth=1, heads=1, batch=4, steps=3, passes=1,
                                  device="cpu", size="tiny"))
    whole, again = train.Run(c, data), train.Run(c, data)
    assert train.train(whole, data, tmp_path)
    train.restore(again, torch.load(tmp_path / "ckpt.pt", weights_only=True))
    found = []
    for run in (whole, again):
        train.finish(run, data, tmp_path)
        found.append((tmp_path / "samples.txt").read_bytes())
    assert found[0] == found[1]


def test_a_signal_saves_and_the_run_can_be_resumed(folder, tmp_path, request):
    flags = [*map(str, QUICK), "--steps", "100000", "--out", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags], text=True,
                               stdout=open(tmp_path / "words", "w"), stderr=subprocess.PIPE)
    request.addfinalizer(process.kill)
    process.stderr.close()                                 # nobody reads the bar any more
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.csv").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and "--resume --out" in (tmp_path / "words").read_text()
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert call(train, "--resume", "--out", tmp_path, "--steps", step + 10, "--passes", 1) == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == step + 10
    assert call(train, "--resume", "--out", tmp_path, "--steps", step + 11, "--passes", 1) == 0
    old = torch.load(tmp_path / "ckpt.1.pt", weights_only=True)          # a finished run is kept
    assert old["step"] == step + 10 and (tmp_path / "results.1.json").exists()


def test_whatever_ends_a_run_it_is_saved(tmp_path, monkeypatch):
    data = datasets.load("pydoc", 16)
    run = train.Run(settings(data), data)

    def fail(run, *how):
        if run.step == 5:
            raise OSError("the disk is full")

    monkeypatch.setattr(train, "report", fail)
    with pytest.raises(OSError):
        train.train(run, data, tmp_path)
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 5


def test_a_run_without_numbers_is_not_saved_and_one_datapoint_has_no_error(tmp_path):
    data = datasets.load("pydoc", 16)
    run = train.Run(settings(data), data)
    run.model.net.head.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="step 0: the weights are not numbers; take"):
        train.save(run, tmp_path)
    assert train.in_digits(train.mean_and_error(torch.ones(1), 2)["stderr"]) == "unknown"


@pytest.mark.parametrize("error, flag", [
    (RuntimeError("Dynamo is not supported on this Python"), "try --no-compile"),
    (type("Failed", (RuntimeError,), dict(__module__="torch._dynamo.exc"))("x"), "--no-compile"),
    (torch.OutOfMemoryError("CUDA out of memory"), "in training --parts 4")])
def test_what_fails_inside_torch_names_a_flag(error, flag, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "complete", mock.Mock(side_effect=error))
    refused(train, "--compile", "--out", tmp_path / "run", match=flag)


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


@pytest.mark.parametrize("chunks, noise", [(1.0, 0.0), (1.0, 3.0), (0.0, 3.0), (0.0, 0.0)])
def test_the_error_of_the_bound_is_its_spread_over_chunks_not_over_steps(chunks, noise):
    N, D, passes, level = 400, 64, 8, torch.linspace(20, 0, 64)
    model, found = mock.Mock(S=1, D=D, A=2), []
    for seed in range(40):
        own = chunks * torch.randn(N, generator=torch.Generator().manual_seed(seed))

        def loss(x, t, s, generator):
            return own[x[:, 0]] + level[t - 1] + noise * torch.randn(len(x))

        model.loss = loss
        torch.manual_seed(seed)
        x = torch.arange(N)[:, None].expand(N, D)
        found.append(train.bound(model, x, passes=passes)["stderr"])
    true = (chunks ** 2 / N + noise ** 2 / (N * passes)) ** 0.5 / (D * np.log(2))
    assert abs(np.mean(found) - true) < 0.05 * true + 1e-4


def test_a_batch_in_parts_has_the_same_gradient(monkeypatch):
    monkeypatch.setattr(nets, "has_bf16", lambda device: False)
    data, found = datasets.load("pydoc", 16), []
    for parts in (1, 3, 12):
        run = train.Run(settings(data, batch=12, dim=8, depth=1, heads=1, parts=parts), data)
        run.model.net.head.weight.data.normal_(generator=seeded())
        bits = train.train_step(run, run.draw(data))
        found.append([bits, *(p.grad for p in run.model.parameters())])
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


def test_a_run_ends_by_its_minutes_or_by_its_passes_whichever_comes_first():
    data = datasets.load("pydoc", 250)

    def length(**given):
        c = train.complete(dict(device="cpu", size="small") | given, data)[0]
        return c["steps"], c["minutes"]

    c = settings(data, size="small", steps=None)
    steps, minutes = length()
    assert minutes == 2.5
    assert steps * 256 * 250 == pytest.approx(150 * len(data.splits["train"]), rel=0.01)
    assert length(steps=7) == (7, None) and length(minutes=7) == (None, 7)
    assert length(batch=9999) == (100, 2.5) and length(size="paper") == (3_000_000, None)
    run = train.Run(settings(data), data)
    run.c, run.step, run.seconds = c | dict(steps=steps, minutes=minutes), steps // 2, 30
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
        assert (c["steps"], c["minutes"]) == expected


def test_the_first_step_which_compiles_takes_no_time_of_the_run(tmp_path, monkeypatch):
    data, step = datasets.load("pydoc", 16), train.train_step
    run = train.Run(settings(data, batch=2, depth=1, dim=16) | dict(steps=None, minutes=0.1), data)
    clock = mock.Mock(perf_counter=lambda: clock.seconds, seconds=0.0)

    def timed(run, x):
        clock.seconds += 1 if run.step else 1000
        return step(run, x)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "train_step", timed)
    assert train.train(run, data, tmp_path)
    assert (run.step, run.seconds, clock.seconds) == (7, 6, 1006)


PAIR = """
import os, signal, sys, torch, data as datasets, train
rank, folder = train.join(), sys.argv[1]
data = datasets.load("pydoc", 16)
c, _ = train.complete(dict(size="tiny", device="cpu", steps=10, batch=6, dim=8, depth=1, heads=1,
                           length=16))
run = train.Run(c, data)
clip, kept = train.nn.utils.clip_grad_norm_, []
def keep(weights, most):
    weights = list(weights)
    kept.append(torch.cat([p.grad.flatten() for p in weights]).clone())
    clip(weights, most)
train.nn.utils.clip_grad_norm_ = keep
assert train.train(run, data, train.Path(folder))
run.c["steps"] = 10 ** 9
save = run.draw
def late(data):
    if rank == 0 and run.step == 15:
        os.kill(os.getpid(), signal.SIGTERM)               # the first process alone is told to stop
    return save(data)
run.draw = late
weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
assert not train.train(run, data, train.Path(folder))
torch.save([kept[0], weights, run.step], f"{folder}/{rank}.pt")
os._exit(0)
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
        with torch.autocast("cpu", torch.bfloat16, enabled=nets.has_bf16("cpu")):
            loss = bits_per_dim(run.loss(x, t, s, sample_sigma(3, 16, generator=g)), 16).mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert torch.allclose((gradients[0] + gradients[1]) / 2, first, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(*gradients, rtol=1e-2)       # each has drawn its own


def test_torchrun_trains_and_one_that_fails_ends_all(tmp_path, monkeypatch):
    flags = [*QUICK, "--passes", 1, "--device", "cpu", "--out", tmp_path / "run"]
    done = torchrun(HERE / "train.py", *flags)
    assert done.returncode == 0 and done.stdout.count("test:") == 1, done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 30
    begin = time.monotonic()
    done = torchrun(HERE / "train.py", *flags, "--heads", 0)
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "--heads 0: take a width of 4 or more" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")                  # left over, and nobody else is there
    monkeypatch.setenv("RANK", "1")
    assert train.join() == 0


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


def test_nothing_of_the_users_is_written_over(folder, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.txt").write_text("my own")
    refused(train, *QUICK, "--out", tmp_path / "mine", match="choose another --out")
    refused(train, "--resume", "--out", folder, "--steps", 10, match="give it more --steps")
    (tmp_path / "mine" / "test.txt").rename(tmp_path / "mine" / "log.csv")
    train.prepare_folder(tmp_path / "mine", dict(kind="text", data="pydoc"), False)
    for name in ("ckpt.pt", "samples.txt", "test.txt"):
        (tmp_path / "mine" / name).write_text("another program's")
    train.prepare_folder(tmp_path / "mine", dict(kind="text", data="pydoc"), False)
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"ckpt.1.pt", "log.1.csv", "samples.1.txt", "test.1.txt"}
    log = dict(kind="text", data=str(tmp_path / "mine" / "log.csv"))
    with pytest.raises(ValueError, match="would replace its data"):
        train.prepare_folder(tmp_path / "mine", log, False)
