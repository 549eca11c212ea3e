"""Inflection for the phrase grammar: noun phrases of English, Spanish, French and German, with gender, case, number,
agreement, contraction and elision. Pure functions of lexicon entries."""

import re
from dataclasses import dataclass

LANGUAGES = ("en", "es", "fr", "de")
CASES = ("nom", "acc", "dat", "gen")
SLOT = re.compile(r"<(\w+)((?: [^<>]+)?)>")
AGREEMENT = re.compile(r"\b([mf]p?|s|p):")

ARTICLES = {  # by agreement: gender, then p for plural
    "es": {"def": {"m": "el", "f": "la", "mp": "los", "fp": "las"}, "indef": {"m": "un", "f": "una"}},
    "fr": {"def": {"m": "le", "f": "la", "mp": "les", "fp": "les"}, "indef": {"m": "un", "f": "une", "mp": "des", "fp": "des"}},
}
# German endings in the order of CASES; the plural (p) has no gender.
DEFINITE = {"m": "der den dem des", "f": "die die der der", "n": "das das dem des", "p": "die die den der"}
EIN_WORD = {"m": " en em es", "f": "e e er er", "n": "  em es", "p": "e e en er"}
STRONG = {"m": "er en em en", "f": "e e er er", "n": "es es em en", "p": "e e en er"}
# What a vowel, a silent h or an unstressed word does to its neighbour, applied from top to bottom.
SOUND_RULES: dict[str, list[tuple[str, str]]] = {
    "en": [],
    "es": [(r"\bde el\b", "del"), (r"\ba el\b", "al"), (r"\by (?=h?[ií](?!e))", "e ")],
    "fr": [
        (r"\b([dljnmst])[ea] (?=(?!ASPIRATE)[aeiouhyâàéèêîïôœAEIOUÉ])", r"\1'"),
        (r"\bde le\b", "du"),
        (r"\bde les\b", "des"),
        (r"\bà le\b", "au"),
        (r"\bà les\b", "aux"),
    ],
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
        """Gender, then p for plural: m, f, n, mp, fp, p."""
        return self.gender + "p" * self.plural


@dataclass(frozen=True)
class Entry:
    """One line of the lexicon: the noun in each language, and what it goes with."""

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


def render(template: str, picks: dict[str, Pick], language: str, sounds: list[tuple[re.Pattern[str], str]]) -> str:
    """Fill a pattern's slots and apply the sound rules; a sentence begins with a capital."""
    text = SLOT.sub(lambda slot: realise(picks[slot[1]], slot[2].strip(), language), template)
    for rule, replacement in sounds:
        text = rule.sub(replacement, text)
    return re.sub(r"\w", lambda first: first[0].upper(), text, count=1) if template[-1] in ".?" else text


def realise(pick: Pick, spec: str, language: str) -> str:
    """Fill one slot: a word that agrees with it, its modifier alone, or a noun phrase."""
    noun, form = pick.entry.nouns[language], set(spec.split())
    if AGREEMENT.search(spec):
        _, *parts = AGREEMENT.split(spec)
        choices = dict(zip(parts[::2], parts[1::2], strict=True))
        return (choices.get(noun.agreement) or choices["p" if noun.plural else "s"]).strip()
    if "adjective" in form:
        return agree(pick.adjectives[0].nouns[language].words, noun.agreement, language)
    return noun_phrase(Pick(pick.entry) if "plain" in form else pick, form, language)


def noun_phrase(pick: Pick, form: set[str], language: str) -> str:
    """A noun with its modifiers in the form asked for, and its site behind it."""
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
    """Article, adjectives, noun."""
    noun = pick.entry.nouns["en"]
    if pick.both:
        return f"{pick.both.nouns['en'].words} {noun.many}"
    words = " ".join([adjective.nouns["en"].words for adjective in pick.adjectives] + [noun.words])
    countable = not noun.mass and not noun.plural
    if "def" in form or ("generic" in form and countable):
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
    if language not in ("es", "fr") or not agreement.endswith("p") or (" " in word and not feminine):
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
    """El, la, un, una, or nothing; el before a stressed a."""
    noun = pick.entry.nouns["es"]
    agreement = "m" if noun.stressed_a else noun.agreement
    if "def" in form:
        return ARTICLES["es"]["def"][agreement]
    countable = not noun.mass and not pick.entry.nouns["en"].mass
    return ARTICLES["es"]["indef"].get(agreement, "") if "indef" in form and countable else ""


def french_article(pick: Pick, form: set[str]) -> str:
    """Definite, indefinite or partitive; contraction and elision come later, by sound."""
    noun = pick.entry.nouns["fr"]
    # "de la fièvre", but "une fièvre persistante"; after the preposition de: "d'une", but "de fièvre".
    mass = noun.mass and not pick.adjectives
    if "partitive" in form or ("indef" in form and mass):
        return "de " + ARTICLES["fr"]["def"][noun.agreement]
    if "indef" in form or ("after_de" in form and not mass and not noun.plural):
        return ARTICLES["fr"]["indef"][noun.agreement]
    return ARTICLES["fr"]["def"][noun.agreement] if "def" in form else ""


def german(pick: Pick, form: set[str]) -> str:
    """Determiner, adjectives in the declension that it asks for, noun in its case."""
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
    if gender == "p" or case > 1 or (case == 1 and gender == "m"):
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
