"""Source text to CodeXGLUE tokens, raw or with literals normalised, and back to plain text.

The formats are those of the CodeXGLUE code-completion data (token level, py150 and javaCorpus): *raw* as
in the hub dataset `google/code_x_glue_cc_code_completion_token`, *norm* as in the CodeXGLUE repository
since 2021-07-30.
"""

from __future__ import annotations

import io
import re
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

START, END, EOL = "<s>", "</s>", "<EOL>"
MARKS = (START, END, EOL, "<pad>")
SUFFIXES = {"java": ".java", "python": ".py"}
VARIANTS = ("raw", "norm")
MAX_TOKEN = 100  # longest token of the raw variant, in characters

Allow = Mapping[str, Iterable[str]]

_JAVA = re.compile(
    r"""
      \s+ | //[^\n\r]* | /\*.*?\*/
    | (?P<token>
        [A-Za-z_$][A-Za-z0-9_$]*+(?![^\x00-\x7f\s]|\\u)
      | \.\.\.
      | 0[xX](?:[0-9a-fA-F](?:_*[0-9a-fA-F])*)?[lL]?
        (?:(?:\.(?:[0-9a-fA-F](?:_*[0-9a-fA-F])*)?)?[pP][+-]?(?:[0-9](?:_*[0-9])*)?[fFdD]?)?
      | 0[bB](?:[01](?:_*[01])*)?[lL]?
      | 0[0-7](?:_*[0-7])*[lL]?
      | (?:[0-9](?:_*[0-9])*(?:[lL]|\.(?:[0-9](?:_*[0-9])*)?)?|\.[0-9](?:_*[0-9])*)
        (?:[eE][+-]?(?:[0-9](?:_*[0-9])*)?)?[fFdD]?
      | [(){}\[\];,.@]
      | \"{3}[ \t\f]*\r?\n(?:[^\\]|\\.)*?\"{3}
      | "[^"\\\n\r]*(?:\\[^\n\r][^"\\\n\r]*)*"
      | '[^'\\\n\r]*(?:\\[^\n\r][^'\\\n\r]*)*'
      | >>>= | >>= | <<= | -> | :: | \+\+ | -- | && | \|\| | << | [-+*/%^|&!<>=]=
      | (?!/\*)[-+*/%^|&=<>!~?:]
      )
    | (?P<word>(?:[\w$]|[^\x00-\x7f\s]|\\u+[0-9a-fA-F]{4})+)
    | (?P<bad>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_IDENTIFIER_START = {"Lu", "Ll", "Lt", "Lm", "Lo", "Nl", "Pc", "Sc"}
_IDENTIFIER_PART = _IDENTIFIER_START | {"Mc", "Mn", "Nd"}
_UNICODE_ESCAPE = re.compile(r"\\u+([0-9a-fA-F]{4})")


def java_tokens(source: str) -> list[str]:
    """Tokens of a Java file, with the boundaries of javalang 0.13 and their text as written.

    Comments are left out; `>>` and `>>>` are two and three tokens, `@` stands alone. A text block (Java
    15), which javalang does not know, is one token, and the only one that spans lines.

    Raises:
        ValueError: the source is no Java, e.g. a string or comment without an end; names the line.
    """
    tokens = []
    for match in _JAVA.finditer(source):
        kind = match.lastgroup
        if kind is None:
            continue
        token = match.group()
        if kind == "bad" or (kind == "word" and not _is_identifier(token)):
            line = source.count("\n", 0, match.start()) + 1
            raise ValueError(f"line {line}: no Java token begins with {token[:20]!r}")
        tokens.append(token)
    return tokens


def _is_identifier(word: str) -> bool:
    # Words with characters outside ASCII come here; a regular expression cannot tell their categories.
    plain = _UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), word)
    categories = [unicodedata.category(character) for character in plain]
    return categories[0] in _IDENTIFIER_START and _IDENTIFIER_PART.issuperset(categories)


_SKIPPED = {tokenize.COMMENT, tokenize.INDENT, tokenize.ENCODING, tokenize.ENDMARKER}
_LINE_ENDS = {tokenize.NEWLINE, tokenize.NL}
# Python 3.12 splits f-strings into parts, 3.14 t-strings too.
_PARTED_STARTS = {getattr(tokenize, f"{letter}STRING_START", None) for letter in "FT"} - {None}
_PARTED_ENDS = {getattr(tokenize, f"{letter}STRING_END", None) for letter in "FT"} - {None}


def python_tokens(source: str) -> list[str]:
    """Tokens of a Python file by the standard library's `tokenize`, line ends as `<EOL>`.

    Comments and indentation are left out, `<EOL>` never stands first, last or twice in a row, white space
    inside a token is one blank. An f-string is one token on every Python.

    Raises:
        ValueError: `tokenize` refuses the source.
    """
    try:
        return _single_line_ends(_python_texts(source))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"no Python: {error}") from None


def _python_texts(source: str) -> Iterator[str]:
    lines = list(io.StringIO(source, newline=None))
    depth, start = 0, (0, 0)
    for kind, text, begin, end, _ in tokenize.generate_tokens(iter(lines).__next__):
        if kind in _PARTED_STARTS:
            if depth == 0:
                start = begin
            depth += 1
        elif kind in _PARTED_ENDS:
            depth -= 1
            if depth == 0:
                yield " ".join(_between(lines, start, end).split())
        elif depth > 0 or kind in _SKIPPED:
            continue
        elif kind in _LINE_ENDS:
            yield EOL
        else:
            yield " ".join(text.split())


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join((lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]))


def _single_line_ends(texts: Iterable[str]) -> list[str]:
    tokens: list[str] = []
    for text in texts:
        if text and (text != EOL or (tokens and tokens[-1] != EOL)):
            tokens.append(text)
    if tokens and tokens[-1] == EOL:
        tokens.pop()
    return tokens


# Whole string tokens: an error token such as a lone quote is none.
_STRING = {
    "java": re.compile(r"""["']"""),
    "python": re.compile(r"""[A-Za-z]*(?:".*"|'.*')\Z""", re.DOTALL),
}
_NUMBER = re.compile(r"\.?[0-9]")
_QUALIFIER = {
    ("java", "norm"): re.compile(r"[a-z]*"),
    ("python", "norm"): re.compile(r"[a-zA-Z]*"),
    ("python", "raw"): re.compile(r"[a-z]*"),
}
_TRIPLE = ("'''", '"""')


def _parts(token: str, language: str, variant: str) -> tuple[str, str, str, str]:
    # Qualifier, opening quote, body and closing quote, where each may be missing.
    qualifier = _QUALIFIER[language, variant].match(token).group()
    body = token[len(qualifier) :]
    for quote in (*_TRIPLE, "'", '"'):
        if body.startswith(quote):
            body = body[len(quote) :]
            if body.endswith(quote):
                return qualifier, quote, body[: -len(quote)], quote
            return qualifier, quote, body, ""
    return qualifier, "", body, ""


def _python_raw(token: str) -> str:
    # Drops by returning "". Marks inside a string would read as marks once tokens are joined.
    if token == EOL:
        return token
    if len(token) > MAX_TOKEN:
        return ""
    if _STRING["python"].match(token):
        qualifier, opening, body, closing = _parts(token, "python", "raw")
        if opening in _TRIPLE:
            return ""
        kept = body if len(body) < 15 and not any(mark in body for mark in MARKS) else ""
        return f"{qualifier}{opening}{kept}{closing}"
    return "" if _NUMBER.match(token) and len(token) >= 50 else token


def _literal(token: str, language: str) -> tuple[str, str, str, str] | None:
    """Kind (`STR`, `NUM`, `CHAR`), what stands before it, its mapped text, and what stands after it."""
    if _STRING[language].match(token):
        qualifier, opening, body, closing = _parts(token, language, "norm")
        # As upstream: only a one-character body counts as a character, so '\n' is a string.
        kind = "CHAR" if language == "java" and opening == "'" and len(body) == 1 else "STR"
        mapped = body.replace(" ", "U+0020").replace(",", "U+002C")
        return kind, qualifier + opening, mapped, closing
    if _NUMBER.match(token):
        return "NUM", "", token, ""
    return None


def _normalised(token: str, language: str, allowed: Mapping[str, frozenset[str]]) -> str:
    literal = _literal(token, language)
    if literal is None:
        return token
    kind, before, mapped, after = literal
    inner = f"<{kind}_LIT:{mapped}>" if mapped in allowed[kind] else f"<{kind}_LIT>"
    return before + inner + after


def literal_allow_lists(files: Iterable[Iterable[str]], language: str) -> dict[str, list[str]]:
    """The literals that the norm variant keeps: the most frequent ones of a train split.

    Args:
        files: the train split's token lists as `java_tokens` or `python_tokens` give them.
        language: `java` or `python`.

    Returns:
        `str` (at most 200), `num` (30) and `char` (30 for Java, none for Python), in mapped form (blank
        as `U+0020`, comma as `U+002C`), most frequent first: the layout of CodeXGLUE's `literals.json`.
    """
    tokens = Counter(token for file in files for token in file)
    counts: dict[str, Counter[str]] = {"STR": Counter(), "NUM": Counter(), "CHAR": Counter()}
    for token, count in tokens.items():
        literal = _literal(token, language)
        # An empty body says the same as no body, and white space would split the token.
        if literal and literal[2] and not re.search(r"\s", literal[2]):
            counts[literal[0]][literal[2]] += count
    sizes = {"STR": 200, "NUM": 30, "CHAR": 30}
    return {
        kind.lower(): sorted(counter, key=lambda text: (-counter[text], text))[: sizes[kind]]
        for kind, counter in counts.items()
    }


def plain_tokens(source: str, language: str) -> list[str]:
    """`java_tokens` or `python_tokens`, by language."""
    return java_tokens(source) if language == "java" else python_tokens(source)


def encode_tokens(
    tokens: Iterable[str], language: str, variant: str = "raw", allow: Allow | None = None
) -> list[str]:
    """One file's plain tokens as CodeXGLUE has them, from `<s>` to `</s>`.

    Args:
        tokens: what `plain_tokens` gave.
        language: `java` or `python`.
        variant: `raw` or `norm`.
        allow: the literals that `norm` keeps (`literal_allow_lists`); None keeps none.
    """
    if variant == "norm":
        allowed = {kind: frozenset((allow or {}).get(kind.lower(), ())) for kind in ("STR", "NUM", "CHAR")}
        code = [_normalised(token, language, allowed) for token in tokens]
    elif language == "java":
        # Upstream reads blank-separated lines, so literals with white space come apart.
        words = " ".join(tokens).split()
        code = [word for word in words if len(word) <= MAX_TOKEN and word not in MARKS]
    else:
        code = _single_line_ends(map(_python_raw, tokens))
    return [START, *code, END]


def codexglue_tokens(
    source: str, language: str, variant: str = "raw", allow: Allow | None = None
) -> list[str]:
    """One source file as CodeXGLUE tokens, `["<s>", ..., "</s>"]`.

    Arguments as for `encode_tokens`.

    Raises:
        ValueError: the source cannot be lexed.
    """
    return encode_tokens(plain_tokens(source, language), language, variant, allow)


_PLACEHOLDER = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def unnormalise(text: str) -> str:
    """Text with its normalised literals put back, as CodeXGLUE's line-level scoring does first.

    `<NUM_LIT>` becomes 0, `<STR_LIT>` and `<CHAR_LIT>` nothing, `<X_LIT:v>` becomes v.
    """

    def restored(match: re.Match[str]) -> str:
        kind, value = match.groups()
        return value if value is not None else "0" if kind == "NUM" else ""

    return _PLACEHOLDER.sub(restored, text)
