"""What a check found: one finding for each question that it asks."""

from __future__ import annotations

from dataclasses import dataclass

from ringattn.check.settings import Settings


@dataclass(frozen=True)
class Finding:
    """The answer to one question. ``what`` was seen; ``remedy`` is what probably is wrong and what to do about it,
    empty where nothing is."""

    question: str
    ok: bool
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings of one check, in the order in which to read them: the first that fails often explains the rest."""

    settings: Settings
    reference: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)

    def __getitem__(self, question: str) -> Finding:
        return next(f for f in self.findings if f.question == question)

    def __str__(self) -> str:
        lines = [f"{'pass' if f.ok else 'FAIL'}  {f.question}: {f.what}" for f in self.findings]
        return "\n".join((*lines, *(f"{f.question}: {f.remedy}" for f in self.findings if not f.ok)))
