"""Frames: every message both ways, and everything hostile refused with a typed error."""

from __future__ import annotations

import contextlib
import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import DIGEST, GOLDEN_FILE, SAMPLES, name_of

from protocol import frames
from protocol import messages as m
from protocol.errors import FrameMalformed, FrameTooLarge, ProtocolViolation, VersionMismatch
from protocol.frames import decode, encode, negotiate, pack_manifest, unpack_manifest
from protocol.specs import ActivationFormat
from protocol.tiles import TileEntry, TileId, TileKind

GOLDEN = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
EACH_SAMPLE = pytest.mark.parametrize("message", SAMPLES, ids=name_of)
ENTRIES = (
    TileEntry(TileId(0, TileKind.ATTENTION, 1), 4096, DIGEST),
    TileEntry(TileId(-1, TileKind.LM_HEAD, 0), 2**40, bytes(32)),
)


def frames_of(message: object) -> list[frames.Buffer]:
    """Encode with a payload where the message carries one."""
    return encode(message, b"\x01\x02" if m.ROW_OF[type(message)].payload_bytes else None)


def test_every_message_of_the_table_has_a_sample_and_a_golden_frame() -> None:
    names = sorted(row.message.__name__ for row in m.TABLE.values())
    assert sorted(map(name_of, SAMPLES)) == names
    assert sorted({name.split("@")[0] for name in GOLDEN}) == names


@EACH_SAMPLE
def test_round_trip(message: object) -> None:
    received = decode(frames_of(message))
    assert received.message == message
    assert bytes(received.payload) == (b"\x01\x02" if m.ROW_OF[type(message)].payload_bytes else b"")


@EACH_SAMPLE
def test_golden_frames_are_read_and_written_for_ever(message: object) -> None:
    """`Name@2` is the frame since fields were added; the samples leave those at their defaults."""
    versions = [bytes.fromhex(frame) for name, frame in GOLDEN.items() if name.split("@")[0] == name_of(message)]
    assert bytes(encode(message)[0]) == versions[-1]
    for golden in versions:
        assert decode([golden, b""][: len(encode(message))]).message == message


@EACH_SAMPLE
def test_a_frame_cut_anywhere_is_refused(message: object) -> None:
    header, *payload = frames_of(message)
    for length in range(len(header)):
        with pytest.raises(FrameMalformed):
            decode([header[:length], *payload])


@EACH_SAMPLE
def test_trailing_garbage_and_wrong_numbers_of_frames_are_refused(message: object) -> None:
    header, *payload = frames_of(message)
    for wrong in ([bytes(header) + b"\x00", *payload], [header, *payload, b""], [header, *payload][:-1]):
        with pytest.raises(FrameMalformed):
            decode(wrong)


@EACH_SAMPLE
def test_each_byte_flipped_decodes_to_a_message_or_a_violation(message: object) -> None:
    header, *payload = frames_of(message)
    for place in range(min(len(header), 200)):
        altered = bytearray(header)
        altered[place] ^= 0xFF
        with contextlib.suppress(ProtocolViolation):
            decode([altered, *payload])


@EACH_SAMPLE
def test_each_field_of_a_wrong_type_is_refused_by_name(message: object) -> None:
    header, *payload = frames_of(message)
    code, *fields = msgpack.unpackb(header)
    for index, name in enumerate(type(message).__dataclass_fields__):  # type: ignore[attr-defined]
        for wrong in ({}, None, -(2**60), [[[]]], b"\xff" * 65, "\x00" * 20_000):
            altered = [code, *fields[:index], wrong, *fields[index + 1 :]]
            with pytest.raises(FrameMalformed, match=rf"{name_of(message)}\.{name}"):
                decode([msgpack.packb(altered), *payload])


@EACH_SAMPLE
def test_a_newer_peers_surplus_fields_are_ignored(message: object) -> None:
    header, *payload = frames_of(message)
    assert decode([msgpack.packb([*msgpack.unpackb(header), "new", 1]), *payload]).message == message


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "can't be unpacked"),
        (b"\xc0", "not a list"),
        (b"\x90", "not a list"),
        (b"\x80", "not a list"),
        (msgpack.packb([9999]), "unknown message code 9999"),
        (msgpack.packb([True]), "unknown message code bool"),
        (msgpack.packb(["1"]), "unknown message code str"),
        (msgpack.packb([8]), "0 of 1 required fields"),
        (msgpack.packb([8, True]), "expected int, got bool"),
        (msgpack.packb([8, 2**31]), "outside"),
        (msgpack.packb([8, 1.0]), "expected int, got float"),
        (b"\x91" * 900 + b"\x90", "unknown message code list"),  # deep, but within msgpack's own bound
        (b"\x91" * 60_000 + b"\x90", "can't be unpacked"),
        (b"\xdd\xff\xff\xff\xff", "can't be unpacked"),  # claims 2**32 items
        (b"\x91\xdb\xff\xff\xff\xff", "can't be unpacked"),  # claims a string of 4 GiB
        (b"\x91\xc6\xff\xff\xff\xff", "can't be unpacked"),  # claims 4 GiB of bytes
        (b"\x92\x08\xdf\xff\xff\xff\xff", "can't be unpacked"),  # claims a map of 2**32 entries
        (b"\x92\x08\xc7\x08\x01" + bytes(8), "can't be unpacked"),  # an extension type
        (b"\x91\xa2\xff\xfe", "can't be unpacked"),  # not UTF-8
        (b"\x91\xc1", "can't be unpacked"),  # the byte that msgpack never uses
    ],
)
def test_hostile_headers_are_refused(header: bytes, words: str) -> None:
    with pytest.raises(FrameMalformed, match=words):
        decode([header])


def test_no_frames_at_all_are_refused() -> None:
    with pytest.raises(FrameMalformed, match="without frames"):
        decode([])


def test_an_oversize_header_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_unpackb", lambda frame: pytest.fail("unpacked"))
    with pytest.raises(FrameTooLarge, match="header of 65537 bytes exceeds 65536"):
        decode([bytes(m.MAX_HEADER_BYTES + 1)])


def test_an_oversize_payload_is_refused_both_ways() -> None:
    chunk = m.TileChunk(digest=DIGEST, offset=0)
    too_large = bytes(m.MAX_TILE_CHUNK_BYTES + 1)
    with pytest.raises(FrameTooLarge, match="TileChunk: payload of 1048577 bytes exceeds 1048576"):
        encode(chunk, too_large)
    with pytest.raises(FrameTooLarge, match="TileChunk: payload"):
        decode([*encode(chunk)[:1], too_large])


def test_an_oversize_header_of_our_own_is_not_sent() -> None:
    peers = tuple(m.Peer(worker="w", public_key=bytes(40), addresses=("a" * 4096,)) for _ in range(20))
    with pytest.raises(FrameTooLarge, match="Probe: header of"):
        encode(m.Probe(probe=1, peers=peers))


def test_a_payload_without_a_place_for_it_is_not_sent() -> None:
    with pytest.raises(FrameMalformed, match="Leave carries no payload"):
        encode(m.Leave(), b"x")


def test_the_payload_is_neither_copied_when_sent_nor_when_received() -> None:
    payload = bytearray(b"1234")
    sent = encode(m.Sum(epoch=1, step=1, op=0, format=ActivationFormat.FLOAT32), payload)
    assert sent[1] is payload
    received = decode(sent).payload
    payload[0] = ord("9")
    assert bytes(received) == b"9234"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_only_ever_raise_a_protocol_violation(noise: bytes) -> None:
    for received in ([noise], [noise, noise]):
        with contextlib.suppress(ProtocolViolation):
            decode(received)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(m.TABLE)), st.lists(PLAIN, max_size=10))
def test_random_fields_only_ever_raise_a_protocol_violation(code: int, fields: list[object]) -> None:
    header = msgpack.packb([code, *fields])
    for received in ([header], [header, b""]):
        with contextlib.suppress(ProtocolViolation):
            decode(received)


# ---------------------------------------------------------------- manifests


def test_manifest_round_trip() -> None:
    for entries in ((), ENTRIES, ENTRIES * 500):
        assert unpack_manifest(pack_manifest(entries)) == entries


def test_a_manifest_cut_anywhere_is_refused() -> None:
    packed = pack_manifest(ENTRIES)
    for length in range(len(packed)):
        with pytest.raises(FrameMalformed):
            unpack_manifest(packed[:length])


@pytest.mark.parametrize(
    ("payload", "kind", "words"),
    [
        (pack_manifest(ENTRIES) + b"\x00", FrameMalformed, "1 bytes that don't belong"),
        (b"\xdd\x00\x0f\x42\x41", FrameTooLarge, "1000001 lines"),
        (b"\xdd\x00\x01\x00\x00" + b"\xdd\x00\x01\x00\x00" * 9, FrameMalformed, "can't be unpacked"),
        (b"\x91" * 5000, FrameMalformed, "can't be unpacked"),
        (b"\x80", FrameMalformed, "can't be unpacked"),
        (b"\x91\x80", FrameMalformed, "TileEntry: expected a list"),
        (msgpack.packb([[[0, "ffn", 0], 1, bytes(31)]]), FrameMalformed, r"TileEntry\.digest: length 31"),
        (msgpack.packb([[[0, "nought", 0], 1, bytes(32)]]), FrameMalformed, r"TileEntry\.tile\.kind: 'nought'"),
        (msgpack.packb([[[0, "x" * 65, 0], 1, bytes(32)]]), FrameMalformed, "can't be unpacked"),
    ],
)
def test_hostile_manifests_are_refused(payload: bytes, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        unpack_manifest(payload)


def test_an_oversize_manifest_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames.msgpack, "Unpacker", lambda **kw: pytest.fail("unpacked"))
    with pytest.raises(FrameTooLarge, match="manifest: payload of"):
        unpack_manifest(bytes(m.MAX_MANIFEST_BYTES + 1))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_manifests_only_ever_raise_a_protocol_violation(noise: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        unpack_manifest(noise)


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("oldest", "newest", "chosen"),
    [(1, m.VERSION, m.VERSION), (1, m.VERSION + 5, m.VERSION), (m.OLDEST_VERSION, m.OLDEST_VERSION, m.OLDEST_VERSION)],
)
def test_the_newest_common_version_is_spoken(oldest: int, newest: int, chosen: int) -> None:
    assert negotiate(oldest, newest, node="beta", software="x 1", own_software="y 1") == chosen


@pytest.mark.parametrize(("oldest", "newest"), [(m.VERSION + 1, m.VERSION + 2), (0, m.OLDEST_VERSION - 1)])
def test_without_a_common_version_both_releases_are_named(oldest: int, newest: int) -> None:
    with pytest.raises(VersionMismatch, match=r"beta \(x 1\).*y 2.*\[beta, handshake\].*same release"):
        negotiate(oldest, newest, node="beta", software="x 1", own_software="y 2")
