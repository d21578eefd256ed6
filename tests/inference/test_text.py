"""Text and tokens: nothing that was generated is ever tokenized again, and streamed text is final."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from benchmarks.random_model import byte_tokenizer
from inference.text import AnswerText, Detokenizer, prompt_tokens, render, tokenize
from protocol import ids
from protocol.errors import InvalidRequest
from protocol.messages import ChatMessage, Manifest

TOKENIZER = byte_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")
BYTE_IDS = st.lists(st.integers(0, 255), max_size=60)


def feed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[AnswerText, list[str]]:
    answer = AnswerText(TOKENIZER, stop)
    pieces = []
    for token in tokens:
        pieces.append(answer.feed(token))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    return answer, pieces


@given(st.text(max_size=40))
def test_valid_text_streams_to_itself(text: str) -> None:
    """Any text without special tokens, token by token, gives itself, and no piece ends in half a character."""
    assume(not any(special in text for special in TOKENIZER.all_special_tokens))
    answer, pieces = feed(tokenize(TOKENIZER, text).tolist())
    assert "".join(pieces) == answer.text == text


@settings(max_examples=300)
@given(BYTE_IDS)
def test_any_bytes_stream_and_end(tokens: list[int]) -> None:
    """Bytes that are no UTF-8 never stall the stream, and the pieces are the text."""
    answer, pieces = feed(tokens)
    assert "".join(pieces) == answer.text
    assert answer.token_boundary() == (len(tokens), len(answer.text))


def test_incomplete_character_is_held_back() -> None:
    tokens = tokenize(TOKENIZER, "a€").tolist()
    answer = AnswerText(TOKENIZER)
    assert [answer.feed(t) for t in tokens] == ["a", "", "", "€"]


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: words carry their space, and a character without a token is its bytes."""
    pieces = ["<unk>", "▁", "▁he", "llo", "a", "▁b", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FALLBACK = byte_fallback_tokenizer()
FALLBACK_BYTES = FALLBACK.token_to_id("<0x00>")


def detokenize(tokens: list[int]) -> str:
    detokenizer = Detokenizer(FALLBACK)
    return "".join([detokenizer.feed(token) or "" for token in tokens]) + detokenizer.flush()


@given(st.lists(st.integers(1, FALLBACK_BYTES - 1) | st.sampled_from(["日", "🙂", "x"]), max_size=12))
def test_words_with_spaces_and_fallback_bytes_are_joined_as_a_whole(parts: list[int | str]) -> None:
    """Token by token gives what decoding all of it gives: spaces and characters across tokens included."""
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [FALLBACK_BYTES + byte for byte in part.encode()]
    assert detokenize(tokens) == FALLBACK.decode(tokens)


@settings(max_examples=300)
@given(st.lists(st.integers(1, FALLBACK_BYTES + 255), max_size=30), st.integers(0, 30))
def test_text_that_later_bytes_would_change_stays_as_it_was_given(tokens: list[int], cut: int) -> None:
    """Bytes that are no UTF-8 make this decoder take back earlier text; the stream goes on and takes nothing back."""
    assert detokenize([*tokens, 2]).startswith(detokenize(tokens[:cut]).rstrip("\ufffd"))
    assert detokenize([*tokens, *[FALLBACK_BYTES + 0xFF] * 5, 2]).endswith("he")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_where_they_first_complete(text: str, stop: list[str]) -> None:
    """The answer ends before the stop string that completes first; nothing of it was streamed before."""
    answer, pieces = feed(tokenize(TOKENIZER, text).tolist(), tuple(stop))
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    if ends:
        # Tokens are single characters here, so the scan stops at the first character that completes one.
        seen = text[: min(ends)]
        expected = seen[: min(at for s in stop if (at := seen.find(s)) >= 0)]
    else:
        expected = text
    assert answer.stopped == bool(ends)
    assert "".join(pieces) == answer.text == expected


def test_boundary_lies_before_the_stop_string() -> None:
    answer, _ = feed(tokenize(TOKENIZER, "hello STOP more").tolist(), ("STOP",))
    assert answer.text == "hello "
    assert answer.token_boundary() == (6, 6)


def test_special_tokens_count_without_text() -> None:
    answer, _ = feed([*tokenize(TOKENIZER, "hi").tolist(), END])
    assert answer.text == "hi"
    assert answer.token_boundary() == (3, 2)


@given(st.text(max_size=20), BYTE_IDS, st.text(max_size=20))
def test_generated_ids_survive_the_next_turn(question: str, sampled: list[int], follow_up: str) -> None:
    """The next prompt begins with the very ids of the last turn, though its text may not encode to them."""
    first = render(TOKENIZER, [ChatMessage("user", question)])
    prompt = tokenize(TOKENIZER, first)
    answer, _ = feed(sampled)
    saved = ids.pack_tokens([*prompt.tolist(), *sampled])
    manifest = Manifest(bytes(16), bytes(16), saved, first + answer.text, (), len(prompt) + len(sampled) - 1)
    messages = [ChatMessage("user", question), ChatMessage("assistant", answer.text), ChatMessage("user", follow_up)]
    text = render(TOKENIZER, messages)
    tokens, continues = prompt_tokens(TOKENIZER, text, manifest)
    assert continues
    assert tokens.tolist() == [
        *prompt.tolist(),
        *sampled,
        *tokenize(TOKENIZER, text[len(manifest.text) :]).tolist(),
    ]


@given(BYTE_IDS, BYTE_IDS, st.text(max_size=20))
def test_another_answer_keeps_the_ids_of_the_prompt(earlier: list[int], sampled: list[int], other: str) -> None:
    """A prompt with an answer whose text does not encode to its ids is asked again: its ids are what was saved."""
    prompt_text = "question" + feed(earlier)[0].text
    prompt = [*tokenize(TOKENIZER, "question").tolist(), *earlier]
    manifest = Manifest(
        bytes(16),
        bytes(16),
        ids.pack_tokens([*prompt, *sampled]),
        prompt_text + feed(sampled)[0].text + "!",
        (),
        len(prompt) + len(sampled),
        prompt_tokens=len(prompt),
        prompt_chars=len(prompt_text),
    )
    tokens, continues = prompt_tokens(TOKENIZER, prompt_text, manifest)
    assert (tokens.tolist(), continues) == (prompt, False)
    edited = prompt_text + "?" + other
    assume(not edited.startswith(manifest.text))
    tokens, continues = prompt_tokens(TOKENIZER, edited, manifest)
    assert (tokens.tolist(), continues) == ([*prompt, *tokenize(TOKENIZER, "?" + other).tolist()], False)


def test_changed_text_is_tokenized_anew() -> None:
    manifest = Manifest(bytes(16), bytes(16), ids.pack_tokens([1, 2, 3]), "something else", (), 3)
    tokens, continues = prompt_tokens(TOKENIZER, "hello", manifest)
    assert not continues
    assert tokens.tolist() == tokenize(TOKENIZER, "hello").tolist()


def test_template_errors_are_the_callers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render(tokenizer, [ChatMessage("user", "hi")])


def test_lone_surrogates_become_replacement() -> None:
    assert tokenize(TOKENIZER, "a\ud800b").tolist() == tokenize(TOKENIZER, "a\ufffdb").tolist()
