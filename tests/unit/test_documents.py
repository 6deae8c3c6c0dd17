"""The documents agree with the program: commands parse; links, names and keys exist."""

import json
import pkgutil
import re
import shlex
from collections.abc import Mapping
from typing import Any

import pytest
import typer
import yaml

from app.cli.main import COMMANDS, command_line
from app.config import Project, reference
from tests import documents
from tests.documents import DOCUMENTS, README, ROOT, Block

MAX_README_LINES = 200
RAYLWAY_COMMAND = re.compile(
    r"""(?:\.venv/bin/raylway|python\ -m\ app)(?![\w-])((?:\ +(?:'[^']*'|"[^"]*"|[^\s|&;()<>'"]+)+)*)""",
    re.VERBOSE,
)
"""Captures the words of a command line of Raylway, as a shell would split them."""
RAY_COMMAND = re.compile(r"(?:^|[\s/])ray ([^\n|&;()<>]+)")
BASES = {"texts": "tweets", "recommendations": "movies"}
"""The shipped project that the YAML fragments of a page change. For other pages it is income."""
FOLDERS = ("app/", "benchmarks/", "configs/", "docs/", "tests/")
SUFFIXES = (".onnx", ".safetensors", ".json")
"""Endings of files in a bundle: such a code span is not a key."""
PARSER = typer.main.get_command(command_line())
BLOCKS = [block for document in DOCUMENTS for block in documents.blocks(document)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language == "sh"]
KEYS = {key.path for group in reference.groups() for key in group.keys}
SECTIONS = {group.path for group in reference.groups() if group.path}


def parse(words: list[str]) -> None:
    """Parse a command line. Raises typer.TyperException if it is invalid."""
    command: Any = PARSER
    context = command.make_context("raylway", [*words])
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


def raylway_commands(text: str) -> list[list[str]]:
    """The words of each command of Raylway in a text, without `raylway` itself."""
    text = re.sub(r"\s# .*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(words) for words in RAYLWAY_COMMAND.findall(text)]


def for_each(blocks: list[Block]) -> Any:
    return pytest.mark.parametrize("block", blocks, ids=str)


def for_each_document(function: Any) -> Any:
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)(function)


def test_commands_are_found_in_a_text_and_invalid_ones_are_refused():
    text = "eval \"$(.venv/bin/raylway up | grep x)\" # y\nray job -- python -m app train a --set 'b={c: 1}'"
    assert raylway_commands(text) == [["up"], ["train", "a", "--set", "b={c: 1}"]]
    assert raylway_commands("raylway-haproxy and .venv/bin/raylway-haproxy -f x") == []
    with pytest.raises(typer.TyperException):
        parse(["train", "a", "--nonsense"])
    with pytest.raises(typer.TyperException):
        parse(["sweep", "report"])


@for_each(SHELL_BLOCKS)
def test_every_command_parses(block):
    for command in block.commands():
        for words in raylway_commands(command):
            parse(words)
        for target in re.findall(r"^make (\S+)", command, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


@for_each([block for block in SHELL_BLOCKS if block.mark])
def test_commands_of_ray_that_no_test_runs_parse(block):
    from ray.scripts.scripts import cli

    for command in block.commands():
        for words in RAY_COMMAND.findall(command):
            group: Any = cli
            context = group.make_context("ray", shlex.split(words))
            while hasattr(group, "commands"):
                name, group, rest = group.resolve_command(context, [*context._protected_args, *context.args])
                context = group.make_context(name, rest, parent=context)


@for_each_document
def test_every_command_in_a_code_span_exists(document):
    for span in documents.spans(document):
        words = shlex.split(re.split(r" [>|] ", span)[0]) if span.startswith("raylway ") else []
        if "COMMAND" in words:
            continue
        try:
            if words[1:]:
                parse(words[1:])
        except typer.Exit:  # --help
            continue
        except typer.TyperException as error:
            # A command may be named without its arguments; a group of commands then shows its help.
            if (message := error.format_message()) and "Missing" not in message:
                pytest.fail(f"{span}: {message}")


def test_every_command_is_in_a_document():
    spans = {" ".join(span.split()[:2]) for document in DOCUMENTS for span in documents.spans(document)}
    lines = {
        f"raylway {words[0]}" for block in SHELL_BLOCKS for words in raylway_commands(block.text) if words
    }
    assert {f"raylway {command}" for command in COMMANDS} - spans - lines == set()


@for_each_document
def test_every_link_has_a_target(document):
    for link in documents.links(document):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in documents.anchors(target), link


@for_each_document
def test_every_path_and_python_name_exists(document):
    for span in documents.spans(document):
        if re.fullmatch(r"[\w./-]+", span) and span.startswith(FOLDERS):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"app(\.\w+)+", span):
            pkgutil.resolve_name(span)  # raises if there is no such name


@for_each_document
def test_every_key_exists(document):
    """A code span such as `training.epochs` or `model.kind: mf`."""
    sections = {path.split(".")[0] for path in SECTIONS}
    for span in documents.spans(document):
        key = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:$|[:=])", span)
        if key and key[1].split(".")[0] in sections and not key[1].endswith(SUFFIXES):
            path = re.sub(r"\.(kind|type|encode|embed)$", "", key[1])
            assert path in {*KEYS, *SECTIONS}, span


@for_each([block for block in BLOCKS if block.language == "yaml"])
def test_every_yaml_block_is_a_valid_project_or_part_of_one(block):
    fragment = yaml.safe_load(block.text)
    assert set(fragment) <= set(Project.model_fields), "a block of YAML is a project or a part of one"
    base = BASES.get(block.document.stem, "income")
    document = yaml.safe_load((ROOT / "configs" / f"{base}.yaml").read_text())
    Project.model_validate(merged(document, fragment))


def merged(document: Any, fragment: Any) -> Any:
    """The document with the values of the fragment. Sections with a kind, and sweeps, are replaced whole."""
    if not isinstance(document, Mapping) or not isinstance(fragment, Mapping):
        return fragment
    if {"kind", "type", "encode", "space"} & set(fragment):
        return fragment
    return {**document, **{key: merged(document.get(key), value) for key, value in fragment.items()}}


@for_each([block for block in BLOCKS if block.language in ("json", "python")])
def test_every_json_and_python_block_is_well_formed(block):
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    decoder, text = json.JSONDecoder(), block.text.strip()
    while text:  # a block may have a request and its response
        _, end = decoder.raw_decode(text)
        text = text[end:].strip()


@for_each(BLOCKS)
def test_every_block_has_a_known_language(block):
    assert block.language in ("sh", "yaml", "json", "python", "text", "mermaid"), block
    assert block.mark is None or block.language == "sh"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_the_project_in_the_readme_is_the_shipped_one():
    (project,) = documents.blocks(README, "yaml")
    assert project.text == (ROOT / "configs" / "smoke.yaml").read_text()


def test_the_tree_in_the_readme_is_complete():
    """Each folder and file of app/ has a line, and each line is a folder or file of app/."""
    (tree,) = [block for block in documents.blocks(README, "text") if block.text.startswith("app/ ")]
    named = {line.split()[0] for line in tree.text.splitlines() if re.match(r"  \S", line)}
    actual = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "app").iterdir()}
    assert named == actual - {"__init__.py", "__main__.py", "__pycache__/"}
    top_folders = {line.split()[0] for line in tree.text.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).exists() for name in top_folders)


def test_every_page_is_linked_from_the_readme():
    assert {path.name for path in DOCUMENTS} - {"README.md"} <= {
        link.partition("#")[0].rpartition("/")[2] for link in documents.links(README)
    }
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {
        path.name for path in DOCUMENTS if path.parent.name == "docs"
    }
