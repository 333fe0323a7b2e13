"""Text from tokens: whole characters, exact stops, in whatever pieces it arrives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.errors import ModelError
from cluster.messages import Emitted, Fence, Logprobs
from router.text.detokenizer import IncrementalDetokenizer
from router.text.output import ChoiceOutput
from router.text.stop_matcher import StopMatcher
from router.text.token_table import TokenTable

END = 256
TOOL = 257
HELLO = 259


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte is a token, so that any token sequence is a test of broken characters; plus three added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<|end|>"])
    built.add_tokens(["<tool>", "a b", "hello"])
    return built


@pytest.fixture(scope="module")
def table(tokenizer) -> TokenTable:
    return TokenTable(tokenizer)


def pieces_of(table: TokenTable, tokens: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(table)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


# --- detokenizer -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
def test_text_comes_back_as_it_was_and_no_piece_is_broken(tokenizer, table, text):
    tokens = tokenizer.encode(text).ids
    pieces = pieces_of(table, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) or "\N{REPLACEMENT CHARACTER}" in text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 259)))
def test_any_tokens_give_what_the_tokenizer_gives(tokenizer, table, tokens):
    so_far = ""
    detokenizer = IncrementalDetokenizer(table)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for token in tokens:
        so_far += detokenizer.push(token)
        assert whole.startswith(so_far)
    assert so_far + detokenizer.flush() == whole


def test_half_a_character_waits_for_its_other_half(tokenizer, table):
    tokens = tokenizer.encode("a👩‍🚀").ids
    assert pieces_of(table, tokens)[:5] == ["a", "", "", "", "👩"]
    assert pieces_of(table, tokens[:3])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_and_foreign_tokens_have_no_text(table):
    assert pieces_of(table, [HELLO, END, TOOL, 99999]) == ["hello", "", "<tool>", "", ""]


def test_sentencepiece_strips_its_first_space_only_where_the_text_stands_alone():
    vocabulary = {"<unk>": 0, "▁Paris": 1, "<0xC3>": 2, "<0xA9>": 3, "▁": 4}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built.decoder = decoders.Sequence(steps)
    table = TokenTable(built)
    tokens = [1, 4, 2, 3]
    assert "".join(pieces_of(table, tokens)) == built.decode(tokens) == "Paris é"
    continuing = IncrementalDetokenizer(table, strip_leading_space=False)
    assert "".join(continuing.push(token) for token in tokens) == " Paris é"


def test_a_decoder_that_looks_at_neighbours_is_refused():
    built = Tokenizer(models.WordPiece(vocab={"a": 0}, unk_token="a"))
    built.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        TokenTable(built)


# --- stop strings ----------------------------------------------------------------------------------------------------


def matched(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return (text, True) if matcher.matched else (text + matcher.flush(), False)


def test_a_stop_across_pieces_is_cut_and_a_false_start_is_shown_late():
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(piece) for piece in ("one <", "/e", "n", "t> <", "/end", ">!")] == [
        "one ",
        "",
        "",
        "</ent> ",
        "",
        "",
    ]
    assert matcher.matched
    assert matched(["</end>"], ["one </en"]) == ("one </en", False)


def test_what_is_complete_first_wins_and_then_the_longer_one():
    assert matched(["abc", "b"], ["abc"]) == ("a", True)
    assert matched(["c", "bc"], ["abc"]) == ("a", True)
    assert matched(["aab"], ["aaab"]) == ("a", True)


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stops_do_not_depend_on_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert matched(stops, pieces) == expected


# --- a choice's output -----------------------------------------------------------------------------------------------


def output(table: TokenTable, stops=(), stop_token_ids=(END,)) -> ChoiceOutput:
    return ChoiceOutput(table, list(stops), stop_token_ids, continues_prompt=True)


def push(target: ChoiceOutput, tokens, logprob: float = -1.0) -> None:
    for offset, token in enumerate(tokens):
        logprobs = Logprobs(logprob, [(token, logprob), (END, float("-inf"))])
        target.push(Emitted(Fence("r", 1, 1, 1), offset, token, logprobs))


def test_every_token_counts_and_a_stop_token_has_no_text(tokenizer, table):
    choice = output(table, stop_token_ids=(HELLO,))
    tokens = [*tokenizer.encode("é").ids, HELLO]
    push(choice, tokens)
    choice.end()
    delta = choice.take()
    assert (delta.text, delta.token_ids, choice.tokens) == ("é", tokens, 3)
    assert [info.data for info in delta.infos] == ["é".encode()[:1], "é".encode()[1:], b"hello"]
    assert [info.text_offset for info in delta.infos] == [0, 0, 1]
    assert choice.take() == ("", [], [])


def test_after_a_stop_string_nothing_more_counts(tokenizer, table):
    choice = output(table, stops=["cd"])
    push(choice, tokenizer.encode("abcdef").ids)
    assert choice.stopped and choice.take().text == "ab"
    assert choice.tokens == 4
    choice.end()
    assert choice.take().text == ""


def test_the_rest_of_a_broken_character_can_complete_a_stop(tokenizer, table):
    choice = output(table, stops=["a\N{REPLACEMENT CHARACTER}"])
    push(choice, tokenizer.encode("xa👩").ids[:3])
    choice.end()
    assert choice.stopped and choice.take().text == "x"


def test_minus_infinity_has_a_number(table):
    choice = output(table)
    push(choice, [5], logprob=float("-inf"))
    (info,) = choice.take().infos
    assert info.logprob == -9999.0 and info.top[1][2] == -9999.0
