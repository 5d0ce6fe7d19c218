"""What texts hold that they should not: control tokens, another template's markers, hidden characters, personal data; and languages.

Owns these patterns. The language is a guess by script and common words: no model, nothing downloaded, and "unknown" where it cannot tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from gemma_grpo.data_check.findings import Finding, counted, examples_of, level_of
from gemma_grpo.data_check.personal import KINDS, SECRETS, kinds_in, place_of
from gemma_grpo.data_check.rows import CheckedRow

UNKNOWN = "unknown"
_FEWEST_WORDS = 6
_LEAST_SHARE, _LEAST_LEAD = 0.15, 1.5
"""Share of a text's words that are a language's common ones, and how many times the next language's, for it to be told."""

_GEMMA = re.compile(r"<(?:start_of_turn|end_of_turn|bos|eos|pad|start_of_image|end_of_image|image_soft_token)>")
_OTHERS = re.compile(
    r"<\|[A-Za-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|</s>\s*\Z|^#{2,3} ?(?:Instruction|Response|Input|Human|User|Assistant):", re.MULTILINE
)
_ROLE = re.compile(r"\b(?:Human|Assistant):|^(?:User|Model|Bot|AI):", re.MULTILINE)
_HIDDEN = {
    "control": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "zero-width": re.compile("[\u200b\u2060-\u2064\ufeff\ufff9-\ufffb]"),  # joiners are left out: emoji and several scripts need them
    "bidirectional": re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]"),
    "tags": re.compile("[\U000e0000-\U000e007f]"),
}
_ANY_HIDDEN = re.compile("|".join(form.pattern for form in _HIDDEN.values()))
_SCRIPTS = {
    "Japanese": re.compile("[\u3040-\u30ff]"),  # before Chinese: kana stand in Japanese alone
    "Chinese": re.compile("[\u3400-\u9fff]"),
    "Korean": re.compile("[\uac00-\ud7af\u1100-\u11ff]"),
    "Cyrillic script": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic script": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Devanagari script": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}
_COMMON = {
    "English": "the of and to a in is that it for you was with on are as be this have or at not your what how do can i from they we",
    "German": "der die das und ist nicht ein eine zu in den mit von für auf ich sie es wie was sich auch dem des im kann wird sind du",
    "French": "le la les de des et est un une que qui dans pour pas vous je il ce en du au sur avec plus sont comment nous mais ne",
    "Spanish": "el la los las de que y en un una es por para con no se del lo como qué más su al me cómo pero sus está son",
    "Italian": "il la che di e un una per non è con del della sono come in si le lo gli dei nel al da più ma anche questo cosa",
    "Portuguese": "o a os as de que e em um uma é para com não do da no na se por como mais dos das ao eu você são mas",
    "Dutch": "de het een en van is in dat niet op te zijn voor met die ik je wat hoe aan er maar om ook als kan naar bij",
    "Swedish": "och att det är en ett som på för av med inte den till jag du har om kan vad hur de var men sig från",
    "Polish": "i w nie na się z do to jest że jak co o po ale dla czy przez od są tak jego ich za być może",
    "Turkish": "ve bir bu için ile de da ne çok daha gibi olan var mı mi nasıl ben sen o değil kadar ama en",
}
_LANGUAGES: dict[str, list[str]] = {}
for _name, _words in _COMMON.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_name)
_LETTERS = re.compile(r"[^\W\d_]+")


def language(text: str) -> str:
    """The language of a text, or its script where several languages share one; "unknown" where neither can be told."""
    text = text[:800]
    if not text.isascii():
        letters = sum(map(str.isalpha, text))
        for name, script in _SCRIPTS.items():
            if len(script.findall(text)) > (0.1 if name == "Japanese" else 0.4) * letters:
                return name
    words = _LETTERS.findall(text.casefold())
    if len(words) < _FEWEST_WORDS:
        return UNKNOWN
    found = Counter(name for word in words if word in _LANGUAGES for name in _LANGUAGES[word])
    ranked = [*found.most_common(2), (UNKNOWN, 0), (UNKNOWN, 0)]
    (best, most), second = ranked[0], ranked[1][1]
    return best if most >= _LEAST_SHARE * len(words) and most >= _LEAST_LEAD * second else UNKNOWN


def text_findings(rows: Sequence[CheckedRow]) -> list[Finding]:
    """Markers, hidden characters, languages and personal data."""
    found = [
        _fitting("gemma_tokens", rows, _GEMMA, "<", lambda row: row.texts, serious_from=0.01),
        _fitting("other_templates", rows, _OTHERS, "<[#", lambda row: row.texts, serious_from=0.01),
        _hidden(rows),
        *_personal(rows),
        _languages(rows),
    ]
    pairs = [row for row in rows if row.replies]
    replies = _fitting("role_labels", pairs, _ROLE, ":", lambda row: row.texts[len(row.messages) :], serious_from=0.05)
    return [*found, replies, _mismatches(pairs)] if pairs else found


def _fitting(
    name: str,
    rows: Sequence[CheckedRow],
    form: re.Pattern[str],
    begins: str,
    texts: Callable[[CheckedRow], Iterable[str]],
    *,
    serious_from: float,
) -> Finding:
    """Rows with a text that the form fits; it cannot without one of the characters `begins`, which are found much faster."""

    def fits(text: str) -> bool:
        return any(char in text for char in begins) and form.search(text) is not None

    found = [(row, text) for row in rows if (text := next(filter(fits, texts(row)), None)) is not None]
    spelled = counted(match.group().strip() for _, text in found if (match := form.search(text)))
    level = level_of(len(found), len(rows), serious_from)
    return Finding(name, level, len(found), len(rows), "rows", examples_of(found, form), spelled)


def _hidden(rows: Sequence[CheckedRow]) -> Finding:
    found = [(row, text) for row in rows if (text := next(filter(_ANY_HIDDEN.search, row.texts), None)) is not None]
    kinds = [kind for row, _ in found for kind, form in _HIDDEN.items() if any(map(form.search, row.texts))]
    level = level_of(len(found), len(rows), 0.05)
    return Finding("hidden_characters", level, len(found), len(rows), "rows", examples_of(found, _ANY_HIDDEN), counted(kinds))


def _personal(rows: Sequence[CheckedRow]) -> list[Finding]:
    found: dict[str, list[tuple[CheckedRow, str]]] = {kind: [] for kind in KINDS}
    for row in rows:
        seen: dict[str, str] = {}
        for text in row.texts:
            for kind in kinds_in(text):
                seen.setdefault(kind, text)
        for kind, text in seen.items():
            found[kind].append((row, text))
    groups = {"secrets": SECRETS, "contact_data": tuple(kind for kind in KINDS if kind not in SECRETS)}
    findings = []
    for name, kinds in groups.items():
        numbers = {row.number for kind in kinds for row, _ in found[kind]}
        details = {kind: len(found[kind]) for kind in kinds if found[kind]}
        examples = [one for kind in kinds for one in examples_of(found[kind], place_of(kind))]
        # a single key is one too many; contact data are mostly made up
        level = level_of(len(numbers), len(rows), 0.0 if name == "secrets" else 0.05)
        findings.append(Finding(name, level, len(numbers), len(rows), "rows", tuple(examples[:3]), details))
    return findings


def _languages(rows: Sequence[CheckedRow]) -> Finding:
    told = [language(" ".join((row.messages[-1]["content"][:1000], *row.replies[:1]))) for row in rows]
    known = Counter(name for name in told if name != UNKNOWN)
    main = known.most_common(1)[0][0] if known else UNKNOWN
    found = [(row, row.messages[-1]["content"]) for row, name in zip(rows, told, strict=True) if name not in (main, UNKNOWN)]
    return Finding("languages", "look" if found else "fine", len(found), len(rows), "rows", examples_of(found), counted(told))


def _mismatches(pairs: Sequence[CheckedRow]) -> Finding:
    found, directions = [], []
    for row in pairs:
        asked, answered = language(row.messages[-1]["content"]), language(row.replies[0])
        if UNKNOWN not in (asked, answered) and asked != answered:
            found.append((row, row.replies[0]))
            directions.append(f"{asked} to {answered}")
    level = level_of(len(found), len(pairs), 0.05)
    return Finding("language_mismatch", level, len(found), len(pairs), "rows", examples_of(found), counted(directions))
