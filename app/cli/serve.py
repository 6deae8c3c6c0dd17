"""Commands on endpoints: serve, traffic, status, undeploy, token."""

import json
from datetime import UTC, datetime
from typing import Annotated

import typer

from app.cli import options
from app.cli.command import EndpointName, File, Json, Overrides, require_cluster, running, wait_for_signal
from app.config import projectfile
from app.config.project import require_name
from app.errors import UserError

MAX_TOKEN_HOURS = 10 * 365 * 24


def serve(file: File, overrides: Overrides = None) -> None:
    """Serve the project's variants over HTTP.

    On a lasting cluster (`raylway up`, or a Ray Job) the endpoint stays when the command ends; otherwise it
    runs until Ctrl-C.
    """
    project = projectfile.load(file, overrides or [])
    with running("serve", hint="the endpoint is down") as console:
        from app.cluster.session import joins_lasting_cluster, session
        from app.jobs import serve
        from app.serving.control import deploy
        from app.serving.traffic.registered import registered_traffic

        traffic, notes = registered_traffic(project.name, project.serving)
        for note in notes:
            console.print(note, style="yellow")
        with session():
            server = serve.deploy(project, traffic, console.print_wait)
            for name, variant in traffic.variants.items():
                console.print(f"  {name}: version {variant.version}, weight {variant.weight:g}")
            console.print(f"serving at {server}/v2/models/{project.name}; try:")
            console.print(deploy.example_command(server, project.name, next(iter(traffic.variants.values()))))
            if joins_lasting_cluster():
                console.print("it runs until the cluster ends")
                return
            console.print("Ctrl-C stops it")
            wait_for_signal()


def traffic(
    context: typer.Context,
    name: EndpointName,
    at: Annotated[
        datetime | None,
        typer.Option(
            parser=options.time,
            metavar="TIME",
            help="Show the traffic at this time (UTC) instead.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the traffic, or change weights: `raylway traffic income --champion 90 --challenger 10`.

    No replica restarts, and no request is lost. Variants that are not named keep their weight.
    """
    require_name(name)
    weights = options.weights(context.args)
    if weights and at:
        raise UserError("--at only looks back; leave it out to change the weights")
    with running("traffic") as console:
        if weights:
            require_cluster()
            from app.cluster.session import session

            with session():
                from app.serving.control.weights import set_weights

                served = set_weights(name, weights, console.print_wait)
        else:
            from app.serving.traffic import traffic
            from app.state.audit import Audit

            with Audit() as audit:
                current = traffic.read_current(
                    audit, name, at.replace(tzinfo=UTC).timestamp() if at else None
                )
            if current is None:
                raise UserError(f"{name} {'was' if at else 'is'} not served{f' at {at}' if at else ''}")
            served = current.traffic
        for variant, deployed in served.variants.items():
            share = "shadow" if deployed.shadow else f"weight {deployed.weight:g}"
            console.print(f"  {variant}: version {deployed.version}, {share}")


def status(as_json: Json = False) -> None:
    """Show the endpoints: variants, weights, replicas, and the last minute's latencies and errors."""
    with running("status", quiet=as_json) as console:
        from app.state import hooks

        if not as_json:
            for fault in hooks.reported():
                console.print(f"without effect: {fault}", style="yellow")
        require_cluster()
        from app.cluster.session import session

        with session():
            from app.jobs import serve

            documents = serve.statuses()
        if as_json:
            console.print(json.dumps(documents))
            return
        from app.cli import status_text

        for renderable in status_text.renderables(documents):
            console.print(renderable)


def undeploy(name: EndpointName) -> None:
    """Take one endpoint off the cluster. The others keep running."""
    require_name(name)
    with running("undeploy", hint="run the command again to finish") as console:
        require_cluster()
        from app.cluster.session import session

        with session():
            from app.serving.control import undeploy as endpoints

            endpoints.undeploy(name, console.print_wait)
        console.print(f"{name} is no longer served")


def token(
    subject: Annotated[str, typer.Argument(help="The principal: the name that records and logs show.")],
    scopes: Annotated[
        str,
        typer.Option(
            help="Comma-separated: predict, feedback, explain, admin. predict:income is for one model."
        ),
    ] = "predict,feedback,explain",
    hours: Annotated[
        float,
        typer.Option(
            parser=options.number("--hours", 0.01, MAX_TOKEN_HOURS),
            metavar="HOURS",
            help="Hours until it expires; at most ten years.",
        ),
    ] = 24,
    new_key: Annotated[bool, typer.Option("--new-key", help="Sign with a new key from now on.")] = False,
) -> None:
    """Issue a token for endpoints with `serving.auth: local`. Prints only the token."""
    from app.serving.gateway import issuer

    if new_key:
        issuer.new_key()
    print(issuer.issue(subject, [scope for scope in scopes.replace(",", " ").split() if scope], hours))
