"""The grammar of clinical phrases: agreement in each language, distinctness, determinism, refusals."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml

from xdist import records
from xdist.errors import Refused
from xdist.inflection import LANGUAGES, SOUND_RULES, Entry, Pick, render
from xdist.phrases import Composer, Grammar, phrases

LEXICON = Path(__file__).parent.parent / "recipes" / "demo" / "phrases.yaml"
GRAMMAR = Grammar.load(LEXICON)
ALL = [entry for pools in [GRAMMAR.shared, *GRAMMAR.specialties.values()] for pool in pools.values() for entry in pool]


def entry(german: str) -> Entry:
    """Look an entry up by its German words, which are unambiguous."""
    return next(e for e in ALL if e.nouns["de"].words == german)


def pick(words: str, *adjectives: str, site: Pick | None = None) -> Pick:
    found = entry(words)
    links = tuple(GRAMMAR.links[found.link]) if site else ()
    return Pick(found, tuple(entry(a) for a in adjectives), links, site)


def place(words: str, side: str) -> Pick:
    return Pick(entry(words), both=GRAMMAR.both) if side == "both" else pick(words, side)


CASES: list[tuple[str, str, dict[str, Pick], str]] = [
    # Spanish: el before stressed a, contractions, y/e, agreement, position of the complement.
    ("es", "<f def> empeora.", {"f": pick("Asthma")}, "El asma empeora."),
    ("es", "tratamiento de <f def>", {"f": pick("Asthma", "schwer", "bekannt")}, "tratamiento del asma conocida grave"),
    ("es", "alergia a <d def>", {"d": pick("Ramipril")}, "alergia al ramipril"),
    ("es", "se recetó a <w>", {"w": pick("d- Mann")}, "se recetó al hombre"),
    ("es", "<f> y <g>", {"f": pick("Fieber"), "g": pick("Reizbarkeit")}, "fiebre e irritabilidad"),
    ("es", "<f>", {"f": pick("Schluckbeschwerden", "fortschreitend")}, "dificultad progresiva para tragar"),
    (
        "es",
        "<f>",
        {"f": pick("Schmerzen", "stark", "chronisch", site=place("Knie", "link"))},
        "dolor crónico intenso en la rodilla izquierda",
    ),
    ("es", "<f>", {"f": pick("Schwellung", site=place("Knie", "both"))}, "hinchazón de ambas rodillas"),
    ("es", "<f def> <f s:mejoró p:mejoraron>", {"f": pick("Übelkeit", "anhaltend")}, "las náuseas persistentes mejoraron"),
    # French: elision, aspirate h, contractions, partitive, aigu/aiguë, invariable phrases.
    ("fr", "pas de <f>", {"f": pick("Asthma")}, "pas d'asthme"),
    ("fr", "pas de <f>", {"f": pick("arteriell- Hypertonie")}, "pas d'hypertension artérielle"),
    ("fr", "pas de <f>", {"f": pick("Leistenhernie")}, "pas de hernie inguinale"),
    ("fr", "<f def>", {"f": pick("Leistenhernie")}, "la hernie inguinale"),
    ("fr", "<s def>", {"s": place("Hüfte", "recht")}, "la hanche droite"),
    ("fr", "J'ai <f indef>.", {"f": pick("Fieber")}, "J'ai de la fièvre."),
    ("fr", "J'ai <f indef>.", {"f": pick("Fieber", "anhaltend")}, "J'ai une fièvre persistante."),
    ("fr", "souffre de <f after_de>", {"f": pick("Asthma", "schwer")}, "souffre d'un asthme sévère"),
    ("fr", "souffre de <f after_de>", {"f": pick("Kopfschmerzen")}, "souffre de maux de tête"),
    ("fr", "<f>", {"f": pick("Schmerzen", "stark", "akut", site=place("Knie", "both"))}, "douleurs aiguës intenses aux deux genoux"),
    ("fr", "<f>", {"f": pick("Schmerzen", site=place("Auge", "link"))}, "douleurs à l'œil gauche"),
    ("fr", "allergique à <d def>", {"d": pick("Betablocker")}, "allergique aux bêtabloquants"),
    ("fr", "allergique à <d def>", {"d": pick("Haloperidol")}, "allergique à l'halopéridol"),
    ("fr", "prend <d partitive>", {"d": pick("Metoprolol")}, "prend du métoprolol"),
    ("fr", "<w> est <w m:traité f:traitée>", {"w": pick("d- Frau")}, "la femme est traitée"),
    # German: strong, weak and mixed declension, weak nouns, dative plural, contractions, genitive.
    ("de", "mit <f dat>", {"f": pick("Lungenentzündung", "schwer")}, "mit schwerer Lungenentzündung"),
    ("de", "mit <f dat indef>", {"f": pick("Herzinfarkt", "akut")}, "mit einem akuten Herzinfarkt"),
    ("de", "<f indef>", {"f": pick("Herzinfarkt", "akut")}, "ein akuter Herzinfarkt"),
    ("de", "<f>", {"f": pick("diabetisch- Ketoazidose", "schwer")}, "schwere diabetische Ketoazidose"),
    ("de", "Behandlung <f gen def>", {"f": pick("diabetisch- Ketoazidose", "schwer")}, "Behandlung der schweren diabetischen Ketoazidose"),
    ("de", "Behandlung <f gen def>", {"f": pick("Herzinfarkt")}, "Behandlung des Herzinfarkts"),
    ("de", "Behandlung <f gen def>", {"f": pick("Morbus Crohn")}, "Behandlung des Morbus Crohn"),
    ("de", "wegen <f gen indef>", {"f": pick("Gallensteine")}, "wegen Gallensteinen"),
    ("de", "wegen <f gen indef>", {"f": pick("Abszess", "klein")}, "wegen eines kleinen Abszesses"),
    ("de", "mit <d dat>", {"d": pick("inhalativ- Kortikosteroide")}, "mit inhalativen Kortikosteroiden"),
    ("de", "<f>", {"f": pick("Schmerzen", "stark", "chronisch", site=place("Knie", "link"))}, "starke chronische Schmerzen im linken Knie"),
    ("de", "<f>", {"f": pick("Hautausschlag", site=place("Oberschenkel", "recht"))}, "Hautausschlag am rechten Oberschenkel"),
    ("en", "<f indef>", {"f": pick("Hautausschlag", site=place("Oberschenkel", "recht"))}, "a rash on the right thigh"),
    ("de", "<f>", {"f": pick("Schwellung", site=place("Knie", "both"))}, "Schwellung beider Knie"),
    ("de", "<f>", {"f": pick("Schmerzen", site=place("Knie", "both"))}, "Schmerzen in beiden Knien"),
    ("de", "verordnete <w dat>", {"w": pick("d- Junge")}, "verordnete dem Jungen"),
    ("de", "bei <w dat>", {"w": pick("mein- Mutter")}, "bei meiner Mutter"),
    ("de", "bei <a dat indef>", {"a": pick("Patient", "64-jährig")}, "bei einem 64-jährigen Patienten"),
    # English: a or an by sound, mass and plural nouns.
    ("en", "<f indef>", {"f": pick("Harnwegsinfekt")}, "a urinary tract infection"),
    ("en", "<f indef>", {"f": pick("Harnwegsinfekt", "akut")}, "an acute urinary tract infection"),
    ("en", "<a indef>", {"a": pick("Frau", "83-jährig")}, "an 83-year-old woman"),
    ("en", "<x indef>", {"x": pick("HIV-Test")}, "an HIV test"),
    ("en", "<f indef>", {"f": pick("Fieber")}, "fever"),
    ("en", "<f def> <f s:is p:are> worse.", {"f": pick("Palpitationen")}, "The palpitations are worse."),
    ("de", "<l def plain> war <l adjective>.", {"l": pick("Kreatinin", "leicht erhöht")}, "Das Kreatinin war leicht erhöht."),
]


@pytest.mark.parametrize(("language", "template", "picks", "expected"), CASES)
def test_agreement(language: str, template: str, picks: dict[str, Pick], expected: str) -> None:
    assert render(template, picks, language, GRAMMAR.sounds[language]) == expected


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, str]]:
    return list(phrases(LEXICON, limit=60_000))


def test_sixty_thousand_distinct_phrases(corpus: list[dict[str, str]]) -> None:
    assert len(corpus) == 60_000
    for language in LANGUAGES:
        assert len({phrase[language] for phrase in corpus}) == len(corpus)


def test_phrases_are_clean_text(corpus: list[dict[str, str]]) -> None:
    for phrase in corpus:
        assert tuple(phrase) == LANGUAGES
        for text in phrase.values():
            assert text
            assert text == text.strip()
            assert "  " not in text
            assert not set(text) & set("<>{}[]|=~/_"), text
            assert not {"- ", " .", " ,"} & {text[at : at + 2] for at in range(len(text))}, text


def test_contractions_are_applied_everywhere(corpus: list[dict[str, str]]) -> None:
    forbidden = {
        "es": [" de el ", " a el "],
        "de": [" in dem ", " an dem "],
        "fr": [" de le ", " de les ", " à le ", " à les ", " le a", " la a", " le é", " la é", " de a", " de é"],
    }
    for phrase in corpus:
        for language, sequences in forbidden.items():
            assert not [s for s in sequences if s in f" {phrase[language]}"], phrase[language]


def test_order_depends_on_the_seed_only() -> None:
    first = list(phrases(LEXICON, limit=300, seed=3))
    assert first == list(islice(phrases(LEXICON, seed=3), 300))
    assert first != list(phrases(LEXICON, limit=300, seed=4))


def test_every_entry_is_used_often(monkeypatch: pytest.MonkeyPatch) -> None:
    uses: dict[int, int] = {}
    compose = Composer.compose
    draw = Composer.draw
    drawn: list[Entry] = []

    def noted_draw(self: Composer, pool: str, specialty: str, kinds: frozenset[str], with_site: bool = False) -> Entry | None:
        found = draw(self, pool, specialty, kinds, with_site)
        if found:
            drawn.append(found)
        return found

    def noted_compose(self: Composer, pattern: dict[str, str], specialty: str) -> dict[str, str] | None:
        drawn.clear()
        return compose(self, pattern, specialty)

    monkeypatch.setattr(Composer, "draw", noted_draw)
    monkeypatch.setattr(Composer, "compose", noted_compose)
    grammar = Grammar.load(LEXICON)
    monkeypatch.setattr(Grammar, "load", lambda path: grammar)
    for _ in phrases(LEXICON, limit=50_000):
        for used in drawn:
            uses[id(used)] = uses.get(id(used), 0) + 1
    rare = [
        e.nouns["en"].words
        for pools in [grammar.shared, *grammar.specialties.values()]
        for pool in pools.values()
        for e in pool
        if uses.get(id(e), 0) < 20
    ]
    assert not rare


def test_the_lexicon_covers_twelve_specialties() -> None:
    assert len(GRAMMAR.specialties) == 12
    for pools in GRAMMAR.specialties.values():
        assert len(pools["findings"]) >= 30
        assert len(pools["drugs"]) >= 13
        assert len(pools["procedures"]) + len(pools["labs"]) >= 12
    assert len(GRAMMAR.patterns) >= 40


def test_no_word_names_two_entries_of_a_pool() -> None:
    for pool in ("findings", "drugs", "procedures", "labs"):
        entries = [e for pools in GRAMMAR.specialties.values() for e in pools[pool]]
        for language in LANGUAGES:
            words = [e.nouns[language].words for e in entries]
            assert not {w for w in words if words.count(w) > 1}


def test_every_language_has_sound_rules() -> None:
    assert set(SOUND_RULES) == set(LANGUAGES)


def spoil(path: Path, change: Callable[[dict], None]) -> Path:
    data = yaml.safe_load(LEXICON.read_text(encoding="utf-8"))
    change(data)
    broken = path / "broken.yaml"
    broken.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["specialties"]["cardiology"]["findings"][0].__setitem__(1, "insuficiencia"), "insuficiencia.*gender mark"),
        (lambda d: d["specialties"]["cardiology"]["drugs"].append(["only", "f dos"]), "only.*4 to 6 texts"),
        (lambda d: d["specialties"]["cardiology"]["findings"][0].__setitem__(4, "z"), "heart failure.*kinds"),
        (lambda d: d["specialties"]["neurology"]["findings"][3].__setitem__(5, "in nowhere"), "numbness.*groups"),
        (lambda d: d["common"]["links"]["at"].__setitem__(0, True), "link 'at'.*quote on"),
        (lambda d: d["patterns"][0].pop("fr"), "noun_phrase.*add its text in fr"),
        (lambda d: d["patterns"][0].__setitem__("de", "<q dat>"), "noun_phrase.*declare the slot 'q'"),
        (lambda d: d["patterns"][0].__setitem__("de", "<f ablative>"), "noun_phrase.*forms are"),
        (lambda d: d["patterns"][0].__setitem__("f", "finding s"), "noun_phrase.*pool"),
        (lambda d: d.pop("common"), "common"),
    ],
)
def test_broken_lexicon_is_refused_with_a_remedy(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(phrases(spoil(tmp_path, change)))


def test_a_corpus_with_a_broken_lexicon_is_refused(tmp_path: Path) -> None:
    broken = spoil(tmp_path, lambda d: d.pop("common"))
    with pytest.raises(Refused, match=r"broken\.yaml: KeyError\('common'\); the file must be YAML with specialties"):
        list(records.grammar(str(broken), ["en"]))
