"""The parts that all commands share: the console with its log, signals and exit codes."""

import os
import signal
import sys
import time

import pytest
import typer

from app.cli import command
from app.errors import Interrupted, UserError


@pytest.fixture(autouse=True)
def sigterm():
    """Restore the handler of SIGTERM after the test."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def log_of(home) -> str:
    (log,) = (home / "logs").iterdir()
    return log.read_text()


def test_output_of_libraries_goes_to_the_log_and_the_command_names_the_log(home, capfd):
    with command.running("train") as console:
        os.write(1, b"chatter of a library\n")
        console.print("for the user")
    output = capfd.readouterr().out
    assert output.startswith(f"log: {home}/logs/train-")
    assert output.endswith("for the user\n")
    assert log_of(home) == "chatter of a library\n"


def test_a_quiet_command_does_not_name_its_log(home, capfd):
    with command.running("status", quiet=True) as console:
        console.print("{}")
    assert capfd.readouterr().out == "{}\n"


def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(home, capfd, monkeypatch):
    # pytest's own sys.stderr does not write to file descriptor 2.
    monkeypatch.setattr(sys, "stderr", open(2, "w", buffering=1, closefd=False))  # noqa: SIM115
    with pytest.raises(typer.Exit) as exit_, command.running("train"):
        raise KeyError("ours")
    assert exit_.value.exit_code == command.EXIT_FAILED
    output = capfd.readouterr().out
    assert "failed: KeyError: 'ours'\nthe log has the traceback: " in output
    assert "Traceback" not in output
    assert "Traceback" in log_of(home)


def test_a_full_disk_is_a_user_error(home):
    with pytest.raises(UserError, match="must have space left"), command.running("train"):
        raise OSError(28, "No space left on device", "/x")


def test_a_user_error_is_raised_unchanged(home):
    with pytest.raises(UserError, match=r"^wrong$"), command.running("train"):
        raise UserError("wrong")


def test_sigterm_ends_a_command_as_ctrl_c_does(home, capfd):
    def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(typer.Exit) as exit_, command.running("train", hint="run it again"):
        body()
    assert exit_.value.exit_code == 128 + signal.SIGTERM
    assert capfd.readouterr().out.endswith("stopped; run it again\n")


def test_an_interrupted_training_names_the_checkpoint_that_is_kept(home, capfd):
    with pytest.raises(typer.Exit) as exit_, command.running("train", hint="run it again"):
        raise Interrupted("a checkpoint at step 7", signal.SIGINT)
    assert exit_.value.exit_code == 128 + signal.SIGINT
    assert capfd.readouterr().out.endswith("stopped: a checkpoint at step 7; run it again\n")


def test_a_command_on_endpoints_needs_a_cluster(home):
    with pytest.raises(UserError, match="no cluster is up"):
        command.require_cluster()


def test_a_rejected_candidate_has_its_own_exit_code():
    command.require_passed(True)
    with pytest.raises(typer.Exit) as exit_:
        command.require_passed(False)
    assert exit_.value.exit_code == command.EXIT_GATE
