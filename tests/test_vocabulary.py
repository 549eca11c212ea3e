"""Vocabularies: trimming changes no vector, extending no English id; new rows start where they are said to start."""

import itertools
import json
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import WORDS, sentences
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from xdist import vocabulary
from xdist.errors import Refused

ALPHABET = [*"abcdefghijklmnopqrstuvwxyzéüñ0123456789.,", "🫀", "中"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def corpus() -> list[str]:
    rows = sentences(300)
    return [row[lang] for row in rows for lang in ("en", "es", "de")] + [" ".join(ALPHABET)] * 3


def word_piece() -> Tokenizer:
    """As of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=320, special_tokens=BERT, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram() -> Tokenizer:
    """As of XLM-R: SentencePiece Unigram, <mask> the last id."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        corpus(), trainers.UnigramTrainer(vocab_size=260, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """As of RoBERTa: byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


MAKERS = [word_piece, unigram, byte_level]


def texts(seed: int = 0) -> list[str]:
    """Real words, joined words, noise and odd characters."""
    rng = random.Random(seed)
    words = [word for lang in WORDS.values() for word in lang]
    found = []
    for _ in range(400):
        parts = [
            rng.choice([rng.choice(words), rng.choice(words) + rng.choice(words), "".join(rng.choices(ALPHABET, k=4))]) for _ in range(5)
        ]
        found.append(" ".join(parts))
    return [*found, "", " ", "🫁", "Ελλάδα", "the <mask> [MASK] knee"]


@pytest.mark.parametrize("make", MAKERS)
def test_trim_cuts_texts_of_kept_pieces_exactly_as_before(make: object) -> None:
    old = make()  # type: ignore[operator]
    fitted = vocabulary.trim(old, [row["es"] for row in sentences(40)])
    new, kept = fitted.tokenizer, set(fitted.old_ids.tolist())
    assert len(kept) == len(fitted.old_ids) == new.get_vocab_size(with_added_tokens=True) < old.get_vocab_size(with_added_tokens=True)
    same = other = 0
    for text in [*texts(), *corpus()]:
        for specials in (True, False):
            before = old.encode(text, add_special_tokens=specials)
            if not set(before.ids) <= kept:
                other += 1
                continue
            same += 1
            after = new.encode(text, add_special_tokens=specials)
            assert after.tokens == before.tokens
            assert fitted.old_ids[after.ids].tolist() == before.ids
    assert same > 100
    assert other > 100  # the vocabulary is really smaller


@pytest.mark.parametrize("make", MAKERS)
def test_trim_covers_every_text_of_the_corpus(make: object) -> None:
    old = make()  # type: ignore[operator]
    for read in ([row["es"] for row in sentences(40)], iter(corpus())):
        read = list(read)
        fitted = vocabulary.trim(old, iter(read))
        for text in read:
            assert fitted.old_ids[fitted.tokenizer.encode(text).ids].tolist() == old.encode(text).ids


@pytest.mark.parametrize("make", MAKERS)
def test_trim_keeps_special_tokens_pairs_and_single_characters(make: object) -> None:
    old = make()  # type: ignore[operator]
    old.enable_truncation(4)
    old.enable_padding(length=9)
    fitted = vocabulary.trim(old, ["el paciente"])
    new = fitted.tokenizer
    assert new.truncation is None
    assert new.padding is None
    assert old.truncation is not None  # the old one is left as it is
    for token in old.get_added_tokens_decoder().values():
        assert fitted.old_ids[new.token_to_id(token.content)] == old.token_to_id(token.content)
    old.no_truncation()
    old.no_padding()
    pair = ("el paciente", "a b")
    assert fitted.old_ids[new.encode(*pair).ids].tolist() == old.encode(*pair).ids
    for character in "qxz中":
        assert fitted.old_ids[new.encode(character).ids].tolist() == old.encode(character).ids


def test_trim_of_byte_level_bpe_can_spell_anything() -> None:
    new = vocabulary.trim(byte_level(), ["el paciente"]).tokenizer
    for text in texts():
        assert new.decode(new.encode(text).ids) == text


def test_trim_keeps_the_score_of_unknown_characters() -> None:
    """Unigram scores an unknown character by its least likely piece. Were that piece dropped, `ab`, which is cut a·b at the
    price of two unlikely pieces, would become b? with an unknown part."""
    pieces = [("<unk>", 0.0), ("ab", -14.0), ("c", -14.0), ("bc", -1.0), ("zz", -40.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert tokenizer.encode("abc").tokens == ["ab", "c"]  # -28, against -50 - 1 for an unknown a and bc
    assert vocabulary.trim(tokenizer, ["abc", "bc"]).tokenizer.encode("abc").tokens == ["ab", "c"]


def test_trim_keeps_vectors_equal() -> None:
    import torch
    from transformers import BertConfig, BertModel

    old = word_piece()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=old.get_vocab_size(), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )  # fmt: skip
    body = BertModel(config).eval()
    fitted = vocabulary.trim(old, corpus()[:200])
    table = body.get_input_embeddings().weight.detach().numpy()
    rows = vocabulary.initial_rows(fitted, old, table)
    np.testing.assert_array_equal(rows, table[fitted.old_ids])
    for text in corpus()[:20]:
        with torch.no_grad():
            before = body(torch.tensor([old.encode(text).ids])).last_hidden_state
            after = body(inputs_embeds=torch.from_numpy(rows[fitted.tokenizer.encode(text).ids])[None]).last_hidden_state
        assert torch.equal(before, after)


# --- extend ---


def english(size: int = 150) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    text = [row["en"] for row in sentences(300)]
    tokenizer.train_from_iterator(text, trainers.WordPieceTrainer(vocab_size=size, special_tokens=BERT, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def others() -> dict[str, Sequence[str]]:
    return {lang: [row[lang] for row in sentences(200)] for lang in ("es", "de")}


def test_extend_keeps_english_ids_and_spells_the_new_languages_in_fewer_pieces() -> None:
    old = english()
    fitted = vocabulary.extend(old, (), others(), 260)
    count = old.get_vocab_size()
    assert count < fitted.tokenizer.get_vocab_size() <= 260
    assert fitted.old_ids.tolist() == [*range(count), *[-1] * (fitted.tokenizer.get_vocab_size() - count)]
    for piece, id_ in old.get_vocab().items():
        assert fitted.tokenizer.token_to_id(piece) == id_
    for text in [row["en"] for row in sentences(50)]:
        assert fitted.tokenizer.encode(text).ids == old.encode(text).ids
    for lang, found in others().items():
        before, after = (sum(len(tok.encode(text).ids) for text in found) for tok in (old, fitted.tokenizer))
        assert after < 0.75 * before, lang
        assert all(1 not in fitted.tokenizer.encode(text).ids for text in found)  # nothing is unknown


def test_extend_cuts_english_exactly_as_the_teacher() -> None:
    old = english(60)  # too few pieces for whole words
    texts = [row["en"] for row in sentences(200)]
    others_with_english_words = {"de": [f"{text} {text}" for text in texts] + others()["de"]}
    loose = vocabulary.extend(old, (), others_with_english_words, 400).tokenizer
    exact = vocabulary.extend(old, texts, others_with_english_words, 400).tokenizer
    assert any(loose.encode(text).ids != old.encode(text).ids for text in texts)
    assert all(exact.encode(text).ids == old.encode(text).ids for text in texts)
    assert exact.get_vocab_size() > old.get_vocab_size()


def test_extend_shares_the_room_among_languages() -> None:
    old = english()
    room = 40
    fitted = vocabulary.extend(old, (), others(), old.get_vocab_size() + room)
    assert fitted.tokenizer.get_vocab_size() == old.get_vocab_size() + room
    first = vocabulary.extend(old, (), {"de": others()["de"]}, old.get_vocab_size() + room // 2)
    names = {id_: piece for piece, id_ in fitted.tokenizer.get_vocab().items()}
    half = range(old.get_vocab_size(), old.get_vocab_size() + room // 2)
    assert [names[id_] for id_ in half] == [{i: p for p, i in first.tokenizer.get_vocab().items()}[id_] for id_ in half]


def test_extend_leaves_added_tokens_where_they_are() -> None:
    old = english()
    old.add_tokens(["covid19"])
    fitted = vocabulary.extend(old, (), others(), 260)
    assert fitted.tokenizer.token_to_id("covid19") == old.token_to_id("covid19") == old.get_vocab_size(with_added_tokens=False)
    assert fitted.old_ids[old.token_to_id("covid19")] == old.token_to_id("covid19")
    ids = sorted(fitted.tokenizer.get_vocab().values())
    assert ids == list(range(len(fitted.old_ids)))


def test_extend_refuses_what_it_cannot_do() -> None:
    with pytest.raises(Refused, match="needs a WordPiece teacher, this one has Unigram"):
        vocabulary.extend(unigram(), (), others(), 900)
    with pytest.raises(Refused, match=r"student\.vocabulary_size: 100 leaves no room"):
        vocabulary.extend(english(), (), others(), 100)


# --- train ---


def test_train_makes_a_unigram_vocabulary_with_the_teachers_special_tokens() -> None:
    specials = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    fitted = vocabulary.train(corpus(), 300, specials)
    tokenizer = fitted.tokenizer
    assert json.loads(tokenizer.to_str())["model"]["type"] == "Unigram"
    assert tokenizer.get_vocab_size() <= 300
    assert [tokenizer.token_to_id(token) for token in specials.values()] == [0, 1, 2, 3]
    assert (fitted.old_ids == -1).all()
    encoded = tokenizer.encode("EL Paciente tiene 42")
    assert encoded.tokens[0] == "[CLS]"
    assert encoded.tokens[-1] == "[SEP]"
    assert encoded.tokens[-3:-1] == ["4", "2"]  # digits one by one
    assert encoded.ids == tokenizer.encode("el paciente tiene 42").ids
    assert tokenizer.encode("a", "b").tokens.count("[SEP]") == 2
    assert tokenizer.token_to_id("[UNK]") in tokenizer.encode("☃").ids


# --- where new rows start ---


def test_new_rows_are_the_mean_of_the_spelling() -> None:
    pieces = {token: id_ for id_, token in enumerate([*BERT, "heart", "lung", "he", "##rt", "##z", "##a"])}
    old = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    new = Tokenizer(models.WordPiece({**pieces, "herz": 11, "##art": 12, "##xyz": 13, "qq": 14}, unk_token="[UNK]"))
    old.pre_tokenizer = new.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    fitted = vocabulary.Vocabulary(new, np.array([*range(11), -1, -1, -1, -1]))
    rows = vocabulary.initial_rows(fitted, old, table)
    np.testing.assert_array_equal(rows[:11], table)
    np.testing.assert_allclose(rows[12], table[[10, 8]].mean(0), atol=1e-6)  # ##a ##rt
    np.testing.assert_allclose(rows[13], table[9], atol=1e-6)  # of x, y and z the teacher knows ##z
    np.testing.assert_allclose(rows[14], table.mean(0), atol=1e-6)  # nothing known: the mean of all
    np.testing.assert_allclose(rows[11], table.mean(0), atol=1e-6)  # he ##r? cannot be spelled as a word


def test_new_rows_move_towards_what_they_are_aligned_to() -> None:
    pieces = {"[UNK]": 0, "heart": 1, "h": 2}
    old = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    new = Tokenizer(models.WordPiece({**pieces, "herz": 3}, unk_token="[UNK]"))
    table = np.eye(3, dtype=np.float32)
    fitted = vocabulary.Vocabulary(new, np.array([0, 1, 2, -1]))
    spelled = vocabulary.initial_rows(fitted, old, table)[3]

    def row(weight: float) -> np.ndarray:
        sums, weights = np.zeros((4, 3), np.float32), np.zeros(4, np.float32)
        sums[3], weights[3] = weight * table[1], weight
        rows = vocabulary.initial_rows(fitted, old, table, vocabulary.Aligned(sums, weights))
        np.testing.assert_array_equal(rows[:3], table)  # a kept row does not move
        return rows[3]

    np.testing.assert_allclose(row(0), spelled)
    far = [float(np.linalg.norm(row(weight) - table[1])) for weight in (0.0, 0.5, 3.0, 1e6)]
    assert far == sorted(far, reverse=True)
    assert far[0] > 0.1
    assert far[-1] < 1e-3


# --- alignment ---


def naive(pairs: list[tuple[list[int], list[int]]], iterations: int) -> dict[tuple[int, int], float]:
    """IBM model 1 with dictionaries, in both directions; the geometric mean of the last posteriors."""
    cells = [(number, j, i, f, e) for number, (source, target) in enumerate(pairs)
             for (j, f), (i, e) in itertools.product(enumerate(target), enumerate([-1, *source]))]  # fmt: skip
    forward = {(f, e): 1.0 for _, _, _, f, e in cells}
    backward = dict(forward)
    found: dict[tuple[int, int], float] = {}
    for _ in range(iterations):
        by_target: dict[tuple[int, int], float] = {}
        by_source: dict[tuple[int, int], float] = {}
        for n, j, i, f, e in cells:
            by_target[n, j] = by_target.get((n, j), 0) + forward[f, e]
            by_source[n, i] = by_source.get((n, i), 0) + backward[f, e]
        down, up, found = dict.fromkeys(forward, 0.0), dict.fromkeys(forward, 0.0), dict.fromkeys(forward, 0.0)
        for n, j, i, f, e in cells:
            a, b = forward[f, e] / by_target[n, j], backward[f, e] / by_source[n, i]
            down[f, e] += a
            up[f, e] += b
            found[f, e] += math.sqrt(a * b)
        per_source: dict[int, float] = {}
        per_target: dict[int, float] = {}
        for f, e in forward:
            per_source[e] = per_source.get(e, 0) + down[f, e]
            per_target[f] = per_target.get(f, 0) + up[f, e]
        forward = {(f, e): down[f, e] / per_source[e] for f, e in down}
        backward = {(f, e): up[f, e] / per_target[f] for f, e in up}
    return {pair: count for pair, count in found.items() if pair[1] >= 0}


def links(pairs: list[tuple[list[int], list[int]]], **options: float) -> dict[tuple[int, int], float]:
    found = vocabulary.expected_links([s for s, _ in pairs], [t for _, t in pairs], **options)  # type: ignore[arg-type]
    return {(int(f), int(e)): float(count) for (f, e), count in zip(found.pairs, found.counts, strict=True)}


def test_one_iteration_by_hand() -> None:
    # Source 7 8, target 5. With nothing learned, target 5 chooses among nothing, 7 and 8: a third each; each source has
    # one target to choose. Expected count of (5, 7) and of (5, 8): the square root of 1/3 × 1.
    assert links([([7, 8], [5])], iterations=1) == pytest.approx({(5, 7): math.sqrt(1 / 3), (5, 8): math.sqrt(1 / 3)})


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_links_are_those_of_a_naive_implementation(iterations: int) -> None:
    rng = random.Random(0)
    pairs = [
        ([rng.randrange(9) for _ in range(rng.randint(1, 6))], [rng.randrange(7) for _ in range(rng.randint(1, 6))]) for _ in range(40)
    ]
    wanted = {pair: count for pair, count in naive(pairs, iterations).items() if count >= 0.05}
    assert links(pairs, iterations=iterations) == pytest.approx(wanted, rel=1e-4)


def test_links_do_not_depend_on_how_many_pairs_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    pairs = [([rng.randrange(9) for _ in range(3)], [rng.randrange(7) for _ in range(2)]) for _ in range(50)]
    whole = links(pairs)
    monkeypatch.setattr(vocabulary, "MOST_TOGETHER", 7)
    assert links(pairs) == pytest.approx(whole, rel=1e-4)


def test_links_find_translations() -> None:
    words = {lang: {word: id_ for id_, word in enumerate(dict.fromkeys(known))} for lang, known in WORDS.items()}
    rows = sentences(300)
    pairs = [([words["en"][w] for w in row["en"].split()], [words["de"][w] for w in row["de"].split()]) for row in rows]
    found = links(pairs)
    for source, target in (("heart", "herz"), ("lung", "lunge"), ("fever", "fieber"), ("today", "heute")):
        f, e = words["de"][target], words["en"][source]
        assert max(links_of(found, f), key=lambda link: link[1])[0] == e


def links_of(found: dict[tuple[int, int], float], target: int) -> list[tuple[int, float]]:
    return [(e, count) for (f, e), count in found.items() if f == target]


def test_links_leave_out_long_and_empty_sentences_and_faint_links() -> None:
    assert links([]) == {}
    assert links([([], [1]), ([1], []), ([1] * 61, [2])]) == {}
    assert (2, 1) in links([([1] * 60, [2])], iterations=1)
    assert links([([7, 8], [5])], iterations=1, least=0.6) == {}


def test_align_sums_the_rows_that_a_token_is_linked_to() -> None:
    old = Tokenizer(models.WordLevel({"[UNK]": 0, "heart": 1, "left": 2}, unk_token="[UNK]"))
    new = Tokenizer(models.WordLevel({"[UNK]": 0, "herz": 1, "linkes": 2, "alone": 3}, unk_token="[UNK]"))
    old.pre_tokenizer = new.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.array([[9, 9], [1, 0], [0, 1]], np.float32)
    one, two = (["heart", "left heart"], ["herz", "linkes herz"]), (["heart"], ["herz"])
    found = vocabulary.align([one, two], old, new, table)
    wanted = np.zeros((4, 2)), np.zeros(4)
    for pairs in ([([1], [1]), ([2, 1], [2, 1])], [([1], [1])]):
        for (f, e), count in links(pairs).items():
            wanted[0][f] += count * table[e]
            wanted[1][f] += count
    np.testing.assert_allclose(found.sums, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found.weight, wanted[1], rtol=1e-5)
    assert found.weight[3] == 0
