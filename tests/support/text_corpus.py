# SPDX-License-Identifier: Apache-2.0
"""Varied strings from a fixed seed, to compare two tokenizers with."""

import random
from collections.abc import Callable, Sequence


_WORDS = (
    "the of and to in is that soprano sop eop sopping MASK gMASK system user assistant observation round hello world "
    "model language weather today naïve café Straße İstanbul ﬁnd don't we'll I'm they've he'd it's you're 'S 'LL"
).split()
_CHINESE = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产"
_CHINESE += "，。！？：；“”‘’（）《》、…—～「」０１２３ＡＢＣａｂｃ％＋＝　你好天气问答轮㎏㈱①②Ⅳ㍿﨑"
_OTHER = "áàâäéêëíîïóôöúûüñçßæøåÁÉÍÓÚÑ ЖжЯя αβγδ עברית العربية हिन्दी ไทย 한국어 ひらがなカタカナ"
_OTHER += "ﾊﾝｶｸ ｶﾞ ½¼²³ªº´¨¸ ĳ ŉ ǆ ſ ﬃ ＠ ⅓ ℃ №"
_COMBINING = "\u0301\u0300\u0308\u0327\u0323\u0302\u0338\u3099\u093c\u05b8\u0651"
_EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🇨🇳", "❤️", "❤️‍🔥", "🏳️‍🌈", "1️⃣", "🤷🏻‍♀️", "☺", "⌚"]
_CONTROL = [chr(code) for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))]
_INVISIBLE = list(
    "\u00a0\u00ad\u034f\u061c\u115f\u180e\u2000\u2003\u2009\u200b\u200c\u200d\u200e\u2028\u2029\u202a\u202f"
)
_INVISIBLE += list(
    "\u205f\u2060\u2581\u3000\u3164\ufdd1\ufeff\ufff9\ufffc\ufffd\ufffe\uffff\ue000\U000e0001\U0010ffff"
)
_CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    '<div class="a">&nbsp;</div>\r\n',
    "SELECT * FROM t WHERE a='b' -- c\n",
    "if (a && b || !c) { return; }  // done\n",
    '{"name": "tool", "arguments": {"city": "北京"}}',
    "    " * 5 + "pass",
    "#" * 30 + "\n",
    "=====================",
    "-" * 81,
    "https://example.com/a?b=c&d=%20e#f",
    "C:\\Users\\name\\file.txt",
    "1,234.56 0x1F 1e-9 3.14159 2023-06-27 10:00:00",
    "<0x0A><0x41><0xE4>",
    "<n><|tab|><|blank_2|><|blank_80|><|blank_81|><image_0><image_19999>",
    "[Round 1]\n\n问：你好\n\n答：",
)
_BROKEN = ("\ud83d", "\ude00", "a\ud800z", "\udc80\udcff", "\ud83d\ude00", "好\ude00\ud83d好")
CONTROL_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "<pad>", "<unk>", "<s>", "</s>", "<ENC>"),
    *("<dBLOCK>", "<unused_0>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<n>", "<|tab|>"),
    *("<|blank_2|>", "<|blank_3|>", "<image_7>", "<0x0A>", "[Round 0]"),
)


def texts(number: int, seed: int = 0) -> list[str]:
    """So many strings, the same for the same seed; some hold half a surrogate pair.

    They mix words, Chinese, code, emoji, runs of blanks and of one character, control and invisible characters,
    combining marks, any code points, and control tokens of all generations.
    """
    source = random.Random(seed)
    kinds = _kinds(source)
    return ["".join(source.choice(kinds)() for _ in range(source.choice((1, 1, 2, 3, 5, 8)))) for _ in range(number)]


def _kinds(source: random.Random) -> Sequence[Callable[[], str]]:
    def some(characters: Sequence[str], most: int) -> str:
        return "".join(source.choice(characters) for _ in range(source.randint(1, most)))

    def any_code_points() -> str:
        codes = (source.randrange(0x110000) for _ in range(source.randint(1, 6)))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    def repeated() -> str:
        character = source.choice([*"a-=_.*#~xX0 \n\t\u3000", "ab", "哈", "😀", "\r\n"])
        return character * source.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 79, 80, 81, 82, 83, 160, 161, 162))

    def composed() -> str:
        return "".join(source.choice("aeounsAEO ａか가नبא\n") + some(_COMBINING, 2) for _ in range(3))

    return (
        lambda: " ".join(some(_WORDS, 1) for _ in range(source.randint(1, 8))),
        lambda: some(_CHINESE, 12),
        lambda: some(_CHINESE, 4) + " " + some(_WORDS, 1),
        lambda: some(_OTHER, 8),
        lambda: source.choice(_CODE),
        lambda: some(_EMOJI, 4),
        lambda: some(_CONTROL, 3),
        lambda: some(_INVISIBLE, 2),
        lambda: some(CONTROL_TOKENS, 3),
        lambda: source.choice(["", " ", "  "]) + source.choice(CONTROL_TOKENS) + source.choice(["", " ", "\n", "\t "]),
        lambda: source.choice(_BROKEN),
        lambda: some([*" \n\t\r"], 6),
        any_code_points,
        repeated,
        composed,
    )
