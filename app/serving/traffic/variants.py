"""The variants of an endpoint: bundles that take the same inputs and share the traffic."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.bundle import signature
from app.bundle.bundle import Bundle
from app.bundle.manifest import MANIFEST, require_passed
from app.bundle.schema import Input, Schema
from app.errors import UserError


class Deployed(BaseModel):
    """A version of the registered model, as an endpoint has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str
    """Its number in the registry."""
    weight: float
    """Share of the units, relative to the other variants' weights."""
    path: Path
    """Its bundle, on the machine that deployed it."""
    identity: str = ""
    """The SHA-256 of its bundle's manifest, the same on all machines; empty if it is not registered."""
    shadow: bool = False
    workers: str | None = None
    """The Serve application of its own replicas; None if it is in those of the endpoint."""


def located(model: str, variants: Mapping[str, Deployed]) -> dict[str, Deployed]:
    """The variants with paths on this machine, which may be another one than deployed them.

    Fetches bundles that are not here. Raises UserError if the registry has no such version or bundle.
    """
    return {name: _located(model, variant) for name, variant in variants.items()}


def _located(model: str, variant: Deployed) -> Deployed:
    if not variant.identity or (variant.path / MANIFEST).exists():
        return variant
    # Imported here: MLflow takes seconds and memory that a replica seldom needs.
    from app.registry import versions

    version = versions.resolve(model, variant.version)
    if version.identity != variant.identity:
        raise UserError(
            f"{model} version {variant.version} has another bundle now than when it was deployed; deploy it "
            "again with `raylway serve`"
        )
    return variant.model_copy(update={"path": version.path})


def load(variants: Mapping[str, Deployed], trusted_keys: Sequence[str] = ()) -> dict[str, Bundle]:
    """Open each variant's bundle as `opened` does."""
    return {name: opened(variant.path, trusted_keys) for name, variant in variants.items()}


def opened(path: Path, trusted_keys: Sequence[str] = ()) -> Bundle:
    """Verify and open a bundle, and let it answer its stored example (which warms it up).

    Raises BrokenBundle if files were changed or the example is answered differently, and UserError if the
    gate did not let it pass, or there are `trusted_keys` and none of them has signed it.
    """
    if trusted_keys:
        signature.require(path / MANIFEST, trusted_keys)
    bundle = Bundle(path)
    require_passed(bundle.manifest, f"a bundle to be served ({path})")
    bundle.check_example()
    return bundle


def common_schema(schemas: Mapping[str, Schema]) -> Schema:
    """What all variants take.

    A category's known values are those that every variant knows: whether a request is refused must not
    depend on the variant, or the variants could not be compared. Raises UserError if they differ in more.
    """
    (first, schema), *others = schemas.items()
    for name, other in others:
        differences = _differences(schema, other)
        if differences:
            raise UserError(
                f"the variants of one endpoint must take the same inputs, but {first} and {name} differ in "
                f"{'; '.join(differences)}. Deploy versions that were trained on the same contract."
            )
    others_know = [{item.name: item.known or [] for item in other.inputs} for _, other in others]
    inputs = []
    for item in schema.inputs:
        known = item.known
        if known is not None:
            known = [value for value in known if all(value in know[item.name] for know in others_know)]
        inputs.append(item.model_copy(update={"known": known}))
    num_items = min(s.num_items for s in schemas.values())
    return schema.model_copy(update={"inputs": inputs, "num_items": num_items})


def _differences(one: Schema, other: Schema) -> list[str]:
    found = []
    left_label, right_label = _label(one), _label(other)
    if left_label != right_label:
        found.append(f"label ({left_label}, {right_label})")
    if one.missing != other.missing:
        found.append(f"data.missing ({one.missing}, {other.missing})")
    left, right = _contracts(one), _contracts(other)
    for name in dict.fromkeys([*left, *right]):
        if left.get(name) != right.get(name):
            found.append(f"column {name} ({left.get(name, 'absent')}, {right.get(name, 'absent')})")
    return found


def _label(schema: Schema) -> str:
    return f"{schema.label}: {schema.positive or ', '.join(schema.classes)}"


def _contracts(schema: Schema) -> dict[str, str]:
    """Each column's contract as text, in the order of the names."""
    by_name: list[Input] = sorted(schema.inputs, key=lambda item: item.name)
    return {item.name: str(item.contract.model_dump(exclude_defaults=True)) for item in by_name}
