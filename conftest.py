"""What test_ardm.py and tests/ share: tiny runs, how scripts are called, archives, a browser."""
import json
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"               # on a GPU each run would compile for long

import numpy as np
import pytest
import torch

import compress
import data as datasets
import nets
import planner
import train

HERE = Path(__file__).parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
QUICK = ["--steps", 30, "--length", 24, "--dim", 32, "--depth", 1, "--heads", 2, "--batch", 16]
LIST = b"LIST\x05\0\0\0INFOx\0"                           # an odd chunk, and its pad byte
SMALL = ["--steps", 25, "--dim", 8, "--depth", 1, "--passes", 2]


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
    """Runs a script in a process of its own."""
    return subprocess.run([sys.executable, HERE / script, *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, **options)


def settings(data, **given):
    """Complete settings of a short run on the CPU."""
    return train.complete(dict(size="tiny", device="cpu", steps=8) | given, data)[0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=40, shape=(6, 5), seed=0):
    """Grey or coloured squares on a slope: something that can be learnt."""
    rng = np.random.default_rng(seed)
    x = np.arange(shape[1])[:, None].reshape(-1, *[1] * (len(shape) - 2)) * 9
    return (rng.integers(0, 200, (n, *[1] * len(shape))) + x
            + rng.integers(0, 9, (n, *shape))).astype(np.uint8)


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


def pack(place, model, content, order="spaced:4", calls=6, block=10, K=27):
    """An archive of a text, and its ideal length in bits."""
    plan, path = [[k for _, _, k in planner.uniform_plan(1, 24, calls)]], place / "packed"
    codec = compress.Codec(model, dict(shape=[24]), order, plan, block)
    path.write_bytes(content)
    archive, _, bits = compress.encode_file(path, model, codec, dict(
        kind="text", K=K, shape=[24]))
    return archive, bits


def unpack(model, archive, K=27, damaged=None):
    """The text in an archive. damaged: a list, which gets the numbers of blocks that are."""
    header, _, at = compress.read_header(archive, "archive")
    codec = compress.open_codec(header, model, dict(kind="text", K=K, shape=[24]), "archive")
    content = b""
    for i, x in compress.decode_file(archive, at, codec, header["length"]):
        if x is not None:
            content += datasets.to_bytes(x.reshape(-1), K)
        elif damaged is None:
            raise ValueError(f"block {i} is damaged")
        else:
            damaged.append(i)
    return content


def blocks_of(archive):
    """[(place, length)] of the blocks of an archive."""
    at, found = 9 + int.from_bytes(archive[5:9], "big"), []
    while at < len(archive):
        found.append((at, 5 + int.from_bytes(archive[at:at + 4], "big") % (1 << 31)))
        at += found[-1][1]
    return found


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

    def open(self, path, width=1280, address=""):
        size = dict(width=width, height=2000, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri() + address)
        while self.run("document.readyState") != "complete":
            time.sleep(0.05)

    def run(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=dict(Tab=9, ArrowRight=39)[key])


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


@pytest.fixture(scope="session")
def model(folder):
    return nets.load(folder / "ckpt.pt", "cpu")[0]


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
