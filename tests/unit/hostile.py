"""What a policy under reinforcement learning may write, or a user may paste: each text here broke or stalled some grader.

`ANSWERS` are contents for a `\\boxed{}`, `RESPONSES` whole responses, `fuzz` makes pairs of answers from fragments. Text that
would run code creates the file `CANARY` if it ever does.
"""

import random
import tempfile
from pathlib import Path

CANARY = Path(tempfile.gettempdir()) / "justrl_trl_model_text_was_executed"
_TOUCH = f"open('{CANARY}','w')"

ANSWERS = {
    "empty": "",
    "NUL": "\x00",
    "NUL among digits": "1\x000/2",
    "lone surrogates": "\ud800\\frac{\udfff}{2}",
    "right-to-left and combining marks": "\u202e1/2\u202c\u0301" * 50,
    "digits of other scripts": "\u0663/\u0664",
    "superscripts that count as digits": "x\u00b2/2",
    "zero width": "1\u200b/2",
    "100 kB of letters": "x" * 100_000,
    "100 kB of digits": "9" * 100_000,
    "10^5 digits with a fraction bar": "9" * 100_000 + "/7",
    "5,000 digits, above Python's limit": "9" * 5_000 + "/7",
    "3,900 digits in algebra": "9" * 3_900 + "+x",
    "huge exponent": "1e999999999",
    "huge exponent in algebra": "1e999999999+x",
    "huge exponent, integer power": "x+10**999999999",
    "nested powers": "9^{9^{9^9}}",
    "bare powers": "9**9**9**9**9",
    "power of a root": "sqrt(2)**(10**9)",
    "root of a huge root": "2**(10**9/3)",
    "letters to a huge power": "(x+1)**99999",
    "negative huge power": "(1/3)**(-10**8)",
    "factorials": "24!\\times24!",
    "huge factorial": "99999999!",
    "nested factorials": "((9!)!)!",
    "double factorial": "99999999!!",
    "huge binomial": "\\binom{10^9}{5*10^8}",
    "shift": "1<<999999999999",
    "repeated string": "'a'*999999999",
    "repeated list": "[0]*999999999",
    "simplify bomb": "*".join(f"sqrt(x+{k}+sqrt(x*y+{k}))" for k in range(1, 40)),
    "expansion bomb": "(" + "+".join(f"sqrt({k})" for k in range(2, 60)) + ")**50",
    "import and run": f"__import__('os').system('touch {CANARY}')",
    "import and run in a root": f"sqrt(__import__('os').system('touch {CANARY}'))",
    "open": _TOUCH,
    "open in a function of sympy": f'ln("{_TOUCH}")',
    "open behind a letter": f"x2({_TOUCH})",
    "class chain": "().__class__.__mro__[1].__subclasses__()",
    "attribute": "(2).p",
    "lambda": "lambda: 0",
    "walrus": "(x:=1)",
    "comprehension": "[x for x in x]",
    "f-string": "f'{x}'",
    "comment": "1#/2",
    "line continuation": "1\\\n/2",
    "quotes": "'\"'\"",
    "semicolon": "1;2",
    "star arguments": "ln(*x)",
    "full width": "\uff4f\uff50\uff45\uff4e(x)",
    "3,000 nested braces": "{" * 3_000 + "}" * 3_000,
    "2,000 parentheses": "(" * 1_000 + "x" + ")" * 1_000,
    "150 parentheses": "(" * 150 + "x" + ")" * 150,
    "2,000 closing parentheses": ")" * 2_000,
    "minus signs": "-" * 3_000 + "x",
    "long sum": "x+" * 1_900 + "x",
    "roots of roots": "\\sqrt{" * 300 + "2" + "}" * 300,
    "roots without end": "\\sqrt" * 500,
    "fractions without end": "\\frac" * 500,
    "open fractions": "\\frac{" * 400,
    "unfinished text boxes": "\\text{" * 400,
    "two units": "5\\text{ cm}\\text{ cm}",
    "nested matrices": "\\begin{pmatrix}1&2\\\\" * 80,
    "nested matrices, short": "\\begin{pmatrix}1&2\\\\" * 13,
    "item lists": "\\item[" * 300,
    "verbatim": "\\verb|" * 300,
    "file": "\\input{/etc/passwd}",
    "macro definitions": "\\def\\a{\\a\\a}\\a" * 50,
    "dollars": "$" * 1_501,
    "blanks": " " * 100_000,
    "thousands commas": "1" + ",000" * 10_000,
    "tuple of 2,000": "(" + ",".join("12" for _ in range(1_300)) + ")",
    "deadly units": "centimeters^" * 300,
    "carets": "^" * 3_000,
    "fractions of slashes": "1/" * 1_900 + "1",
}

RESPONSES = {
    "nothing": "",
    "100 kB line": "x" * 100_000,
    "100 kB of blanks": " " * 100_000,
    "unclosed box": "\\boxed{5",
    "20,000 open boxes": "\\boxed{" * 20_000,
    "closing braces before the box opens": "\\boxed}}}{5}",
    "box without braces": "\\boxed 5",
    "box and no more": "\\boxed",
    "NUL": "\x00" * 1_000 + "\\boxed{\x00}",
    "lone surrogates": "\ud800\udfff" * 1_000,
    "many numbers": "1 2 3.4 5/6 " * 8_000,
    "many formulas": "$x^2=\\frac{1}{2}$ \\[y\\] \\(z\\) " * 3_000,
    "nested formulas": "$" * 1_999 + "\\(\\[" * 1_000,
    "final answers": "final answer is " * 5_000,
}
# math-verify needs a second or more for a third of the answers as formulas: these are the kinds that matter, one of each
_FORMULAS = (
    *("nested powers", "factorials", "huge factorial", "huge binomial", "huge exponent", "5,000 digits, above Python's limit"),
    *("3,000 nested braces", "2,000 parentheses", "NUL", "lone surrogates", "import and run", "class chain", "nested matrices"),
)
RESPONSES |= {f"formula: {name}": f"the answer is ${ANSWERS[name]}$" for name in _FORMULAS}

_FRAGMENTS = [
    *"\\frac{1}{2} \\frac12 \\frac \\sqrt2 \\sqrt{3} \\sqrt \\pi x y 2 10 0.5 .5 1/2 ! ^2 ^{2} ^ ** ( ) [ ] , + - *".split(),
    *"/ // = x= \\text{cm} degrees % \\% \\$ 1,000 e ln ln(2) oo zoo nan re im frac 2i 1e3 1_0 0x1f 07 2j 0.2[1]".split(),
    *"\\infty \\left \\right { } | \\cup \\in \\{ \\} sqrt pi \u0663 \u00b2 \u03c0 \u221a \u00b0 # \" ' ; : < > & @ .".split(),
    *"\\binom{4}{2} \\sin million li all is if \\begin{pmatrix} \\end{pmatrix} __class__ lambda".split(),
    *("~", "\\", "\\\\", " ", "\n", "\x00", "\ud800", "\u202e", "\\text{ cm}", "7 3/4"),
]


def fuzz(seed: int, count: int) -> list[tuple[str, str]]:
    """`count` pairs of answers made of up to eight fragments; every second pair differs in one place only."""
    generator = random.Random(seed)
    pairs = []
    for index in range(count):
        truth = [generator.choice(_FRAGMENTS) for _ in range(generator.randint(1, 8))]
        given = [generator.choice(_FRAGMENTS) for _ in range(generator.randint(1, 8))]
        if index % 2:
            given = list(truth)
            given.insert(generator.randint(0, len(given)), generator.choice(_FRAGMENTS))
        pairs.append(("".join(given), "".join(truth)))
    return pairs
