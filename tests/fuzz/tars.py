"""Strategies that damage a tar, and members that no tar of ours has: links, other places, sizes that are not there."""

import tarfile
from typing import Any

from hypothesis import strategies as st

from fuzz.mutations import OUTSIDE, Strategy, any_file, bytes_of


def _member(name: str, data: bytes = b"", **about: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in about.items():
        setattr(info, key, value)
    head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % 512)


def _pax(fields: dict[str, str]) -> bytes:
    lines = b""
    for key, value in fields.items():
        body = f" {key}={value}\n".encode("utf-8", "surrogatepass")
        size = len(body) + len(str(len(body))) + (len(str(len(body) + len(str(len(body))))) > len(str(len(body))))
        lines += str(size).encode() + body
    return _member("pax", lines, type=tarfile.XHDTYPE)


_NAMES = [
    "a.png",
    "a.cls",
    "/etc/x.png",
    "../secret.png",
    "..",
    "",
    ".cls",
    "a" * 300 + ".png",
    "x/../../b.cls",
    "\udcff.png",
]
_LINKS = [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE,
    b"?",
]
_PAX = [{"size": s} for s in ("-1", "1e9", "99999999999999", "x", str(10**400), "٣")]
_PAX += [{"path": p} for p in ("/etc/passwd.png", "../secret.png", "\0.png", "x" * 5000)]
_PAX += [
    {"GNU.sparse.map": "0,1,2"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)},
]
_PAX += [
    {"GNU.sparse.size": str(10**15), "GNU.sparse.numblocks": str(10**9)},
    {"mtime": "nan"},
    {"hdrcharset": "BINARY"},
]
_PAX += [{"linkpath": "/etc/passwd"}, {"": "x"}, {"comment": "x" * 100_000}]


@st.composite
def _hostile_member(draw: Any) -> bytes:
    name = draw(st.sampled_from(_NAMES))
    kind = draw(st.sampled_from(["link", "pax", "size", "plain", "long"]))
    if kind == "link":
        return _member(
            name, type=draw(st.sampled_from(_LINKS)), linkname=draw(st.sampled_from([OUTSIDE, "/etc/passwd", name]))
        )
    if kind == "pax":
        return _pax(draw(st.sampled_from(_PAX))) + _member(name, b"1")
    if kind == "size":  # says more than there is
        head = bytearray(_member(name))
        head[124:136] = draw(
            st.sampled_from([b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0"])
        )
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head[:512])
        return bytes(head)
    if kind == "long":
        return _member(
            "././@LongLink",
            draw(st.sampled_from(_NAMES)).encode("utf-8", "surrogateescape") * 50,
            type=tarfile.GNUTYPE_LONGNAME,
        )
    return _member(name, draw(st.sampled_from([b"", b"1", b"\xff", b"9" * 5000])))


def tar(sound: bytes) -> Strategy:
    @st.composite
    def with_members(draw: Any) -> bytes:
        """Members that a tar of ours would not have, between the others."""
        blocks = [i for i in range(0, len(sound), 512) if sound[i + 257 : i + 262] == b"ustar"]
        at = draw(st.sampled_from(blocks))
        return sound[:at] + b"".join(draw(st.lists(_hostile_member(), min_size=1, max_size=3))) + sound[at:]

    heads = [i for i in range(0, len(sound), 512) if sound[i + 257 : i + 262] == b"ustar"]

    @st.composite
    def in_header(draw: Any) -> bytes:
        """A changed header that has the right checksum."""
        at, data = draw(st.sampled_from(heads)), bytearray(sound)
        data[at : at + 512] = (draw(bytes_of(sound[at : at + 512])) + bytes(512))[:512]
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        return bytes(data)

    return st.one_of(with_members(), with_members(), in_header(), any_file(sound))
