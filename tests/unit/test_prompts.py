"""Source before a cursor to tokens, and tokens behind it to source."""

import ast
import io
import random
import sysconfig
import tokenize
from pathlib import Path

import pytest

from greencode.lexing import EOL, codexglue_tokens
from greencode.prompts import read

JAVA = """\
/* Licence: don't "quote" */
package a.b;

import java.util.*;

/** A map from {@code K}; it's small. */
public final class Store<K extends Comparable<K>, V> implements Map<K, List<V>> {
    private static final int[] SIZES = {1, 2, 0x1F};
    private final Map<K, V[]> all = new HashMap<>();

    @Override @SuppressWarnings("unchecked")
    public <T> T get(K key, int... rest) throws java.io.IOException {
        if (key == null || rest.length < 3 && !(key instanceof Object)) {
            throw new IllegalStateException("no key; none {");  // why
        } else if (SIZES[0]-- > -1) {
            return (T) all.get(key)[rest.length >> 1 >>> 2];
        }
        for (int i = 0, n = rest.length; i < n; i++) {
            try { all.forEach((k, v) -> v[i] = null); } catch (Exception e) { i += 1; } finally { i--; }
        }
        do { n *= 2; } while (n < SIZES.length);
        char c = 'x', d = '\\n', q = '\\'';
        Runnable run = new Runnable() { public void run() { System.out.println(a ? b : ~c); } };
        switch (c) { case 'x': break; default: this.<K>sort(Store::new); }
        return null;
    }
}
"""

PYTHON = '''\
#!/usr/bin/env python
"""Module: it's documented."""
from . import sibling
from ..up import (a, b as c,
                  d)


class Store(dict):
    """A "store"."""

    size: int = 3

    @property
    def first(self, *args, key=None, **more) -> "str":
        # why not
        if key is None and not args:
            return self[0][1:-1, ...]
        elif key:
            raise KeyError(f"no {key}")
        else:
            pass
        for i, x in enumerate(args):
            try:
                print(-i ** 2, ~x, x @ x, x if x else -x, sep='')
            except (ValueError, TypeError) as error:
                continue
            finally:
                del x
        with open('a') as f, open("b") as g:
            lines = [line for line in f if line != b'\\n'
                     and g]
        return lambda *a, b=1: {**more, 'k': a}

    async def second(self):
        x = await self.first(1,
                             two=2)
        while True:
            x += 1 ; y = 1.5 .real
            break
        return x


def last(): return Store()
'''
SOURCES = {"java": JAVA, "python": PYTHON}


def tokens_of(source, language):
    return codexglue_tokens(source, language)[1:-1]


def fed(writer, text, step=3):
    """What a writer makes of text that comes in pieces."""
    parts = [writer.write(text[at : at + step]) for at in range(0, len(text), step)]
    return "".join([*parts, writer.close()])


def cuts(source, language):
    """(source before a cursor, its prompt, the rest of the tokens as text) for every third cursor in code."""
    full = " ".join(tokens_of(source, language))
    for at in range(0, len(source) + 1, 3):
        prompt = read(source[:at], language)
        known = prompt.text.removesuffix(f" {EOL}")
        if prompt.completable and full.startswith(known):
            yield (
                source[:at],
                prompt,
                full[len(prompt.text) :] if full.startswith(prompt.text) else full[len(known) + 6 :],
            )


@pytest.mark.parametrize("language", SOURCES)
def test_a_whole_file_gives_the_tokens_of_training(language):
    assert read(SOURCES[language].rstrip(), language).text == " ".join(tokens_of(SOURCES[language], language))


@pytest.mark.parametrize("language", SOURCES)
def test_from_any_cursor_the_rest_of_the_file_comes_back_with_the_same_tokens(language):
    source, tried = SOURCES[language], 0
    for before, prompt, rest in cuts(source, language):
        after = fed(prompt.writer, rest)
        again = tokens_of(before + after, language)
        assert again == tokens_of(source, language), before[-40:]
        if language == "python":
            tuple(tokenize.generate_tokens(io.StringIO(before + after).readline))  # no wrong indentation
        tried += 1
    assert tried > 0.2 * len(source)


@pytest.mark.parametrize("language", SOURCES)
def test_text_comes_out_alike_in_whatever_pieces(language):
    for before, prompt, rest in list(cuts(SOURCES[language], language))[::9]:
        whole = fed(prompt.writer, rest, step=len(rest) or 1)
        assert fed(read(before, language).writer, rest, step=1) == whole


def test_python_comes_back_as_it_is_usually_written():
    source = (
        "def f(a, *b, c=None, **d):\n"
        "    if a is not None and -a > 0:\n"
        "        return [x ** 2 for x in a[1:-1]]\n"
        "    else:\n"
        "        print('a', not b, sep='')\n"
        "        raise ValueError(b'x' + c.d(1, *b)[0])\n"
        "    try:\n"
        "        pass\n"
        "    except E as e:\n"
        "        return {1: 2}\n"
    )
    text = " ".join(tokens_of(source, "python")).partition(EOL)[2]
    assert "def f(a, *b, c=None, **d):" + fed(
        read("def f(a, *b, c=None, **d):", "python").writer, f" {EOL}{text}"
    ) == (source.rstrip("\n"))
    ast.parse(source)


def test_java_comes_back_as_it_is_usually_written():
    source = (
        "class A<T> extends B<C<T>> {\n"
        "    int[] x = {1, 2};\n"
        "    @Override public void f(List<? super T> a, int... b) {\n"
        "        for (int i = 0; i < a.size() && !b; i++) {\n"
        '            g((String) a[i], -1, "a b");\n'
        "        }\n"
        "        if (a >= b) {\n"
        "            return;\n"
        "        } else {\n"
        "            h(() -> B::new);\n"
        "        }\n"
        "    }\n"
        "}"
    )
    text = " ".join(tokens_of(source, "java"))
    start = "class A<T>"
    assert start + fed(read(start, "java").writer, text.removeprefix("class A < T >")) == source


@pytest.mark.parametrize(
    ("language", "before", "tokens", "after"),
    [
        ("python", "x = self.na", "me ( )", "me()"),  # within a word
        ("python", "x = self.name", " ( )", "()"),
        ("python", "return", " x", " x"),
        ("python", "return ", " x", "x"),
        ("python", "x =", "= y", "= y"),
        ("python", "f(", "a = - 1 )", "a=-1)"),
        ("python", "x = [1,", " 2 ]", " 2]"),
        ("python", "print('hel", "lo' )", "lo')"),  # within a string
        ("python", "print('hello ", " world' )", "world')"),
        ("python", "if x:", " <EOL> pass <EOL>", "\n    pass\n"),
        ("python", "if x:\n", " pass", "    pass"),
        ("python", "if x:\n  ", " pass", "pass"),
        ("python", "if x:\n\ty = 1\n\t", " z = 2 <EOL> w", "z = 2\n\tw"),
        ("python", "  if x:\n    y()\n    ", " return <EOL> else : <EOL> z", "return\n  else:\n    z"),
        ("python", "class A:\n    def f(self):\n        x()\n", " def g", "    def g"),
        ("python", "def f():\n    x()\n\n\n", " def g", "def g"),
        ("python", "x = 1  # count", " y", "\ny"),  # in a comment: on the next line
        ("python", "f(a,\n", " b )", "    b)"),
        ("python", "x = 1", " <EOL> y = 'never clo", "\ny ="),  # a string that does not end is left out
        ("python", "x = 1", " <EO", ""),
        ("python", "x if'a", "b' else y", "b' else y"),  # `if` is no prefix of a string
        ("java", "list.ad", "d ( x ) ; }", "d(x);\n}"),
        ("java", "    int x;", " int y ; int z", "\n    int y;\n    int z"),
        ("java", "void f() {", " } void g", "}\nvoid g"),
        ("java", "void f() {\n    ", " x ( ) ; } }", "x();\n}\n}"),
        ("java", "if (a", " > > 2 ) b", " >> 2) b"),
        ("java", "foo(); // then", " bar ( ) ;", "\nbar();"),
        ("java", 's = "a', ' b" + c', ' b" + c'),
        ("java", "char c = ", " 'x' ; char d = '", "'x';\nchar d ="),
        ("java", "Map<String,", " List < X > > m ;", " List<X>> m;"),
        ("java", "", " import a . b ; class C", "import a.b;\nclass C"),
    ],
)
def test_a_completion_fits_behind_the_cursor(language, before, tokens, after):
    assert fed(read(before, language).writer, tokens) == after


@pytest.mark.parametrize(
    ("language", "source", "text"),
    [
        ("python", "    x = 1\n  y = 2\nz", f"x = 1 {EOL} y = 2 {EOL} z"),  # indentation of nothing known
        ("python", "a)]\nb = (1,\n", f"a ) ] {EOL} b = ( 1 , {EOL}"),
        ("python", "the text of a docstring.\n'''\nx = 1\n", f"x = 1 {EOL}"),
        ("python", 'isn\'t it so that\n"""\nx = 1', "x = 1"),
        ("python", "x = 'it\ny = 2\n", f"y = 2 {EOL}"),  # a line that is no code
        ("python", "x = 1 \\\n", "x = 1"),
        ("python", "x = '''a\nb'''\ny", f"x = {EOL} y"),
        ("python", "s = 'longer than fifteen characters'\n", f"s = '' {EOL}"),
        ("python", "x if'ab", "x if 'ab"),
        ("python", "x = Rb'ab", "x = Rb'ab"),
        ("python", "x = '\ue000', 'b'", "x = '' , 'b'"),
        ("python", "", ""),
        ("java", " * of a comment\n */\nint x;", "int x ;"),
        ("java", "int # y;\nint x;", "int x ;"),
        ("java", 'glob("**/*.java"); x', 'glob ( "**/*.java" ) ; x'),
        ("java", "int x; /* open", "int x ;"),
    ],
)
def test_odd_beginnings_and_ends_are_read(language, source, text):
    assert read(source, language).text == text


@pytest.mark.parametrize(
    ("language", "source"),
    [("python", 'def f():\n    """Return '), ("java", "/** Returns "), ("python", "r'''a")],
)
def test_prose_is_not_completed(language, source):
    assert not read(source, language).completable


def test_normalised_literals_go_both_ways():
    allow = {"str": ["a", "U+002C"], "num": ["0"]}
    prompt = read("f('a', 'secret', 0, 1, ", "python", "norm", allow)
    assert prompt.text == "f ( '<STR_LIT:a>' , '<STR_LIT>' , <NUM_LIT:0> , <NUM_LIT> ,"
    after = fed(prompt.writer, " '<STR_LIT:U+002C>' , <NUM_LIT> , '<STR_LIT>' ) <EOL> x = <NUM_L")
    assert after == "',', 0, '')\nx ="
    assert fed(read("x = ", "python", "norm", allow).writer, " <NUM_LIT:") == ""  # half a placeholder


def test_nothing_is_an_error():
    rng = random.Random(0)
    alphabet = "ab1.( )[]{}<>:;,=+-*/\\\"'#\n\t \ufffd\u00e9\ue000@"
    for _ in range(2000):
        source, tokens = ("".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(2))
        for language in SOURCES:
            fed(read(source, language).writer, tokens + rng.choice(["", f" {EOL}", " x"]))


@pytest.mark.slow
def test_the_standard_library_goes_both_ways():
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rng, tried = random.Random(0), 0
    for path in files:
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            full = " ".join(tokens_of(source, "python"))
        except ValueError:
            continue
        for _ in range(5):
            before = source[: rng.randrange(len(source))]
            prompt = read(before, "python")
            if not prompt.completable or not full.startswith(prompt.text):
                continue
            rest = full[len(prompt.text) :].split(" ")[: rng.randrange(1, 40)]
            after = fed(prompt.writer, " ".join(rest))
            again = read(before + after, "python").text.removesuffix(f" {EOL}")
            assert full.startswith(again), path
            tried += 1
    assert tried > 300
