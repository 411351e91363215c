"""The page beside the paper, the measurements and the course."""
import html
import json
import math
import os
import re
import select
import shutil
import subprocess
import time
import xml.etree.ElementTree
from unittest import mock

from conftest import HERE, seeded

import numpy as np
import pytest
import torch
from torch import nn

import data as datasets
import nets
import planner
import train
from ardm import UpscaleARDM, draw
from exercises import make
from results import bench, check, common, orders, page, plot, recipes
from test_ardm import ONE, Table, all_x

ASSIGNMENT = (HERE / "exercises" / "assignment").exists()  # a copy without the solutions


def test_the_order_of_confidence_takes_the_surest_first():
    model, plan = UpscaleARDM(Table(4, 4, S=2), 4, 4, 2), [(1, 1, 1), (1, 2, 3), (2, 1, 4)]
    x, sigma = orders.generate_surest(model, torch.zeros(2, 4).long(), plan,
                                      lambda log_p, where, s: draw(log_p, generator=seeded()))
    for i in range(2):
        row, m = torch.zeros(1, 4).long(), torch.zeros(1, 4).bool()
        for s, t, k in plan:
            m = m & (s == plan[0][0]) if t == 1 else m
            log_p = model.log_probs(row, m, t * ONE, s * ONE)[0]
            order = [j for j in log_p.amax(dim=1).argsort(descending=True).tolist() if not m[0, j]]
            now = (sigma[s - 1, i] >= t) & (sigma[s - 1, i] < t + k)
            assert sorted(order[:k]) == now.nonzero()[:, 0].tolist()
            m = m | now
            row = torch.where(m, model.coarsen(x[i:i + 1], s), row)


def test_an_ingredient_taken_away_is_away_in_the_evaluation_too(monkeypatch):
    found = []
    monkeypatch.setattr(recipes, "trained", lambda **how: (mock.Mock(), None))
    monkeypatch.setattr(train, "bound", lambda *x, **how: found.append(nets.CONV) or {"bits": 1})
    list(recipes.without({"it": mock.patch.object(nets, "CONV", 1)}, mock.Mock(seeds=1),
                       mock.Mock(), None, steps=1))
    assert found == [5, 1]


def test_a_training_that_was_told_to_stop_is_no_measurement(monkeypatch):
    monkeypatch.setattr(train, "train", lambda *how: False)
    with pytest.raises(KeyboardInterrupt):
        common.trained(data=datasets.load("pydoc", 16), steps=1)


def test_a_network_that_sees_the_past_alone_gives_all_texts_a_sum_of_1():
    with orders.PAST[0], orders.PAST[1], orders.PAST[2]:
        model = nets.build(dict(kind="text", K=2, shape=[5], recipe="ours", branch=0, dim=8,
                                depth=3, heads=1, parametrization="data")).double()
        for p in model.parameters():
            nn.init.normal_(p, generator=seeded())
        assert abs((-model.loss(all_x(5, 2))).exp().sum().item() - 1) < 1e-12


def test_every_section_exists_and_the_log_is_written_from_its_rows(tmp_path, monkeypatch):
    assert all(callable(bench.section(name)) for name in bench.SECTIONS)
    kept = json.loads((page.HERE / "bench.json").read_text())
    assert {*kept} <= {*bench.SECTIONS}
    written = []
    monkeypatch.setattr(datasets, "write", lambda path, content: written.append(content))
    bench.write(kept)
    assert written == [(page.HERE / "README.md").read_bytes()], "python -m results.bench readme"


def test_every_figure_of_the_readme_follows_from_a_row(monkeypatch):
    kept = json.loads((page.HERE / "bench.json").read_text())
    words = " ".join(bench.CONCLUSIONS.values())
    check.check(kept, words)
    monkeypatch.setattr(check, "OTHERS", {"1.35", "2.69", "2.64"})
    with pytest.raises(ValueError, match="in no claim: 1.43"):
        check.check(kept, words)
    kept["mnist"]["rows"][0]["bits"] += 0.001
    with pytest.raises(ValueError, match="0.916 ± 0.004"):
        check.check(kept, words)


def test_a_run_is_drawn_in_one_picture(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "module://of.a.notebook")
    shutil.copy(folder / "results.json", tmp_path)         # a short run has no log.csv
    for log in ("", "step,seconds,a,b\n100,1.0,3.0,3.1\n200,2.0,2.5,2.6\n"):
        if log:
            (tmp_path / "log.csv").write_text(log)
        monkeypatch.setattr("sys.argv", ["plot", str(tmp_path)])
        plot.main()
        assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


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


@pytest.mark.skipif(ASSIGNMENT, reason="the page shows solutions")
def test_the_page_is_made_of_the_sources_and_the_recording():
    found = (page.HERE / "index.html").read_bytes()
    assert found == page.build().encode(), "run python -m results.page"
    film = (page.HERE / "text.svg").read_text("utf-8")
    assert film == page.film(**json.loads((page.HERE / "page.json").read_text())["film"])
    assert xml.etree.ElementTree.fromstring(film).tag.endswith("svg")
    assert len(found) < 1.5e6 and (page.HERE / "page.json").stat().st_size < 1e6
    assert not re.search(rb"https?://(?!www.w3.org)|src=|@import", found)


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
        assert len(places) >= 4
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


def test_names_in_a_chart_are_no_markup(browser):
    browser.run("window.place = document.createElement('div'); window.bad = '<img src=x>';"
                "window.axis = {from: 0, to: 1, words: bad};"
                "chart(place, axis, axis, [{points: [[0, 0]], name: bad, at: 0, key: bad}])")
    assert browser.run("place.querySelectorAll('img').length") == 0
    assert browser.run("place.textContent.split(bad).length") == 5


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
