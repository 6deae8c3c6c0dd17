"""Commands on trained models: versions, promote, sign, compress, predict, audit."""

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.command import Json, ModelName, require_passed, running
from app.config.project import require_name
from app.console import short_path
from app.errors import UserError


def versions(name: ModelName) -> None:
    """List a model's registered versions with their aliases."""
    with running("versions") as console:
        from app.registry import versions

        registered = versions.versions(name)
        if not registered:
            raise UserError(f"no model {name!r} is registered; train one with `raylway train`")
        for version in registered:
            console.print(f"  {version.version:<4} {', '.join(version.aliases):<12} run {version.run_id}")


def promote(
    name: ModelName,
    version: Annotated[str, typer.Argument(help="A version number, or `challenger`.")],
) -> None:
    """Make a version the champion."""
    with running("promote") as console:
        from app.registry import promotion

        promoted = promotion.promote(name, version, console.print_wait)
        console.print(f"{name} version {promoted.number} is the champion")


def sign(model: Annotated[str, typer.Argument(help="A registered version, such as income@3.")]) -> None:
    """Sign a version's bundle with the private key in the file that RAYLWAY_SIGNING_KEY names.

    Endpoints with serving.trusted_keys serve only signed bundles.
    """
    with running("sign") as console:
        from app.bundle import signature
        from app.registry import versions

        name, at, number = model.partition("@")
        if not at:
            raise UserError(f"{model}: must be a version of a model, such as {model}@3 or {model}@challenger")
        version = versions.sign(name, number, signature.signing_key())
        console.print(f"{name} version {version.number} is signed")


def compress(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle, as `train` prints it.")],
    register: Annotated[
        bool, typer.Option("--register", help="Register it, so that it can be served.")
    ] = False,
) -> None:
    """Make an int8 version of a bundle: smaller, and faster where layers are large.

    Its card shows the loss of quality. Refused if it loses more than `compression.max_loss`. Exit code 3:
    the gate rejected it.
    """
    passed = True
    with running("compress") as console:
        from app.cluster.session import joins_lasting_cluster, session
        from app.jobs import compress, quantization
        from app.state import shared

        if joins_lasting_cluster():
            with session():
                shared.require_shared()
        compressed = quantization.compress(bundle)
        comparison = compressed.comparison
        before, after = comparison["before"], comparison["after"]
        for name, unit, scale in (
            ("bytes", "MB", 1e-6),
            ("ms_1", "ms for 1 row", 1),
            ("ms_32", "ms for 32 rows", 1),
        ):
            console.print(f"  {before[name] * scale:8.2f} -> {after[name] * scale:8.2f} {unit}")
        console.print(f"  {before['score']:8.4f} -> {after['score']:8.4f} test {comparison['metric']}")
        path = compressed.path
        if register:
            path, decision, _ = compress.register(compressed, console)
            passed = decision.passed
        console.print(f"bundle: {short_path(path)}")
    require_passed(passed)


def predict(
    model: Annotated[
        str,
        typer.Argument(help="A registered model, or a version of it: income, income@3, income@challenger."),
    ],
    input_: Annotated[
        str, typer.Option("--input", help="A Parquet or CSV file, a folder of them, or a URI.")
    ],
    output: Annotated[Path, typer.Option(help="The folder of Parquet files to write. Must not exist.")],
    k: Annotated[
        int,
        typer.Option(
            parser=options.number("--k", 1, 100, whole=True),
            metavar="NUMBER",
            help="Items per user, for a recommender; at most 100.",
        ),
    ] = 10,
) -> None:
    """Predict every row of a table, as the endpoint would. Rows that break the contract get the reason."""
    with running("predict") as console:
        from app.cluster.session import session
        from app.jobs import predict, predictor

        with session():
            predicted = predict.run(model, predict.source(input_), output, k, console.print_wait)
        console.print(f"{predicted.num_rows:,} rows predicted in {output}")
        if predicted.suffix:
            console.print(
                f"the input has columns of these names, so the prediction columns end in {predicted.suffix}"
            )
        if predicted.num_invalid:
            column = f"{predictor.VIOLATION}{predicted.suffix}"
            console.print(
                f"{predicted.num_invalid:,} of them break the contract: see the column {column}",
                style="yellow",
            )


def audit(
    name: Annotated[str | None, typer.Argument(help="A model; all if left out.")] = None,
    expect: Annotated[
        str | None,
        typer.Option(metavar="NUMBER:SEAL", help="A head that this command printed before."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify the log of what was deployed, promoted and changed, and by whom; and show it, in UTC.

    The last line is the log's head. Store it where nobody can change it: --expect then proves that no entry
    up to it was changed or removed.
    """
    from app.state.audit_head import Head

    expected = None if expect is None else Head.parse(expect)
    if name is not None:
        require_name(name)
    with running("audit", quiet=as_json) as console:
        from app.cli import audit_text
        from app.state import audit_head
        from app.state.audit import Audit

        with Audit() as audit:
            entries = audit.entries(name, expected=expected)
        if as_json:
            console.print(json.dumps(audit_text.document(entries, audit_head.load())))
            return
        console.print(audit_text.table(entries))
        console.print(f"head: {audit_head.load() or 'the log is empty'}")
