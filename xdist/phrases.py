"""Compose parallel clinical phrases in English, Spanish, French and German from a small grammar.

The YAML file holds a lexicon (nouns with gender and countability, adjectives, fixed adverbials) and
patterns whose slots ask for a form, for instance ``<f dat indef>``; its header explains the notation.
A phrase is composed once as picks from the lexicon and then rendered in each language: noun phrases
by grammar, and the finished text by sound rules (elision, contraction).
"""

import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

LANGUAGES = ("en", "es", "fr", "de")
CASES = ("nom", "acc", "dat", "gen")
FORMS = {*CASES, "bare", "def", "indef", "generic", "partitive", "after_de", "plain", "adjective"}
MODIFIERS = {"severity", "course", "levels", "ages", "site"}
ADVERBIALS = {"since", "when", "after", "follow", "often"}  # pools without gender marks
KINDS = frozenset("sidetmncgpbvFM")
PATIENCE = 40  # draws without a new phrase before a pattern counts as exhausted
SLOT = re.compile(r"<(\w+)((?: [^<>]+)?)>")
AGREEMENT = re.compile(r"\b([mf]p?|s|p):")

ARTICLES = {  # by agreement: gender, then p for plural
    "es": {"def": {"m": "el", "f": "la", "mp": "los", "fp": "las"}, "indef": {"m": "un", "f": "una"}},
    "fr": {"def": {"m": "le", "f": "la", "mp": "les", "fp": "les"},
           "indef": {"m": "un", "f": "une", "mp": "des", "fp": "des"}},
}
# German endings in the order of CASES; the plural (p) has no gender.
DEFINITE = {"m": "der den dem des", "f": "die die der der", "n": "das das dem des", "p": "die die den der"}
EIN_WORD = {"m": " en em es", "f": "e e er er", "n": "  em es", "p": "e e en er"}
STRONG = {"m": "er en em en", "f": "e e er er", "n": "es es em en", "p": "e e en er"}
# What a vowel, a silent h or an unstressed word does to its neighbour, applied from top to bottom.
SOUND_RULES: dict[str, list[tuple[str, str]]] = {
    "en": [],
    "es": [(r"\bde el\b", "del"), (r"\ba el\b", "al"), (r"\by (?=h?[ií](?!e))", "e ")],
    "fr": [(r"\b([dljnmst])[ea] (?=(?!ASPIRATE)[aeiouhyâàéèêîïôœAEIOUÉ])", r"\1'"),
           (r"\bde le\b", "du"), (r"\bde les\b", "des"), (r"\bà le\b", "au"), (r"\bà les\b", "aux")],
    "de": [(r"\b(i|a|vo)n dem\b", r"\1m"), (r"\b(zu|bei) dem\b", r"\1m"), (r"\bzu der\b", "zur")],
}


@dataclass(frozen=True)
class Noun:
    """One language's part of an entry; adverbials and adjectives have no gender."""

    words: str
    gender: str = ""
    plural: bool = False
    mass: bool = False
    stressed_a: bool = False  # Spanish el asma, although feminine
    many: str = ""  # the plural, given for paired sites
    genitive: str | None = None  # an irregular German ending

    @property
    def agreement(self) -> str:
        return self.gender + "p" * self.plural


@dataclass(frozen=True)
class Entry:
    nouns: dict[str, Noun]
    kinds: frozenset[str]
    link: str = ""
    groups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pick:
    """An entry chosen for a slot, with its modifiers; links holds the prepositions before the site."""

    entry: Entry
    adjectives: tuple[Entry, ...] = ()
    links: tuple[str, ...] = ()
    site: "Pick | None" = None
    both: Entry | None = None


def read_noun(text: str, language: str) -> Noun:
    words, _, many = text.partition("=")
    if language == "en":
        article, _, rest = words.partition(" ")
        counted = article in ("a", "an", "some")
        return Noun(rest if counted else words, plural=article == "some", mass=not counted, many=many)
    found = re.fullmatch(r"(fa|[mf]p?|n|p)(~?) (\S.*)", words)
    if found is None:
        raise ValueError(f"begin {text!r} with a gender mark: m, f, n, mp, fp, p or fa")
    mark, tilde, words = found.groups()
    words, slash, genitive = words.partition("/")
    return Noun(words, mark.strip("ap"), mark.endswith("p"), bool(tilde), mark == "fa", many,
                genitive if slash else None)


def read_entry(row: Any, where: str, inflected: bool = True) -> Entry:
    if not isinstance(row, list) or not 4 <= len(row) <= 6 or not all(isinstance(c, str) and c for c in row):
        raise ValueError(f"{where}: {row!r}: write a list of 4 to 6 texts: en, es, fr, de, kinds, site link")
    try:
        nouns = {lg: read_noun(cell, lg) if inflected else Noun(cell) for lg, cell in zip(LANGUAGES, row)}
    except ValueError as error:
        raise ValueError(f"{where}: {row!r}: {error}") from None
    link, *groups = row[5].split() if len(row) == 6 else [""]
    return Entry(nouns, frozenset("".join(row[4:5])) - {" "}, link, frozenset(groups))


class Grammar:
    """The checked content of the YAML file."""

    def __init__(self, data: dict[str, Any]) -> None:
        common = data["common"]
        self.links: dict[str, list[str]] = common["links"]
        self.both = read_entry(common["both"], "both", inflected=False)
        self.shared = {pool: [read_entry(row, pool, pool not in ADVERBIALS) for row in rows]
                       for pool, rows in common["pools"].items()}
        self.shared |= {pool: [read_entry(row, pool, inflected=False) for row in rows]
                        for pool, rows in (common["adjectives"] | {"sides": common["sides"]}).items()}
        sites = [(group, read_entry(row, group)) for group, rows in common["sites"].items() for row in rows]
        self.shared["site"] = [Entry(site.nouns, site.kinds | {group}) for group, site in sites]
        self.specialties = {name: {pool: [read_entry(row, f"{name}, {pool}") for row in rows]
                                   for pool, rows in (pools | {"name": [pools["name"]]}).items()}
                            for name, pools in data["specialties"].items()}
        self.patterns: list[dict[str, str]] = data["patterns"]
        aspirate = f"(?:{'|'.join(common['aspirate_h'])})"
        self.sounds = {lg: [(re.compile(rule.replace("ASPIRATE", aspirate)), new) for rule, new in rules]
                       for lg, rules in SOUND_RULES.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Grammar":
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            grammar = cls(yaml.safe_load(text))
        except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error!r}; the file must be YAML with specialties, patterns and common: links, "
                             "both, sides, aspirate_h, sites, adjectives, pools") from error
        grammar.check_lexicon()
        for pattern in grammar.patterns:
            grammar.check_pattern(pattern)
        return grammar

    def check_lexicon(self) -> None:
        for name, link in self.links.items():
            if len(link) != 5 or not all(isinstance(word, str) for word in link):
                raise ValueError(f"link {name!r}: give a text per language and the German case; quote on, off, yes, no")
        groups = {group for site in self.shared["site"] for group in site.kinds}
        for specialty, pools in self.specialties.items():
            for entry in pools["findings"]:
                where = f"{specialty}, findings: {entry.nouns['en'].words!r}"
                if not entry.kinds or not entry.kinds <= KINDS:
                    raise ValueError(f"{where}: give kinds from the letters {''.join(sorted(KINDS))}")
                if entry.link and (entry.link not in self.links or not entry.groups or not entry.groups <= groups):
                    raise ValueError(f"{where}: give a site link from {sorted(self.links)} and groups "
                                     f"from {sorted(groups)}")

    def check_pattern(self, pattern: dict[str, str]) -> None:
        where = f"pattern {pattern.get('id')!r}"
        pools = self.shared.keys() | {pool for pools in self.specialties.values() for pool in pools}
        for name in pattern.keys() - {"id", *LANGUAGES}:
            if pattern[name].split()[0] not in pools:
                raise ValueError(f"{where}: begin the slot {name!r} with a pool from {sorted(pools)}")
        for language in LANGUAGES:
            if language not in pattern:
                raise ValueError(f"{where}: add its text in {language}")
            for name, form in SLOT.findall(pattern[language]):
                if name not in pattern or not AGREEMENT.search(form) and not FORMS.issuperset(form.split()):
                    raise ValueError(f"{where}, {language}: declare the slot {name!r}, forms are {sorted(FORMS)}")


class Composer:
    """Draws the entries of a phrase; every pool is a deck that is reshuffled when empty, so all come up evenly."""

    def __init__(self, grammar: Grammar, rng: random.Random) -> None:
        self.grammar, self.rng = grammar, rng
        self.decks: dict[tuple[str, str, frozenset[str], bool], list[Entry]] = {}

    def draw(self, pool: str, specialty: str, kinds: frozenset[str], with_site: bool = False) -> Entry | None:
        shared = self.grammar.shared.get(pool)
        deck = self.decks.setdefault((pool, "" if shared else specialty, kinds, with_site), [])
        if not deck:
            deck += [entry for entry in shared or self.grammar.specialties[specialty][pool]
                     if (not kinds or kinds & entry.kinds) and (entry.link or not with_site)]
            self.rng.shuffle(deck)
        return deck.pop() if deck else None

    def pick(self, slot: str, specialty: str) -> Pick | None:
        """Fill a slot such as ``findings s severity? site``."""
        pool, *rest = slot.split()
        kinds = [word for word in rest if word.rstrip("?") not in MODIFIERS and word != "*"]
        # Site groups are whole words, other kinds single letters.
        entry = self.draw(pool, specialty, frozenset(kinds if pool == "site" else "".join(kinds)), "site" in rest)
        if entry is None:
            return None
        if pool == "site":
            return self.sided(entry, specialty)
        wanted = [word.rstrip("?") for word in rest if word.rstrip("?") in MODIFIERS
                  and (word[-1] != "?" or self.rng.random() < 0.5)]
        # Laboratory values have no kinds: all levels suit them.
        drawn = [self.draw(name, specialty, entry.kinds) for name in wanted if name != "site"]
        adjectives = tuple(adjective for adjective in drawn if adjective)
        site = self.draw("site", specialty, entry.groups) if "site" in wanted and entry.link else None
        if site is None:
            return Pick(entry, adjectives)
        return Pick(entry, adjectives, tuple(self.grammar.links[entry.link]), self.sided(site, specialty))

    def sided(self, site: Entry, specialty: str) -> Pick:
        """Paired sites, recognised by their plural, become left, right or both."""
        if not site.nouns["en"].many:
            return Pick(site)
        if self.rng.random() < 0.25:
            return Pick(site, both=self.grammar.both)
        side = self.draw("sides", specialty, frozenset())
        return Pick(site, (side,) if side else ())

    def compose(self, pattern: dict[str, str], specialty: str) -> dict[str, str] | None:
        """One phrase in all languages; None where no entry fits or two contradict each other."""
        picks: dict[str, Pick] = {}
        for name in [name for name in pattern if name not in ("id", *LANGUAGES)]:
            pick = self.pick(pattern[name], specialty)
            if pick is None or pick.entry in [other.entry for other in picks.values()]:
                return None
            picks[name] = pick
        chosen = [p for pick in picks.values() for p in (pick, pick.site) if p]
        if {"F", "M"} <= {kind for pick in chosen for kind in pick.entry.kinds}:
            return None  # no pregnant uncle
        return {lg: render(pattern[lg], picks, lg, self.grammar.sounds[lg]) for lg in LANGUAGES}


def render(template: str, picks: dict[str, Pick], language: str, sounds: list[tuple[re.Pattern[str], str]]) -> str:
    text = SLOT.sub(lambda slot: realise(picks[slot[1]], slot[2].strip(), language), template)
    for rule, replacement in sounds:
        text = rule.sub(replacement, text)
    return re.sub(r"\w", lambda first: first[0].upper(), text, count=1) if template[-1] in ".?" else text


def realise(pick: Pick, spec: str, language: str) -> str:
    """Fill one slot: a word that agrees with it, its modifier alone, or a noun phrase."""
    noun, form = pick.entry.nouns[language], set(spec.split())
    if AGREEMENT.search(spec):
        _, *parts = AGREEMENT.split(spec)
        choices = dict(zip(parts[::2], parts[1::2]))
        return (choices.get(noun.agreement) or choices["p" if noun.plural else "s"]).strip()
    if "adjective" in form:
        return agree(pick.adjectives[0].nouns[language].words, noun.agreement, language)
    return noun_phrase(Pick(pick.entry) if "plain" in form else pick, form, language)


def noun_phrase(pick: Pick, form: set[str], language: str) -> str:
    if language == "en":
        words = english(pick, form)
    elif language == "de":
        words = german(pick, form)
    else:
        words = romance(pick, form, language)
    if pick.site is None:
        return words
    preposition, case = pick.links[LANGUAGES.index(language)], pick.links[4]
    return " ".join(filter(None, [words, preposition, noun_phrase(pick.site, {"def", case}, language)]))


def english(pick: Pick, form: set[str]) -> str:
    noun = pick.entry.nouns["en"]
    if pick.both:
        return f"{pick.both.nouns['en'].words} {noun.many}"
    words = " ".join([adjective.nouns["en"].words for adjective in pick.adjectives] + [noun.words])
    countable = not noun.mass and not noun.plural
    if "def" in form or "generic" in form and countable:
        return f"the {words}"
    if "indef" not in form or not countable:
        return words
    # The sound decides, not the letter: "a urinary", "an MRI", "an 83-year-old".
    vowel = re.match(r"[aio]|e(?!u)|u(?!r|t|ni|se|v)|8|1[18]\b|[AEFHILMNORSX](?=[A-Z-])", words)
    return f"{'an' if vowel else 'a'} {words}"


def agree(text: str, agreement: str, language: str) -> str:
    """Inflect an adjective given as masculine/feminine; phrases (de larga evolución) stay as they are."""
    masculine, _, feminine = text.partition("/")
    word = feminine or masculine if agreement.startswith("f") else masculine
    if language not in ("es", "fr") or not agreement.endswith("p") or " " in word and not feminine:
        return word
    if language == "es":
        return word + ("s" if word[-1] in "aeiou" else "es")
    return word[:-1] + "ux" if word.endswith("al") else word if word[-1] in "sx" else word + "s"


def romance(pick: Pick, form: set[str], language: str) -> str:
    """Article, noun, adjectives: the course stands next to the noun, phrases of several words last."""
    noun = pick.entry.nouns[language]
    if pick.both:
        return f"{agree(pick.both.nouns[language].words, noun.gender, language)} {noun.many}"
    adjectives = [agree(a.nouns[language].words, noun.agreement, language) for a in reversed(pick.adjectives)]
    head, _, complement = noun.words.partition(" | ")
    article = spanish_article(pick, form) if language == "es" else french_article(pick, form)
    return " ".join(filter(None, [article, head, *sorted(adjectives, key=lambda a: " " in a), complement]))


def spanish_article(pick: Pick, form: set[str]) -> str:
    noun = pick.entry.nouns["es"]
    agreement = "m" if noun.stressed_a else noun.agreement
    if "def" in form:
        return ARTICLES["es"]["def"][agreement]
    countable = not noun.mass and not pick.entry.nouns["en"].mass
    return ARTICLES["es"]["indef"].get(agreement, "") if "indef" in form and countable else ""


def french_article(pick: Pick, form: set[str]) -> str:
    noun = pick.entry.nouns["fr"]
    # "de la fièvre", but "une fièvre persistante"; after the preposition de: "d'une", but "de fièvre".
    mass = noun.mass and not pick.adjectives
    if "partitive" in form or "indef" in form and mass:
        return "de " + ARTICLES["fr"]["def"][noun.agreement]
    if "indef" in form or "after_de" in form and not mass and not noun.plural:
        return ARTICLES["fr"]["indef"][noun.agreement]
    return ARTICLES["fr"]["def"][noun.agreement] if "def" in form else ""


def german(pick: Pick, form: set[str]) -> str:
    noun = pick.entry.nouns["de"]
    if not noun.gender and not noun.plural:  # a fixed adverbial
        return noun.words
    case = next((index for index, name in enumerate(CASES) if name in form), 0)
    gender = "p" if noun.plural or pick.both else noun.gender
    *stems, head = re.split(r"- ", noun.many if pick.both else noun.words)
    if case == 3 and gender == "p" and "def" not in form and not (pick.adjectives or pick.both or stems):
        case = 2  # a genitive that nothing shows gives way to the dative: wegen Gallensteinen
    determiner, declension = "", "strong"
    own = stems.pop(0) if stems and stems[0] in ("mein", "d") else ""  # the determiner of a person
    if own == "mein":
        determiner, declension = own + EIN_WORD[gender].split(" ")[case], "mixed"
    elif pick.both:
        determiner, declension = pick.both.nouns["de"].words + STRONG["p"].split()[case], "weak"
    elif own == "d" or "def" in form:
        determiner, declension = DEFINITE[gender].split()[case], "weak"
    elif "indef" in form and not noun.mass and gender != "p":
        determiner, declension = "ein" + EIN_WORD[gender].split(" ")[case], "mixed"
    ending = german_ending(case, gender, declension)
    adjectives = [stem + ending for stem in [a.nouns["de"].words for a in pick.adjectives] + stems]
    head, _, complement = head.partition(" ")
    return " ".join(filter(None, [determiner, *adjectives, decline(head, noun, case, gender), complement]))


def german_ending(case: int, gender: str, declension: str) -> str:
    """The ending of an adjective; after an article most cases have -en."""
    strong = STRONG[gender].split()[case]
    if declension == "strong":
        return strong
    if gender == "p" or case > 1 or case == 1 and gender == "m":
        return "en"
    return strong if declension == "mixed" else "e"


def decline(head: str, noun: Noun, case: int, gender: str) -> str:
    """Case endings of the German noun itself."""
    if gender == "p":
        return head + ("n" if case == 2 and head[-1] not in "nsa" else "")
    if noun.genitive in ("n", "en"):  # weak nouns: den Patienten, dem Jungen
        return head + (noun.genitive if case else "")
    if case != 3 or gender == "f":
        return head
    if noun.genitive is not None:
        return head + noun.genitive
    # Latin words in -us, -is and the like stay as they are: des Morbus, des Diabetes; but des Halses.
    return head if re.search(r"([uioae]s|\d)$", head) else head + ("es" if head[-1] in "sßxz" else "s")


def phrases(path: str | os.PathLike[str], limit: int | None = None, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield distinct parallel phrases; no text occurs twice in any language. File and seed fix the order."""
    rng = random.Random(seed)
    grammar = Grammar.load(path)
    composer = Composer(grammar, rng)
    live = [(pattern, specialty) for pattern in grammar.patterns for specialty in grammar.specialties]
    seen: set[tuple[str, str]] = set()
    count = 0
    while live:
        rng.shuffle(live)
        productive = []
        for pair in live:
            if limit is not None and count >= limit:
                return
            drawn = (composer.compose(*pair) for _ in range(PATIENCE))
            phrase = next((p for p in drawn if p and seen.isdisjoint(p.items())), None)
            if phrase is not None:
                productive.append(pair)
                seen.update(phrase.items())
                count += 1
                yield phrase
        live = productive
