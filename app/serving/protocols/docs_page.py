"""The page /v2/docs, on which a browser shows and tries an endpoint's OpenAPI description (Swagger UI)."""

from functools import cache
from importlib import resources
from pathlib import Path

ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""Media types of the files of Swagger UI that the page loads, by name."""


@cache
def page() -> bytes:
    """The page in HTML."""
    return (resources.files(__package__) / "docs.html").read_bytes()


def asset(name: str) -> bytes:
    """The content of a file of ASSETS."""
    import swagger_ui_bundle

    return (Path(swagger_ui_bundle.swagger_ui_path) / name).read_bytes()
