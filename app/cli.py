"""The commands. `raylway COMMAND`, or `python -m app COMMAND` in a Ray Job.

Heavy imports (Ray, PyTorch, MLflow) stand inside the commands that need them: `raylway check` and `--help`
answer at once.
"""

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from app import projectfile
from app.console import Console, chatter_to_log, short
from app.errors import Interrupted, UserError
from app.finish import Finish

EXIT_FAILED, EXIT_USER, EXIT_GATE = 1, 2, 3

app = typer.Typer(
    help=__doc__.splitlines()[0] if __doc__ else None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[
    Path, typer.Argument(help="The project file, such as configs/income.yaml.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, such as training.epochs=3. May be repeated."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do all stages again, also those done before.")]


@app.command()
def check(file: File, overrides: Set = None) -> None:
    """Validate a project file. Starts nothing."""
    project = projectfile.load(file, overrides or [])
    inputs = f"{len(project.features)} of {len(project.data.columns)} columns as features"
    if of := project.data.interactions:
        inputs = f"which {of.item} each {of.user} takes"
    Console().say(
        f"{file}: valid: {project.name}, {inputs}, {project.model.kind}, "
        f"{project.training.num_workers} workers, {len(project.serving.variants)} variants"
    )
    if project.sweep is not None:
        from app.tuning.space import Space

        space = Space(project)
        space.check()
        Console().say("sweep:")
        for line in space.described():
            Console().say(f"  {line}")


@app.command()
def train(file: File, overrides: Set = None, fresh: Fresh = False) -> None:
    """Prepare, train, evaluate, pass the gate, register.

    An interrupted run goes on when the same command is given again. Exit code 3: trained, but the gate did
    not let the candidate pass.
    """
    project = projectfile.load(file, overrides or [])
    with _working("train", hint="the same command goes on from the last checkpoint") as console:
        from app import cluster

        with cluster.session():
            from app import pipeline

            outcome = pipeline.run(project, console, fresh=fresh)
        console.say(f"bundle: {short(outcome.bundle)}")
    if not outcome.decision.passed:
        raise typer.Exit(EXIT_GATE)


class _RunByDefault(TyperGroup):
    """`raylway sweep FILE` is `raylway sweep run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweeps = typer.Typer(cls=_RunByDefault, no_args_is_help=True)
app.add_typer(sweeps, name="sweep", help="Search for better settings: `raylway sweep FILE`.")


@sweeps.command("run")
def sweep(
    file: File,
    overrides: Set = None,
    trials: Annotated[
        int | None, typer.Option(help="How many in all, instead of sweep.trials; more extend a sweep.")
    ] = None,
    train_best: Annotated[
        bool, typer.Option("--train-best", help="Train the best project in full, and hand it to the gate.")
    ] = False,
) -> None:
    """Search for better settings, as the project's `sweep` says; go on with a sweep that was interrupted.

    Ends with the best project as a file, and a page about the search.
    """
    extra = [] if trials is None else [f"sweep.trials={trials}"]
    project = projectfile.load(file, [*(overrides or []), *extra])
    if train_best and project.sweep and len(project.sweep.objectives) > 1:
        raise UserError("--train-best: several objectives have no best trial; train one of the files")
    outcome = None
    with _working("sweep", hint="the same command goes on with the trials that are left") as console:
        from app import cluster

        with cluster.session():
            from app import pipeline, sweep

            swept = sweep.run(project, console)
            if not swept.best:
                raise UserError("no trial was completed; the log and the report say what went wrong")
            if train_best:
                outcome = pipeline.run(swept.projects[0], console)
                console.say(f"bundle: {short(outcome.bundle)}")
    if outcome is not None and not outcome.decision.passed:
        raise typer.Exit(EXIT_GATE)


@sweeps.command("report")
def sweep_report(
    file: File,
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page.", show_default=False)] = None,
) -> None:
    """Write one self-contained HTML page about a sweep: what was tried, what matters, and what it cost."""
    project = projectfile.load(file, overrides or [])
    with _working("report") as console:
        from app import sweep

        page = sweep.report(project, out)
        console.say(f"report: {short(page.resolve())}")


@app.command()
def compress(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle, as `train` names it.")],
) -> None:
    """Make an int8 version of a bundle: smaller, and faster where layers are large.

    Its card says what it costs. One that loses more than `compression.max_loss` is refused.
    """
    with _working("compress") as console:
        from app import compression

        made = compression.compress(bundle)
        before, after = made.comparison["before"], made.comparison["after"]
        for name, unit, scale in (
            ("bytes", "MB", 1e-6),
            ("ms_1", "ms for 1 row", 1),
            ("ms_32", "ms for 32", 1),
        ):
            console.say(f"  {before[name] * scale:8.2f} -> {after[name] * scale:8.2f} {unit}")
        console.say(f"  {before['score']:8.4f} -> {after['score']:8.4f} test {made.comparison['metric']}")
        console.say(f"bundle: {short(made.path)}")


@app.command()
def serve(file: File, overrides: Set = None) -> None:
    """Serve the project's variants over HTTP.

    On a cluster that lasts (`raylway up`, or a Ray Job) the endpoint stays when the command has ended;
    otherwise it lives until Ctrl-C.
    """
    project = projectfile.load(file, overrides or [])
    with _working("serve", hint="the endpoint is down") as console:
        from app import cluster
        from app.serving import variants

        chosen, notes = variants.registered(project)
        for note in notes:
            console.say(note, style="yellow")
        with cluster.session():
            from app.serving import deploy

            needed = project.serving.num_cpus * project.serving.autoscaling.min_replicas
            console.wait(cluster.shortage(needed, "serving.num_cpus x autoscaling.min_replicas"))
            server = deploy.deploy(project.serving, project.name, chosen)
            for name, variant in chosen.items():
                console.say(f"  {name}: version {variant.version}, weight {variant.weight:g}")
            console.say(f"serving at {server}/v2/models/{project.name}; try:")
            console.say(variants.curl(server, project.name, next(iter(chosen.values()))))
            if cluster.lasts():
                console.say("it stays up with the cluster")
                return
            console.say("Ctrl-C stops it")
            _wait_for_signal()


@app.command()
def versions(name: Annotated[str, typer.Argument(help="The registered model, such as income.")]) -> None:
    """List a model's registered versions with their aliases."""
    with _working("versions") as console:
        from app import registry

        found = registry.versions(name)
        if not found:
            raise UserError(f"no model {name!r} is registered; train one with `raylway train`")
        for entry in found:
            console.say(f"  {entry.version:<4} {', '.join(entry.aliases):<12} run {entry.run_id}")


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="The registered model, such as income.")],
    version: Annotated[str, typer.Argument(help="A version number, or `challenger`.")],
) -> None:
    """Make a version the champion."""
    with _working("promote") as console:
        from app import registry

        chosen = registry.promote(name, version)
        console.say(f"{name} version {chosen.number} is the champion")


@app.command()
def up() -> None:
    """Start a local Ray cluster that lasts, with token authentication, and say how to reach it."""
    from app import local_cluster

    Console().say(str(local_cluster.up()))


@app.command()
def down() -> None:
    """Stop the cluster that `raylway up` started, and only that one."""
    from app import local_cluster

    stopped = local_cluster.down()
    Console().say(f"stopped the cluster at {stopped.address}" if stopped else "no cluster is up")


@app.command()
def demo() -> None:
    """A model's whole life on the census sample, in about two minutes; leaves nothing running."""
    from app import demo

    with demo.own_home(), _working("demo") as console:
        demo.run(console)


@app.command()
def preflight(
    file: Annotated[Path | None, typer.Argument(help="A project file to hold against it.")] = None,
    overrides: Set = None,
) -> None:
    """Say what this machine can train with, and what to change where it does not fit a project."""
    project = projectfile.load(file, overrides or []) if file else None
    with _working("preflight") as console:
        from app.training import preflight

        machine = preflight.inspect()
        for line in preflight.described(machine):
            console.say(f"  {line}")
        if project:
            if faults := preflight.faults(project.training, machine):
                raise UserError("\n".join(faults))
            console.say(f"{file}: fits")


@contextmanager
def _working(command: str, hint: str = "") -> Iterator[Console]:
    """A command's console, the chatter in a log file; a defect of ours ends in one line that names it.

    SIGTERM ends it as Ctrl-C does, in order.
    """
    stopped_by = signal.SIGINT

    def interrupt(number: int, _: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with chatter_to_log(command) as (console, log):
        console.say(f"log: {short(log)}", style="dim")
        try:
            yield console
        except (UserError, typer.Exit):
            raise
        except Interrupted as stop:
            console.say(f"stopped: {stop}; {hint}")
            raise typer.Exit(128 + stop.signal_number) from None
        except KeyboardInterrupt:
            console.say(f"stopped{f'; {hint}' if hint else ''}")
            raise typer.Exit(128 + stopped_by) from None
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip().splitlines()[-1:] or [""]
            console.say(f"failed: {type(error).__name__}: {reason[0]}", style="red")
            console.say(f"the log has the whole story: {short(log)}")
            raise typer.Exit(EXIT_FAILED) from None


def _wait_for_signal() -> None:
    """Until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def main() -> None:
    """The entry point: a user's mistake is one message and exit code 2."""
    finish = Finish()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        finish.status = EXIT_USER
        sys.exit(EXIT_USER)
    except SystemExit as ending:
        finish.status = ending.code if isinstance(ending.code, int) else None
        raise
