"""The model in this repository: it is small, loads, and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference.embedded import MODEL
from inference.embedded.evaluate import NOT_TOLD_PRECISION, NOT_TOLD_RECALL, GreedyModel, score
from inference.embedded.recipe import CONTEXT
from inference.embedded.small_talk import HINT, SUGGESTION
from inference.embedded.template import CHAT_TEMPLATE
from inference.embedded.windows import Encoder, fresh_conversation
from inference.embedded.world import AnswerKind
from inference.model import load_model
from protocol.errors import ConfigError
from tests.inference.harness import Conversation, config_for, run, service


def test_it_is_small_and_whole() -> None:
    sizes = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sum(sizes.values()) <= 10_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= sizes.keys()


def test_it_passes_the_self_check_and_speaks_as_it_was_trained(tmp_path: Path) -> None:
    """Loaded as `--model embedded` loads it: the engine agrees with transformers, and the template is training's."""
    model = load_model(config_for("embedded", tmp_path / "run"))
    assert model.name == "embedded"
    assert model.max_context == CONTEXT
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert model.eos_ids == {model.tokenizer.convert_tokens_to_ids("<|end|>")}


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.model.MODEL", tmp_path / "weights")
    with pytest.raises(ConfigError, match="not in this installation"):
        load_model(config_for("embedded", tmp_path / "run"))


@pytest.mark.parametrize(("window", "conversations"), [(512, 32), (CONTEXT, 12)])
def test_it_remembers_in_fresh_conversations(window: int, conversations: int) -> None:
    """Never trained on, greedy, exact match. The bars are far below what it is held to: few questions are asked."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, use_safetensors=True).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL).backend_tokenizer)
    played = [
        fresh_conversation(f"evaluation/shipped/{i}", window, encoder.count, "training") for i in range(conversations)
    ]
    answers = GreedyModel(model, encoder)([encoder.conversation(conversation) for conversation in played])
    rows = score([t for c in played for t in c.turns], [a for said in answers for a in said])
    print({name: f"{row.right} of {row.questions}" for name, row in rows.items() if row.questions})
    recall = "recall, 1 to 512 tokens" if window == 512 else "recall, 1025 to 1900 tokens"
    bar = 0.9 if window == 512 else 0.85
    for name in (recall, AnswerKind.UPDATED, NOT_TOLD_RECALL, NOT_TOLD_PRECISION):
        assert rows[name].questions >= 20, name
        assert rows[name].rate >= bar, (name, rows[name])


def test_a_visit(tmp_path: Path) -> None:
    """Through the engine: facts told, one changed, one asked for that was never told, and something beyond it."""
    visit = {
        SUGGESTION: "Noted. Anna's relation to you: sister; Anna's city: Rome.",
        "My door code is 48213.": "Noted. Your door code: 48213.",
        "Where does Anna live?": "Anna's city: Rome.",
        "Actually, Anna moved to Oslo.": "Updated. Anna's city: Oslo.",
        "What is Anna's shoe size?": "Anna's shoe size: you have not told me.",
        "What is the capital of France?": HINT,
        "Which code opens my door?": "Your door code: 48213.",
        "So, where does Anna live?": "Anna's city: Oslo.",
    }

    async def main() -> dict[str, str]:
        async with service(config_for("embedded", tmp_path / "run", reuse=False)) as (running, client):
            conversation = Conversation(client, running.model)
            return {text: (await conversation.say(text, max_tokens=64)).text for text in visit}

    answers = run(main())
    assert answers == visit, json.dumps(answers, indent=1)
