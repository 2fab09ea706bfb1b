"""Text, tokenizer, packing and cuts."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from greencode.corpus import Record, check_record
from greencode.errors import UserError
from greencode.tokenise import Sample, cut, encode, load_tokenizer, pack, text_of, train_tokenizer

JAVA = [
    "<s>", "package", "a", ".", "b", ";", "public", "class", "Größe", "{", "int", "n_1", "=", "0x1F", ";",
    "String", "s", "=", '"a', 'b"', ";", "List", "<", "List", "<", "T", ">", ">", "x", "->", "y", ">>=", "2",
    ";", "}", "</s>",
]  # fmt: skip
PYTHON = [
    "<s>", "def", "f", "(", "x", ",", "*", "args", ")", ":", "<EOL>", "return", "x", "+", "1.5e-3", "<EOL>",
    "print", "(", "'日本 — é'", ",", '"👩‍👩‍👧"', ")", "</s>",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text_of(JAVA), text_of(PYTHON)] * 20, 400, 128, directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def test_the_examples_are_codexglue_tokens():
    check_record(Record(0, "A.java", JAVA), "java", "here")
    check_record(Record(0, "a.py", PYTHON), "python", "here")


def test_text_is_the_tokens_joined_by_one_blank_without_the_ends():
    assert text_of(["<s>", "a", "=", "1", "<EOL>", "b", "</s>"]) == "a = 1 <EOL> b"
    assert text_of(["<s>", "</s>"]) == ""


@pytest.mark.parametrize("code", [JAVA, PYTHON, ["<s>", "</s>"]])
def test_decoding_gives_the_text_back(tokenizer, code):
    ids = tokenizer(text_of(code))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text_of(code)


@example("  two  blanks \t\r\n and_e\u0301 \u200b\ufeff\x00 ! '??' .5 , a_1")
@example("x = '<s> </s>' <EOL><EOL>")
@settings(max_examples=200, deadline=None)
@given(st.text())
def test_decoding_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text


def test_tokens_stay_within_those_of_codexglue(tokenizer):
    """Every CodeXGLUE token with its blank is a pre-token of its own; frequent ones are one model token."""
    ids = tokenizer("def x <EOL> return x ; }")["input_ids"][1:]
    assert [tokenizer.decode([token]) for token in ids] == [
        "def",
        " x",
        " <EOL>",
        " return",
        " x",
        " ;",
        " }",
    ]


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) <= 400
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.model_max_length == 128


def test_training_repeats_exactly(directory, tmp_path):
    train_tokenizer([text_of(JAVA), text_of(PYTHON)] * 20, 400, 128, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=f"No usable tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_tokenizer_is_named(directory, tmp_path, share):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="No usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("batch", [1, 2, 3, 512])
def test_encode_is_the_same_in_any_batch(tokenizer, batch):
    codes = [JAVA, PYTHON, ["<s>", "</s>"], JAVA, PYTHON]
    expected = [tokenizer(text_of(code))["input_ids"] for code in codes]
    assert list(encode(tokenizer, iter(codes), batch)) == expected


def test_encode_of_nothing_is_nothing(tokenizer):
    assert list(encode(tokenizer, [])) == []


def test_pack_splits_long_files_and_lets_short_ones_share_a_block():
    blocks = pack(iter([[1, 2, 3, 4, 5], [6], [7, 8], [9, 10, 11]]), 4)
    assert blocks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]  # the tail 9 10 11 fills no block
    assert blocks.dtype == np.int32


def test_pack_of_exactly_one_block():
    assert pack([[1, 2], [3, 4]], 4).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("files", "count"), [([], 0), ([[]], 0), ([[1, 2], [3]], 3)])
def test_pack_needs_one_block(files, count):
    with pytest.raises(UserError, match=rf"Only {count} training tokens, fewer than one sequence of 4"):
        pack(files, 4)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9), st.integers(1, 7))
def test_pack_keeps_every_token_in_order_but_the_tail(files, block):
    stream = [token for file in files for token in file]
    if len(stream) < block:
        with pytest.raises(UserError):
            pack(files, block)
        return
    blocks = pack(files, block)
    assert blocks.shape[1] == block
    assert blocks.flatten().tolist() == stream[: len(stream) // block * block]


def test_cut_takes_the_first_fifth_and_the_next_tokens():
    tokens = list(range(200))
    assert cut(7, tokens, 0.2, 512, 15) == Sample(7, list(range(40)), list(range(40, 55)))


def test_cut_reads_no_more_than_the_longest_context():
    sample = cut(0, list(range(10_000)), 0.2, 512, 15)
    assert len(sample.context) == 512
    assert sample.reference == list(range(512, 527))


@pytest.mark.parametrize(
    ("length", "fraction", "new_tokens", "usable"),
    [
        (100, 0.2, 15, True),  # 20 tokens of context, the least
        (99, 0.2, 15, False),
        (75, 0.8, 15, True),  # 60 + 15 = 75, nothing to spare
        (75, 0.8, 16, False),
        (0, 0.2, 15, False),
    ],
)
def test_cut_leaves_out_files_that_are_too_short(length, fraction, new_tokens, usable):
    sample = cut(0, list(range(length)), fraction, 512, new_tokens)
    assert (sample is not None) is usable
    if usable:
        assert len(sample.context) == int(length * fraction)
        assert len(sample.reference) == new_tokens


def test_the_least_context_is_an_argument():
    assert cut(0, list(range(50)), 0.2, 512, 15, min_context=10).context == list(range(10))
    assert cut(0, list(range(50)), 0.2, 512, 15, min_context=11) is None
    assert cut(0, list(range(50)), 0.2, 5, 15, min_context=10) is None
