"""Source in an editor to the CodeXGLUE tokens a model knows, and its completion back to source.

Models are trained on tokens joined by blanks, without comments, docstrings (raw variant) or layout
(`greencode.lexing`). `read` turns the text before the cursor into such tokens, whatever state it is in:
it may begin within a comment or block and end within a word, a string or a bracket. A `Writer` turns the
tokens of a completion into source that fits behind the cursor, as they come.

What tokens do not hold must be guessed on the way back: spaces after the usual styles, line breaks in
Java after `;`, `{` and `}`, indentation in Python from the lines before and from words such as `return`
and `else`. The tokens are never changed by it: lexed again, prompt and completion give the same ones.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Set
from dataclasses import dataclass

from greencode.lexing import EOL, Allow, encode_tokens, plain_tokens, unnormalise

_PIECES = {
    "python": re.compile(
        r"""
          (?P<comment>\#[^\n]*)
        | (?P<string>(?:\b[bfrtu]{1,2})?(?: '{3}(?:[^\\]|\\.)*?'{3} | "{3}(?:[^\\]|\\.)*?"{3}
                                      | '(?!'')(?:[^'\\\n]|\\.)*' | "(?!"")(?:[^"\\\n]|\\.)*" ))
        | (?P<block>(?:\b[bfrtu]{1,2})?(?:'{3}|"{3}))
        | (?P<open>(?:\b[bfrtu]{1,2})?['"])[^\n]*\Z
        """,
        re.VERBOSE | re.DOTALL | re.IGNORECASE,
    ),
    "java": re.compile(
        r"""
          (?P<comment>//[^\n]*|/\*.*?\*/)
        | (?P<string>"{3}[ \t]*\n(?:[^\\]|\\.)*?"{3} | '(?:[^'\\\n]|\\.)*' | "(?!"")(?:[^"\\\n]|\\.)*")
        | (?P<block>/\*)
        | (?P<open>"{3}[ \t]*\n|['"](?=[^\n]*\Z)).*\Z
        """,
        re.VERBOSE | re.DOTALL,
    ),
}
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_GOES_ON = re.compile(r"[\w$+*/%&|^<>=!:.-]\Z")


@dataclass(frozen=True)
class Prompt:
    """The text before the cursor as the model reads it.

    Attributes:
        text: CodeXGLUE tokens joined by one blank; the last may be incomplete.
        writer: turns the completion into source.
        completable: False within a docstring or block comment, of which the model knows nothing.
    """

    text: str
    writer: Writer
    completable: bool = True


def read(source: str, language: str, variant: str = "raw", allow: Allow | None = None) -> Prompt:
    """Prompt of the source before a cursor.

    Lines that cannot be lexed are left out; nothing is an error.

    Args:
        source: any text, at best the beginning of a file up to the cursor.
        language: `java` or `python`.
        variant: `raw` or `norm`, as the model was trained.
        allow: the literals that `norm` keeps.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n").replace(_MARK, "")
    source = _without_open_start(source, language)
    code, strings, end, tail = _scan(source, language)
    if end == "comment":
        code += "\n"
    if language == "python":
        code = re.sub(r"\\\n[ \t]*\Z", " ", code)
    tokens = encode_tokens(_lexed(code, strings, language), language, variant, allow)[1:-1]
    if language == "python" and tokens and tokens[-1] != EOL and _blank_tail(code).startswith("\n"):
        tokens.append(EOL)
    # The token that the cursor touches may go on, unless it is a placeholder, a string or a bracket.
    touched = tokens[-1] if tokens and code.endswith(tokens[-1]) and _GOES_ON.search(tokens[-1]) else ""
    unfinished = tail or touched
    if touched and not tail:
        tokens.pop()
    make = PythonWriter if language == "python" else JavaWriter
    writer = make(code.replace(_MARK, '""'), tokens, unfinished, variant, new_line=end == "comment")
    return Prompt(" ".join([*tokens, *unfinished.split()]), writer, end != "block")


def _without_open_start(source: str, language: str) -> str:
    """The source after a comment or docstring that it begins within.

    An editor sends the last lines that fit, from wherever that is.
    """
    if language == "java":
        return re.sub(r"\A(?:(?!/\*|\").)*?\*/", "", source, count=1, flags=re.DOTALL)
    quotes = re.search(r"'{3}|\"{3}", source)
    if not quotes:
        return source
    head = _PIECES["python"].sub(" ", source[: quotes.start()])
    for first, second in re.findall(r"\b([A-Za-z_]\w*)(?=[ \t]+([A-Za-z_]\w*))", head):
        # Two words side by side, neither of them a keyword, are prose.
        if not any(map(_is_python_keyword, (first, second))):
            return source[quotes.end() :]
    return source


def _is_python_keyword(word: str) -> bool:
    return word in keyword.kwlist or word in keyword.softkwlist or word in ("print", "exec")


def _scan(source: str, language: str) -> tuple[str, list[str], str, str]:
    """Source without comments, its strings each replaced by a mark, how it ends, and an open string.

    Marks keep brackets and line ends within strings out of sight. The end is `code`, `comment` (of one
    line), `block` (a docstring or block comment) or `string`.
    """
    parts, strings, at = [], [], 0
    end, tail = "code", ""
    for match in _PIECES[language].finditer(source):
        parts.append(source[at : match.start()])
        at = match.end()
        kind = match.lastgroup
        if kind == "string":
            strings.append(match.group())
            parts.append(_MARK)
        elif kind == "comment":
            block = match.group().startswith("/*")
            parts.append(" " if block else "")
            if at == len(source) and not block:
                end = "comment"
        else:
            end, tail = ("string", match.group()) if kind == "open" else ("block", "")
            at = len(source)
            break
    parts.append(source[at:])
    return "".join(parts), strings, end, tail


_MARK = "\ue000"  # of Unicode's private use area


def _blank_tail(code: str) -> str:
    """Where code ends: from the last line end that only blanks follow; empty if code follows it."""
    return code[len(code.rstrip()) :].lstrip(" \t")


def _lexed(code: str, strings: list[str], language: str) -> list[str]:
    """Plain tokens of code that may have open brackets; lines that cannot be lexed are left out."""
    lines = [line.lstrip() for line in code.split("\n")] if language == "python" else code.split("\n")
    known = iter(strings)
    texts = [re.sub(_MARK, lambda _: next(known), line) for line in lines]
    for at, line in enumerate(lines):
        if "'" in line or '"' in line:  # a quote that its line does not close
            lines[at] = texts[at] = ""
    try:
        return _with_brackets("\n".join(texts), "\n".join(lines), language)
    except ValueError:
        tokens: list[str] = []
        for text, line in zip(texts, lines, strict=True):
            try:
                found = _with_brackets(text, line, language)
            except ValueError:
                continue
            tokens += [*found, EOL] if found and language == "python" else found
        return tokens


def _with_brackets(text: str, masked: str, language: str) -> list[str]:
    """Tokens of text whose brackets need not match: what is missing is added, and taken off again."""
    if language == "java":
        return plain_tokens(text, language)
    opened: list[str] = []
    missing: list[str] = []
    for bracket in re.findall(r"[()\[\]{}]", masked):
        if bracket in _CLOSER:
            opened.append(bracket)
        elif opened:
            opened.pop()
        else:
            missing.append(next(a for a, b in _CLOSER.items() if b == bracket))
    before = "".join(reversed(missing))
    after = "".join(_CLOSER[bracket] for bracket in reversed(opened))
    tokens = plain_tokens(f"{before}{text}{after}", language)
    return tokens[len(before) : len(tokens) - len(after)]


_WORD = re.compile(
    r"""(?: "{3}.*?"{3} | '{3}.*?'{3} | "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | [^\s"'] )+""",
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = "+-*/%&|^<>=!"


class Writer:
    """Source of a completion, token by token; made by `read`.

    `write` takes text as the model's tokenizer gives it and returns the source of all tokens that are
    certainly complete; `close` returns the rest. A string that is still open then is left out: the code
    would not be well-formed.
    """

    def __init__(self, code: str, tokens: list[str], unfinished: str, variant: str, new_line: bool) -> None:
        """
        Args:
            code: the source before the cursor, without comments and with empty strings.
            tokens: its complete tokens.
            unfinished: what the cursor touches of a token that may go on, as written.
            variant: as for `read`.
            new_line: begin on a new line, because the cursor is in a comment.
        """
        self._normalised = variant == "norm"
        # An unfinished token is read again with what the model adds, less what is there already.
        self._buffer = " ".join(unfinished.split())
        self._there = len(self._buffer)
        self._blank_there = unfinished[-1:].isspace()
        self._spaced = (
            code[-1:] in (" ", "\t") and not unfinished and bool(code[code.rfind("\n") + 1 :].strip())
        )
        self._new_line = "\n" if new_line else ""
        self._brackets: list[str] = []
        self._tight = False
        self._prev = ""
        for token in tokens:
            self._note(token)
        self.unit = _unit(code)
        self._arrive(code)

    def write(self, text: str) -> str:
        """Source of the tokens that `text` completes."""
        if text and self._blank_there:
            text, self._blank_there = text.removeprefix(" "), False
            self._buffer += " "
            self._there += 1
        self._buffer += text
        return self._drain(final=False)

    def close(self) -> str:
        """Source of what was held back."""
        return self._drain(final=True)

    def _drain(self, final: bool) -> str:
        out = ""
        while word := self._next_word(final):
            space = self._space(word)
            self._note(word)
            if self._there:
                out += self._restored(word)[self._there :]
            else:
                if self._spaced and space == " ":
                    space = ""
                out += self._new_line + space + self._restored(word)
                self._new_line, self._spaced = "", False
            self._there = 0
        return out

    def _next_word(self, final: bool) -> str:
        """Take the next word off the buffer if it is complete, else nothing."""
        buffer = self._buffer.lstrip()
        match = _WORD.match(buffer)
        end = match.end() if match else 0
        if buffer[end : end + 1] in ("'", '"') and f" {EOL}" in buffer[end:]:
            end = buffer.index(f" {EOL}", end)  # a quote that nothing closes: as it is
        word = buffer[:end]
        if end == len(buffer) and word != EOL:
            # It may go on. At the end half a placeholder or mark is no code.
            if not final or re.fullmatch(r"<[A-Z_]+(:[^>]*)?", word):
                return ""
        elif end < len(buffer) and not buffer[end].isspace():
            return ""
        self._buffer = buffer[end:]
        return word

    def _restored(self, word: str) -> str:
        if word == EOL:
            return ""
        if not self._normalised:
            return word
        return unnormalise(word).replace("U+0020", " ").replace("U+002C", ",")

    def _space(self, word: str) -> str:
        """White space before a word."""
        raise NotImplementedError

    def _note(self, word: str) -> None:
        """Take notice of a word: brackets, and whether the next one keeps close."""
        if word in _CLOSER:
            self._brackets.append(word)
        elif word in (")", "]", "}") and self._brackets:
            self._brackets.pop()
        self._prev = word

    def _arrive(self, code: str) -> None:
        """Learn the layout at the cursor; the words before it have been noticed."""
        raise NotImplementedError

    def _inside(self, bracket: str) -> bool:
        return self._brackets[-1:] == [bracket]

    def _merges(self, word: str) -> bool:
        """Whether two operators would become one without a blank."""
        return self._prev[-1:] == word[0] and word[0] in _OPERATORS


def _unit(code: str) -> str:
    """One step of indentation, after the lines before the cursor."""
    indents = re.findall(r"^([ \t]+)\S", code, re.MULTILINE)
    if any(indent.startswith("\t") for indent in indents):
        return "\t"
    return "  " if min(map(len, indents), default=4) == 2 else "    "


def _indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _is_operand(word: str, keywords: Set[str]) -> bool:
    """Whether a value can end with this token."""
    if word in (")", "]", "}"):
        return True
    return bool(word) and word not in keywords and (word[-1].isalnum() or word[-1] in "_$\"'")


_PYTHON_WORDS = frozenset(keyword.kwlist) - {"None", "True", "False"}
_ENDS_BLOCK = ("return", "raise", "break", "continue", "pass")
_DEFINES = ("def", "class", "async", "@")
_AFTER = {
    "elif": ("if", "elif"),
    "else": ("if", "elif", "for", "while", "try", "except", "async"),
    "except": ("try", "except"),
    "finally": ("try", "except", "else"),
    **dict.fromkeys(_DEFINES, _DEFINES),
}


@dataclass
class _Block:
    """An open block of Python: its indentation, and the first word of its last line."""

    indent: str
    first: str = ""


class PythonWriter(Writer):
    """Blanks as in PEP 8; a line's indentation is that of an open block, or a unit more after `:`."""

    def _note(self, word: str) -> None:
        operand = _is_operand(self._prev, _PYTHON_WORDS)
        self._tight = (
            word in ("(", "[", "{", "~")
            or (word in ("+", "-", "*", "**") and not operand)
            or (word == "@" and self._prev in ("", EOL))
            or (word == "=" and self._inside("("))
            or (word == ":" and self._inside("["))
        )
        super()._note(word)

    def _space(self, word: str) -> str:
        if word == EOL:
            self._end_line(self._prev)
            return "\n"
        if self._prev in ("", EOL):
            return self._start_line(word)
        return " " if self._blank_before(word) else ""

    def _blank_before(self, word: str) -> bool:
        prev = self._prev
        if prev == ".":
            return word in _PYTHON_WORDS
        if word in (")", "]", "}", ",", ";", ":"):
            return False
        if self._tight:
            return self._merges(word)
        if word in (".", "(", "["):
            return not _is_operand(prev, _PYTHON_WORDS) or (word == "." and prev[0].isdigit())
        return not (word == "=" and self._inside("("))

    def _arrive(self, code: str) -> None:
        self._blocks = [_Block("")]
        # Whether the indentation of the line with the cursor is settled.
        self._settled = True
        self._here = ""
        *lines, here = code.split("\n")
        depth, joined, last = 0, False, ""
        for line in [*lines, here]:
            if line.strip():
                if depth == 0 and not joined:
                    self._enter(_indent_of(line))
                    self._blocks[-1].first = re.match(r"\w+|.", line.lstrip())[0]
                depth = max(0, depth + len(re.findall(r"[(\[{]", line)) - len(re.findall(r"[)\]}]", line)))
                last = line.rstrip()
                joined = last.endswith("\\")
        if here.strip():
            return
        if self._prev == EOL:
            self._end_line(last[-1:])
        if not self._brackets:
            self._settle(here, after_empty=code.endswith("\n\n") and not self._new_line)

    def _settle(self, here: str, after_empty: bool) -> None:
        """Take the blanks before the cursor for the line's indentation, if code may begin there.

        Otherwise more must come: the next deeper block's, or that of a new one after `:`.
        """
        indents = [block.indent for block in self._blocks]
        opened = not self._blocks[-1].first and len(self._blocks) > 1
        if opened and len(here) > len(indents[-2]):
            self._blocks[-1].indent = here
            self._settled = True
        elif not opened and (here in indents if here or after_empty else self._prev != EOL):
            del self._blocks[indents.index(here) + 1 :]
            self._settled = True
        elif not opened and here:
            del self._blocks[next((n for n, i in enumerate(indents) if i.startswith(here)), 0) + 1 :]
            self._settled = not self._blocks[-1].indent.startswith(here)
        self._here = here

    def _enter(self, indent: str) -> None:
        """Make `indent` that of the innermost block, closing deeper ones."""
        width = len(indent.expandtabs())
        while len(self._blocks) > 1 and len(self._blocks[-1].indent.expandtabs()) > width:
            self._blocks.pop()
        if len(self._blocks[-1].indent.expandtabs()) < width:
            self._blocks.append(_Block(indent))

    def _end_line(self, last: str) -> None:
        """Where the next line belongs, unless its first word says otherwise."""
        self._settled = False
        if self._brackets:
            return
        if last == ":":
            self._blocks.append(_Block(self._blocks[-1].indent + self.unit))
        elif self._blocks[-1].first in _ENDS_BLOCK and len(self._blocks) > 1:
            self._blocks.pop()

    def _start_line(self, word: str) -> str:
        """Indentation of a line that begins with `word`."""
        blocks = self._blocks
        if self._brackets:
            return "" if self._settled else blocks[-1].indent + ("" if word in (")", "]", "}") else self.unit)
        here, self._here = self._here, ""
        if not self._settled and blocks[-1].first:
            fitting = [
                n for n in range(len(blocks)) if self._fits(word, n) and blocks[n].indent.startswith(here)
            ]
            if fitting:
                del blocks[fitting[-1] + 1 :]
        blocks[-1].first = word
        return "" if self._settled else blocks[-1].indent.removeprefix(here)

    def _fits(self, word: str, n: int) -> bool:
        """Whether a line that begins with `word` is likely to belong to the n-th open block."""
        if word in _DEFINES and n and self._blocks[n - 1].first == "class":
            return True
        return self._blocks[n].first in _AFTER.get(word, ())


_JAVA_WORDS = frozenset(
    """
    abstract assert break case catch class const continue default do else enum extends final finally for goto
    if implements import instanceof interface native new package private protected public return static
    strictfp switch synchronized throw throws transient try volatile while yield
    """.split()  # noqa: SIM905
)
_NO_CALL = _JAVA_WORDS - {"class", "new", "enum"}
_BEFORE_TYPE_PARAMETERS = ("abstract", "default", "final", "private", "protected", "public", "static")
_AFTER_BLOCK = ("else", "catch", "finally", ")", "]", ";", ",", ".")
_LIST, _TYPES = "={", "<"  # brackets of an array's values, of type arguments


class JavaWriter(Writer):
    """One statement per line, blocks indented, blanks as in Java's usual style."""

    _block_ended = False

    def _note(self, word: str) -> None:
        operand = _is_operand(self._prev, _JAVA_WORDS)
        self._tight = (
            word in ("(", "[", "@", "!", "~", "::", ".")
            or (word in ("+", "-", "++", "--") and not operand)
            or self._opens_types(word)
            or self._opens_list(word)
        )
        self._block_ended = word == "}" and not self._inside(_LIST)
        if word == ">" and self._inside(_TYPES):
            self._brackets.pop()
            self._prev = word
        elif self._opens_types(word) or self._opens_list(word):
            self._brackets.append(_TYPES if word == "<" else _LIST)
            self._prev = word
        else:
            while word in (")", "]", "{", "}", ";") and self._inside(_TYPES):
                self._brackets.pop()  # it was a comparison
            super()._note(word)

    def _opens_types(self, word: str) -> bool:
        """Whether `<` begins type parameters or arguments; names tell, as types begin with a capital."""
        prev = self._prev
        named = prev[:1].isupper() and (len(prev) == 1 or not prev.isupper())
        return word == "<" and (named or prev == "." or prev in _BEFORE_TYPE_PARAMETERS)

    def _opens_list(self, word: str) -> bool:
        """Whether `{` begins values, not statements."""
        return word == "{" and (self._prev in ("=", "]", "(") or self._inside(_LIST))

    def _space(self, word: str) -> str:
        prev, closes = self._prev, word == "}" and not self._inside(_LIST)
        if closes:
            self._indent = self._indent.removesuffix(self.unit)
        breaks = (
            (prev == ";" and not self._inside("("))
            or (prev == "{" and not self._inside(_LIST) and not closes)
            or (self._block_ended and word not in _AFTER_BLOCK)
            or (closes and prev not in ("", "{"))
        )
        if self._at_start:
            space = "" if self._settled else self._indent
        elif breaks:
            space = "\n" + self._indent
        else:
            space = " " if prev and self._blank_before(word) else ""
        self._at_start = False
        if word == "{" and not self._opens_list(word):
            self._indent += self.unit
        return space

    def _blank_before(self, word: str) -> bool:
        prev = self._prev
        if word in (")", "]", ",", ";", "::", "[", "...") or (
            word == "}" and (prev == "{" or self._inside(_LIST))
        ):
            return False
        if word == ".":
            return prev[0].isdigit()
        if self._tight:
            return self._merges(word)
        if word == "(":
            return prev in _NO_CALL or not (_is_operand(prev, frozenset()) or prev == ">")
        if word in ("++", "--"):
            return not _is_operand(prev, _JAVA_WORDS)
        if word == ">":
            return prev != ">" and not self._inside(_TYPES)
        return not (self._opens_types(word) and prev not in _BEFORE_TYPE_PARAMETERS)

    def _arrive(self, code: str) -> None:
        *lines, here = code.split("\n")
        last = here if here.strip() else next((line for line in reversed(lines) if line.strip()), "")
        self._indent = _indent_of(last)
        if last.rstrip().endswith("{") and self._prev == "{" and not self._inside(_LIST):
            self._indent += self.unit
        self._at_start = not here.strip()
        # Whether the indentation of the line with the cursor is settled.
        self._settled = bool(here) or not self._prev
        if self._at_start and here:
            self._indent = here
