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
from typing import Any

import yaml

from xdist import files
from xdist.inflection import AGREEMENT, CASES, LANGUAGES, SLOT, SOUND_RULES, Entry, Noun, Pick, render

FORMS = {*CASES, "bare", "def", "indef", "generic", "partitive", "after_de", "plain", "adjective"}
MODIFIERS = {"severity", "course", "levels", "ages", "site"}
ADVERBIALS = {"since", "when", "after", "follow", "often"}  # pools without gender marks
KINDS = frozenset("sidetmncgpbvFM")
PATIENCE = 40  # draws without a new phrase before a pattern counts as exhausted


def read_noun(text: str, language: str) -> Noun:
    """One cell of a lexicon line: gender mark, words, and what follows / and =."""
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
    return Noun(words, mark.strip("ap"), mark.endswith("p"), bool(tilde), mark == "fa", many, genitive if slash else None)


def read_entry(row: Any, where: str, inflected: bool = True) -> Entry:
    """One lexicon line; errors name it."""
    if not isinstance(row, list) or not 4 <= len(row) <= 6 or not all(isinstance(c, str) and c for c in row):
        raise ValueError(f"{where}: {row!r}: write a list of 4 to 6 texts: en, es, fr, de, kinds, site link")
    try:
        nouns = {lg: read_noun(cell, lg) if inflected else Noun(cell) for lg, cell in zip(LANGUAGES, row, strict=False)}
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
        self.shared = {pool: [read_entry(row, pool, pool not in ADVERBIALS) for row in rows] for pool, rows in common["pools"].items()}
        self.shared |= {
            pool: [read_entry(row, pool, inflected=False) for row in rows]
            for pool, rows in (common["adjectives"] | {"sides": common["sides"]}).items()
        }
        sites = [(group, read_entry(row, group)) for group, rows in common["sites"].items() for row in rows]
        self.shared["site"] = [Entry(site.nouns, site.kinds | {group}) for group, site in sites]
        self.specialties = {
            name: {pool: [read_entry(row, f"{name}, {pool}") for row in rows] for pool, rows in (pools | {"name": [pools["name"]]}).items()}
            for name, pools in data["specialties"].items()
        }
        self.patterns: list[dict[str, str]] = data["patterns"]
        aspirate = f"(?:{'|'.join(common['aspirate_h'])})"
        self.sounds = {
            lg: [(re.compile(rule.replace("ASPIRATE", aspirate)), new) for rule, new in rules] for lg, rules in SOUND_RULES.items()
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Grammar":
        """Read and check a grammar file. Raises ValueError naming the entry and the remedy."""
        try:
            grammar = cls(yaml.safe_load(files.read(os.fspath(path)).decode()))
        except (UnicodeDecodeError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path}: {error!r}; the file must be YAML with specialties, patterns and common: links, "
                "both, sides, aspirate_h, sites, adjectives, pools"
            ) from error
        grammar.check_lexicon()
        for pattern in grammar.patterns:
            grammar.check_pattern(pattern)
        return grammar

    def check_lexicon(self) -> None:
        """Refuse site links and kinds that do not exist."""
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
                    raise ValueError(f"{where}: give a site link from {sorted(self.links)} and groups from {sorted(groups)}")

    def check_pattern(self, pattern: dict[str, str]) -> None:
        """Refuse a pattern that lacks a language or asks for an unknown slot or form."""
        where = f"pattern {pattern.get('id')!r}"
        pools = self.shared.keys() | {pool for pools in self.specialties.values() for pool in pools}
        for name in pattern.keys() - {"id", *LANGUAGES}:
            if pattern[name].split()[0] not in pools:
                raise ValueError(f"{where}: begin the slot {name!r} with a pool from {sorted(pools)}")
        for language in LANGUAGES:
            if language not in pattern:
                raise ValueError(f"{where}: add its text in {language}")
            for name, form in SLOT.findall(pattern[language]):
                if name not in pattern or (not AGREEMENT.search(form) and not FORMS.issuperset(form.split())):
                    raise ValueError(f"{where}, {language}: declare the slot {name!r}, forms are {sorted(FORMS)}")


class Composer:
    """Draws the entries of a phrase; every pool is a deck that is reshuffled when empty, so all come up evenly."""

    def __init__(self, grammar: Grammar, rng: random.Random) -> None:
        self.grammar, self.rng = grammar, rng
        self.decks: dict[tuple[str, str, frozenset[str], bool], list[Entry]] = {}

    def draw(self, pool: str, specialty: str, kinds: frozenset[str], with_site: bool = False) -> Entry | None:
        """The next entry of a pool that fits; None where none does."""
        shared = self.grammar.shared.get(pool)
        deck = self.decks.setdefault((pool, "" if shared else specialty, kinds, with_site), [])
        if not deck:
            deck += [
                entry
                for entry in shared or self.grammar.specialties[specialty][pool]
                if (not kinds or kinds & entry.kinds) and (entry.link or not with_site)
            ]
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
        wanted = [word.rstrip("?") for word in rest if word.rstrip("?") in MODIFIERS and (word[-1] != "?" or self.rng.random() < 0.5)]
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
