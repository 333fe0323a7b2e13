"""The ends of logs, and logs as they grow."""

import pytest

from deploy import log_files
from deploy.log_files import read_log, tail


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "FOLLOW_SECONDS", 0.0)
    file = tmp_path / "decode-0.log"
    file.write_text("one\ntwo\nthr")
    return file


async def test_the_last_lines_are_there_also_one_that_is_not_whole_yet(log):
    assert tail(log, 2) == ["two", "thr"]
    assert tail(log, 9) == ["one", "two", "thr"]
    assert tail(log, 0) == []
    assert [line async for line in read_log(log, 1, follow=False)] == ["thr"]


async def test_following_gives_each_line_once_and_whole(log):
    following = read_log(log, 1, follow=True)
    assert await anext(following) == "two"
    with log.open("a") as more:
        more.write("ee\nfour\n")
    assert [await anext(following), await anext(following)] == ["three", "four"]
    await following.aclose()


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    file = tmp_path / "long.log"
    file.write_bytes(b"x" * (64 * 1024) + b"\nlast\n")
    assert tail(file, 5)[-1] == "last" and len(tail(file, 5)) == 2
