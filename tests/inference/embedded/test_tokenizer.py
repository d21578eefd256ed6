from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inference.embedded.model import for_transformers
from inference.embedded.template import SPECIAL_TOKENS, SYSTEM_PROMPT
from inference.embedded.tokenizer import VOCABULARY, load_tokenizer
from inference.embedded.windows import Encoder, fresh_conversation


def test_any_text_survives_the_round_trip(encoder: Encoder) -> None:
    @settings(deadline=None, max_examples=300)
    @given(st.text())
    def check(text: str) -> None:
        if not any(token in text for token in SPECIAL_TOKENS):
            assert encoder.decode(encoder.encode(text)) == text

    check()


def test_digits_are_single_tokens(tokenizer_file: Path) -> None:
    tokens = load_tokenizer(tokenizer_file).encode("call 471-8935 at 14:30").tokens
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("47189351430")
    assert not [t for t in load_tokenizer(tokenizer_file).get_vocab() if sum(c.isdigit() for c in t) > 1]


def test_a_name_is_the_same_tokens_wherever_it_stands(encoder: Encoder) -> None:
    """Otherwise "Velmar lives in Rome" could not be found by "Where does Velmar live?"."""
    for name in ("Velmar", "Anna", "Trouka"):
        ids = encoder.encode(name)
        for text in (f"{name} lives", f"is {name}?", f"({name})", f"my sister {name}'s", f"\n{name}."):
            found = encoder.encode(text)
            assert any(found[i : i + len(ids)] == ids for i in range(len(found))), text


def test_vocabulary(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert [tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_the_template_gives_the_tokens_that_were_trained_on(encoder: Encoder, tokenizer_file: Path) -> None:
    fast = for_transformers(load_tokenizer(tokenizer_file))
    for seed in range(5):
        conversation = fresh_conversation(f"template/{seed}", 512, encoder.count, "training")
        messages = [{"role": "system", "content": conversation.system}]
        for turn in conversation.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        text = fast.apply_chat_template(messages, tokenize=False)
        assert fast(text, add_special_tokens=False).input_ids == encoder.conversation(conversation).ids


def test_a_rendered_answer_is_the_generated_one(tokenizer_file: Path) -> None:
    """The next prompt begins with the last one and its answer, to the character, whatever the answer's edges."""
    fast = for_transformers(load_tokenizer(tokenizer_file))
    messages = [{"role": "user", "content": "  I live in Rome. \n"}]
    for answer in ("Noted: you live in Rome.", " \n edges  ", "", "é漢\u00a0"):
        prompt = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "\tWhere? "}]
        following = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert following.startswith(f"{prompt}{answer}<|end|><|user|>\tWhere? <|end|>")


def test_the_system_prompt_is_there_unless_another_is_given(tokenizer_file: Path) -> None:
    fast = for_transformers(load_tokenizer(tokenizer_file))
    user = {"role": "user", "content": "Hi"}
    assert fast.apply_chat_template([user], tokenize=False) == f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>Hi<|end|>"
    other = [{"role": "system", "content": " Be brief. "}, user]
    assert fast.apply_chat_template(other, tokenize=False) == "<|system|> Be brief. <|end|><|user|>Hi<|end|>"


def test_saved_and_loaded_by_transformers(tokenizer_file: Path, tmp_path: Path) -> None:
    fast = for_transformers(load_tokenizer(tokenizer_file))
    fast.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = fast.apply_chat_template([{"role": "user", "content": "My code is 4711, Anna."}], tokenize=False)
    assert loaded.chat_template == fast.chat_template
    assert loaded(text).input_ids == fast(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
