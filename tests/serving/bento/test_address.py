"""serving.bento.address: options before the environment, and refusals with the reason."""

import socket

import pytest

from serving.bento import address
from serving.bento.run import StartError, main


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "stated", "chosen"),
    [
        (None, "", "127.0.0.1"),
        (None, "0.0.0.0", "0.0.0.0"),
        (None, "::", "::"),
        (None, "localhost", "127.0.0.1"),
        ("127.0.0.2", "0.0.0.0", "127.0.0.2"),
        ("localhost", "", "127.0.0.1"),
    ],
)
def test_the_host(monkeypatch: pytest.MonkeyPatch, given: str | None, stated: str, chosen: str) -> None:
    monkeypatch.setenv("HOST", stated)
    assert address.chosen_host(given) == chosen


def test_the_machines_name_that_a_shell_keeps_in_host_does_not_open_the_service_to_the_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST", socket.gethostname())
    assert address.chosen_host(None) == "127.0.0.1"
    assert "is no IP address: listening at 127.0.0.1" in capsys.readouterr().err


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(address.AddressError, match=r"'no-such\.invalid' has no address"):
        address.chosen_host("no-such.invalid")


def test_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address.chosen_port(None) == 3000
    monkeypatch.setenv("PORT", " 8080 ")
    assert address.chosen_port(None) == 8080
    assert address.chosen_port(4000) == 4000
    for wrong in ("http", "0", "65536", "-1", "²", "tcp://10.0.0.1:3000"):
        monkeypatch.setenv("PORT", wrong)
        with pytest.raises(address.AddressError, match="is no port; set a number from 1 to 65535"):
            address.chosen_port(None)


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"cannot listen at 127\.0\.0\.1 port {port} \(Address already in use\)"):
            main("127.0.0.1", port)
