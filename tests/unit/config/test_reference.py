"""The reference of the project file's keys: whole, readable, and the same in docs/keys.md."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from app.config import reference
from app.config.reference import NAME, REQUIRED, Group, Key
from app.config.section import PositiveInt, Section
from app.errors import UserError
from tests.commands import raylway

ROOT = Path(__file__).parents[3]
GROUPS = reference.groups()
PATHS = {key.path for group in GROUPS for key in group.keys}


class Square(Section):
    """A square."""

    kind: Literal["square"]
    side: float = Field(gt=0, le=2.5)
    """Length of a side."""


class Circle(Section):
    """A circle,
    round."""

    kind: Literal["circle"]
    radius: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Its radius."""


class Drawing(Section):
    """A drawing."""

    shape: Annotated[Square | Circle, Field(discriminator="kind")] = Square(kind="square", side=2)
    """The shape."""
    shapes: dict[str, Square] = Field(min_length=1)
    """More shapes."""
    labels: list[str] = Field(["a", "2"], min_length=2)
    """Two or more."""
    size: PositiveInt | tuple[int, int] = 10_000
    """Width, or width and height."""
    ink: Literal["black", "red"] | Circle | None = None
    """The ink."""
    notes: dict[str, Any] = Field({})
    """Whatever."""
    is_framed: bool = False
    """Whether it is framed."""


def test_a_section_becomes_groups_of_keys():
    assert reference.groups(Drawing, "page") == [
        Group(
            "page",
            "",
            "A drawing.",
            (
                Key(
                    "page.shape", "section with kind: square, circle", "{kind: square, side: 2}", "The shape."
                ),
                Key("page.shapes", "mapping (section), 1 or more", REQUIRED, "More shapes."),
                Key("page.labels", "list (text), 2 or more", '[a, "2"]', "Two or more."),
                Key(
                    "page.size",
                    "integer >= 1, or [integer, integer]",
                    "10000",
                    "Width, or width and height.",
                ),
                Key("page.ink", "one of black, red, or section, or null", "null", "The ink."),
                Key("page.notes", "mapping (any value)", "{}", "Whatever."),
                Key("page.is_framed", "true or false", "false", "Whether it is framed."),
            ),
        ),
        Group(
            "page.shape",
            "kind: square",
            "A square.",
            (Key("page.shape.side", "number > 0, <= 2.5", REQUIRED, "Length of a side."),),
        ),
        Group(
            "page.shape",
            "kind: circle",
            "A circle, round.",
            (Key("page.shape.radius", "number >= 0, < 1, or null", "null", "Its radius."),),
        ),
        Group(
            f"page.shapes.{NAME}",
            "",
            "A square.",
            (
                Key(f"page.shapes.{NAME}.kind", "square", REQUIRED, ""),
                Key(f"page.shapes.{NAME}.side", "number > 0, <= 2.5", REQUIRED, "Length of a side."),
            ),
        ),
        Group(
            "page.ink",
            "",
            "A circle, round.",
            (
                Key("page.ink.kind", "circle", REQUIRED, ""),
                Key("page.ink.radius", "number >= 0, < 1, or null", "null", "Its radius."),
            ),
        ),
    ]


def test_a_group_as_text_and_as_markdown():
    group = Group("a.b", "kind: c", "A | b.", (Key("a.b.x", "one of y, z", "y", "Either | or."),))
    assert reference.as_text([group]) == (
        "a.b, kind: c\n  A | b.\n\n  a.b.x: one of y, z; default y\n      Either | or.\n"
    )
    document = reference.as_markdown([group])
    assert document.endswith(
        "### `a.b`, `kind: c`\n\nA \\| b.\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
        "| `x` | one of y, z | `y` | Either \\| or. |\n"
    )


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_every_section_and_key_has_a_meaning(group):
    assert group.meaning.endswith("."), group.title
    for key in group.keys:
        assert key.meaning.endswith("."), f"{key.path} must have a docstring below its field"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_shipped_project_is_in_the_reference(config):
    def missing(value: Any, path: str) -> list[str]:
        if path in PATHS and not any(other.startswith(f"{path}.") for other in PATHS):
            return []  # its value has no keys of its own
        if not isinstance(value, dict):
            return [] if path in PATHS else [path]
        here = [] if path in PATHS or path.endswith(NAME) else [path]
        named = any(other.startswith(f"{path}.{NAME}") for other in PATHS)
        return here + [
            lost
            for name, below in value.items()
            for lost in missing(below, f"{path}.{NAME if named else name}")
        ]

    selectors = {"kind", "type", "encode", "embed"}  # in the titles of groups
    document = yaml.safe_load(config.read_text())
    lost = [path for name, value in document.items() for path in missing(value, name)]
    assert [path for path in lost if path.rpartition(".")[2] not in selectors] == []


def test_the_page_of_keys_is_in_step():
    page = (ROOT / "docs" / "keys.md").read_text()
    assert page == reference.as_markdown(GROUPS), "run: .venv/bin/raylway keys --markdown > docs/keys.md"


@pytest.mark.parametrize(
    ("section", "titles"),
    [
        ("training", ["training", "training.early_stopping", "training.horovod", "training.checkpoints"]),
        ("training.horovod", ["training.horovod"]),
        ("model.numbers", [f"model.numbers, embed: {kind}" for kind in ("none", "linear", "periodic")]),
    ],
)
def test_a_section_is_selected_with_what_is_below_it(section, titles):
    assert [group.title for group in reference.select(section)] == titles


def test_a_key_is_selected_alone():
    (group,) = reference.select("training.epochs")
    assert [key.path for key in group.keys] == ["training.epochs"]


@pytest.mark.parametrize(("section", "hint"), [("trainig", " (did you mean training?)"), ("?", "")])
def test_an_unknown_section_is_refused_with_the_known_ones(section, hint):
    with pytest.raises(UserError) as caught:
        reference.select(section)
    assert str(caught.value) == (
        f"there is no section or key {section!r}{hint}; the sections are data, features, model, training, "
        "sweep, evaluation, gate, compression, serving"
    )


def test_the_command_prints_the_reference():
    assert raylway("keys").stdout == reference.as_text(GROUPS)
    assert raylway("keys", "serving.tls").stdout == reference.as_text(reference.select("serving.tls"))
    assert raylway("keys", "--markdown").stdout == reference.as_markdown(GROUPS)
    refused = raylway("keys", "nothing")
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1)
