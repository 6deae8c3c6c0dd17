"""An endpoint's traffic with the versions that the registry has for its variants."""

from app.config import Serving
from app.errors import UserError
from app.registry import versions
from app.serving.names import workers_application
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import Deployed


def registered(name: str, serving: Serving) -> tuple[Traffic, list[str]]:
    """The traffic that a project asks for, with the versions that are registered now, and notes for the user.

    A variant whose alias no version bears yet is left out, so that a project with a challenger can be served
    before there is one. Raises UserError if no variant with a weight is left, or if there is no version with
    a number that `serving.variants` names.
    """
    variants, notes = registered_variants(name, serving)
    if not any(variant.weight for variant in variants.values()):
        raise UserError(
            f"no version of {name!r} that serving.variants names with a weight is registered; train one "
            "first with `raylway train`"
        )
    return Traffic(salt=serving.salt, policy=serving.policy, variants=variants), notes


def registered_variants(name: str, serving: Serving) -> tuple[dict[str, Deployed], list[str]]:
    """The variants that have a version now, and a note for each of the others."""
    variants, notes = {}, []
    for variant_name, variant in serving.variants.items():
        is_number = variant.version.isdigit()
        version = (versions.resolve if is_number else versions.find)(name, variant.version)
        if version is None:
            notes.append(
                f"the variant {variant_name} is left out: no version has the alias {variant.version!r} yet"
            )
            continue
        has_workers = variant.shadow or variant.workers is not None
        variants[variant_name] = Deployed(
            version=version.number,
            weight=variant.weight,
            path=version.path,
            identity=version.identity,
            shadow=variant.shadow,
            workers=workers_application(name, version.number) if has_workers else None,
        )
    return variants, notes
