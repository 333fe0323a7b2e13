"""Keys come from a file or the environment, change without a stop, and are never shown."""

import pytest

from cluster.access.keys import LOOK_SECONDS, KeySource, open_ring
from cluster.access.security import ClusterSecurity, is_loopback
from cluster.clock import ManualClock
from cluster.config import Security
from cluster.errors import ConfigError

SHORT = KeySource("router.api_keys_file", None, "TEST_KEYS")


def source(file) -> KeySource:
    return KeySource("router.api_keys_file", str(file), "TEST_KEYS")


def test_lines_are_keys_and_comments_are_not(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the web team\n  sk-one  \n\nsk-two\n")
    ring = open_ring(source(file), ManualClock())
    assert [ring.accepts(key) for key in (b"sk-one", b"sk-two", b"sk", b"", b"# of the web team")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_without_a_file_the_environment_counts_and_without_both_there_are_none(tmp_path, monkeypatch):
    assert open_ring(SHORT, ManualClock()) is None
    monkeypatch.setenv("TEST_KEYS", "sk-env")
    assert open_ring(SHORT, ManualClock()).accepts(b"sk-env")
    monkeypatch.setenv("TEST_KEYS", " ")
    with pytest.raises(ConfigError, match="TEST_KEYS has no key"):
        open_ring(SHORT, ManualClock())


def test_a_changed_file_is_read_again_and_a_broken_one_leaves_the_former_keys(tmp_path):
    clock, file = ManualClock(), tmp_path / "keys"
    file.write_text("sk-old\n")
    ring = open_ring(source(file), clock)
    (tmp_path / "new").write_text("sk-new\n")
    (tmp_path / "new").replace(file)
    assert ring.accepts(b"sk-old"), "it is not looked at all the time"
    clock.advance(LOOK_SECONDS)
    assert ring.accepts(b"sk-new") and not ring.accepts(b"sk-old")
    for breaking in (lambda: file.write_text("# none\n"), file.unlink):
        breaking()
        clock.advance(LOOK_SECONDS)
        assert ring.accepts(b"sk-new")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "can't be read: No such file"), (b"", "has no key"), (b"\xff\xfe", "not text"), (b"tooshort", "too short")],
)
def test_a_secret_that_does_not_do_is_told_by_its_setting_and_never_shown(tmp_path, content, problem):
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        ClusterSecurity(Security(secret_file=str(file)))
    assert "security.secret_file" in str(caught.value) and "tooshort" not in str(caught.value)


def test_an_address_that_others_reach_needs_a_secret_or_a_word_that_it_does_not(tmp_path):
    open_cluster = ClusterSecurity(Security())
    open_cluster.require_for("127.0.0.1", "bootstrap.host")
    for host in ("0.0.0.0", "::", "10.1.2.3", "worker-7.example"):
        with pytest.raises(ConfigError, match=r"bootstrap\.host: .*secret_file.*BATON_CLUSTER_SECRET.*allow_insecure"):
            open_cluster.require_for(host, "bootstrap.host")
    ClusterSecurity(Security(allow_insecure=True)).require_for("0.0.0.0", "bootstrap.host")
    file = tmp_path / "secret"
    file.write_text("a secret of some length")
    ClusterSecurity(Security(secret_file=str(file))).require_for("0.0.0.0", "bootstrap.host")


def test_addresses_of_this_machine_alone():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))
