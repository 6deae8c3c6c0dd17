"""Parse README.md, CONTRIBUTING.md, SECURITY.md and docs/: blocks, commands, links and code spans."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (
    "training",
    "sweeps",
    "texts",
    "recommendations",
    "serving",
    "security",
    "operations",
    "architecture",
)
"""Pages of docs/ in the order in which their commands are run; keys.md, which is generated, has none."""
DOCUMENTS = (
    README,
    *(ROOT / "docs" / f"{page}.md" for page in (*PAGES, "keys")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
)
MARK = re.compile(r"# (?:Needs|Takes) (.+)\.")
"""First line of a block of commands that one machine cannot run, or that take too long for a test."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: Path
    line: int
    """Line number of its fence."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def mark(self) -> str | None:
        """What the commands of the block need or take; None if a test can run them."""
        match = MARK.fullmatch(self.text.partition("\n")[0])
        return match[1] if match else None

    def commands(self) -> Iterator[str]:
        """The commands of the block, each with its continuation lines. Comments are left out."""
        command = ""
        for line in self.text.splitlines():
            if not command and (not line.strip() or line.startswith("#")):
                continue
            command += f"{line}\n"
            if not line.endswith("\\") and _is_closed(command):
                yield command.rstrip("\n")
                command = ""
        assert not command, f"{self}: the block ends within a command: {command}"


def _is_closed(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def blocks(document: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a document; with `language`, those of that language."""
    text = document.read_text()
    all_blocks = []
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        line = text[: match.start()].count("\n") + 1
        all_blocks.append(Block(document, line, match[1], textwrap.dedent(match[2])))
    return [block for block in all_blocks if language in ("", block.language)]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(document: Path) -> list[str]:
    """The code spans of a document's prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def links(document: Path) -> list[str]:
    """The targets of a document's links."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(document))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
