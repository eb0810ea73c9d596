"""Keys and links: what is kept, what is read, and that no secret ever shows."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ConfigInvalid, LinkInvalid
from protocol.logs import redact
from protocol.security import KeyPair, Link, is_key, load_or_create_keypair, require_address, write_private

SERVER, TOKEN = KeyPair.generate(), KeyPair.generate()
LINK = Link(role="join", addresses=("10.0.0.1:4000", "[fe80::1]:4000"), server_key=SERVER.public, secret=TOKEN.secret)
URL_SECRET = LINK.format().rpartition(".")[2]


def replaced(old: str, new: str) -> str:
    """The sample link with one piece of its text replaced."""
    assert old in LINK.format()
    return LINK.format().replace(old, new, 1)


# ---------------------------------------------------------------- keys


def test_a_pair_is_found_again_from_its_secret() -> None:
    assert KeyPair.from_secret(TOKEN.secret) == TOKEN
    assert KeyPair.generate() != TOKEN


@pytest.mark.parametrize("key", [b"", b"x" * 39, b"x" * 41, b'"' * 40, b"#" * 40, TOKEN.secret + b"\n"])
def test_what_is_no_key_is_refused(key: bytes) -> None:
    assert not is_key(key)
    with pytest.raises(ValueError, match="40 characters of z85"):
        KeyPair.from_secret(key)
    with pytest.raises(ValueError, match="40 characters of z85"):
        KeyPair(TOKEN.public, key)


def test_secrets_never_show() -> None:
    secret = TOKEN.secret.decode()
    for shown in (repr(TOKEN), str(TOKEN), f"{TOKEN}", repr(LINK), str(LINK), repr([LINK, TOKEN])):
        assert secret not in shown
        assert URL_SECRET not in shown
    assert redact(f"dialling {LINK.format()} now").endswith(".*** now")


def test_a_key_pair_is_made_once_and_kept_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "state" / "worker.key"
    made = load_or_create_keypair(path)
    assert load_or_create_keypair(path) == made
    assert [file.name for file in path.parent.iterdir()] == ["worker.key"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "worker.key"
    load_or_create_keypair(path)
    path.chmod(0o640)
    with pytest.raises(ConfigInvalid, match=r"open to others \(640\) \(chmod 600 .*worker\.key\)"):
        load_or_create_keypair(path)


@pytest.mark.parametrize("content", [b"", b"not a key", b"#" * 40, TOKEN.secret[:-1], bytes(9000)])
def test_a_key_file_without_a_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "worker.key"
    write_private(path, content)
    with pytest.raises(ConfigInvalid, match="holds no key") as caught:
        load_or_create_keypair(path)
    assert TOKEN.secret[:-1].decode() not in str(caught.value)


def test_a_key_file_that_cannot_be_read_or_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "worker.key"):
        with pytest.raises(ConfigInvalid, match="key file"):
            load_or_create_keypair(path)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(OSError, match=r"directory|Is a|denied|exist"):
        write_private(target, b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


# ---------------------------------------------------------------- links

hosts = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
)
addresses = st.lists(st.builds("{}:{}".format, hosts, st.integers(1, 65535)), min_size=1, max_size=16)
keys = st.binary(min_size=32, max_size=32)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["join", "ask"]), addresses)
def test_a_link_is_read_as_it_was_written(role: str, where: list[str]) -> None:
    link = Link(role=role, addresses=tuple(where), server_key=SERVER.public, secret=TOKEN.secret)
    assert Link.parse(link.format()) == link
    assert Link.parse(f"  {link.format()}\n") == link
    assert link.keys == TOKEN


def test_the_form_of_a_link() -> None:
    assert LINK.format().startswith("manyhands://10.0.0.1:4000,[fe80::1]:4000/join/")
    assert len(LINK.format().rpartition("/")[2]) == 43 + 1 + 43


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with manyhands://"),
        ("http://10.0.0.1/join/x.y", "begins with manyhands://"),
        ("manyhands://10.0.0.1:4000", "a part is missing"),
        (LINK.format() + "/more", "too many"),
        (replaced("/join/", "/JOIN/"), "role 'JOIN' is none of join, ask"),
        (replaced("/join/", "/serve/"), "role 'serve'"),
        (replaced("10.0.0.1:4000", "10.0.0.1"), "'10.0.0.1' is not HOST:PORT"),
        (replaced("10.0.0.1:4000", ""), "'' is not HOST:PORT"),
        (replaced("10.0.0.1:4000", "10.0.0.1:0"), "port from 1 to 65535"),
        (replaced("10.0.0.1:4000", "10.0.0.1:65536"), "port from 1 to 65535"),
        (replaced("10.0.0.1:4000", "10.0.0.1:٤٠٠٠"), "port from 1 to 65535"),
        (replaced("10.0.0.1:4000", "10.0.0.1:-1"), "port from 1 to 65535"),
        (replaced("10.0.0.1:4000", "a b:4000"), "is not HOST:PORT"),
        (replaced("10.0.0.1:4000", "user@host:4000"), "is not HOST:PORT"),
        (replaced("[fe80::1]:4000", "fe80::1:4000"), "IPv6 as"),
        (replaced("10.0.0.1:4000", ",".join(["a:1"] * 16)), "1 to 16 addresses, not 17"),
        (replaced("." + URL_SECRET, ""), "ends before its token"),
        (replaced(URL_SECRET, ""), "token is cut or too long: 0 of 43"),
        (replaced(URL_SECRET, URL_SECRET[:-1]), "token is cut or too long: 42 of 43"),
        (replaced(URL_SECRET, URL_SECRET[:-3]), "token is cut or too long: 40 of 43"),
        (replaced(URL_SECRET, URL_SECRET + "A"), "token is cut or too long: 44 of 43"),
        (replaced(URL_SECRET, URL_SECRET[:-1] + "="), "token is damaged"),
        (replaced(URL_SECRET, URL_SECRET[:-1] + chr(ord(URL_SECRET[-1]) + 1)), "token is damaged"),
        (replaced(URL_SECRET, URL_SECRET[:-1] + "!"), "token is damaged"),
        (replaced(URL_SECRET, URL_SECRET[:-1] + "ü"), "token is damaged"),
        (LINK.format() + "." + URL_SECRET, "token is cut or too long: 87 of 43"),
        (LINK.format() + "A" * 2048, "too long"),
    ],
)
def test_a_malformed_link_says_what_is_wrong_and_keeps_the_token(text: str, words: str) -> None:
    with pytest.raises(LinkInvalid) as caught:
        Link.parse(text)
    told = "".join(traceback.format_exception(caught.value))
    assert words in caught.value.message
    for piece in (URL_SECRET, URL_SECRET[:-1], URL_SECRET[:-3]):
        assert piece not in told
    assert TOKEN.secret.decode() not in told


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.integers(0, 150))
def test_any_text_is_a_link_or_a_link_invalid(noise: str, place: int) -> None:
    for text in (noise, "manyhands://" + noise, LINK.format()[:place] + noise + LINK.format()[place:]):
        try:
            Link.parse(text)
        except LinkInvalid as error:
            assert URL_SECRET not in str(error)


@pytest.mark.parametrize(
    "address", ["host:1", "a.b-c.example:65535", "192.168.0.1:80", "[::1]:80", "[fe80::1%eth0]:80"]
)
def test_addresses_that_can_be_dialled(address: str) -> None:
    require_address(address)


@pytest.mark.parametrize("address", ["", ":1", "host:", "host", "-host:1", "a/b:1", "[::1:80", "::1]:80", "tcp://a:1"])
def test_addresses_that_cannot(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        require_address(address)
