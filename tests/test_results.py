"""What results/ measures, writes and draws."""
import json
import shutil
from unittest import mock

from conftest import seeded

import pytest
import torch
from torch import nn

import data as datasets
import nets
import train
from ardm import UpscaleARDM, draw
from results import bench, check, orders, page, plot, recipes
from test_ardm import ONE, Table, all_x


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
    row = kept["mnist"]["rows"][0]
    row["bits"] += 0.001
    with pytest.raises(ValueError, match=f"{row['bits']:.3f} ± "):
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
