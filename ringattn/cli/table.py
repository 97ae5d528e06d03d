"""A report as a table, and below it what to do about each finding."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringattn.check import Report


def show(report: Report, console: Console) -> None:
    """Prints the report."""
    s = report.settings
    table = Table(
        title=f"{s.model} on {s.ranks} ranks, {s.seqlen} tokens, {s.documents} documents", title_justify="left"
    )
    for name in ("", "question", "seen"):
        table.add_column(name)
    for f in report.findings:
        table.add_row("[green]pass[/]" if f.ok else "[bold red]FAIL[/]", f.question, escape(f.what))
    console.print(table)
    for f in report.findings:
        if not f.ok:
            console.print(f"[bold]{f.question}[/]: {escape(f.remedy)}")
    verdict = "sharded and single run agree" if report.ok else "the sharded run is not the single one"
    console.print(f"{verdict}; compared with {report.reference}, {report.seconds:.1f} s", style="dim")
