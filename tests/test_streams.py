"""Claims about files as streams of bytes and lines."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import streams
from earlybert.config import EarlyBertError

COMPRESSIONS = {
    "bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes(),
}  # fmt: skip
PARTS = [b"".join(b"%d line %d\n" % (part, i * i) for i in range(20_000 * part)) for part in (1, 2, 0)]


@pytest.fixture(params=COMPRESSIONS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def content(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    return b"".join(streams.chunks(path))


def test_the_members_of_a_file_are_read_one_after_the_other(form: str, tmp_path: Path) -> None:
    members = b"".join(map(COMPRESSIONS[form], [*PARTS, *PARTS]))
    assert content(tmp_path / "a", members) == b"".join(PARTS) * 2


@pytest.mark.parametrize("form", ["bz2", "gz", "xz"])
def test_zeros_after_a_member_are_padding(form: str, tmp_path: Path) -> None:
    one = COMPRESSIONS[form](PARTS[0])
    assert content(tmp_path / "a", one + bytes(512)) == PARTS[0]
    assert content(tmp_path / "a", one + bytes(100_000) + one + bytes(100_000)) == PARTS[0] * 2


@pytest.mark.parametrize("what", ["two bytes", "all", "cut", "one byte", "text"])
def test_a_damaged_later_member_is_an_error_and_no_shorter_text(what: str, form: str, tmp_path: Path) -> None:
    first, second = (COMPRESSIONS[form](part) for part in PARTS[:2])
    damaged = {
        "two bytes": b"\x13\x37" + second[2:],
        "all": b"\x13" * len(second),
        "cut": second[:-20],
        "one byte": second[:1],
        "text": b"These are no bytes of a stream.",
    }[what]
    with pytest.raises(EarlyBertError, match=rf"a: the {form} stream breaks after \d+ bytes .*damaged"):
        content(tmp_path / "a", first + damaged)
