"""The variants of an endpoint: bundles that take the same inputs and share the traffic."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app import registry
from app.bundle import Bundle, Input, Schema
from app.config import Project
from app.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A version of the registered model that answers a share of the traffic."""

    version: str
    """Its number in the registry."""
    weight: float
    """Share of the units, relative to the other variants' weights."""
    path: Path
    """Its bundle."""


def registered(project: Project) -> tuple[dict[str, Deployed], list[str]]:
    """The project's variants with the versions that the registry has for them now, and what is to be said.

    A variant whose alias no version bears yet is left out, so that a project with a challenger can be served
    before there is one. Raises UserError if none is left, or a version that is named by number is not there.
    """
    found, notes = {}, []
    for name, variant in project.serving.variants.items():
        is_number = variant.version.isdigit()
        version = (registry.resolve if is_number else registry.find)(project.name, variant.version)
        if version is None:
            notes.append(f"the variant {name} is left out: no version has the alias {variant.version!r} yet")
        else:
            found[name] = Deployed(version=version.number, weight=variant.weight, path=version.path)
    if not found:
        raise UserError(
            f"no version of {project.name!r} that serving.variants names is registered; train one first with "
            "`raylway train`"
        )
    return found, notes


def curl(server: str, name: str, variant: Deployed) -> str:
    """A command line that asks the endpoint about the first row of a variant's stored example."""
    row = json.loads((variant.path / "example.json").read_text())["rows"][0]
    body = json.dumps({"unit": "user-17", "rows": [row]}).replace("'", "'\\''")
    return f"curl -s {server}/v2/models/{name}/predict -H 'content-type: application/json' -d '{body}'"


def load(variants: Mapping[str, Deployed]) -> dict[str, Bundle]:
    """Verify and open each variant's bundle, and let it answer its stored example (which warms it up).

    Raises BrokenBundle if files were changed or the example is answered differently.
    """
    bundles = {}
    for name, variant in variants.items():
        bundles[name] = Bundle(variant.path)
        bundles[name].check_example()
    return bundles


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
