"""The traffic of a project, with the versions that the registry has for its variants."""

from app.config import Serving
from app.errors import UserError
from app.registry import versions
from app.serving.names import workers_application
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant


def registered_traffic(name: str, serving: Serving) -> tuple[Traffic, list[str]]:
    """The traffic of a project's settings, and a note for the user on each variant that is left out.

    A variant is left out if no version has its alias, so that a project that names a challenger can be served
    before one exists. Raises UserError if no variant with a weight remains, or if `serving.variants` names a
    version by a number that is not registered.
    """
    variants, notes = registered_variants(name, serving)
    if not any(variant.weight for variant in variants.values()):
        raise UserError(
            "at least one variant in serving.variants must have a weight and a registered version, and for "
            f"{name!r} none has; train one first with `raylway train`"
        )
    return Traffic(salt=serving.salt, policy=serving.policy, variants=variants), notes


def registered_variants(name: str, serving: Serving) -> tuple[dict[str, DeployedVariant], list[str]]:
    """The variants that have a registered version, and a note for each of the others."""
    variants, notes = {}, []
    for variant_name, variant in serving.variants.items():
        is_number = variant.version.isdigit()
        version = (versions.resolve if is_number else versions.find)(name, variant.version)
        if version is None:
            notes.append(
                f"variant {variant_name} is left out: no version of {name} has the alias {variant.version!r}"
            )
            continue
        has_workers = variant.shadow or variant.workers is not None
        variants[variant_name] = DeployedVariant(
            version=version.number,
            weight=variant.weight,
            path=version.path,
            identity=version.identity,
            shadow=variant.shadow,
            workers=workers_application(name, version.number) if has_workers else None,
        )
    return variants, notes
