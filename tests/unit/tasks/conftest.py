import functools

import pytest

from tests import families


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """`families.build` in one state directory for each family; builds each model once."""

    @functools.cache
    def home(family: str):
        return tmp_path_factory.mktemp(f"home-{family}")

    return functools.cache(lambda family, name: families.build(family, name, home(family)))
