"""The coordinator's settings, its addresses, and what it takes for a model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coordinator.addresses import advertised, reachable_here
from coordinator.config import CoordinatorConfig, Dtype, with_port
from coordinator.model_folder import find_model_folder
from protocol.errors import CheckpointInvalid, ConfigInvalid, ManyhandsError
from protocol.settings import load
from protocol.specs import ActivationFormat, WeightFormat


class Address(NamedTuple):
    """As psutil gives it."""

    family: int
    address: str


def v4(address: str) -> Address:
    return Address(socket.AF_INET, address)


def v6(address: str) -> Address:
    return Address(socket.AF_INET6, address)


INTERFACES = {
    "lo": [v4("127.0.0.1"), v6("::1")],
    "docker0": [v4("172.17.0.1")],
    "wlan0": [v4("192.168.1.5"), v4("169.254.3.4"), v6("fe80::1%wlan0"), v6("2001:db8::5")],
    "eth0": [v4("10.0.0.2"), Address(17, "aa:bb:cc:dd:ee:ff")],
}


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        ("127.0.0.1", (), ("127.0.0.1:7411",)),
        ("192.168.1.5", (), ("192.168.1.5:7411",)),
        ("::1", (), ("[::1]:7411",)),
        ("0.0.0.0", (), ("192.168.1.5:7411", "10.0.0.2:7411", "172.17.0.1:7411", "127.0.0.1:7411")),
        (
            "::",
            (),
            ("192.168.1.5:7411", "[2001:db8::5]:7411", "10.0.0.2:7411", "172.17.0.1:7411", "127.0.0.1:7411",
             "[::1]:7411"),
        ),
        ("0.0.0.0", ("me.example", "me.example:7411", "me.example:9"), ("me.example:7411", "me.example:9")),
    ],
)  # fmt: skip
def test_addresses_in_links(host: str, given: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert advertised(host, 7411, given, INTERFACES) == expected


def test_a_machine_without_addresses_is_told() -> None:
    with pytest.raises(ConfigInvalid, match="no address") as caught:
        advertised("0.0.0.0", 7411, (), {})
    assert "--advertise" in caught.value.remedy


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("0.0.0.0", ("127.0.0.1:1", "10.0.0.2:1")),
        ("::", ("[::1]:1", "10.0.0.2:1")),
        ("10.0.0.2", ("10.0.0.2:1",)),
    ],
)
def test_a_client_on_this_machine_goes_over_loopback(host: str, expected: tuple[str, ...]) -> None:
    assert reachable_here(host, 1, ("10.0.0.2:1",)) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [("a", "a:5"), ("a:6", "a:6"), ("::1", "[::1]:5"), ("[::1]", "[::1]:5"), ("[::1]:6", "[::1]:6")],
)
def test_ports_are_added_where_none_is(address: str, expected: str) -> None:
    assert with_port(address, 5) == expected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"plan": "1,x"}, "no share"),
        ({"plan": ""}, "no share"),
        ({"port": 70_000}, "port 70000"),
        ({"name": ""}, "name"),
        ({"workers": 0}, "workers 0 must be positive"),
        ({"kv_positions": 0}, "kv_positions 0 must be positive"),
        ({"lease_s": 0.1}, "heartbeat_s 0.5 must be shorter"),
        ({"max_sessions": 5000}, "exceeds 1024"),
        ({"client_silence_s": 0.0}, "client_silence_s"),
        ({"advertise": ("not an address",)}, "not HOST:PORT"),
        ({"advertise": ("a",) * 17}, "17 addresses"),
    ],
)
def test_settings_that_can_not_be(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CoordinatorConfig(**values)


def test_settings_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    environ = {"MANYHANDS_WORKERS": "3", "MANYHANDS_DTYPE": "bfloat16"}
    config = load(CoordinatorConfig, {"plan": "1,1/2", "tile_cache": "1MiB"}, environ, None, "coordinator").config
    assert (config.policy().workers, config.policy().plan_words) == (3, "1,1/2")
    assert config.formats == (WeightFormat.BFLOAT16, ActivationFormat.BFLOAT16)
    assert config.tile_cache_bytes == 2**20
    assert config.state_folder == tmp_path / "manyhands" / "coordinator"
    assert CoordinatorConfig().policy().plan_words is None
    assert CoordinatorConfig(dtype=Dtype.AUTO).formats == (None, None)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_whole_numbers_leave_the_activations_to_the_checkpoint(dtype: str) -> None:
    config = load(CoordinatorConfig, {"dtype": dtype, "kv_positions": "512"}, {}, None, "coordinator").config
    assert config.formats == (WeightFormat(dtype), None)
    assert config.policy().kv_positions == 512
    assert CoordinatorConfig().policy().kv_positions == 8192


def test_a_model_is_a_folder_or_a_hub_name(tmp_path: Path) -> None:
    assert find_model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    for bad in ("", "no such thing", str(tmp_path / "none"), str(tmp_path / "file"), "a/b@", "a/b/c"):
        with pytest.raises(ConfigInvalid) as caught:
            find_model_folder(bad)
        assert caught.value.remedy


def test_a_hub_name_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    asked: list[tuple[str, str | None]] = []

    def download(repo: str, revision: str | None = None, **_: object) -> str:
        asked.append((repo, revision))
        if repo == "no/network":
            raise errors.LocalEntryNotFoundError("offline")
        if repo == "full/disk":
            raise OSError(28, "No space left on device")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model_folder("owner/name@refs/pr/1") == tmp_path
    assert asked == [("owner/name", "refs/pr/1")]
    for repo, code in (("no/network", CheckpointInvalid.code), ("full/disk", "storage-full")):
        with pytest.raises(ManyhandsError) as caught:
            find_model_folder(repo)
        assert (caught.value.code, repo in str(caught.value)) == (code, True)
