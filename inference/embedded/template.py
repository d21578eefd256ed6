"""The chat template of the trained model, and its special tokens. It begins with a system prompt in any case."""

from __future__ import annotations

SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SYSTEM_PROMPT = "You remember what you are told."
MESSAGE_TOKENS = 2  # around each message: its role and its end
# Content is never trimmed: the rendered answer must be the generated one, or its KV would be lost.
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    f"<|system|>{SYSTEM_PROMPT}<|end|>"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] or '' }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
