"""The page beside the paper."""
import json
import math
import re
import shutil
import time
import xml.etree.ElementTree

from conftest import HERE, Browser, seeded

import numpy as np
import pytest
import torch

import coder
import nets
import planner
from ardm import UpscaleARDM
from results import page
from test_ardm import ONE

ASSIGNMENT = (HERE / "exercises" / "assignment").exists()  # a copy without the solutions


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium")
    if ASSIGNMENT:
        pytest.skip("the page shows solutions")
    if program is None:
        pytest.skip("no chromium is installed: nobody looks at the page")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    browser.open(page.HERE / "index.html")
    browser.run("start().then(() => writeOn(64))")
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
    assert len(found) < 4e6 and (page.HERE / "page.json").stat().st_size < 1e6
    assert not re.search(rb"https?://(?!www.w3.org|arxiv.org/abs)|src=|@import", found)


@pytest.fixture(scope="module")
def rounded():
    """The model of the page: the one of English with 8 bits a weight."""
    model, checkpoint = nets.load(nets.ENGLISH)
    page.in_eight_bits(model.requires_grad_(False))
    return model, planner.smooth(checkpoint["L"], checkpoint["counts"])[0]


def symbols(text):
    return [256 if letter == "_" else ord(letter) for letter in text]


@pytest.mark.parametrize("text", ("_", "the ____ of the\n_________ is not _____!", "_" * 64))
def test_the_network_of_the_page_is_the_one_of_pytorch(browser, rounded, text):
    x = torch.tensor([symbols(text)])
    known = x < 256
    log_p = rounded[0].log_probs(x * known, known, ONE, ONE)[0]
    found = browser.run(f"call({symbols(text)}).then(log_p => [...log_p])")
    assert np.abs(np.array(found).reshape(log_p.shape) - log_p.numpy()).max() < 1e-3


@pytest.mark.parametrize("way", ("random", "left to right", "spaced", "surest"))
def test_what_the_page_writes_costs_what_the_model_says(browser, rounded, way):
    browser.run(f"""$("#sentence").value = "She ___ to the ____ed"; choose($("#way"), "{way}");
                    start(3).then(() => writeOn(64))""")
    frames = browser.run("frames.map(({x, bits, wrote}) => ({x, bits, wrote}))")
    assert [len(frame["wrote"]) for frame in frames] == [0, 2, 3, 2]
    nats = 0
    for before, after in zip(frames, frames[1:]):
        x = torch.tensor([before["x"]])
        log_p = rounded[0].log_probs(x % 256, x < 256, ONE, ONE)[0]
        nats -= sum(log_p[i, after["x"][i]].item() for i in after["wrote"])
        sure = log_p.amax(dim=1).masked_fill(x[0] < 256, -math.inf)
        if way == "surest":
            assert {*sure.topk(len(after["wrote"])).indices.tolist()} == {*after["wrote"]}
        assert after["bits"] == pytest.approx(nats / math.log(2), abs=1e-2)
    at = [i for frame in frames for i in sorted(frame["wrote"])]
    assert at == sorted(at) or way != "left to right"


def test_the_page_counts_and_packs_a_text_as_ardm_and_coder_do(browser, rounded):
    model, L = rounded
    text = "It was the best of times."
    x, D = torch.tensor([symbols(text)]), len(text)
    browser.run(f"$('#sentence').value = {json.dumps(text)}; start()")
    for order, plan in (("random", "planned"), ("spaced", "even")):
        how = "{order: {value: '%s'}, calls: {value: 8}, plan: {value: '%s'}}" % (order, plan)
        calls = browser.run(f"planOf({how}, {D})")
        share = L[np.arange(D) * len(L) // D]
        wanted = planner.plan(share, 8) if plan == "planned" else planner.uniform_plan(1, D, 8)
        cost = planner.plan_cost(share, [(1, t, k) for t, k in calls])
        assert cost == pytest.approx(planner.plan_cost(share, wanted))
        sigma = torch.tensor([browser.run(f"orderOf('{order}', {D}, 8)")])
        assert order == "random" or sigma[0].tolist() == planner.order("spaced:4", D).tolist()
        nll = model.nll(x, [(1, t, k) for t, k in calls], sigma).item() / math.log(2)
        assert browser.run(f"bitsOf({x[0].tolist()}, {how})") == pytest.approx(nll, abs=1e-2)
    for button in ("pack", "unpack"):
        browser.run(f"$('#{button}').click()")
        while browser.run(f"$('#{button}').disabled"):
            time.sleep(0.05)
    assert browser.run("$('#packed').textContent").endswith(f"decode to: {text}")
    assert browser.run("packed.data.length") < D / 2


@pytest.mark.parametrize("n", (0, 1, 5, 300))
def test_the_coder_of_the_page_is_coder_py(browser, n):
    log_p = torch.randn(n, 256, generator=seeded()).mul(3).log_softmax(dim=1)
    a = torch.randint(256, (n,), generator=seeded(1)).tolist()
    browser.run(f"window.rows = {log_p.flatten().tolist()}")
    cdf = np.array(browser.run(f"[...Array({n}).keys()].map(i => quantized(rows, i))"))
    cdf = cdf.reshape(n, 257)
    assert (np.diff(cdf) > 0).all() and (cdf[:, 0] == 0).all() and (cdf[:, -1] == 1 << 22).all()
    p = np.diff(cdf) / 2 ** 22
    assert np.abs(p - log_p.exp().numpy()).max(initial=0) < 2e-4
    starts, freqs = coder.intervals(cdf, np.array(a, dtype=np.int64))
    data = coder.encode(starts, freqs)
    for s, f in ((starts.tolist(), freqs.tolist()), ([9, 0, 0, 1], [4, 1, 1, 1])):  # x = f << 42
        assert browser.run(f"[...encode({s}, {f})]") == [*coder.encode(s, f)]
    browser.run(f"window.decoder = new Decoder(Uint8Array.from({[*data]})); 0")
    assert browser.run(f"[...Array({n}).keys()].map(i => decoder.pop(quantized(rows, i)))") == a


def test_the_page_plans_as_the_planner_does(browser):
    for curve in browser.run("Object.keys(CURVES)"):
        browser.run(f"choose($('#curve'), {json.dumps(curve)}); take(CURVES[curve()][0])")
        L, budgets = np.array(browser.run("L")), browser.run("BUDGETS")
        D, wanted = len(L), planner.costs(L, range(1, 251))
        assert np.abs(np.array(browser.run("best.costs")) - [*wanted.values()]).max() < 1e-8
        for name, plan in (("planned", lambda n: planner.plan(L, n)),
                           ("even", lambda n: planner.uniform_plan(1, D, n)),
                           ("cosine", lambda n: planner.cosine_plan(1, D, n))):
            found = browser.run(f"BUDGETS.map(PLANS.{name})")
            for n, calls in [*zip(budgets, found)][::7]:
                assert len(calls) == n and sum(k for _, k in calls) == D
                cost = planner.plan_cost(L, [(1, t, k) for t, k in calls])
                assert cost == pytest.approx(planner.plan_cost(L, plan(n)), abs=1e-8)
    browser.run("choose($('#curve'), '4/√t + 0.05'); take(CURVES[curve()][0])")
    browser.run("toCalls(BUDGETS.indexOf(10))")
    assert "planned 0.591, even 0.823" in browser.run("$('#price').textContent")


def test_the_curve_is_drawn_by_hand_and_never_rises(browser):
    browser.run("$('#blocks').scrollIntoView()")
    at = browser.run("(box => [box.x + box.width / 2, box.y + box.height / 3])"
                     "($('#blocks svg').getBoundingClientRect())")
    for kind, buttons in (("mousePressed", 1), ("mouseMoved", 1), ("mouseReleased", 0)):
        browser.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left",
                     buttons=buttons)
    found = browser.run("[curve(), L, $('#price').textContent]")
    assert found[0] == "drawn" and (np.diff(found[1]) <= 0).all() and "NaN" not in found[2]


def test_the_objective_of_the_page_is_the_example_of_exercise_2(browser):
    assert "2.511 nats" in browser.run("$('#loss').textContent")
    for name, exact in zip(browser.run("Object.keys(TOYS)"), (3.060, math.log(12))):
        browser.run(f"choose($('#toy'), {json.dumps(name)}); toT()")
        assert f"on -log p(x): {exact:.3f}." in browser.run("$('#loss').textContent")
    browser.run("$('#cards').children[0].focus()")
    browser.press("ArrowRight")
    assert browser.run("generated") == [1, 3, 2]


def test_every_symbol_and_step_of_the_boxes_lights_up_on_both_sides(browser):
    browser.run("$('#boxes').scrollIntoView()")
    for name in browser.run("boxes.map(box => box.dataset.name)"):
        browser.run(f"document.querySelector('input[value=\"{name}\"]').click()")
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
    browser.run("$('#sentence').value = 'a ____ b'; start().then(() => writeOn(2))")
    browser.run("document.querySelector('#which input').click()")
    browser.run("document.body.tabIndex = -1; document.body.focus()")
    controls = "[...document.querySelectorAll('input, button, select')]"
    for _ in range(250):
        browser.press("Tab")
        place = browser.run(f"{controls}.indexOf(document.activeElement)")
        if place in reached or place < 0:
            continue
        reached.add(place)
        if browser.run("document.activeElement.type") != "range":
            continue
        browser.run("document.activeElement.value = document.activeElement.min;"
                    "document.activeElement.dispatchEvent(new Event('input'))")
        now = "(one => [one.value, one.closest('section').textContent])(document.activeElement)"
        before = browser.run(now)
        browser.press("ArrowRight")
        one = browser.run("document.activeElement.id")
        assert all(a != b for a, b in zip(before, browser.run(now))), one
    wanted = browser.run(f"{controls}.flatMap((one, i) => one.disabled || one.hidden || "
                         "one.type === 'radio' && !one.checked ? [] : [i])")
    assert reached >= {*wanted} and "zoom=1" in browser.run("location.hash")


def test_names_in_a_chart_are_no_markup(browser):
    browser.run("window.place = document.createElement('div'); window.bad = '<img src=x>';"
                "window.axis = {from: 0, to: 1, words: bad};"
                "chart(place, axis, axis, [{points: [[0, 0]], name: bad, at: 0, key: bad}])")
    assert browser.run("place.querySelectorAll('img').length") == 0
    assert browser.run("place.textContent.split(bad).length") == 5


def test_what_the_page_shows_is_what_was_recorded(browser):
    assert browser.run("coded()") == page.coded("abacabab")
    for name in ("digit", "speech"):
        one = browser.run(f"({{...{name}, x: [...{name}.x], sigma: [...{name}.sigma]}})")
        x, sigma = torch.tensor([one["x"]]), torch.tensor(one["sigma"]).view(one["S"], 1, -1)
        model = UpscaleARDM(None, x.shape[1], one["K"], one["b"])
        for n in (0, len(one["plan"]) * 2 // 3, len(one["plan"])):
            s, t, _ = (one["plan"] + [[model.S, model.D + 1, 0]])[n]
            wanted = model.net_input(x, sigma[s - 1] < t, s)[0].tolist()
            assert browser.run(f"stateOf({name}, {n}).map(([low]) => low)") == wanted
        assert wanted == one["x"]                          # at the end all is known
    browser.run("toPixel(10 * 28 + 15); $('#pixels').value = 160; drawDigit()")
    x = browser.run("digit.x[10 * 28 + 15]")
    digits = " ".join(str(x // unit % 4) for unit in (64, 16, 4, 1))
    assert f"digits {digits} (base 4); the value is {x}." in browser.run(
        "$('#digit .digits').textContent")
    browser.run("toValue(5); toStage(2)")
    assert "0.1 + 0.3 = 0.40, divided by 0.60: 0.667" in browser.run("$('#sum').textContent")


@pytest.fixture
def other(browser, tmp_path):
    other = Browser(shutil.which("chromium"), tmp_path / "chromium")
    yield other
    other.process.kill()
    assert not [one for one in other.events if one["method"] == "Runtime.exceptionThrown"]


def test_a_view_can_be_sent_and_fits_on_a_phone(other):
    address = "#step=3&cards=911&message=z&luck=x&kind=cosine&calls=5&zoom=3&sentence=to+be+_&at=)"
    other.open(page.HERE / "index.html", 360, address)
    assert other.run("[$('#step').value, kind(), $('#calls').value, $('#zoom').value, $('#sentence'"
                     ").value, document.documentElement.scrollWidth]") == [
        "3", "cosine", "5", "3", "to be _", 360]           # what makes no sense is left out
    other.run("document.querySelectorAll('li[data-k]')[3].click()")
    assert other.run("$('pre.under').textContent").strip() == "m = sigma < t[:, None]"
    other.call("Emulation.setScriptExecutionDisabled", value=True)
    other.open(page.HERE / "index.html", 360)
    assert other.run("[...document.querySelectorAll('button, input, fieldset')].filter("
                     "one => one.offsetParent).length") == 0


@pytest.mark.skipif(ASSIGNMENT, reason="this is an assignment itself")
def test_a_page_without_solutions_has_its_figures_and_not_the_code(browser, other, tmp_path):
    (tmp_path / "index.html").write_text(page.build(solutions=False), "utf-8")
    other.open(tmp_path / "index.html")
    browser.run("choose($('#curve'), 'text8, measured'); take(CURVES[curve()][0], 40)")
    other.run("toCalls(40)")
    for code in ("BUDGETS.map(PLANS.planned)", "coded()", "$('#price').textContent"):
        assert other.run(code) == browser.run(code)
    gone = ("cheapest", "encode", "Decoder", "planned", "groups")
    assert other.run(f"[{', '.join(f'typeof {name}' for name in gone)}]") == 5 * ["undefined"]
    assert other.run("document.querySelectorAll('pre').length") == 0
