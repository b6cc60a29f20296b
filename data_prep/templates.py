"""What Wikipedia's templates show in running text: those that carry words of a sentence; all others show
nothing.

Names are those of the English Wikipedia and of the larger other ones, in lower case with spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def words(text: str, *, separator: str = " ") -> frozenset[str]:
    return frozenset(text.split(separator))


RAISED = str.maketrans("0123456789+-−–", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻")
"""Digits and signs as exponents."""

_NAME_SPACES = re.compile(r"[\s_]+")
_LANGUAGE = re.compile(r"lang-[a-z-]{2,12}")
_RANGE_WORDS = words("to - \u2013 and or by x \u00d7 to(-) and(-) +/- \u00b1")
_UNITS = {
    "sqmi": "sq mi", "sqft": "sq ft", "cuft": "cu ft", "C": "°C", "F": "°F", "C-change": "°C",
    "km2": "km²", "m2": "m²", "cm2": "cm²", "m3": "m³", "km3": "km³",
}  # fmt: skip


def shown(name: str, arguments: str, *, title: str | None) -> str:
    """The text that `{{name|arguments}}` shows, its links and inner templates read already; "" mostly."""
    name = _NAME_SPACES.sub(" ", name).strip()
    key = name.lower()
    if not arguments and (literal := _LITERAL.get(key)) is not None:
        return literal
    if (show := _SHOWN.get(key)) is not None:
        return show(*_arguments(arguments))
    if _LANGUAGE.fullmatch(key):
        return _first(*_arguments(arguments))
    if ":" in key:
        function, _, value = name.partition(":")
        if (change := _FUNCTIONS.get(function.lower())) is not None:
            return change(value.strip())
    if key in _OWN_TITLE:
        return title or ""
    return ""


def is_disambiguation(names: set[str]) -> bool:
    """Whether a page with templates of these names only tells pages of one name apart."""
    return bool(names & _DISAMBIGUATION)


def is_stub(names: set[str]) -> bool:
    """Whether the page's editors call it a stub."""
    return bool(names & _STUB) or any(name.endswith(("-stub", " stub")) for name in names)


_NAMES = re.compile(r"\{\{\s{0,4}([^{}|\n<\[\]]{1,60})(?=[|}\n])")


def names(wikitext: str) -> set[str]:
    """Names of all templates of a page, in lower case."""
    return {_NAME_SPACES.sub(" ", name).strip().lower() for name in _NAMES.findall(wikitext)}


Values = list[str]
Named = dict[str, str]


def _arguments(text: str) -> tuple[Values, Named]:
    values: Values = []
    named: Named = {}
    for argument in text.split("|") if text else ():
        key, equals, value = argument.partition("=")
        if not equals or "<" in key or len(key) > 40:
            values.append(argument.strip())
        elif (name := key.strip()).isdigit() and 1 <= int(name) <= 20:
            while len(values) < int(name):
                values.append("")
            values[int(name) - 1] = value.strip()
        else:
            named[name.lower()] = value.strip()
    return values, named


def _first(values: Values, named: Named) -> str:
    return values[0] if values else named.get("text") or named.get("quote") or named.get("content") or ""


def _second(values: Values, named: Named) -> str:
    return values[1] if len(values) > 1 else named.get("text", "")


def _last(values: Values, named: Named) -> str:
    return values[-1] if values else next(iter(named.values()), "")


def _converted(values: Values, named: Named) -> str:
    """Show `{{convert|5|to|10|km|mi}}` as "5 to 10 km": the amounts and the unit that they were given in."""
    at = 1
    while at + 1 < len(values) and values[at] in _RANGE_WORDS:
        at += 2
    unit = values[at] if at < len(values) else ""
    separator = "-" if named.get("adj") == "on" else " "
    amounts = " ".join(values[:at]).replace(" - ", "\u2013").replace(" \u2013 ", "\u2013")
    return separator.join(filter(None, [amounts, _UNITS.get(unit, unit)]))


def _fraction(values: Values, named: Named) -> str:
    if len(values) == 3:
        return f"{values[0]} {values[1]}/{values[2]}"
    return "/".join(values if len(values) > 1 else ["1", *values])


def _as_of(values: Values, named: Named) -> str:
    if "alt" in named:
        return named["alt"]
    start = "since" if named.get("since") else "As of"
    if named.get("lc"):
        start = start.lower()
    months = " January February March April May June July August September October November December"
    date = list(values[:3])
    if len(date) > 1 and date[1].isdigit() and 1 <= int(date[1]) <= 12:
        date[1] = months.split(" ")[int(date[1])]
    return f"{start} {' '.join(reversed(date))}"


def _circa(values: Values, named: Named) -> str:
    return "c. " + " \u2013 c. ".join(values[:2]) if values else "c."


def _value(values: Values, named: Named) -> str:
    number = values[0] if values else ""
    power = "\u00d710" + named["e"].translate(RAISED) if "e" in named else ""
    return f"{number}{power} {named.get('u') or named.get('ul') or ''}".strip()


def _spaced(values: Values, named: Named) -> str:
    return " ".join(filter(None, values))


def _joined(values: Values, named: Named) -> str:
    return "".join(values)


def _nihongo(values: Values, named: Named) -> str:
    english, *others = values or [""]
    inside = ", ".join(other for other in others[:2] if other)
    return f"{english} ({inside})" if english and inside else english or inside


def _quoted(values: Values, named: Named) -> str:
    by = named.get("author") or named.get("source") or (values[1] if len(values) > 1 else "")
    text = values[0] if values else named.get("text") or named.get("quote") or ""
    return f"\n\n{text}\n\n" + (f"\u2014 {by}\n\n" if by else "")


def _items(values: Values, named: Named) -> str:
    return "\n" + "".join(f"* {value.lstrip('*# ')}\n" for value in values if value)


def _italian_person(values: Values, named: Named) -> str:
    """The sentence that opens a biography of the Italian Wikipedia."""
    woman = named.get("sesso", "M").upper() == "F"
    name = " ".join(filter(None, (named.get("nome"), named.get("cognome"))))

    def event(of: str) -> str:
        date = f"{named.get('giornomese' + of, '')} {named.get('anno' + of, '')}".strip()
        return ", ".join(filter(None, (named.get("luogo" + of), date)))

    life = " – ".join(filter(None, (event("nascita"), event("morte"))))
    life = "; ".join(filter(None, (named.get("predata", "").strip(), life)))
    work = [named[key] for key in ("attività", "attività2", "attività3") if named.get(key)]
    if not name or not work:
        return name
    verb = ("è stata" if woman else "è stato") if named.get("annomorte") else "è"
    article = "una" if woman else "uno" if _TAKES_UNO.match(work[0]) else "un"
    done = " e ".join(filter(None, (", ".join(work[:-1]), work[-1])))
    about = f" ({life})" if life else ""
    sentence = f"{name}{about} {verb} {article} {done} {named.get('nazionalità', '')}"
    return sentence.strip() + named.get("postnazionalità", ".") + " "


_TAKES_UNO = re.compile(r"(?:s[^aeiou]|z|ps|pn|gn|x|y)", re.IGNORECASE)

_BY_SHOW: list[tuple[Callable[[Values, Named], str], str]] = [
    (
        _first,
        "nowrap|nobr|j|small|smaller|big|bigger|large|larger|abbr|abbrlink|tooltip|smallcaps|sc|smallcaps2|"
        "linktext|ill|illm|interlanguage link|sic|keypress|key|mvar|math|var|em|strong|unicode|hover|angbr|"
        "noitalic|nobold|italics|italic|bold|script/hebrew|script/arabic|polytonic|vanchor|visible anchor|"
        "maiuscoletto|formatonumero|ipa|samp|code|kbd|center|block indent|resize|not a typo|not typo|"
        "notatypo|proper name|citation needed span|overline|formatnum",
    ),
    (_second, "lang|langue|lingua|script|rtl-lang|font color|font colour|color|colour|langx|fontcolor"),
    (_last, "transl|tlit|translit|transliteration|wikt-lang|zh|hiero"),
    (_converted, "convert|cvt|convertir"),
    (_fraction, "frac|fraction|sfrac|fract"),
    (_as_of, "as of|since"),
    (_circa, "circa|c.|ca.|ca"),
    (_nihongo, "nihongo|nihongo2|nihongo3"),
    (
        _quoted,
        "quote|blockquote|cquote|bquote|quotation|rquote|citazione|citation bloc|quote box2|zitat|cita",
    ),
    (_items, "plainlist|plain list|flatlist|unbulleted list|ubl"),
    (_joined, "chem|ce|chem2|sub|sup|su|physconst|gaps"),
    (_spaced, "start date"),
    (_value, "val"),
    (_italian_person, "bio"),
]
_SHOWN = {name: show for show, names in _BY_SHOW for name in names.split("|")}

_LITERAL = {  # of templates without arguments
    "ndash": "\u2013", "en dash": "\u2013", "mdash": "\u2014", "em dash": "\u2014", "snd": " \u2013 ",
    "spaced ndash": " \u2013 ", "spnd": " \u2013 ", "spaced en dash": " \u2013 ", "spaced mdash": " \u2014 ",
    "'": "'", "'s": "'s", "`": "'", "nbsp": " ", "!": "|", "=": "=", "dot": "\u00b7", "middot": "\u00b7",
    "\u00b7": " \u00b7 ", "bull": "\u2022", "\u2022": " \u2022 ", "times": "\u00d7", "sup2": "\u00b2",
    "pound sign": "\u00a3", "gbp": "\u00a3", "euro": "\u20ac", "okina": "\u02bb", "ad": "AD", "bc": "BC",
    "ce": "CE", "bce": "BCE", "a.c.": "a.C.", "d.c.": "d.C.", "break": "<br>", "clear": "", "-\"": "\"",
    "spaces": " ", "thinsp": " ", "hair space": " ", "zwj": "", "shy": "", "pi": "\u03c0", "minus": "\u2212",
    "-": "<br>", "infin": "\u221e", "permil": "\u2030", "deg": "\u00b0", "'\"": "'\"", "\"'": "\"'",
}  # fmt: skip

_FUNCTIONS: dict[str, Callable[[str], str]] = {
    "formatnum": str, "lc": str.lower, "uc": str.upper, "nowrap": str,
    "lcfirst": lambda value: value[:1].lower() + value[1:],
    "ucfirst": lambda value: value[:1].upper() + value[1:],
}  # fmt: skip
_OWN_TITLE = frozenset({"pagename", "fullpagename", "basepagename", "subpagename"})

_DISAMBIGUATION = words(
    "disambig|disambiguation|disamb|dab|disambiguation page|hndis|geodis|human name disambiguation|"
    "place name disambiguation|numberdis|letter-numbercombdisambig|letter–number combination disambiguation|"
    "school disambiguation|hospital disambiguation|mathematical disambiguation|mathdab|roaddis|"
    "airport disambiguation|callsigndis|chemistry disambiguation|species latin name disambiguation|surname|"
    "given name|set index article|sia|disambigua|begriffsklärung|homonymie|desambiguación|desambig|"
    "desambiguação|dp|ujednoznacznienie|неоднозначность|توضيح|aimai|曖昧さ回避|消歧义",
    separator="|",
)
_STUB = words("stub s ébauche esbozo esboço beginnetje заготовка")
