"""The variants of an endpoint: bundles with the same inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.bundle import signature
from app.bundle.bundle import Bundle
from app.bundle.manifest import MANIFEST, require_passed
from app.bundle.schema import Input, Schema
from app.errors import UserError


class DeployedVariant(BaseModel):
    """A registered version that an endpoint serves."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str
    """Number of the version in the registry."""
    weight: float
    """Share of the units, relative to the other variants' weights."""
    path: Path
    """Folder of the bundle on the machine that deployed it."""
    identity: str = ""
    """SHA-256 of the bundle's manifest, the same on all machines; empty if it is not registered."""
    shadow: bool = False
    """Whether the variant gets copies of requests, and its answers are recorded only."""
    workers: str | None = None
    """Serve application of the variant's workers; None if the endpoint's replicas load it themselves."""


def with_local_bundles(model: str, variants: Mapping[str, DeployedVariant]) -> dict[str, DeployedVariant]:
    """The variants with paths on this machine; bundles that are missing here are fetched from the registry.

    Raises UserError if the registry does not have the version, or has another bundle for it.
    """
    return {name: _with_local_bundle(model, variant) for name, variant in variants.items()}


def _with_local_bundle(model: str, variant: DeployedVariant) -> DeployedVariant:
    if not variant.identity or (variant.path / MANIFEST).exists():
        return variant
    # Imported late: MLflow takes seconds and memory, and a replica seldom needs it.
    from app.registry import versions

    version = versions.resolve(model, variant.version)
    if version.identity != variant.identity:
        raise UserError(
            f"version {variant.version} of {model} must have the bundle that was deployed, but the registry "
            "has another bundle now; deploy the model again with `raylway serve`"
        )
    return variant.model_copy(update={"path": version.path})


def open_bundles(
    variants: Mapping[str, DeployedVariant], trusted_keys: Sequence[str] = ()
) -> dict[str, Bundle]:
    """Open the bundle of each variant with `open_bundle`."""
    return {name: open_bundle(variant.path, trusted_keys) for name, variant in variants.items()}


def open_bundle(path: Path, trusted_keys: Sequence[str] = ()) -> Bundle:
    """Verify and open a bundle, and predict its stored example, which also warms it up.

    Raises BrokenBundle if a file was changed or the example's predictions differ, and UserError if the bundle
    did not pass the gate, or is not signed by one of `trusted_keys`, if there are any.
    """
    if trusted_keys:
        signature.require(path / MANIFEST, trusted_keys)
    bundle = Bundle(path)
    require_passed(bundle.manifest, f"a bundle to be served ({path})")
    bundle.check_example()
    return bundle


def common_schema(schemas: Mapping[str, Schema]) -> Schema:
    """The schema that all variants of an endpoint share.

    Its known categories are those that every variant knows: the variants could not be compared if some
    refused requests that others answer. Raises UserError if the schemas differ in anything else.
    """
    (first, schema), *others = schemas.items()
    for name, other in others:
        differences = _differences(schema, other)
        if differences:
            raise UserError(
                f"the variants of one endpoint must take the same inputs, but {first} and {name} differ in "
                f"{'; '.join(differences)}. Deploy versions that were trained on the same contract."
            )
    known_to_others = [{item.name: item.known or [] for item in other.inputs} for _, other in others]
    inputs = []
    for item in schema.inputs:
        known = item.known
        if known is not None:
            known = [
                value for value in known if all(value in values[item.name] for values in known_to_others)
            ]
        inputs.append(item.model_copy(update={"known": known}))
    num_items = min(s.num_items for s in schemas.values())
    return schema.model_copy(update={"inputs": inputs, "num_items": num_items})


def _differences(one: Schema, other: Schema) -> list[str]:
    differences = []
    left_label, right_label = _label(one), _label(other)
    if left_label != right_label:
        differences.append(f"label ({left_label}, {right_label})")
    if one.missing != other.missing:
        differences.append(f"data.missing ({one.missing}, {other.missing})")
    left, right = _contracts(one), _contracts(other)
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            differences.append(f"column {name} ({left.get(name, 'absent')}, {right.get(name, 'absent')})")
    return differences


def _label(schema: Schema) -> str:
    return f"{schema.label}: {schema.positive or ', '.join(schema.classes)}"


def _contracts(schema: Schema) -> dict[str, str]:
    """Text of each column's contract, sorted by name."""
    by_name: list[Input] = sorted(schema.inputs, key=lambda item: item.name)
    return {item.name: str(item.contract.model_dump(exclude_defaults=True)) for item in by_name}
