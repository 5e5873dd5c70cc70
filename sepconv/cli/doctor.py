"""`sepconv doctor`: whether everything that sepconv needs is here and right."""

from argparse import Namespace
from dataclasses import asdict

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from sepconv.cli.findings import Finding, findings
from sepconv.cli.result import Result
from sepconv.cli.sources.opening import chosen_device

_STYLES = {"good": "green", "note": "yellow", "fault": "red"}


def run(options: Namespace) -> Result:
    """Look at everything, and say what to do about each finding."""
    found = list(findings(chosen_device(options.device)))
    faults = [f"{f.name}: {f.found}; {f.advice}" for f in found if f.status == "fault"]
    return Result({"findings": [asdict(finding) for finding in found]}, [_table(found)], faults)


def _table(found: list[Finding]) -> Table:
    table = Table(title="sepconv doctor", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("")
    table.add_column("found, and what to do", overflow="fold")
    for finding in found:
        told = Text(finding.found)
        if finding.advice:
            told.append(f"\n{finding.advice}", style="bold")
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(finding.name, status, told)
    return table
