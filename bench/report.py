"""What every benchmark here shares: figures of a sample, a table, JSON, a plot, a progress bar, the machine.

Knows nothing of agentbus but its version.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import apsw
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

__all__ = ["AgainstOption", "JsonOption", "PlotOption", "Report", "figures", "median", "percentile", "progress"]

_T = TypeVar("_T")

JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write the figures and all samples here as JSON.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="OUT", help="Draw them here, .svg or .png; needs pip install '.\\[bench]'."),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="COMMAND",
        help="Measure another MCP server too, in turn with ours, and show the ratios. It has to offer "
        "send_message{to,text} and to push notifications/claude/channel. {name} and {home} in the command become the "
        "session's name and an empty folder of the run, as in 'env BUS_NAME={name} BUS_HOME={home} other-server'.",
    ),
]


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lies, by nearest rank."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(samples: Sequence[float]) -> float:
    """The middle of the samples."""
    return percentile(samples, 0.5)


def figures(samples: Sequence[float], digits: int = 3) -> dict[str, float]:
    """What is reported of a sample, in its own unit."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(percentile(samples, share), digits) for name, share in shares.items()}


def progress(steps: Iterable[_T], what: str, total: int | None = None) -> Iterable[_T]:
    """`steps`, with a bar on a terminal's stderr."""
    console = Console(stderr=True)
    return track(steps, what, total=total, console=console, transient=True, disable=not console.is_terminal)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "agentbus": version("agentbus-local"),
        "mcp": version("mcp"),
    }


@dataclass
class Report:
    """The tables of one benchmark run, and what is to be drawn."""

    question: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _plots: list[tuple[str, str, str, Any]] = field(default_factory=list)

    def add(self, table: str, what: str, **columns: float | int | str) -> None:
        """One row. The unit is in the table's name or the column's."""
        self.tables.setdefault(table, []).append({"": what, **columns})

    def add_samples(self, table: str, samples: Mapping[str, Sequence[float]], **columns: float | int | str) -> None:
        """One row of p50, p90, p99 and max for each sample; the samples go to the JSON, and are drawn."""
        for what, values in samples.items():
            self.add(table, what, **figures(values), **columns)
        self.samples.setdefault(table, {}).update({what: list(values) for what, values in samples.items()})
        self._plots.append(("histogram", table, "", dict(samples)))

    def draw_bars(self, title: str, unit: str, values: Mapping[str, float]) -> None:
        """To be drawn: one bar for each."""
        self._plots.append(("bars", title, unit, dict(values)))

    def draw_lines(self, title: str, x_axis: str, lines: Mapping[str, Mapping[float, float]]) -> None:
        """To be drawn: one line for each, over a logarithmic axis."""
        self._plots.append(("lines", title, x_axis, {name: dict(points) for name, points in lines.items()}))

    def finish(self, json_to: Path | None, plot_to: Path | None) -> None:
        """Print the tables, and write what was asked for."""
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(self.question, style="bold", highlight=False)
        for title, rows in self.tables.items():
            table = Table(title=title, title_justify="left")
            columns = list(dict.fromkeys(column for row in rows for column in row))
            for column in columns:
                table.add_column(column, justify="left" if column == "" else "right", overflow="fold")
            for row in rows:
                table.add_row(*(_shown(row.get(column, "")) for column in columns))
            console.print(table)
        if json_to is not None:
            facts = {
                "question": self.question,
                "date": datetime.now(UTC).date().isoformat(),
                "command": " ".join(["python -m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
                "machine": machine(),
                "tables": self.tables,
                "samples": self.samples,
            }
            json_to.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if plot_to is not None:
            self._draw(plot_to)

    def _draw(self, path: Path) -> None:
        try:
            import matplotlib as mpl
        except ImportError:
            raise typer.BadParameter("--plot needs matplotlib: pip install '.[bench]'") from None
        mpl.use("agg")
        from matplotlib import pyplot

        # Text as text and no date in it: a picture that is made again changes only where the figures do.
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "agentbus", "font.size": 9})
        count = len(self._plots)
        figure, all_axes = pyplot.subplots(count, 1, figsize=(7, 2.6 * count), squeeze=False, layout="constrained")
        for axes, (kind, title, label, data) in zip(all_axes[:, 0], self._plots, strict=True):
            axes.set_title(title, loc="left", fontsize=9)
            _DRAWERS[kind](axes, label, data)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
        pyplot.close(figure)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _histogram(axes: Any, _label: str, samples: dict[str, list[float]]) -> None:
    everything = [value for values in samples.values() for value in values]
    # The slowest hundredth would squeeze all the others into one bar; it is in the table.
    high = percentile(everything, 0.99)
    for name, values in samples.items():
        axes.hist(values, bins=80, range=(0, high), histtype="step", label=f"{name}: p50 {median(values):.3g}")
    axes.set_ylabel("rounds")
    axes.legend(fontsize=8)


def _bars(axes: Any, unit: str, values: dict[str, float]) -> None:
    bars = axes.barh(list(values), list(values.values()), color="#4c72b0")
    axes.bar_label(bars, labels=[_shown(value) for value in values.values()], fontsize=8, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _lines(axes: Any, x_axis: str, lines: dict[str, dict[float, float]]) -> None:
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_axis)
    axes.legend(fontsize=8)


_DRAWERS = {"histogram": _histogram, "bars": _bars, "lines": _lines}
