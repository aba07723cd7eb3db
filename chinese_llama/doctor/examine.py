"""What several paths are, whether they belong together, in which order they merge, and what is wrong with each."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from chinese_llama import __version__
from chinese_llama.data.mixture import sources
from chinese_llama.doctor.data import check_data_together, check_unknown, look
from chinese_llama.doctor.finding import Finding, guarded, listing, some
from chinese_llama.doctor.survey import Survey
from chinese_llama.doctor.things import Thing, recognise
from chinese_llama.errors import UserError, printable
from chinese_llama.hub import is_hub_id
from chinese_llama.progress import say
from chinese_llama.terminal import columns
from chinese_llama.workspace import FILE, Workspace

SEVERITIES = ("error", "warning", "note")
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
INSIDE = 20  # things in a directory that are looked at
MODELS = ("model", "meta checkpoint")
ONCE = ("pad-is-unk",)  # said once, however often it is so
WIDE = "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff"
PIECE = re.compile(rf"\s*(?:[{WIDE}]|[^\s{WIDE}]+)")  # before and after a Chinese character a line may end


@dataclass
class Report:
    """`things`: what there is; `order`: the commands that merge the adapters; `findings`, the worst first."""

    things: list[Thing] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many findings there are of each severity."""
        counted = Counter[str](finding.severity for finding in self.findings)
        return {severity: counted[severity] for severity in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """1 where something is broken, else 0."""
        return int(any(finding.severity == "error" for finding in self.findings))


def examine(paths: list[Path]) -> Report:
    """Look at everything that is at the paths; a workspace stands for all that it names. Raises UserError for a path
    that does not exist; all else that is wrong becomes a finding."""
    for path in paths:
        if not path.exists():
            hint = " (a hub id? download it first)" if is_hub_id(path) else ""
            raise UserError(f"{path}: no such file or directory{hint}.")
    report = Report()
    surveys: list[Survey] = []
    told: set[Path] = set()
    for thing in _expanded(paths, report.findings):
        say(f"Looking at {thing.path} ...")
        report.things.append(thing)
        found = list(guarded(thing.path, _checked(thing, surveys)))
        told |= {thing.path} if thing.kind == "unknown" and found else set()
        report.findings += found
    report.findings += guarded(Path("the data"), check_data_together(surveys))
    others = [thing for thing in report.things if thing.path not in told and thing.kind != "data"]
    if others:
        report.findings += guarded(Path("all of it"), _together(report, others))
    report.findings = _sorted(report.findings)
    return report


def _recognised(path: Path) -> Thing:
    """What is at a path; "unknown" with the problem, where it cannot even be told."""
    try:
        return recognise(path)
    except Exception as error:  # content that nobody foresaw
        return Thing(path, "unknown", "cannot be read", {"problem": f"{type(error).__name__}: {error}"[:200]})


def _checked(thing: Thing, surveys: list[Survey]) -> Iterator[Finding]:
    """What is wrong with one thing; surveys of data are kept. What is heavy is loaded for what needs it: data do not
    wait for PyTorch."""
    if thing.kind == "data":
        found, survey = look(thing)
        yield from found
        surveys += [survey] if survey else []
    elif thing.kind == "unknown":
        yield from check_unknown(thing)
    elif thing.kind != "workspace":
        from chinese_llama.doctor.adapter import check_adapter
        from chinese_llama.doctor.model import check_model
        from chinese_llama.doctor.tokenizer import check_tokenizer

        if thing.kind in MODELS:
            yield from guarded(thing.path, check_model(thing))
        elif thing.kind == "adapter":
            yield from guarded(thing.path, check_adapter(thing))
        yield from guarded(thing.path, check_tokenizer(thing))


def _together(report: Report, things: list[Thing]) -> Iterator[Finding]:
    from chinese_llama.doctor.readings import check_extension
    from chinese_llama.doctor.together import check_together

    places = [thing.path for thing in things if "pieces" in thing.facts and thing.kind != "vocabulary"]
    yield from guarded(Path("the tokenizers"), check_extension(places))
    report.order, findings = check_together(things)
    yield from findings


def _sorted(findings: list[Finding]) -> list[Finding]:
    """Each finding once, the worst first, those of a place together."""
    once: dict[str, Finding] = {}
    for finding in findings:
        once.setdefault(finding.check if finding.check in ONCE else json.dumps(asdict(finding)), finding)
    return sorted(once.values(), key=lambda one: SEVERITIES.index(one.severity))


# --- what the paths stand for


def _expanded(paths: list[Path], findings: list[Finding]) -> list[Thing]:
    """What the paths stand for, each once; a tokenizer's file goes with the directory that it lies in."""
    things: dict[Path, Thing] = {}
    for path in paths:
        for thing in _stands_for(path, findings):
            things.setdefault(thing.path.resolve(), thing)
    return [
        thing
        for place, thing in things.items()
        if thing.kind != "tokenizer" or place.is_dir() or place.parent not in things
    ]


def _stands_for(path: Path, findings: list[Finding]) -> Iterator[Thing]:
    thing = _recognised(path)
    if thing.kind == "workspace":
        yield from _workspace(path if path.is_file() else path / FILE, findings)
        return
    inside = thing.facts.get("inside") or []
    if thing.kind != "unknown" or not inside:
        yield thing
        return
    if len(inside) > INSIDE:
        what = f"{len(inside):,} things lie in the directory; the first {INSIDE} are looked at."
        remedy = "Give those that you mean: chinese-llama doctor PATH PATH ..."
        findings.append(Finding("note", "looked-at-in-part", str(path), what, some(inside[INSIDE:]), remedy))
    for place in inside[:INSIDE]:
        yield _found(place, path)


def _found(place: str, where: Path) -> Thing:
    """What was not given, but found, so that its place among the others means nothing."""
    thing = _recognised(Path(place))
    thing.facts["found_in"] = str(where)
    return thing


def _workspace(file: Path, findings: list[Finding]) -> Iterator[Thing]:
    """All that a workspace names and that is there; what is not is told."""
    try:
        space = Workspace(file)
        named = _named(space)
    except (UserError, TypeError, AttributeError, ValueError) as error:
        told = str(error).removeprefix(f"{file.absolute()}: ")
        findings.append(
            Finding(
                "error",
                "workspace-not-readable",
                str(file),
                f"The workspace cannot be read: {told}",
                listing(file),
                "Correct it there; `chinese-llama init` in another directory writes one with every setting explained.",
            )
        )
        return
    missing = [f"{what}: {place}" for what, place in named if not Path(place).exists()]
    if missing:
        findings.append(
            Finding(
                "note", "workspace-names-missing", str(file),
                f"{len(missing)} of the {len(named)} places that the workspace names do not exist (yet).", some(missing),
                "What the commands make, they make when they are run; inputs have to be put there.",
            )
        )  # fmt: skip
    for what, place in named:
        if Path(place).exists():
            thing = _found(place, file)
            thing.facts |= {"measures": True} if what.startswith("eval") else {}
            yield thing


def _named(space: Workspace) -> list[tuple[str, str]]:
    """What a workspace names: what it is for, and where. Raises UserError for data that are no paths."""
    settings = space.settings
    found = [("base", space.base())] if settings.base else []
    for section, made in (("extend_vocab", settings.extend_vocab), ("extend_model", settings.extend_model)):
        found.append((f"{section}.output", str(space.path(made.output))))
    found += [(f"adapter {name}", place) for name, place in space.adapters().items()]
    found.append(("merge.output", str(space.path(settings.merge.output))))
    for section, data in (
        ("train_vocab.corpus", settings.train_vocab.corpus),
        ("extend_vocab.corpus", settings.extend_vocab.corpus),
        ("pt_lora.data", settings.pt_lora.get("data")),
        ("sft_lora.data", settings.sft_lora.get("data")),
    ):
        if data:
            found += [(section, str(source.path)) for source in sources(space.paths(data))]
    found += [(f"eval.text {name}", str(space.path(file))) for name, file in settings.eval.text.items()]
    return [(what, place) for what, place in found if not (is_hub_id(place) and not Path(place).exists())]


# --- what is told


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as plain JSON."""
    told = {
        "tool": f"chinese_llama {__version__}",
        "things": [asdict(thing) for thing in report.things],
        "order": report.order,
        "findings": [asdict(finding) for finding in report.findings],
        "counts": report.counts(),
        "exit_code": report.exit_code,
    }
    return dict(json.loads(json.dumps(told, default=str)))


def text(report: Report, width: int | None = None) -> str:
    """The report for a terminal, coloured; who writes it elsewhere takes the colours out. With a `width` in columns
    sentences and evidence are wrapped to it, but never a remedy: commands in it are there to be copied."""
    lines = []
    for thing in report.things:
        lines += [
            typer.style(printable(str(thing.path)), bold=True),
            *_wrapped(f"{printable(thing.title)}{_reads(thing)}", 2, 2, width),
        ]
    if report.order:
        lines += [
            "",
            typer.style(f"Merge, in this order{_first(report)}:", bold=True),
            *(f"  {printable(command)}" for command in report.order),
        ]
    for severity in SEVERITIES:
        found = [finding for finding in report.findings if finding.severity == severity]
        if found:
            lines += ["", typer.style(f"{severity.capitalize()}s", fg=COLOURS[severity], bold=True)]
        for same in _alike(found):
            lines += _told(same, width)
    return "\n".join([*lines, "", _closing(report)])


def _first(report: Report) -> str:
    return " (once the errors are gone)" if report.exit_code else ""


def _reads(thing: Thing) -> str:
    """What the checks have learnt of a tokenizer."""
    pieces, ratio = thing.facts.get("pieces"), thing.facts.get("chinese_characters_per_token")
    said = f"; {pieces:,} pieces" if pieces else ""
    return said + (f", {ratio:.2f} Chinese characters a token" if ratio else "")


def _alike(findings: list[Finding]) -> list[list[Finding]]:
    """Findings that differ in their places only, as those of one tokenizer in several directories, together."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.check, one.what, one.remedy, *one.evidence), []).append(one)
    return list(groups.values())


def _told(same: list[Finding], width: int | None) -> list[str]:
    finding = same[0]
    head = typer.style(f"[{finding.check}]", fg=COLOURS[finding.severity])
    lines = [f"  {head} {printable(', '.join(one.where for one in same))}"]
    lines += _wrapped(printable(finding.what), 4, 4, width)
    for line in finding.evidence:
        lines += _wrapped(printable(line), 6, 8, width)
    return [*lines, f"    -> {printable(finding.remedy)}"] if finding.remedy else lines


def _wrapped(line: str, indent: int, hang: int, width: int | None) -> list[str]:
    """A line, indented, in as many as it takes; those that follow by `hang`. Words and paths stay whole."""
    if width is None:
        return [" " * indent + line]
    lines = [" " * indent]
    for word in re.findall(r"\s*\S+", line):
        for piece in [word] if "/" in word else PIECE.findall(word):
            if lines[-1].strip() and columns(lines[-1] + piece) > max(width, 40):
                lines.append(" " * hang + piece.lstrip())
            else:
                lines[-1] += piece
    return lines


def _closing(report: Report) -> str:
    counts = report.counts()
    if not any(counts.values()):
        return "Nothing is wrong."
    words = ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items())
    return f"{words}." + ("" if counts["error"] or counts["warning"] else " Nothing is wrong.")
