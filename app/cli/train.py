"""Commands that read a project file and train: check, keys, preflight, train, sweep."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.command import File, Overrides, require_passed, running
from app.config import projectfile
from app.config.section import MAX_NUMBER
from app.console import Console, short_path
from app.errors import UserError


def check(file: File, overrides: Overrides = None) -> None:
    """Validate a project file. Starts nothing."""
    project = projectfile.load(file, overrides or [])
    inputs = f"{len(project.features)} of {len(project.data.columns)} columns as features"
    if interactions := project.data.interactions:
        inputs = f"which {interactions.item} each {interactions.user} takes"
    console = Console()
    console.print(
        f"{file}: valid: {project.name}, {inputs}, {project.model.kind}, "
        f"{project.training.num_workers} workers, {len(project.serving.variants)} variants"
    )
    if project.sweep is not None:
        from app.tuning.space import Space

        space = Space(project)
        space.check()
        console.print("sweep:")
        for line in space.describe():
            console.print(f"  {line}")


def keys(
    section: Annotated[
        str | None,
        typer.Argument(help="A section or key, such as training or serving.limits; all if left out."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown, as in docs/keys.md.")] = False,
) -> None:
    """Show the keys of the project file: type, default, bounds and meaning."""
    from app.config import reference

    selected = reference.groups() if section is None else reference.select(section)
    print(reference.as_markdown(selected) if markdown else reference.as_text(selected), end="")


def preflight(
    file: Annotated[Path | None, typer.Argument(help="A project file to check the machine against.")] = None,
    overrides: Overrides = None,
) -> None:
    """Show what this machine can train with, and what to change if a project needs more."""
    project = projectfile.load(file, overrides or []) if file else None
    with running("preflight") as console:
        from app.training import preflight

        machine = preflight.inspect()
        for line in preflight.describe(machine):
            console.print(f"  {line}")
        if project:
            if faults := preflight.faults(project.training, machine):
                raise UserError("\n".join(faults))
            console.print(f"{file}: fits")


def train(
    file: File,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run all stages, also those whose result is stored.")
    ] = False,
) -> None:
    """Prepare, train, evaluate, pass the gate, register.

    The same command resumes an interrupted run. Exit code 3: trained, but the gate rejected the candidate.
    """
    project = projectfile.load(file, overrides or [])
    with running("train", hint="run the command again to continue from the last checkpoint") as console:
        from app.cluster.session import session

        with session():
            from app.jobs import pipeline

            outcome = pipeline.run(project, console, fresh=fresh)
        console.print(f"bundle: {short_path(outcome.bundle)}")
    require_passed(outcome.decision.passed)


def sweep(
    file: File,
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option(
            parser=options.number("--trials", 1, MAX_NUMBER, whole=True),
            metavar="NUMBER",
            help="Number of trials in all, instead of sweep.trials; a larger number extends a sweep.",
        ),
    ] = None,
    train_best: Annotated[
        bool, typer.Option("--train-best", help="Train the best project in full, and let the gate judge it.")
    ] = False,
) -> None:
    """Search for better settings: `raylway sweep FILE`.

    Runs the search that the project's `sweep` describes, and resumes one that was interrupted. Ends with the
    best project as a file, and an HTML report.
    """
    extra = [] if trials is None else [f"sweep.trials={trials}"]
    project = projectfile.load(file, [*(overrides or []), *extra])
    if train_best and project.sweep and len(project.sweep.objectives) > 1:
        raise UserError("--train-best: several objectives have no best trial; train one of the files")
    passed = True
    with running("sweep", hint="run the command again to continue with the remaining trials") as console:
        from app.cluster.session import session

        with session():
            from app.jobs import pipeline, sweep

            swept = sweep.run(project, console)
            if not swept.best:
                raise UserError("no trial was completed; see the errors in the log and the report")
            if train_best:
                outcome = pipeline.run(swept.projects[0], console)
                console.print(f"bundle: {short_path(outcome.bundle)}")
                passed = outcome.decision.passed
    require_passed(passed)


def sweep_report(
    file: File,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file to write.", show_default=False)] = None,
) -> None:
    """Write one self-contained HTML page about a sweep: trials, importance of the parameters, and cost."""
    project = projectfile.load(file, overrides or [])
    with running("report") as console:
        from app.jobs import sweep

        page = sweep.report(project, out, console.print_wait)
        console.print(f"report: {short_path(page.resolve())}")
