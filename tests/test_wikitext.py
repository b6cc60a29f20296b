"""Claims about wikitext as prose."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import clean, templates, wikitext


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("'''Rome''' is a [[city]] in [[Italy|the south]]s.", "Rome is a city in the souths."),
        ("See [http://x.y the page], [http://x.y] and http://z.", "See the page, and."),
        ("Write to [mailto:a@b.c us] or [//x.y there].", "Write to us or there."),
        ("It is {{convert|5|to|10|km|mi|abbr=on}} long.", "It is 5 to 10 km long."),
        ("It is {{cvt|5|ft|m}} long{{citation needed|date=May 2015}}.", "It is 5 ft long."),
        ("no breaks{{clarify|date=May 2015}}in the chain", "no breaks in the chain"),
        ("the word {{lang|fr|''chat''}} and {{lang-de|Katze}}", "the word chat and Katze"),
        ("{{Infobox city\n| name = [[Rome]]\n| x = {{nowrap|y}}\n}}\nText.", "Text."),
        ("Before.\n{| class=wikitable\n! a !! b\n|-\n| 1 || {{nowrap|2}}\n|}\nAfter.", "Before.\nAfter."),
        ("A\n{|\n| a\n{|\n| inner\n|}\n| b\n|}\nB", "A\nB"),
        ("Before.\n<table><tr><td>1</td></tr></table>\nAfter.", "Before.\nAfter."),
        ("A fact.<ref>Source [[x]] {{cite}}</ref> More.<ref name=b/> End.", "A fact. More. End."),
        ("A fact.<ref name=a>never closed\nMore.<REF>Upper</REF> End.", "A fact. More. End."),
        ("[[File:a.jpg|thumb|A [[caption]] {{nowrap|here}}]]Text.[[Category:Towns]]", "Text."),
        ("[[Immagine:a b.JPG|thumb|By an alias of the namespace]]Text.", "Text."),
        ("[[fr:Rome]]\n[[:Category:Towns]] is listed.", "Category:Towns is listed."),
        ("[[wikt:foo|foo]] and [[Star Trek: Voyager]]", "foo and Star Trek: Voyager"),
        ("__NOTOC__\n<!-- hidden -->Text.<!-- not closed", "Text."),
        ("E is <math>mc^2</math>.<gallery>\na.jpg|b\n</gallery>", "E is mc^2."),
        (r"<math>\tfrac{a+b}{2} \neq \bar x</math>", "(a+b)/2 ≠ x̅"),
        (r"So <math>\frac{</math> is broken.", "So is broken."),
        ("10<sup>&minus;7</sup>, 10<sup>−7</sup>, H<sub>2</sub>O, T<sub>m</sub>", "10−7, 10⁻⁷, H₂O, Tm"),
        ("Paris ({{IPA-fr|paʁi}}; {{small|f.}}) fell ({{IPAc-en|p}}, {{x}}).", "Paris (f.) fell."),
        ("In {{circa|1900}}, {{frac|1|2}} of {{formatnum:1000}}.", "In c. 1900, 1/2 of 1000."),
        ("{{as of|2015|6|30}}, {{val|6.2|e=18|u=C}}", "As of 30 June 2015, 6.2×10¹⁸ C"),
        ("1900{{ndash}}1910&nbsp;AD", "1900\u20131910 AD"),
        ("<span style='display:none'>x</span>Text <nowiki>[[raw]] ''x''</nowiki>.", "Text [[raw]] ''x''."),
        ("One line\nand its rest.\n\nAnother.", "One line and its rest.\nAnother."),
        (
            "* Short\n*# Two ''marks''\n: Indented\n; Term : meaning",
            "Short\nTwo marks\nIndented\nTerm: meaning",
        ),
        ("A<br>B<br />C<div>D</div>", "A\nB\nC\nD"),
        ("<poem>\nRoses{{x}}<ref>r</ref>\nViolets\n</poem>", "Roses\nViolets"),
        ("== Empty ==\n== Full ==\nText.\n=== Deep ===\n== See also ==\n=== More ===\n* x", "Full\nText."),
        (
            "Intro.\n== History ==\n=== Early ===\nOld.\n== References ==\n{{reflist}}\nx",
            "Intro.\nHistory\nEarly\nOld.",
        ),
        ("{{unclosed|template\nText goes on.", "unclosed|template Text goes on."),
        ("A {{stray}} }} and ]] and [[half.", "A and and half."),
        ("L''''Italia''' e l'''Adige marathon''.", "L'Italia e l'Adige marathon."),
        ("'''''both''''' and '''b''' ''i''", "both and b i"),
        (
            "The Franco-{{lang|de|Preussisch}} war, the {{lang|la|pro}}-form, {a}-b.",
            "The Franco-Preussisch war, the pro-form, {a}-b.",
        ),
        ("-{zh-hans:计算机; zh-hant:電腦;}-和-{zh:[[A;b|软件]];zh-tw:{{lang|zh|軟體}}}-", "计算机和软件"),
        ("-{H|zh-cn:a;zh-tw:b}-好-{A|zh-cn:;zh-tw:x}-，-{R|原}--{字: 1; 2}-", "好x，原字: 1; 2"),
        ("-{zh-hans;zh-hant|名}-（-{a -{zh:b;zh-hk:c}- d}-）-{ e", "名（a b d）-{ e"),
        ("-{" + "长" * 3000 + "-{zh:b;zh-hk:c}-}-", "长" * 3000 + "b"),
        ("{{quote|To be|Hamlet}}", "To be\n— Hamlet"),
        ("{{{1|default}}} {{PAGENAME}} {{uc:abc}}", "default Rome ABC"),
        (
            "{{Bio|Nome=Ada|Cognome=Neri|Sesso=F|LuogoNascita=Roma|AnnoNascita=1901|Attività=scrittrice"
            "|Nazionalità=italiana}}",
            "Ada Neri (Roma, 1901) è una scrittrice italiana.",
        ),
    ],
)
def test_wikitext_becomes_the_prose_that_a_reader_sees(source: str, plain: str) -> None:
    assert wikitext.plain(source, title="Rome") == plain


MARKS = [
    "[[", "]]", "{{", "}}", "|", "\n{|", "\n|}", "\n|-", "''", "'''", "<ref>", "</ref>", "<math>",
    "<!--", "-->",
    "<nowiki>", "</nowiki>", "\n== ", " ==\n", "\n* ", "<br>", "{{{", "}}}", "&amp;", "\ue000",
    "-{", "}-", "zh:", ";",
    "\ue007", "a", " b ",
]  # fmt: skip


@given(st.lists(st.sampled_from(MARKS), max_size=60).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_heap_of_marks_gives_prose_without_private_characters(source: str) -> None:
    found = wikitext.plain(source)
    assert not any("\ue000" <= c <= "\uf8ff" for c in found)
    assert "\n\n" not in found and found == found.strip()


@pytest.mark.parametrize(
    "source",
    [
        "{{a|" * 100_000 + "}}" * 100_000,
        "[[a|" * 100_000,
        "{{" * 100_000 + "]]" * 100_000,
        "[[" * 50_000 + "}}" * 50_000 + "\n|}" * 50_000,
        "\n{|" * 50_000,
        "<ref>" * 100_000,
        "<math>" * 50_000 + "</math>",
        "<!--" * 100_000,
        "<poem>" * 50_000 + "\n" * 50_000,
        "''" * 200_000,
        "'''a ''b" * 50_000,
        "(" * 200_000 + ")" * 200_000,
        ", ;" * 100_000,
        "&" * 300_000,
        "=" * 300_000,
        "<" * 300_000,
        "[http://" * 50_000,
        "{{{" * 100_000,
        "x " * 500_000,
        "<REF>x</REF>" * 200_000,
        "{{" + " " * 100_000 + "{",
        "[http://" + "a" * 200_000,
        "[http://a" + " b" * 100_000,
        "http://" + "." * 200_000,
        "== " * 100_000,
        "{{a|" + "b=" * 200_000,
        "<span " * 100_000,
        "{{{a|" * 50_000 + "}" * 150_000,
        "''a'" * 100_000,
        "\n|" * 200_000,
        "-{" * 100_000 + "}-" * 100_000,
        "-{a" * 100_000 + "}-" * 100_000,
        "-{zh:a;" * 50_000 + "b}-" * 50_000,
        "-{" + "-{}-" * 100_000 + "}-" * 9,
        "-{zh" + " ;" * 200_000 + "}-",
        "}}" * 100_000 + "}-" * 100_000,
    ],
    ids=lambda source: source[:8].strip() or "blank",
)
def test_hostile_nesting_takes_linear_time(source: str) -> None:
    started = time.process_time()
    wikitext.plain(source)
    templates.names(source)
    clean.leftovers(source)
    assert time.process_time() - started < 10
