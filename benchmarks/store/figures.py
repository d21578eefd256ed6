"""What a benchmark found: figures with what they are held to, and lines for plots; as a table, JSON and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured value, and what it was measured against in the same run.

    at_least, at_most: what the ratio to `against` is held to; where there is no `against`, the value itself.
    samples: the values that `value` is the median of, as measured, in the same unit.
    """

    name: str
    value: float
    unit: str
    against: float | None = None
    against_name: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    samples: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        return None if self.against is None else self.value / self.against

    @property
    def is_met(self) -> bool | None:
        """None: held to nothing."""
        held = self.value if self.ratio is None else self.ratio
        if self.at_least is not None:
            return held >= self.at_least
        return None if self.at_most is None else held <= self.at_most

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "against": self.against,
            "against_name": self.against_name,
            "ratio": self.ratio,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": self.is_met,
            "note": self.note,
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class Series:
    """Lines of one plot.  # lines: name -> points (x, y)"""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass
class Section:
    """What one part of the benchmark found. facts: outcomes that are no numbers, by name."""

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "figures": [figure.to_json() for figure in self.figures],
            "series": [
                {"title": s.title, "x": s.x_label, "y": s.y_label, "lines": {n: list(p) for n, p in s.lines.items()}}
                for s in self.series
            ],
            "facts": self.facts,
        }


def alternate(
    rounds: int, contenders: Mapping[str, Callable[[int], float]], step: Callable[[], None]
) -> dict[str, list[float]]:
    """Run all contenders `rounds` times, one after another, each round beginning with the next one.

    Each gets a number that moves on with every call, to choose its buffers by, so that none finds in the CPU's caches
    what the one before it left. Returns each one's answers.
    """
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            found[name].append(contenders[name](turn * len(names) + place))
            step()
    return found


def rates(seconds: Sequence[float], nbytes: int) -> tuple[float, ...]:
    """GB/s of each sample."""
    return tuple(nbytes / s / 1e9 for s in seconds)


def rate(
    name: str,
    found: Mapping[str, Sequence[float]],
    which: str,
    against: str,
    nbytes: int,
    *,
    at_least: float | None = None,
    note: str = "",
) -> Figure:
    """The figure of one contender's rate against another's, from seconds per `nbytes`."""
    samples = rates(found[which], nbytes)
    return Figure(
        name,
        statistics.median(samples),
        "GB/s",
        statistics.median(rates(found[against], nbytes)),
        against,
        at_least,
        note=note,
        samples=samples,
    )


def table(section: Section) -> Table:
    """The section's figures for a terminal; what is missed is red."""
    found = Table(title=section.title, title_justify="left")
    for column in ("", "median", "", "against", "ratio", "held to"):
        found.add_column(column, justify="left" if column in ("", "against") else "right")
    for figure in section.figures:
        colour = {True: "green", False: "red", None: "default"}[figure.is_met]
        found.add_row(
            figure.name,
            _short(figure.value),
            figure.unit,
            "" if figure.against is None else f"{_short(figure.against)} {figure.against_name}",
            "" if figure.ratio is None else f"[{colour}]{figure.ratio:.2f}[/]",
            f"[{colour}]{figure.bound}[/]",
        )
    return found


def facts(section: Section) -> Table:
    """The section's outcomes that are no numbers."""
    found = Table.grid(padding=(0, 2))
    for name, fact in section.facts.items():
        found.add_row(name, fact)
    return found


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plot(section: Section, directory: Path) -> list[Path]:
    """Pictures of a section. Raises ImportError: matplotlib is not installed (the extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    compared = [(figure, figure.ratio) for figure in reversed(section.figures) if figure.ratio is not None]
    if compared:
        picture, axes = pyplot.subplots(figsize=(9, 0.8 + 0.42 * len(compared)))
        for row, (figure, ratio) in enumerate(compared):
            colour = {True: "tab:green", False: "tab:red", None: "tab:blue"}[figure.is_met]
            axes.barh(row, ratio, color=colour, height=0.6)
            bound = figure.at_least if figure.at_least is not None else figure.at_most
            if bound is not None:
                axes.plot([bound, bound], [row - 0.42, row + 0.42], color="black", linewidth=2)
        axes.set_yticks(range(len(compared)), [f"{f.name}\nagainst {f.against_name}" for f, _ in compared])
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("ratio; the black mark is what it is held to")
        axes.set_title(section.title, fontsize=10)
        made.append(_saved(picture, directory / f"store-{section.name}.png"))
    for number, series in enumerate(section.series):
        picture, axes = pyplot.subplots(figsize=(7, 4))
        for name, points in series.lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(series.x_label)
        axes.set_ylabel(series.y_label)
        axes.set_title(series.title, fontsize=10)
        axes.legend(fontsize=8)
        made.append(_saved(picture, directory / f"store-{section.name}-{number}.png"))
    return made


def _saved(picture: Any, path: Path) -> Path:
    from matplotlib import pyplot

    picture.tight_layout()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)
    return path
