"""Pictures of a study, for its page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa_engine.report.figures import BLUE, GREEN, GREY, ORANGE, new_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def history(document: dict[str, Any]) -> Figure:
    """The objective by trial, and the best so far."""
    complete = _complete(document)
    figure, axes = _canvas(8, 3.6, "Trials")
    axes.plot([row["trial"] for row in complete], [row["value"] for row in complete], "o", color=BLUE, label="complete")
    better = min if document["direction"] == "minimize" else max
    best = [better(row["value"] for row in complete[: place + 1]) for place in range(len(complete))]
    axes.step([row["trial"] for row in complete], best, where="post", color=ORANGE, label="best so far")
    for state, colour in (("pruned", GREY), ("failed", "#000000")):
        numbers = [row["trial"] for row in document["trials"] if row["state"] == state]
        if numbers:
            floor = [0.02] * len(numbers)
            axes.plot(numbers, floor, "x", color=colour, label=state, transform=axes.get_xaxis_transform())
    axes.set_xlabel("trial")
    axes.set_ylabel(document["objective"])
    whole_numbers(axes.xaxis, 12)
    axes.legend(frameon=False, fontsize=9)
    return figure


def importance_bars(document: dict[str, Any]) -> Figure:
    """The share of each setting, largest on top."""
    shares = sorted(document["importance"].items(), key=lambda pair: pair[1])
    figure, axes = _canvas(8, 1.1 + 0.4 * len(shares), "Importance")
    axes.barh([name for name, _ in shares], [share for _, share in shares], color=BLUE, height=0.6)
    for place, (_, share) in enumerate(shares):
        axes.text(share + 0.01, place, f"{share:.0%}", va="center", fontsize=9)
    axes.set_xlim(0, max(0.1, *(share for _, share in shares)) * 1.15)
    axes.set_xticks([])
    return figure


def slices(document: dict[str, Any]) -> Figure:
    """The objective against each setting."""
    spaces, complete = document["space"], _complete(document)
    columns = min(3, len(spaces))
    rows = -(-len(spaces) // columns)
    figure = new_figure(2.9 * columns + 0.4, 2.7 * rows + 0.3)
    for place, space in enumerate(spaces):
        axes = figure.add_subplot(rows, columns, place + 1)
        known = [row for row in complete if space["name"] in row["values"]]
        values = [row["values"][space["name"]] for row in known]
        if space["choices"]:
            places = {str(choice): number for number, choice in enumerate(space["choices"])}
            values = [places[str(value)] for value in values]
            axes.set_xticks(range(len(places)), list(places))
            axes.set_xlim(-0.5, len(places) - 0.5)
        elif space["log"]:
            axes.set_xscale("log")
        axes.scatter(values, [row["value"] for row in known], c=BLUE, s=22, alpha=0.75)
        best = document["best"]
        for row, value in zip(known, values, strict=True):
            if best is not None and row["trial"] == best["trial"]:
                axes.scatter([value], [row["value"]], c=ORANGE, s=60, marker="*", zorder=3)
        axes.set_title(space["name"], fontsize=10, loc="left")
        _plain(axes)
        if place % columns == 0:
            axes.set_ylabel(document["objective"], fontsize=9)
    figure.tight_layout()
    return figure


def curves(document: dict[str, Any]) -> Figure:
    """Held-out loss on the way: the best trial, the complete ones, those that were ended."""
    figure, axes = _canvas(8, 3.6, "Held-out loss on the way")
    best = document["best"]["trial"] if document["best"] else None
    named: set[str] = set()
    for row in document["trials"]:
        if not row["losses"]:
            continue
        kind = "best" if row["trial"] == best else row["state"]
        colour, width = {"best": (ORANGE, 2.2), "complete": (BLUE, 1.0), "pruned": (GREY, 0.8)}.get(kind, (GREEN, 0.8))
        steps, losses = zip(*row["losses"], strict=True)
        label = None if kind in named else kind
        named.add(kind)
        axes.plot(steps, losses, color=colour, linewidth=width, marker="." if len(steps) == 1 else None, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _complete(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["trials"] if row["state"] == "complete"]


def _canvas(width: float, height: float, title: str) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, loc="left", weight="bold")
    _plain(axes)
    figure.set_layout_engine("tight")
    return figure, axes


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
