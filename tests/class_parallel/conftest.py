"""Fixtures of this folder: pools of 2 and 3 processes, which all its files share."""

import os

import pytest

pytest.register_assert_rewrite("class_parallel.ranks")

from .ranks import Pool  # noqa: E402


@pytest.fixture(scope="package")
def pools(tmp_path_factory):
    """The pool of a number of processes: it starts when a test first asks for it, which takes seconds."""
    made: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in made:
            made[size] = Pool(size, str(tmp_path_factory.mktemp("ranks") / "store"))
        return made[size]

    os.environ["OMP_NUM_THREADS"] = "1"
    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def pool(request, pools) -> Pool:
    return pools(request.param)
