"""The commands. `raylway COMMAND`, or `python -m app COMMAND` in a Ray Job.

Heavy imports (Ray, PyTorch, MLflow) stand inside the commands that need them: `raylway check` and `--help`
answer at once.
"""

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from typer.core import TyperGroup

from app.cli import options, failures
from app.cli.finish import Finish
from app.config import projectfile
from app.config.project import require_name
from app.config.section import MAX_NUMBER
from app.console import Console, chatter_to_log, short
from app.errors import Interrupted, UserError, described

EXIT_FAILED, EXIT_USER, EXIT_GATE = 1, 2, 3
MAX_TOKEN_HOURS = 10 * 365 * 24

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

Json = Annotated[bool, typer.Option("--json", help="For programs: one document, and nothing else.")]


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
        from app.cluster.session import session

        with session():
            from app.jobs import pipeline

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
        int | None,
        typer.Option(
            parser=options.number("--trials", 1, MAX_NUMBER, whole=True),
            metavar="NUMBER",
            help="How many in all, instead of sweep.trials; more extend a sweep.",
        ),
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
        from app.cluster.session import session

        with session():
            from app.jobs import pipeline, sweep

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
        from app.jobs import sweep

        page = sweep.report(project, out, console.wait)
        console.say(f"report: {short(page.resolve())}")


@app.command()
def compress(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle, as `train` names it.")],
    register: Annotated[
        bool, typer.Option("--register", help="Register it, so that it can be served.")
    ] = False,
) -> None:
    """Make an int8 version of a bundle: smaller, and faster where layers are large.

    Its card says what it costs. One that loses more than `compress.max_loss` is refused. Exit code 3: the
    gate did not let it be registered.
    """
    with _working("compress") as console:
        from app.cluster.session import lasts, session
        from app.jobs import compress, quantization
        from app.state import stages

        if lasts():
            with session():
                stages.require_shared()
        made = quantization.compress(bundle)
        before, after = made.comparison["before"], made.comparison["after"]
        for name, unit, scale in (
            ("bytes", "MB", 1e-6),
            ("ms_1", "ms for 1 row", 1),
            ("ms_32", "ms for 32", 1),
        ):
            console.say(f"  {before[name] * scale:8.2f} -> {after[name] * scale:8.2f} {unit}")
        console.say(f"  {before['score']:8.4f} -> {after['score']:8.4f} test {made.comparison['metric']}")
        if not register:
            console.say(f"bundle: {short(made.path)}")
        else:
            path, decision, _ = compress.register(made, console)
            console.say(f"bundle: {short(path)}")
            if not decision.passed:
                raise typer.Exit(EXIT_GATE)


@app.command()
def serve(file: File, overrides: Set = None) -> None:
    """Serve the project's variants over HTTP.

    On a cluster that lasts (`raylway up`, or a Ray Job) the endpoint stays when the command has ended;
    otherwise it lives until Ctrl-C.
    """
    project = projectfile.load(file, overrides or [])
    with _working("serve", hint="the endpoint is down") as console:
        from app.cluster.session import lasts, session
        from app.serving import deploy, follow

        chosen, notes = follow.registered(project.name, project.serving)
        for note in notes:
            console.say(note, style="yellow")
        with session():
            from app.cluster import capacity

            needed = project.serving.num_cpus * project.serving.autoscaling.min_replicas
            setting = "serving.num_cpus x autoscaling.min_replicas"
            console.wait(capacity.now().wait(needed, setting, besides=project.name))
            server = deploy.deploy(project.serving, project.name, chosen, console.wait)
            for name, variant in chosen.variants.items():
                console.say(f"  {name}: version {variant.version}, weight {variant.weight:g}")
            console.say(f"serving at {server}/v2/models/{project.name}; try:")
            console.say(deploy.curl(server, project.name, next(iter(chosen.variants.values()))))
            if lasts():
                console.say("it stays up with the cluster")
                return
            console.say("Ctrl-C stops it")
            _wait_for_signal()


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(help="A registered model, or a version of it: income, income@3, income@challenger."),
    ],
    input_: Annotated[
        str, typer.Option("--input", help="A Parquet or CSV file, a folder of them, or a URI.")
    ],
    output: Annotated[Path, typer.Option(help="The folder of Parquet files to make.")],
    k: Annotated[
        int,
        typer.Option(
            parser=options.number("--k", 1, 100, whole=True),
            metavar="NUMBER",
            help="Of a recommender: how many items, at most 100.",
        ),
    ] = 10,
) -> None:
    """Answer every row of a table, as the endpoint would. Rows that break the contract are told why."""
    with _working("predict") as console:
        from app.cluster.session import session
        from app.jobs import predict

        with session():
            answered = predict.run(model, predict.source(input_), output, k, console.wait)
        console.say(f"{answered.num_rows:,} rows answered in {output}")
        if answered.suffix:
            console.say(f"the input has columns of these names, so the answers end in {answered.suffix}")
        if answered.num_broken:
            column = f"{predict.VIOLATION}{answered.suffix}"
            console.say(
                f"{answered.num_broken:,} of them break the contract: see the column {column}", style="yellow"
            )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def traffic(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The endpoint, such as income.")],
    at: Annotated[
        datetime | None,
        typer.Option(
            parser=options.time,
            metavar="TIME",
            help="Say who answered at this time (UTC) instead.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say who answers, or change the weights: `raylway traffic income --champion 90 --challenger 10`.

    No replica is started anew, and no request is lost. What is not named keeps its weight.
    """
    require_name(name)
    weights = options.weights(context.args)
    if weights and at:
        raise UserError("--at only looks back; leave it out to change the weights")
    with _working("traffic") as console:
        from app.serving import traffic
        from app.state.audit import Audit

        if weights:
            from app.cluster.session import lasts, session

            if not lasts():
                raise UserError(
                    "no cluster is up, so nothing is served; see `raylway up` and `raylway serve`"
                )
            with session():
                from app.serving import applications

                served = applications.reweight(name, weights, console.wait)
        else:
            with Audit() as audit:
                held = traffic.current(audit, name, at.replace(tzinfo=UTC).timestamp() if at else None)
            if held is None:
                raise UserError(f"{name} {'was' if at else 'is'} not served{f' at {at}' if at else ''}")
            served = held.traffic
        for variant, deployed in served.variants.items():
            share = "shadow" if deployed.shadow else f"weight {deployed.weight:g}"
            console.say(f"  {variant}: version {deployed.version}, {share}")


@app.command()
def undeploy(name: Annotated[str, typer.Argument(help="The endpoint, such as income.")]) -> None:
    """Take one endpoint off the cluster. The others go on."""
    require_name(name)
    with _working("undeploy", hint="the same command goes on") as console:
        from app.cluster.session import lasts, session

        if not lasts():
            raise UserError("no cluster is up, so nothing is served; see `raylway up` and `raylway serve`")
        with session():
            from app.serving import deploy

            deploy.take_off(name, console.wait)
        console.say(f"{name} is not served any more")


@app.command()
def status(as_json: Json = False) -> None:
    """Show the endpoints: variants, weights, replicas, and the last minute's latencies and errors."""
    with _working("status", quiet=as_json) as console:
        from app.cluster.session import lasts, session

        if not lasts():
            raise UserError("no cluster is up, so nothing is served; see `raylway up` and `raylway serve`")
        with session():
            from app.serving import status

            documents = [endpoint.document() for endpoint in status.endpoints()]
        if as_json:
            console.say(json.dumps(documents))
            return
        if not documents:
            console.say("nothing is served")
        for document in documents:
            console.say(_endpoint(document))
        if documents:
            console.say(_watch(documents[0]["watch"]))


def _watch(watch: dict[str, Any] | None) -> str:
    """What the watch over the endpoints does, for people."""
    if watch is None:
        return "watch: does not answer; nobody follows the registry, and bandits set no weights"
    last = f", the last: {watch['last_error']}" if watch["last_error"] else ""
    return f"watch: last round {watch['looked_s_ago']:.0f} s ago, {watch['failures']} failures{last}"


def _endpoint(document: dict[str, Any]) -> RenderableType:
    """An endpoint for people."""
    from rich.table import Table

    running, target = (document["replicas"][key] for key in ("running", "target"))
    table = Table(
        title=f"{document['name']}: {document['status']}, {running} of {target} replicas",
        title_justify="left",
        box=None,
        padding=(0, 2),
    )
    for column in ("variant", "version", "share", "requests/s", "p50 ms", "p99 ms", "errors"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, variant in document["variants"].items():
        share = "shadow" if variant["shadow"] else f"{variant['share']:.0%}"
        values = [f"{1000 * variant[q]:.1f}" if variant[q] else "" for q in ("p50_s", "p99_s")]
        errors = "" if variant["error_rate"] is None else f"{variant['error_rate']:.2%}"
        rate = f"{variant['requests_per_s']:.1f}"
        workers = f" ({variant['workers'][0]} workers)" if variant["workers"] else ""
        table.add_row(name + workers, variant["version"], share, rate, *values, errors)
    notes = [f"fault: {fault}" for fault in document["faults"]]
    recording = document["recording"]
    if recording["dropped"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in recording["dropped"].items())
        notes.append(f"{document['not_recorded']:,} predictions were not recorded ({reasons})")
    for fault in recording["faults"]:
        waiting = f"{recording['waiting']:,} predictions ({recording['waiting_bytes'] / 1e6:.1f} MB)"
        notes.append(f"the database takes no records, {waiting} wait: {fault}")
    if document["not_shadowed"]:
        notes.append(f"{document['not_shadowed']:,} requests were not shadowed")
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


@app.command()
def token(
    subject: Annotated[str, typer.Argument(help="Whose it is: the name that records and logs will have.")],
    scopes: Annotated[
        str, typer.Option(help="Of predict, feedback, explain and admin; predict:income is for one model.")
    ] = "predict,feedback,explain",
    hours: Annotated[
        float,
        typer.Option(
            parser=options.number("--hours", 0.01, MAX_TOKEN_HOURS),
            metavar="HOURS",
            help="How long it is good; at most ten years.",
        ),
    ] = 24,
    new_key: Annotated[bool, typer.Option("--new-key", help="Sign with a new key from now on.")] = False,
) -> None:
    """Issue a token for endpoints with `serving.auth: local`. Nothing else is printed."""
    from app.serving import issuer

    if new_key:
        issuer.new_key()
    print(issuer.issue(subject, [scope for scope in scopes.replace(",", " ").split() if scope], hours))


@app.command()
def audit(
    name: Annotated[str | None, typer.Argument(help="A model; all, if left out.")] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="NUMBER:SEAL", help="What this command printed last, at some time before."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the log of what was deployed, promoted and changed, and by whom; and show it, in UTC.

    The last line is the log's head. Kept where nobody can change it, it proves with --expect that nothing up
    to there was changed or removed.
    """
    from app.state.audit_head import Head

    expected = None if expect is None else Head.parse(expect)
    if name is not None:
        require_name(name)
    with _working("audit", quiet=as_json) as console:
        from app.cli import audit_text
        from app.state import audit_head
        from app.state.audit import Audit

        with Audit() as audit:
            entries = audit.entries(name, expected=expected)
        if as_json:
            console.say(json.dumps(audit_text.document(entries, audit_head.load())))
            return
        console.say(audit_text.table(entries))
        console.say(f"head: {audit_head.load() or 'the log is empty'}")


@app.command()
def versions(name: Annotated[str, typer.Argument(help="The registered model, such as income.")]) -> None:
    """List a model's registered versions with their aliases."""
    with _working("versions") as console:
        from app.registry import versions

        found = versions.versions(name)
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
        from app.registry import versions

        chosen = versions.promote(name, version, console.wait)
        console.say(f"{name} version {chosen.number} is the champion")


@app.command()
def sign(model: Annotated[str, typer.Argument(help="A registered version, such as income@3.")]) -> None:
    """Sign a version's bundle with the private key in the file that RAYLWAY_SIGNING_KEY names.

    Endpoints with serving.trusted_keys serve nothing else.
    """
    with _working("sign") as console:
        from app.bundle import signature
        from app.registry import versions

        name, at, number = model.partition("@")
        if not at:
            raise UserError(f"{model}: must be a version of a model, such as {model}@3 or {model}@challenger")
        version = versions.sign(name, number, signature.signing_key())
        console.say(f"{name} version {version.number} is signed")


@app.command()
def up() -> None:
    """Start a local Ray cluster that lasts, with token authentication, and say how to reach it."""
    from app.cluster import local

    Console().say(str(local.up()))


@app.command()
def down() -> None:
    """Stop the cluster that `raylway up` started, and only that one."""
    from app.cluster import local

    stopped = local.down()
    Console().say(f"stopped the cluster at {stopped.address}" if stopped else "no cluster is up")


@app.command()
def demo() -> None:
    """A model's whole life on the census sample, in about two minutes; leaves nothing running."""
    from app.jobs import demo

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
def _working(command: str, hint: str = "", *, quiet: bool = False) -> Iterator[Console]:
    """A command's console, the chatter in a log file, which is named unless `quiet`; a defect of ours ends in
    one line that names it.

    SIGTERM ends it as Ctrl-C does, in order.
    """
    stopped_by = signal.SIGINT

    def interrupt(number: int, _: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with chatter_to_log(command) as (console, log):
        if not quiet:
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
            if message := failures.explained(error):
                raise UserError(message) from None
            console.say(f"failed: {described(error)}", style="red")
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
        finish.status = app(standalone_mode=False) or 0
    except SystemExit as ending:  # Typer's, when nobody reads what is printed
        finish.status = ending.code if isinstance(ending.code, int) else None
        raise
    except typer.TyperException as error:
        finish.status = _told(options.mistake(error))
    except UserError as error:
        finish.status = _told(str(error))
    except Exception as error:  # before there is a log, or of a command that has none
        message = failures.explained(error)
        if message is None:
            raise
        finish.status = _told(message)
    sys.exit(finish.status)


def _told(message: str) -> int:
    if message:
        print(f"error: {message}", file=sys.stderr)
    return EXIT_USER
