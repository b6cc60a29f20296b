"""Claims about reading Wikipedia dumps."""

import bz2
import gzip
import hashlib
import itertools
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import bzip2, sources, wikipedia, wikitext
from earlybert.config import EarlyBertError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikipedia"
needs_dumps = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared Wikipedia dumps are not on this machine"
)

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="it">
<siteinfo><namespaces><namespace key="0" /><namespace key="6">Immagine</namespace>
<namespace key="14">Categoria</namespace></namespaces></siteinfo>
<page><title>Luna</title><ns>0</ns><id>7</id>
 <revision><id>1</id><contributor><id>9</id></contributor><text>old</text></revision>
 <revision><id>2</id>
  <text bytes="9" xml:space="preserve">La '''Luna''' &amp; il Sole.</text></revision></page>
<page><title>Satellite</title><ns>0</ns><id>8</id><redirect title="Luna" />
 <revision><id>3</id><text>#RINVIA [[Luna]]</text></revision></page>
<page><title>Discussione:Luna</title><ns>1</ns><id>9</id>
 <revision><id>4</id><text>x</text></revision></page>
</mediawiki>"""


def _pages(data: bytes, *, step: int = 7) -> list[wikipedia.Page]:
    pieces = ((data[i : i + step], True) for i in range(0, len(data), step))
    return list(wikipedia.pages(pieces, path=Path("dump.xml")))


def test_pages_carry_id_title_namespace_and_the_last_revision() -> None:
    moon, satellite, talk = _pages(DUMP.encode())
    assert (moon.id, moon.title, moon.dropped) == ("7", "Luna", None)
    assert moon.text == "La '''Luna''' & il Sole."
    assert (satellite.dropped, talk.dropped) == ("redirect", "other namespace")


def test_the_wikis_own_namespace_names_are_known() -> None:
    moon = _pages(DUMP.encode())[0]
    assert {"immagine", "categoria", "file", "category"} <= moon.dropped_prefixes
    text = "Prima. [[Immagine:a.jpg|thumb|Una foto]] Dopo.\n[[Categoria:Astri]]"
    assert wikitext.plain(text, dropped_prefixes=moon.dropped_prefixes) == "Prima. Dopo."


def test_truncated_xml_names_file_and_byte() -> None:
    with pytest.raises(
        EarlyBertError, match=r"dump\.xml: the XML breaks off in or after page 3, 696 bytes .*truncated"
    ):
        _pages(DUMP.encode()[:-60])


def test_another_xml_is_refused() -> None:
    with pytest.raises(EarlyBertError, match="root element is <rss>, not <mediawiki>"):
        _pages(b"<rss><page/></rss>")


def test_memory_does_not_grow_with_the_dump() -> None:
    page = (
        "<page><title>T</title><ns>0</ns><id>1</id><revision><text>"
        + "word " * 2000
        + "</text></revision></page>"
    )

    def chunks(count: int) -> Iterator[tuple[bytes, bool]]:
        yield b"<mediawiki>", True
        for _ in range(count):
            yield page.encode(), True
        yield b"</mediawiki>", True

    def peak(count: int) -> int:
        tracemalloc.start()
        assert sum(1 for _ in wikipedia.pages(chunks(count), path=Path("d"))) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(1000) < 2 * peak(50)


def _real(name: str) -> list[wikipedia.Page]:
    path = SHARED / name
    data = (bz2 if path.suffix == ".bz2" else gzip).open(path).read()
    return _pages(data, step=1 << 20)


@needs_dumps
@pytest.mark.parametrize(
    ("name", "pages", "counts"),
    [
        (
            "enwiki-201605-206-pages.xml.bz2",
            206,
            {"redirect": 99, "disambiguation page": 8, "other namespace": 1, None: 98},
        ),
        (
            "itwiki-2013-747-pages.xml.gz",
            747,
            {"redirect": 64, "disambiguation page": 29, "other namespace": 75, None: 579},
        ),
        ("aawiki-20260101-pages-meta-current.xml.bz2", 507, {None: 1, "redirect": 1, "other namespace": 505}),
        ("enwiki-export09-3-pages.xml.bz2", 3, {"redirect": 1, None: 2}),
    ],
)
def test_real_dumps_have_their_known_counts(name: str, pages: int, counts: dict[str | None, int]) -> None:
    found = _real(name)
    assert len(found) == pages
    assert Counter(page.dropped for page in found) == counts


@needs_dumps
@pytest.mark.parametrize("name", ["enwiki-201605-206-pages.xml.bz2", "enwiki-table-markup.xml.bz2"])
def test_real_articles_come_out_without_markup(name: str) -> None:
    articles = [p for p in _real(name) if p.dropped is None][:25]
    text = "\n".join(wikitext.plain(p.text, dropped_prefixes=p.dropped_prefixes) for p in articles)
    assert len(text) > 10_000
    for mark in ("{{", "}}", "[[", "]]", "<ref", "'''", "{|", "\n|", "&nbsp;", "thumb|", "Category:"):
        assert mark not in text, mark


def _dump(count: int, *, words: int = 40) -> bytes:
    """An export of pages as pseudo-random as a hash."""
    made = []
    for i in range(count):
        text = " ".join(hashlib.sha256(f"{i} {j}".encode()).hexdigest() for j in range(words))
        made.append(
            f"<page><title>T{i}</title><ns>0</ns><id>{i}</id><revision><text>{text}</text></revision></page>\n"
        )
    return f"<mediawiki>\n<siteinfo/>\n{''.join(made)}</mediawiki>\n".encode()


def _parts(path: Path, of: int) -> list[list[str]]:
    source = sources.parse(f"wikipedia:{path}")
    assert source.can_split(path)
    return [[raw.id for raw in source.part(path, (r, of), progress=lambda _: None)] for r in range(of)]


@pytest.mark.parametrize("level", [None, 1, 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_the_parts_of_a_file_hold_each_page_once(level: int | None, parts: int, tmp_path: Path) -> None:
    data = _dump(300)  # 800 kB of content that hardly compresses: several blocks at level 1
    path = tmp_path / "dump.xml"
    if level is not None:  # several streams, cut anywhere, as in the multistream dumps
        data = b"".join(
            bz2.compress(piece, level) for piece in (data[:1000], data[1000:500_123], data[500_123:])
        )
    path.write_bytes(data)
    found = _parts(path, parts)
    assert [id for part in found for id in part] == [str(i) for i in range(300)]
    if parts <= 3:
        assert sum(map(bool, found)) == min(parts, 2 if level == 9 else parts)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_blocks_of_any_ranges_are_the_whole_content(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=2000)) * 400
    level = data.draw(st.integers(1, 2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bz2"
        path.write_bytes(bz2.compress(content, level) + bz2.compress(b"", level) + bz2.compress(content[:7]))
        size = path.stat().st_size
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=5))})
        found = b""
        for start, stop in itertools.pairwise(cuts):
            found += b"".join(
                c for c, _, _ in itertools.takewhile(lambda b: b[2], bzip2.blocks(path, start, stop))
            )
    assert found == content + content[:7]


def test_a_damaged_and_a_truncated_block_name_file_and_byte(tmp_path: Path) -> None:
    whole = bz2.compress(_dump(300), 1)
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(whole[:-40])
    with pytest.raises(
        EarlyBertError, match=r"dump\.xml\.bz2: the bz2 stream breaks off in the block at byte [\d,]+"
    ):
        list(bzip2.blocks(path))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(EarlyBertError, match=r"bz2: the bz2 (block|stream).* at byte [\d,]+"):
        list(bzip2.blocks(path))


def test_a_broken_page_costs_that_page_only() -> None:
    good = "<page><title>{0}</title><ns>0</ns><id>{0}</id><revision><text>t</text></revision></page>"
    bad = [
        "<page><title>B1</title><id>1</id><revision><text>a < b</text></revision></page>",
        "<page><title>B2</title><id>2</id><revision><text>&unknown;</text></revision></page>",
        "<page><title>B3</title><id>3</id></revision></page>",
    ]
    pieces = [good.format(10), bad[0], good.format(11), bad[1], bad[2], good.format(12)]
    data = f"<mediawiki>{''.join(pieces)}</mediawiki>".encode()
    invalid = b"<page><title>B4</title><id>4</id><revision><text>\xff</text></revision></page></mediawiki>"
    found = _pages(data.replace(b"</mediawiki>", invalid))
    assert [(p.id, p.dropped) for p in found] == [
        ("10", None), ("B1", "broken page"), ("11", None), ("B2", "broken page"), ("B3", "broken page"),
        ("12", None), ("B4", "broken page"),
    ]  # fmt: skip


def test_disambiguation_pages_are_dropped_and_stubs_are_marked() -> None:
    def page(text: str) -> wikipedia.Page:
        return _pages(DUMP.replace("La '''Luna''' &amp; il Sole.", text).encode())[0]

    assert page("Rome may be:\n* a\n{{Disambiguation|geo}}").dropped == "disambiguation page"
    assert page("Roma:\n{{ disambigua }}").dropped == "disambiguation page"
    assert page("{{Italy-geo-stub}}").stub and page("{{S|fiumi}}").stub and not page("{{Stubborn}}").stub


def test_an_utf16_dump_is_read_as_the_utf8_one(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{DUMP}'.encode(encoding))
        source = sources.parse(f"wikipedia:{path}")
        found = list(source.documents(path, progress=lambda _: None))
        assert [raw.text for raw in found] == ["La '''Luna''' & il Sole.", "", ""]


def test_a_document_type_is_refused() -> None:
    bomb = '<!DOCTYPE m [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>' + DUMP
    with pytest.raises(EarlyBertError, match=r"dump\.xml: declares a document type"):
        _pages(bomb.encode())
