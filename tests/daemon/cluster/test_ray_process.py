"""How Ray is started: the head's address, the options of a head and of a node."""

import socket
from pathlib import Path

import pytest

from framepackd.cluster.ray_process import AddressError, Head, RayProcess, cause_of_end


def options(head: Head, *cards: str) -> list[str]:
    return RayProcess(head, "render2", list(cards), Path("/run/ray"), 6380, {}).arguments()


def test_a_head_is_here_if_its_address_is() -> None:
    assert Head.at("localhost:6379").is_here
    assert not Head("192.0.2.1", 6379).is_here  # of the documentation: nobody has it
    assert str(Head("::1", 6379)) == "[::1]:6379"


@pytest.mark.parametrize(
    "text", ["front", "front:", ":6379", "front:0", "front:70000", "no.such.host.invalid:6379"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(AddressError, match="--head"):
        Head.at(text)


def test_a_head_lends_only_what_it_is_told_and_shows_no_dashboard() -> None:
    given = options(Head("127.0.0.1", 6379))
    assert {"--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0", "--resources={}"} <= set(
        given
    )
    assert "--node-ip-address=127.0.0.1" in given


def test_a_node_lends_its_cards_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "own_address", "192.0.2.2")
    given = options(Head("192.0.2.1", 6379), "framepackd:cuda:0")
    assert {"--address=192.0.2.1:6379", "--node-name=render2", "--node-ip-address=192.0.2.2"} <= set(given)
    assert '--resources={"framepackd:cuda:0": 1}' in given
    assert "--head" not in given


def test_ports_are_known_to_a_firewall() -> None:
    ports = [int(option.split("=")[1]) for option in options(Head("127.0.0.1", 6379)) if "-port=" in option]
    assert set(ports) - {6379} <= set(range(6380, 7380))
    assert len(set(ports)) == len(ports)


def test_a_folder_that_is_too_deep_for_sockets_is_refused() -> None:
    with pytest.raises(AddressError, match="at most 40 characters"):
        RayProcess(Head("127.0.0.1", 6379), "here", [], Path("/" + "a" * 60), 6380, {})


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken", "another token"),
        ("RuntimeError: Version mismatch: The cluster was started with:", "another version"),
        ("rpc_client.h:204: Failed to connect to GCS within 5 seconds.", "does not answer"),
        ("gcs_server [exit code=-9]", "main process"),
        ("raylet: This node has beem marked as dead.", "frozen"),
        ("subscriber.cc:325: A worker is dead. subscription_failure_callback will be", "started anew"),
        ("", "does not say"),
    ],
)
def test_the_cause_of_an_end_is_given_in_words(said: str, cause: str) -> None:
    assert cause in cause_of_end(said)


def test_the_loopback_stays_the_loopback() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        assert Head("127.0.0.1", 1).own_address == "127.0.0.1"
