import pytest

from greencode.lexing import (
    codexglue_tokens,
    encode_tokens,
    java_tokens,
    literal_allow_lists,
    python_tokens,
    unnormalise,
)


def spaced(source: str) -> str:
    return " ".join(java_tokens(source))


@pytest.mark.parametrize(
    ("source", "tokens"),
    [
        ("int a=1; // one\n/* two\n ** */ int b;", "int a = 1 ; int b ;"),
        ("/**/int/***/a;", "int a ;"),
        ("x // comment at the end", "x"),
        ("Map<A,List<B>> m", "Map < A , List < B > > m"),
        ("a >>> b >> c", "a > > > b > > c"),
        ("a >>= b; a >>>= c; a <<= d; a >= e; a << f", "a >>= b ; a >>>= c ; a <<= d ; a >= e ; a << f"),
        ("@Override @interface A", "@ Override @ interface A"),
        ("f(int... a)", "f ( int ... a )"),
        ("x->x::y", "x -> x :: y"),
        ("a+++b---c&&d||!e", "a ++ + b -- - c && d || ! e"),
        ("a!=b==c<=d^~e%=f|=g&=h^=i", "a != b == c <= d ^ ~ e %= f |= g &= h ^= i"),
        ("a?b:c/d*=e/=f", "a ? b : c / d *= e /= f"),
        ("true false null", "true false null"),
        ("$a _b a1 größe a€", "$a _b a1 größe a€"),
        (r"caf\u00e9 = 1", r"caf\u00e9 = 1"),
        ("a.b[0].c()", "a . b [ 0 ] . c ( )"),
    ],
)
def test_java_boundaries(source, tokens):
    assert spaced(source) == tokens


@pytest.mark.parametrize(
    "number",
    [
        "0",
        "1L",
        "1_000l",
        "0x1F",
        "0XFFFF_FFFFL",
        "0b1010",
        "0B1_1L",
        "017",
        "08",
        "1.5",
        "1.",
        ".5",
        ".5f",
        "1e10",
        "1E-3",
        "1.e+5d",
        "2f",
        "3D",
        "0x1.8p3",
        "0x.8P-2f",
        "0x1p+3",
    ],
)
def test_a_java_number_is_one_token(number):
    assert java_tokens(f"({number});") == ["(", number, ")", ";"]


@pytest.mark.parametrize(
    "literal",
    [
        '""',
        '"a b"',
        r'"a \" b"',
        r'"\\"',
        '"// no comment"',
        "'x'",
        r"'\''",
        r"'\u0020'",
        "'\"'",
        '"""\n  a "quoted" b\n  """',
        '"""  \n  \\""" \\\n  """',
    ],
)
def test_a_java_literal_is_one_token_as_written(literal):
    assert java_tokens(f"f({literal})") == ["f", "(", literal, ")"]


@pytest.mark.parametrize(
    "source", ['x = "abc', 'x = "abc\n";', "'a", "/* never closed", "/*/", "a # b", "`a`", "a ² b", "\\ n"]
)
def test_unlexable_java_is_a_value_error(source):
    with pytest.raises(ValueError, match="line 1: no Java token"):
        java_tokens(source)


def test_unlexable_java_names_the_line():
    with pytest.raises(ValueError, match="line 3"):
        java_tokens("class A {\n\n#}")


def test_python_line_ends_are_never_first_last_or_doubled():
    source = "# comment\n\n\nx = 1  # one\n\n\n# two\nif x:\n\n    y(\n        2)\n\n\n"
    assert " ".join(python_tokens(source)) == "x = 1 <EOL> if x : <EOL> y ( <EOL> 2 )"


def test_python_without_a_last_line_break_or_with_foreign_ones():
    assert python_tokens("x") == ["x"]
    assert python_tokens("x\r\ny\rz\n") == ["x", "<EOL>", "y", "<EOL>", "z"]


@pytest.mark.parametrize("source", ["", "\n\n", "# nothing\n"])
def test_an_empty_python_file_has_no_tokens(source):
    assert python_tokens(source) == []
    assert codexglue_tokens(source, "python") == ["<s>", "</s>"]


def test_white_space_in_a_python_string_becomes_one_blank():
    assert python_tokens("x = '''a\n   b\t c'''\n") == ["x", "=", "'''a b c'''"]


@pytest.mark.parametrize(
    ("source", "token"),
    [
        ("f'a {b} c'", "f'a {b} c'"),
        ('rf"{a!r:>{width}}"', 'rf"{a!r:>{width}}"'),
        ('f"""a\n  {b}\n  c"""', 'f"""a {b} c"""'),
        ("f'größe {a}'", "f'größe {a}'"),
        ("f'{{a}}'", "f'{{a}}'"),
    ],
)
def test_an_f_string_is_one_token(source, token):
    assert python_tokens(f"x = {source} + 1\n") == ["x", "=", token, "+", "1"]


@pytest.mark.parametrize("source", ["x = (\n", "x = '''abc\n", "if x:\n        a\n    b\n"])
def test_python_that_tokenize_refuses_is_a_value_error(source):
    with pytest.raises(ValueError, match="no Python"):
        python_tokens(source)


def raw_python(source: str) -> list[str]:
    return codexglue_tokens(source, "python")[1:-1]


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("'12345678901234'", ["'12345678901234'"]),  # 14 characters are kept
        ("'123456789012345'", ["''"]),
        ('rb"123456789012345"', ['rb""']),
        ("u'a b'", ["u'a b'"]),
        ("''", ["''"]),
        ("'''a'''", []),
        ('"""a"""', []),
        ("r'''a'''", []),
        (f"'{'a' * 98}'", ["''"]),  # 100 characters with the quotes
        (f"'{'a' * 99}'", []),
        ("R'abc'", ["R'abc'"]),
        ("R'abcdefghijklmn'", []),  # upstream knows only small qualifiers
        ("'<s>'", ["''"]),
        ("'a <EOL>'", ["''"]),
        ("1" * 49, ["1" * 49]),
        ("1" * 50, []),
        ("a" * 100, ["a" * 100]),
        ("a" * 101, []),
    ],
)
def test_raw_python_literals(literal, expected):
    assert raw_python(f"x = {literal}\n") == ["x", "=", *expected]


def test_a_dropped_docstring_leaves_no_doubled_line_end():
    assert raw_python('"""Doc."""\nx = 1\n\n"""More."""\ny\n') == ["x", "=", "1", "<EOL>", "y"]


def test_raw_java_literals_come_apart_at_white_space():
    assert codexglue_tokens('f("a  b\tc", \' \');', "java") == [
        "<s>", "f", "(", '"a', "b", 'c"', ",", "'", "'", ")", ";", "</s>",
    ]  # fmt: skip


def test_raw_java_text_block_comes_apart_too():
    assert codexglue_tokens('"""\n a\n b"""', "java") == ["<s>", '"""', "a", 'b"""', "</s>"]


def test_raw_java_drops_long_tokens_and_marks():
    long, longest = "a" * 101, "a" * 100
    assert codexglue_tokens(f'{long} {longest} "x <s> </s> <EOL> <pad> y"', "java") == [
        "<s>", longest, '"x', 'y"', "</s>",
    ]  # fmt: skip


ALLOW = {"str": ["utf-8", "aU+0020b", "U+002C", "\\n"], "num": ["0", "1.0f"], "char": ["x", "U+0020"]}


def norm(source: str, language: str) -> list[str]:
    return codexglue_tokens(source, language, "norm", ALLOW)[1:-1]


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ('"utf-8"', '"<STR_LIT:utf-8>"'),
        ('"other"', '"<STR_LIT>"'),
        ('"a b"', '"<STR_LIT:aU+0020b>"'),
        ('","', '"<STR_LIT:U+002C>"'),
        ("'x'", "'<CHAR_LIT:x>'"),
        ("' '", "'<CHAR_LIT:U+0020>'"),
        ("'y'", "'<CHAR_LIT>'"),
        (r"'\n'", r"'<STR_LIT:\n>'"),
        (r"'\t'", "'<STR_LIT>'"),
        ('"x"', '"<STR_LIT>"'),
        ("0", "<NUM_LIT:0>"),
        ("1.0f", "<NUM_LIT:1.0f>"),
        ("0x0", "<NUM_LIT>"),
        (".5", "<NUM_LIT>"),
        ("true", "true"),
        ("null", "null"),
        ('"""\n a\n"""', '"""<STR_LIT>"""'),
    ],
)
def test_norm_java_literals(literal, expected):
    assert norm(f"f({literal});", "java") == ["f", "(", expected, ")", ";"]


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("'utf-8'", "'<STR_LIT:utf-8>'"),
        ("'x'", "'<STR_LIT>'"),
        ("Rb'utf-8'", "Rb'<STR_LIT:utf-8>'"),
        ('"""Doc."""', '"""<STR_LIT>"""'),
        ("''", "'<STR_LIT>'"),
        ("f'{a} b'", "f'<STR_LIT>'"),
        ("0", "<NUM_LIT:0>"),
        ("1e5", "<NUM_LIT>"),
        ("None", "None"),
    ],
)
def test_norm_python_literals(literal, expected):
    assert norm(f"x = {literal}\n", "python") == ["x", "=", expected]


def test_norm_without_allow_lists_keeps_no_literal():
    assert codexglue_tokens('f("utf-8", 0)', "java", "norm")[3:6] == ['"<STR_LIT>"', ",", "<NUM_LIT>"]


def test_a_lone_quote_is_no_string():
    assert encode_tokens(["'", "a"], "python", "norm") == ["<s>", "'", "a", "</s>"]


def test_allow_lists_hold_the_most_frequent_literals_in_mapped_form():
    files = [
        java_tokens('f("b", "b", "a b", \'x\', \',\', 1, 1, 2, "", "a\tb")'),
        java_tokens('"b" "a b" "c"'),
    ]
    assert literal_allow_lists(files, "java") == {
        "str": ["b", "aU+0020b", "c"],
        "num": ["1", "2"],
        "char": ["U+002C", "x"],
    }


def test_allow_lists_are_limited_and_ties_are_ordered():
    source = " ".join(f'"s{i:03d}" {i} {chr(0x4E00 + i)!r}' for i in range(300))
    allow = literal_allow_lists([java_tokens(source)], "java")
    assert {kind: len(values) for kind, values in allow.items()} == {"str": 200, "num": 30, "char": 30}
    assert allow["str"][:2] == ["s000", "s001"]
    assert literal_allow_lists([python_tokens("x = 'a', 1\n")], "python") == {
        "str": ["a"],
        "num": ["1"],
        "char": [],
    }


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("x = <NUM_LIT> ;", "x = 0 ;"),
        ("x = <NUM_LIT:42> ;", "x = 42 ;"),
        ('f ( "<STR_LIT>" , "<STR_LIT:utf-8>" )', 'f ( "" , "utf-8" )'),
        ("'<CHAR_LIT>' '<CHAR_LIT:a>'", "'' 'a'"),
        ('"<STR_LIT:>>"', '">"'),
        ("a < STR_LIT > b", "a < STR_LIT > b"),
    ],
)
def test_unnormalise(text, plain):
    assert unnormalise(text) == plain
