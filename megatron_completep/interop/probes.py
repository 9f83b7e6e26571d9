"""Texts on which a converted tokenizer is compared with the one that it was made from."""

from __future__ import annotations

import random
from collections.abc import Iterator

from megatron_completep.data.tokenizer import SPACE_MARK, Tokenizer

# Scripts, combining marks, emoji sequences, whitespace of all kinds, code, and names of special
# tokens as text.
PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 3,141,592 o'clock; we'll see!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ÄÖÜ ß € — „Anführung“",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ελληνικά: ξεσκεπάζω την ψυχοφθόρα.",
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと ちりぬるを。키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم  דג סקרן שט בים מאוכזב  ऋषियों को सताने वाले दुष्ट राक्षसों",
    "e\u0301 \u00e9 a\u0308 \ufb01 \u212b \u1e9b\u0323 👩‍👩‍👧‍👦 🇩🇪 👍🏽 "
    "\U0001f600\ufe0f \u200b\u200d\ufeff",
    "def f(x):\n\tif x:\n        return {'a': [1, 2], \"b\": None}  # ▁ and ▁▁\r\n\n\n    \t \n",
    " leading", "trailing ", "  two  ", "\n", "", " ", "        ", "\t\t\t", "a" * 50,
    " " * 33 + "x", "\u00a0\u3000\u2003 x",
    "<|endoftext|> <s></s> <unk> <0x0A> <0x41> [EOS] <|im_start|>",
    "\0 \x07 \x1b[0m \x7f", SPACE_MARK, f"a{SPACE_MARK}b {SPACE_MARK}",
)  # fmt: skip

# Languages of many scripts, of which Babel holds names of languages and territories.
_LANGUAGES = (
    *("am", "ar", "be", "bg", "bn", "bo", "cs", "de", "el", "fa", "fr", "gu", "he", "hi", "hy"),
    *("ja", "ka", "kk", "km", "ko", "lo", "ml", "mn", "my", "or", "pa", "ru", "si", "sr", "ta"),
    *("te", "th", "ti", "tr", "uk", "ur", "vi", "yi", "zh"),
)
_NAMES_A_TEXT = 50


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Every text: the probes, their mixtures, real names of many languages, the tokens' own."""
    yield from PROBES
    yield from mixtures()
    yield from locale_names(_LANGUAGES)
    yield from token_texts(tokenizer)


def locale_names(languages: tuple[str, ...] | None = None) -> Iterator[str]:
    """Names of languages and territories in these languages (None: all), some at a time.

    They are those of the package Babel; without it there are none.
    """
    try:
        from babel import localedata
    except ImportError:
        return
    if languages is None:
        codes = {identifier.split("_")[0] for identifier in localedata.locale_identifiers()}
        languages = tuple(sorted(codes))
    for language in languages:
        data = localedata.load(language, merge_inherited=False)
        names: list[str] = []
        for key in ("languages", "territories"):
            names += [str(name) for name in data.get(key, {}).values()]
        for start in range(0, len(names), _NAMES_A_TEXT):
            yield " ".join(names[start : start + _NAMES_A_TEXT])


def token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of every token together with that of the next one.

    So each token stands within a word, where merges decide, and not alone, where it may be found
    as a whole.
    """
    texts = [_text_of(tokenizer, token) for token in range(tokenizer.vocab_size)]
    for text, following in zip(texts, [*texts[1:], ""], strict=True):
        yield text + following


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    # Ids may have holes, and a library may refuse those.
    try:
        return tokenizer.decode([token]).replace("\N{REPLACEMENT CHARACTER}", "")
    except (KeyError, IndexError, ValueError):
        return ""


def mixtures() -> list[str]:
    """Random mixtures of the probes' characters and words.

    Runs of one character are among them: there, ties between segmentations show.
    """
    generator = random.Random(0)
    characters = sorted(set("".join(PROBES)))
    texts = []
    for length in (3, 7, 20, 60):
        for _ in range(40):
            mixture = ""
            for _ in range(length):
                mixture += generator.choice(characters) * generator.choice((1, 1, 1, 2, 5))
            texts.append(mixture)

    words = " ".join(PROBES).split(" ")
    for _ in range(40):
        texts.append(" ".join(generator.choice(words) for _ in range(30)))

    # Long texts of growing runs: here the sums of scores round.
    for space in (" ", "\t", "-", "="):
        for start in range(4):
            lines = [space * n + generator.choice(words) for n in range(start, 64)]
            texts.append("\n".join(lines))
    return texts
