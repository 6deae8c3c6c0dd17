import json
import threading

import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from app.errors import UserError
from app.serving.gateway import issuer
from app.state import files


def verify(token):
    """Raises JoseError unless a published key has signed the token."""
    jwt.decode(token, KeySet.import_key_set(json.loads(issuer.jwks().read_text())))


def run_concurrently(function, num_threads):
    threads = [threading.Thread(target=function) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_concurrent_first_tokens_are_all_signed_by_a_published_key():
    tokens = []
    run_concurrently(lambda: tokens.append(issuer.issue("ann", ["predict"], 1)), 6)
    assert len(tokens) == 6
    for token in tokens:
        verify(token)


def test_keys_that_are_added_concurrently_are_all_kept():
    earlier = issuer.issue("ann", ["predict"], 1)
    run_concurrently(issuer.new_key, 6)
    assert len(json.loads(issuer.jwks().read_text())["keys"]) == 7
    verify(earlier)


@pytest.mark.parametrize("num_writes", [0, 1])
def test_tokens_stay_valid_if_adding_a_key_is_killed(monkeypatch, num_writes):
    class Killed(BaseException):
        pass

    remaining, write = num_writes, files.write

    def write_or_die(*arguments, **options):
        nonlocal remaining
        if not remaining:
            raise Killed
        remaining -= 1
        write(*arguments, **options)

    earlier = issuer.issue("ann", ["predict"], 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write_or_die)
        with pytest.raises(Killed):
            issuer.new_key()
    for token in (earlier, issuer.issue("bob", ["predict"], 1)):
        verify(token)


def test_only_the_owner_can_read_the_keys_and_the_public_file_has_no_private_key(home):
    issuer.jwks()
    for file in (home / "issuer").iterdir():
        assert file.stat().st_mode & 0o077 == 0
    assert '"d"' not in issuer.jwks().read_text()


def test_an_unknown_scope_is_refused():
    with pytest.raises(UserError, match=r"a scope must be one of predict, .*; not 'root'"):
        issuer.issue("bob", ["root"], 1)
