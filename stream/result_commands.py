"""The commands that open results: show, compare, export."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from stream.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = Annotated[Path | None, typer.Option("--out", help="Picture to write (.png, .pdf, .svg).", metavar="FILE")]


def show(
    result: Annotated[Path, typer.Argument(help="Result file of xpcs-stream, boost_corr or the APS.")],
    out: Picture = None,
) -> None:
    """Tell what a result holds, with a fit of every q, and draw it.

    xpcs-stream show result.h5 --out g2.png

    Fitted is g2 = baseline + contrast exp(-2 rate tau); where there is g2 of successive parts of the run, also that of
    an early and a late one. Drawn are g2, the two-time correlation if there is one, and of our own results g2 of parts
    of the run, the mean image, scattering and intensity.
    """
    from stream.figure import draw
    from stream.result import read
    from stream.summary import dynamics, facts, table_of_ageing, table_of_fits

    curves = read(result)
    found = dynamics(curves)
    if out is not None:
        save(draw(result), out)
    console = Console()
    show_facts(console, facts(curves, found))
    console.print(table_of_fits(curves, found))
    if curves.segments is not None and curves.segments.late:
        console.print()
        console.print(table_of_ageing(curves, curves.segments))
    if out is not None:
        typer.echo(out)


def compare(
    a: Annotated[Path, typer.Argument(help="Result file of xpcs-stream, boost_corr or the APS ...", metavar="A")],
    b: Annotated[Path, typer.Argument(help="... and another.", metavar="B")],
    out: Picture = None,
    max_z: Annotated[
        float | None,
        typer.Option(min=0, help="End with status 1 if any difference is larger, in units of its error.", metavar="Z"),
    ] = None,
    q_tolerance: Annotated[
        float, typer.Option(min=0, help="Bins are the same whose q differ by less, relative.")
    ] = 1e-3,
) -> None:
    """Lay two results over each other: how far their g2 lie apart, in units of their errors.

    xpcs-stream compare result.h5 theirs.hdf --max-z 5 --out both.png

    z is the difference of g2 at the same q and delay over the root of the sum of their squared errors. Of two
    measurements of the same dynamics the median of |z| is 0.67; two programs that correlate the same frames share their
    noise, and lie much nearer.
    """
    from stream.compare import compare as compared
    from stream.result import read
    from stream.summary import table_of_differences

    of_a, of_b = read(a), read(b)
    found = compared(of_a, of_b, q_tolerance=q_tolerance)
    if out is not None:
        from stream.figure import draw_comparison

        save(draw_comparison(of_a, of_b, found), out)
    console = Console()
    console.print(table_of_differences(of_a, found))
    for note in found.notes:
        typer.echo(f"note: {note}")
    bins = f"{len(found.bins)} bin{'s' * (len(found.bins) != 1)}"
    typer.echo(f"{bins}, {found.n_delays} delays in common: median |z| {found.median:.3g}, max |z| {found.largest:.3g}")
    if out is not None:
        typer.echo(out)
    if max_z is not None and found.largest > max_z:
        typer.echo(f"xpcs-stream: max |z| {found.largest:.3g} is above {max_z:g}", err=True)
        raise typer.Exit(1)


def export(
    result: Annotated[Path, typer.Argument(help="Result file of xpcs-stream, boost_corr or the APS.")],
    to: Annotated[Path, typer.Option(help="File to write: .csv, .nc (NetCDF) or .zarr.", metavar="FILE")],
) -> None:
    """Write g2 for other tools.

    xpcs-stream export result.h5 --to g2.csv

    In a .csv there is one line for every bin and delay, below one line that names the columns with their units. A .nc
    or .zarr is an xarray.Dataset with units, and the two-time correlation if there is one.
    """
    from stream.export import export as exported
    from stream.result import read

    exported(read(result), to)
    typer.echo(to)


def save(figure: "Figure", out: Path) -> None:
    """Write a picture.

    Raises
    ------
    ConfigError
        It cannot be written there, or is of no format that is known.
    """
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out}: {error}") from None


def show_facts(console: Console, facts: Mapping[str, object]) -> None:
    """Print names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        text = str(value)
        table.add_row(name, text if len(text) < 300 else text[:300] + " ...")
    console.print(table)
