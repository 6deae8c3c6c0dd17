import os

import pytest

from app import console
from app.errors import UserError
from app.registry import connection
from app.serving.gateway import issuer
from app.state import stages
from app.state.audit import Audit
from app.state.home import database_url, make_private, private_file
from app.tuning import study as studies


@pytest.fixture
def open_umask():
    """A umask that would let all users read and write new files."""
    umask = os.umask(0)
    yield
    os.umask(umask)


def modes(folder):
    return {path.relative_to(folder): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.parametrize("exists", [False, True])
def test_other_users_can_read_nothing_of_the_state(home, open_umask, monkeypatch, exists):
    """The state directory is new, or exists and is open to all."""
    monkeypatch.delenv("RAYLWAY_DATABASE_URL", raising=False)
    if exists:
        home.mkdir()
    with Audit() as audit:
        audit.add("traffic", "income", {})
    connection.client().search_experiments()
    issuer.new_key()
    with studies.opened("s", ["maximize"], {}, print):
        pass
    with console.output_to_log("check"):
        print("a client's row")
    stages.produce(home / "store" / "x", lambda draft: (draft / "rows.csv").write_text("1"))
    if not exists:
        assert home.stat().st_mode & 0o777 == 0o700
    readable = {path: mode for path, mode in modes(home).items() if len(path.parts) == 1 and mode & 0o077}
    assert readable == {}
    assert {"production.db", "mlflow.db", "optuna.db", "logs"} <= {path.name for path in home.iterdir()}


def test_an_existing_folder_keeps_its_mode(home):
    home.mkdir(mode=0o755)
    make_private(home / "a" / "b")
    assert home.stat().st_mode & 0o777 == 0o755
    assert set(modes(home).values()) == {0o700}


def test_an_existing_file_keeps_its_content(home):
    file = private_file(home / "a" / "x.db")
    file.write_text("content")
    assert private_file(file).read_text() == "content"


@pytest.mark.parametrize(
    "url",
    ["nonsense", "mysql://x:secret@host/y", "postgresql://x:secret@host:abc/y", "postgres://[::1/y", ""],
)
def test_an_invalid_database_url_is_refused_without_its_password(monkeypatch, url):
    monkeypatch.setenv("RAYLWAY_DATABASE_URL", url)
    with pytest.raises(
        UserError, match="RAYLWAY_DATABASE_URL: must be a URL such as postgresql://"
    ) as caught:
        database_url("production.db")
    assert "secret" not in str(caught.value)
