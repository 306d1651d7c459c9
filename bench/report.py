"""What all benchmarks share: figures of a sample, tables, JSON, plots, a progress bar, the machine, exit codes.

This module knows nothing about agentbus except its version.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import apsw
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

__all__ = [
    "AgainstOption",
    "Failed",
    "JsonOption",
    "PlotOption",
    "Report",
    "figures",
    "main",
    "median",
    "percentile",
    "progress",
]

_T = TypeVar("_T")

# The base class of what typer raises for an invalid command line. typer exports the child class, but not this one.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Failed(Exception):
    """Nothing could be measured; the sentence says why."""


def _interrupt(_number: int, _frame: object) -> NoReturn:
    # Only the first signal counts: a second one must not interrupt the cleanup.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(command: Callable[..., None]) -> NoReturn:
    """Run `command` as the command line of its module. An error is one line on stderr, never a traceback.

    Exit codes: 0 measured, 1 failed, 2 usage error, 130 interrupted.
    """
    # Our handler, not an event loop's: that one would only cancel a task and go on waiting for a session.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    # Each session gets its own settings of agentbus. The variables of this shell must not reach some of the sessions.
    for variable in list(os.environ):
        if variable.startswith(("AGENTBUS_", "CLAUDE")):
            del os.environ[variable]
    # With this set, a checkout compiles its modules at each start; what is installed has them compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    program = f"python -m bench.{Path(sys.argv[0]).stem}"
    try:
        code = app(prog_name=program, standalone_mode=False) or 0
    except _UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        print(f"{program}: {message.rstrip('.')}; see --help", file=sys.stderr)
        code = 2
    except Failed as error:
        print(f"{program}: {error}", file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code)


JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write the figures and all samples here as JSON.")
]


def _can_plot(path: Path | None) -> Path | None:
    """Check before the run, not after it, that the plot can be drawn. Raises BadParameter if not."""
    if path is not None:
        if path.suffix not in (".svg", ".png"):
            raise typer.BadParameter(f"--plot {path} has to end in .svg or .png")
        try:
            import matplotlib as mpl
        except ImportError:
            raise typer.BadParameter("--plot needs matplotlib: pip install '.[bench]'") from None
        mpl.use("agg")
    return path


PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        callback=_can_plot,
        metavar="OUT",
        help="Draw them here, .svg or .png; needs pip install '.\\[bench]'.",
    ),
]


def _is_command(words: str | None) -> str | None:
    if words is not None:
        try:
            if not shlex.split(words):
                raise typer.BadParameter("--against is empty: give the command that starts the other server")
        except ValueError as error:
            raise typer.BadParameter(f"--against {words} is no command line: {error}") from None
    return words


AgainstOption = Annotated[
    str | None,
    typer.Option(
        callback=_is_command,
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


def figures(samples: Sequence[float], digits: int = 3) -> dict[str, float | int]:
    """The figures of a sample, in its own unit, and the number of values."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: round(percentile(samples, share), digits) for name, share in shares.items()} | {"n": len(samples)}


def progress(steps: Iterable[_T], what: str, total: int | None = None) -> Iterable[_T]:
    """Pass on `steps`, and show a progress bar if stderr is a terminal."""
    console = Console(stderr=True)
    return track(steps, what, total=total, console=console, transient=True, disable=not console.is_terminal)


def machine() -> dict[str, str]:
    """The facts on which the figures depend."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "agentbus": version("agentbus-local"),
        "mcp": version("mcp"),
        "clock": time.get_clock_info("perf_counter").implementation,
        # The other load on this machine: figures from a busy machine are useless.
        "load before": f"{_LOAD_BEFORE:.2f}",
    }


_LOAD_BEFORE = os.getloadavg()[0]


@dataclass
class Report:
    """The tables and plots of one benchmark run."""

    question: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _plots: list[tuple[str, str, str, Any]] = field(default_factory=list)

    def add(self, table: str, what: str, **columns: float | int | str) -> None:
        """Add one row. The unit is in the name of the table or of the column."""
        self.tables.setdefault(table, []).append({"": what, **columns})

    def add_samples(self, table: str, samples: Mapping[str, Sequence[float]], **columns: float | int | str) -> None:
        """Add one row for each sample: p50, p90, p99, max and the count. The samples go to the JSON."""
        for what, values in samples.items():
            self.add(table, what, **figures(values), **columns)
        self.samples.setdefault(table, {}).update({what: list(values) for what, values in samples.items()})

    def draw_histogram(self, title: str, unit: str, samples: Mapping[str, Sequence[float]]) -> None:
        """Plan a histogram with one outline for each sample."""
        self._plots.append(("histogram", title, unit, dict(samples)))

    def add_ratio(self, table: str, what: str, above: str, below: str, *columns: str) -> None:
        """Add one row: the row `above` divided by the row `below`, in the columns that both have."""
        rows = {str(row[""]): row for row in self.tables.get(table, [])}
        if above in rows and below in rows:
            pairs = {column: (rows[above].get(column), rows[below].get(column)) for column in columns}
            ratios = {
                column: round(over / under, 2)
                for column, (over, under) in pairs.items()
                if isinstance(over, (int, float)) and isinstance(under, (int, float)) and under
            }
            if ratios:
                self.add(table, what, **ratios)

    def target(
        self, what: str, measured: float, unit: str, most: float | None = None, least: float | None = None
    ) -> None:
        """Add one target: at most, or at least. Shown, never enforced, because it depends as much on the machine."""
        bound = f"<= {most:,g}" if most is not None else f">= {least:,g}"
        is_met = (most is None or measured <= most) and (least is None or measured >= least)
        self.add("targets", what, measured=round(measured, 3), unit=unit, target=bound, met="yes" if is_met else "no")

    def draw_bars(self, title: str, unit: str, values: Mapping[str, float]) -> None:
        """Plan a plot with one bar for each value."""
        self._plots.append(("bars", title, unit, dict(values)))

    def draw_lines(self, title: str, x_axis: str, y_axis: str, lines: Mapping[str, Mapping[float, float]]) -> None:
        """Plan a plot with one curve for each line, over a logarithmic axis."""
        points = {name: dict(line) for name, line in lines.items()}
        self._plots.append(("lines", title, f"{x_axis}|{y_axis}", points))

    def finish(self, json_to: Path | None, plot_to: Path | None) -> None:
        """Write the files that were asked for, and print the tables. Raises Failed when a file cannot be written."""
        if "targets" in self.tables:
            self.tables["targets"] = self.tables.pop("targets")  # the summary stands at the end
        try:
            if json_to is not None:
                json_to.write_text(json.dumps(self._facts(), indent=1) + "\n", encoding="utf-8")
            if plot_to is not None:
                self._draw(plot_to)
        except OSError as error:
            raise Failed(f"{error.filename} cannot be written: {error.strerror}") from None
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(self.question, style="bold", highlight=False)
        for title, rows in self.tables.items():
            table = Table(title=title, title_justify="left")
            columns = list(dict.fromkeys(column for row in rows for column in row))
            for column in columns:
                table.add_column(column, justify="left" if column in ("", "note") else "right", overflow="fold")
            for row in rows:
                table.add_row(*(_shown(row.get(column, "")) for column in columns))
            console.print(table)

    def _facts(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "date": datetime.now(UTC).date().isoformat(),
            "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "machine": machine(),
            "tables": self.tables,
            "samples": self.samples,
        }

    def _draw(self, path: Path) -> None:
        from matplotlib import pyplot

        # Text stays text, and there is no date: a picture that is made again changes only where the figures change.
        pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "agentbus", "font.size": 9})
        # In inches. Each bar needs its own line; the other kinds have a fixed height.
        heights = [0.8 + 0.24 * len(data) if kind == "bars" else 2.6 for kind, _, _, data in self._plots]
        figure, all_axes = pyplot.subplots(
            len(heights), 1, figsize=(8, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
        )
        for axes, (kind, title, label, data) in zip(all_axes[:, 0], self._plots, strict=True):
            axes.set_title(title, loc="left", fontsize=9)
            _DRAWERS[kind](axes, label, data)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
        pyplot.close(figure)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _histogram(axes: Any, unit: str, samples: dict[str, list[float]]) -> None:
    # The slowest values would squeeze all others into one bar. They are in the table.
    high = max(percentile(values, 0.97) for values in samples.values())
    for name, values in samples.items():
        label = f"{name}: p50 {median(values):.3g}"
        weights = [1 / len(values)] * len(values)
        axes.hist(values, bins=60, range=(0, high), weights=weights, histtype="step", label=label)
    axes.set_ylabel("share")
    axes.set_xlabel(unit)
    axes.legend(fontsize=7)


def _bars(axes: Any, unit: str, values: dict[str, float]) -> None:
    bars = axes.barh(list(values), list(values.values()), color="#4c72b0")
    axes.bar_label(bars, labels=[_shown(value) for value in values.values()], fontsize=8, padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _lines(axes: Any, label: str, lines: dict[str, dict[float, float]]) -> None:
    x_axis, _, y_axis = label.partition("|")
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_axis)
    axes.set_ylabel(y_axis)
    axes.legend(fontsize=7)


_DRAWERS = {"histogram": _histogram, "bars": _bars, "lines": _lines}
