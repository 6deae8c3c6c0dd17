import json
import threading

import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from app.serving.gateway import issuer


def good(token):
    jwt.decode(token, KeySet.import_key_set(json.loads(issuer.jwks().read_text())))


def at_once(function, times):
    threads = [threading.Thread(target=function) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_tokens_issued_at_once_are_all_good_though_the_first_key_is_made_meanwhile():
    tokens = []
    at_once(lambda: tokens.append(issuer.issue("ann", ["predict"], 1)), 6)
    assert len(tokens) == 6
    for token in tokens:
        good(token)


def test_keys_that_are_added_at_once_are_all_kept():
    before = issuer.issue("ann", ["predict"], 1)
    at_once(issuer.new_key, 6)
    assert len(json.loads(issuer.jwks().read_text())["keys"]) == 7
    good(before)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_kill_between_the_writes_of_a_new_key_leaves_tokens_good(monkeypatch, writes):
    class Killed(BaseException):
        pass

    left, write = writes, issuer._write

    def killed(*arguments):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        write(*arguments)

    before = issuer.issue("ann", ["predict"], 1)
    with monkeypatch.context() as patch:
        patch.setattr(issuer, "_write", killed)
        with pytest.raises(Killed):
            issuer.new_key()
    for token in (before, issuer.issue("bob", ["predict"], 1)):
        good(token)
