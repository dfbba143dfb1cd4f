"""`scripts/bench NAME [--quick] [-o FILE]`: runs one benchmark by name. It measures nothing itself."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import click
from rich.console import Console

from benchmarks.result import Result, show, write


def names() -> list[str]:
    """The modules beside this one that define `run`, found without importing them."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _defines_run(path))


def _defines_run(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in ast.parse(path.read_text()).body)


def _list(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        for name in names():
            click.echo(name)
        context.exit()


@click.command()
@click.argument("name")
@click.option("--quick", is_flag=True, help="Fewer repetitions: ends within 60 s.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there as JSON.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name the benchmarks and exit.")
def main(name: str, quick: bool, output: Path | None) -> None:
    """Runs benchmark NAME and shows its figures against their targets. A missed target is shown; it is no failure of the command."""
    if name not in names():
        raise click.BadParameter(f"no benchmark {name!r}; there are: {', '.join(names()) or 'none yet'}", param_hint="NAME")
    result: Result = importlib.import_module(f"benchmarks.{name}").run(quick)
    show(name, result, Console())
    if output:
        write(output, name, result)
        click.echo(f"written to {output}")


if __name__ == "__main__":
    main(prog_name="scripts/bench")
