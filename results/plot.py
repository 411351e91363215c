"""A run in one picture: python -m results.plot out/pydoc writes results.png into its folder.

Loss over time from log.csv, L_t, and the price of few calls (the paper's Fig. 3) from results.json.
"""
import csv
import io
import json
from pathlib import Path

import numpy as np

import data as datasets
import planner


def draw(results, log):
    """The picture as the bytes of a PNG. log: rows of log.csv, without its head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg          # needs no screen
    from matplotlib.figure import Figure
    L = np.array(results["L_smooth"])
    budgets = np.unique(np.geomspace(len(L), L.size, 30).round().astype(int)).tolist()
    costs = [cost / L.shape[1] for cost in planner.costs(L, budgets).values()]
    exact = [row for row in results["calls"] if "bits" in row]
    figure = Figure(figsize=(15, 4))
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for column, name in ((2, "training"), (3, "validation")):
        left.plot([float(row[1]) for row in log], [float(row[column]) for row in log], label=name)
    left.set(xlabel="seconds", ylabel="bits per dimension")
    for s, row in enumerate(L, start=1):
        middle.plot(range(1, len(row) + 1), row, label=f"stage {s}")
    middle.set(xlabel="t", ylabel="loss component $L_t$, bits", ylim=0)
    right.plot(budgets, costs, label="predicted from $L_t$")
    right.plot([row["calls"] for row in exact], [row["bits"] for row in exact], "o",
               label="measured")
    right.set(xlabel="network calls", ylabel="bits per dimension", xscale="log")
    for axes in (left, middle, right):
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    return file.getvalue()


def main():
    parser = datasets.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of a completed run of train.py")
    folder = parser.parse_args().folder
    results = json.loads(datasets.read(folder / "results.json"))
    log = list(csv.reader(datasets.read(folder / "log.csv").decode().splitlines()))[1:] if (
        folder / "log.csv").exists() else []
    datasets.write(folder / "results.png", draw(results, log))
    print(f"{folder / 'results.png'} written")


if __name__ == "__main__":
    datasets.run(main)
