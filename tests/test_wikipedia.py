"""Claims about reading Wikipedia dumps."""

import bz2
import gzip
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import wikipedia
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
    pieces = (data[i : i + step] for i in range(0, len(data), step))
    return list(wikipedia.pages(pieces, path=Path("dump.xml")))


def test_pages_carry_id_title_namespace_and_the_last_revision() -> None:
    moon, satellite, talk = _pages(DUMP.encode())
    assert (moon.id, moon.title, moon.namespace, moon.redirect) == ("7", "Luna", 0, False)
    assert moon.text == "La '''Luna''' & il Sole."
    assert satellite.redirect and talk.namespace == 1


def test_the_wikis_own_namespace_names_are_known() -> None:
    moon = _pages(DUMP.encode())[0]
    assert {"immagine", "categoria", "file", "category"} <= moon.dropped_prefixes
    text = "Prima. [[Immagine:a.jpg|thumb|Una foto]] Dopo.\n[[Categoria:Astri]]"
    assert wikipedia.plain(text, dropped_prefixes=moon.dropped_prefixes) == "Prima. Dopo."


def test_truncated_xml_names_file_and_byte() -> None:
    with pytest.raises(EarlyBertError, match=r"dump\.xml: the XML breaks at byte \d+ .*truncated or damaged"):
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

    def chunks(count: int) -> Iterator[bytes]:
        yield b"<mediawiki>"
        for _ in range(count):
            yield page.encode()
        yield b"</mediawiki>"

    def peak(count: int) -> int:
        tracemalloc.start()
        assert sum(1 for _ in wikipedia.pages(chunks(count), path=Path("d"))) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(1000) < 2 * peak(50)


@pytest.mark.parametrize(
    ("wikitext", "plain"),
    [
        ("'''Rome''' is a [[city]] in [[Italy|the south]]s.", "Rome is a city in the souths."),
        ("See [http://x.y the page], [http://x.y] and http://z.", "See the page, and."),
        ("It is {{convert|5|to|10|km|mi|abbr=on}} long.", "It is 5 to 10 km long."),
        ("It is {{cvt|5|ft|m}} long{{citation needed|date=May 2015}}.", "It is 5 ft long."),
        ("the word {{lang|fr|''chat''}} and {{lang-de|Katze}}", "the word chat and Katze"),
        ("{{Infobox city\n| name = [[Rome]]\n| x = {{nowrap|y}}\n}}\nText.", "Text."),
        ("Before.\n{| class=wikitable\n! a !! b\n|-\n| 1 || {{nowrap|2}}\n|}\nAfter.", "Before.\nAfter."),
        ("A fact.<ref>Source [[x]] {{cite}}</ref> More.<ref name=b/> End.", "A fact. More. End."),
        ("[[File:a.jpg|thumb|A [[caption]] here]]Text.[[Category:Towns]]", "Text."),
        ("[[fr:Rome]]\n[[:Category:Towns]] is listed.", "Category:Towns is listed."),
        ("__NOTOC__\n<!-- hidden -->Text.", "Text."),
        ("E is <math>mc^2</math>, H<sub>2</sub>O.<gallery>\na.jpg|b\n</gallery>", "E is, H2O."),
        ("Paris ({{IPA-fr|paʁi}}; {{small|f.}}) fell.", "Paris (f.) fell."),
        ("In {{circa|1900}}, {{frac|1|2}} of {{formatnum:1000}}.", "In c. 1900, 1/2 of 1000."),
        ("1900{{ndash}}1910&nbsp;AD", "1900\u20131910 AD"),
        ("<span style='display:none'>x</span>Text <nowiki>[[raw]]</nowiki>.", "Text raw."),
        ("* Short item\n* An item of seven words is prose\n", "An item of seven words is prose"),
        ("== Empty ==\n== Full ==\nText.\n=== Deep ===\n== See also ==\n=== More ===\n* x", "Full\nText."),
        (
            "Intro.\n== History ==\n=== Early ===\nOld.\n== References ==\n{{reflist}}\nx",
            "Intro.\nHistory\nEarly\nOld.",
        ),
        ("{{unclosed|template\nText goes on.", "unclosed|template\nText goes on."),
    ],
)
def test_wikitext_becomes_the_prose_that_a_reader_sees(wikitext: str, plain: str) -> None:
    assert wikipedia.plain(wikitext) == plain


def _real(name: str) -> list[wikipedia.Page]:
    path = SHARED / name
    data = (bz2 if path.suffix == ".bz2" else gzip).open(path).read()
    return _pages(data, step=1 << 20)


@needs_dumps
@pytest.mark.parametrize(
    ("name", "pages", "redirects", "articles"),
    [
        ("enwiki-201605-206-pages.xml.bz2", 206, 100, 106),
        ("itwiki-2013-747-pages.xml.gz", 747, 65, 608),
        ("aawiki-20260101-pages-meta-current.xml.bz2", 507, None, 1),
    ],
)
def test_real_dumps_have_their_known_counts(
    name: str, pages: int, redirects: int | None, articles: int
) -> None:
    found = _real(name)
    assert len(found) == pages
    assert redirects is None or sum(page.redirect for page in found) == redirects
    assert sum(page.namespace == 0 and not page.redirect for page in found) == articles


@needs_dumps
@pytest.mark.parametrize("name", ["enwiki-201605-206-pages.xml.bz2", "enwiki-table-markup.xml.bz2"])
def test_real_articles_come_out_without_markup(name: str) -> None:
    articles = [p for p in _real(name) if p.namespace == 0 and not p.redirect][:25]
    text = "\n".join(wikipedia.plain(p.text, dropped_prefixes=p.dropped_prefixes) for p in articles)
    assert len(text) > 10_000
    for mark in ("{{", "}}", "[[", "]]", "<ref", "'''", "{|", "\n|", "&nbsp;", "thumb|", "Category:"):
        assert mark not in text, mark
