import contextlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer

from app.cli import main
from app.cli.main import COMMANDS
from app.errors import UserError
from tests.commands import raylway

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))
MUST_BE = "must be a whole number from"


@pytest.fixture
def faulty(tmp_path):
    file = tmp_path / "faulty.yaml"
    file.write_text((ROOT / "configs" / "smoke.yaml").read_text().replace("epochs: 3", "epochz: soon"))
    return file


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_project_is_valid(config):
    done = raylway("check", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{config}: valid: {Path(config).stem}, ")
    _, *sweep = done.stdout.splitlines()
    assert not sweep or (sweep[0], sweep[-1].split()[0]) == ("sweep:", "size:")


def test_set_overrides_a_key():
    done = raylway("check", "configs/smoke.yaml", "--set", "training.num_workers=7", "--set", "name=other")
    assert done.returncode == 0
    assert ": valid: other, " in done.stdout
    assert " 7 workers" in done.stdout


@pytest.mark.parametrize("command", ["check", "train", "serve"])
def test_a_faulty_project_is_refused_before_anything_starts(faulty, command, home):
    done = raylway(command, str(faulty))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert f"{faulty}:29: training.epochz: unknown key (did you mean epochs?); allowed: " in done.stderr
    assert f"{faulty}:27: training.epochs: is missing; " in done.stderr
    assert not home.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.yaml"], "error: configs/none.yaml: no such project file"),
        (
            ["configs/smoke.yaml", "--set", "nothing"],
            "error: --set nothing: must be of the form key.key=value",
        ),
        (["configs/smoke.yaml", "--set", "training.epochs=soon"], "error: --set: training.epochs: "),
        (["pyproject.toml"], "error: pyproject.toml: "),
    ],
)
def test_a_user_error_is_a_message_and_exit_code_2(arguments, message):
    done = raylway("check", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr


def test_a_path_with_brackets_is_printed_unchanged(tmp_path):
    file = tmp_path / "a[b].yaml"
    file.write_text((ROOT / "configs" / "smoke.yaml").read_text())
    done = raylway("check", str(file))
    assert done.stdout.startswith(f"{file}: valid: ")


def listed_commands(help_text: str) -> set[str]:
    """The commands that a help text lists."""
    (box,) = re.findall(r"─ Commands ─.*?╰", help_text, re.DOTALL)
    return set(re.findall(r"^│ ([a-z]\S*) ", box, re.MULTILINE))


def test_help_lists_every_command():
    done = raylway("--help")
    assert (done.returncode, listed_commands(done.stdout)) == (0, set(COMMANDS))


@pytest.mark.parametrize(
    "group", [name for name, command in COMMANDS.items() if isinstance(command, Mapping)]
)
def test_the_help_of_a_group_lists_its_commands(group):
    done = raylway(group, "--help")
    assert (done.returncode, listed_commands(done.stdout)) == (0, set(COMMANDS[group]))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_parameter_has_a_help_text(name):
    command = typer.main.get_command(main.command_line()).commands[name]
    for cmd in [command, *getattr(command, "commands", {}).values()]:
        assert cmd.help, cmd.name
        for parameter in cmd.params:
            assert parameter.help, f"{cmd.name}: {parameter.name}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("chek", "no such command 'chek'. Did you mean 'check'?; it takes audit, check, "),
        ("check", "check: missing argument 'file'; it takes file, --set, --help (see `"),
        ("check x y", "check: got unexpected extra argument(s) (y); it takes "),
        ("check x --sett a=1", "check: no such option: --sett (Possible options: --set); it takes "),
        ("sweep x --nonsense", "sweep run: no such option: --nonsense; it takes file, --set, --trials, "),
        ("promote income", "promote: missing argument 'version'; it takes name, version, "),
        ("predict income --input x", "predict: missing option '--output'; it takes "),
        ("predict income --input", "error: option '--input' requires an argument; see --help"),
        ("train x --fresh=1", "error: option '--fresh' does not take a value; see --help"),
    ],
)
def test_an_invalid_command_line_is_one_line_and_exit_code_2(arguments, message):
    done = raylway(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["sweep"]])
def test_a_command_without_arguments_shows_its_help(command):
    done = raylway(*command)
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage:" in done.stdout


def test_the_table_of_commands_imports_no_large_library():
    code = "import sys, app.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "app.config.projectfile" in loaded
    assert not {"ray", "torch", "mlflow", "pandas", "sklearn", "onnx"} & loaded


@pytest.mark.parametrize("name", ["o'brien", "../x", "a/b", "%2e", "ünï", "a" * 5000, "a\udcffb", "Income"])
@pytest.mark.parametrize(
    "command",
    [
        ["versions", "NAME"],
        ["promote", "NAME", "1"],
        ["sign", "NAME@1"],
        ["traffic", "NAME"],
        ["traffic", "NAME", "--champion", "1"],
        ["audit", "NAME"],
        ["undeploy", "NAME"],
        ["predict", "NAME", "--input", "x.csv", "--output", "out"],
        ["predict", "NAME@champion", "--input", "x.csv", "--output", "out"],
    ],
    ids=" ".join,
)
def test_an_invalid_model_name_is_refused_by_every_command(command, name, home, monkeypatch):
    from app.cluster import session

    monkeypatch.setattr(session, "session", contextlib.nullcontext)
    monkeypatch.setenv("RAYLWAY_SIGNING_KEY", str(ROOT / "pyproject.toml"))
    with pytest.raises(UserError, match="there is no model"):
        main.command_line()([word.replace("NAME", name) for word in command], standalone_mode=False)


@pytest.mark.parametrize(
    "value", ["1e400", "nan", "-inf", "inf", "1e12", "-1", "soon", "1_0", "५", "\uff15", "0x1F", "1,5", ""]
)
@pytest.mark.parametrize(
    "command", ["token x --hours={}", "traffic income --champion {}", "traffic a --b={}"]
)
def test_a_number_outside_its_range_is_refused_with_one_line(command, value, home):
    with pytest.raises(
        UserError, match=rf"^--(hours|champion|b): must be a number from .*; it is '{value}'$"
    ):
        main.command_line()([word.format(value) for word in command.split()], standalone_mode=False)
    assert not home.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *(
            (
                ["predict", "m", "--input", "a", "--output", "b", "--k", k],
                f"--k: {MUST_BE} 1 to 100; it is {k!r}",
            )
            for k in ("0", "101", str(10**30), "many", "1_0", "1.0", " 5 ", "\uff15", "nan", "")
        ),
        *(
            (
                ["sweep", "configs/smoke.yaml", "--trials", n],
                f"--trials: {MUST_BE} 1 to 1,000,000,000; it is ",
            )
            for n in ("0", "1.5", "1_0", "9" * 5000)
        ),
        (
            ["traffic", "income", "--champion", " 5 "],
            "--champion: must be a number from 0 to 1,000,000,000; it",
        ),
        (["traffic", "income", "champion", "5"], "champion 5: must be variants with their weights: "),
        (["traffic", "income", "--champion"], "--champion: must be variants with their weights: "),
        (
            ["traffic", "income", "--at", "soon"],
            "--at: must be a time such as 2026-11-01T12:00:00; it is 'soon'",
        ),
    ],
)
def test_an_option_that_is_not_a_number_or_time_is_refused_with_one_line(command, message, home):
    with pytest.raises(UserError) as caught:
        main.command_line()(command, standalone_mode=False)
    assert str(caught.value).startswith(message)
    assert not home.exists()
