"""What is trained and how: the model's shape, the curriculum, the learning rate. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import LlamaConfig

# Short windows first: recall is learned within some hundred steps at 128 tokens, where few facts compete, and hardly
# at all when training begins with 256. (progress at which the stage ends, window in tokens)
CURRICULUM = ((0.12, 128), (0.24, 256), (0.40, 512), (0.60, 1024), (1.0, 2048))
CONTEXT = 2048


@dataclass(frozen=True)
class Recipe:
    """All that decides what comes out of a training run, besides its length."""

    seed: int = 1
    batch_tokens: int = 8192  # per step
    matrix_lr: float = 5e-3  # peak; Muon, of the layers' matrices
    other_lr: float = 1.5e-3  # peak; AdamW, of the embedding and the norms
    warm_up: float = 0.015  # of the run
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    curriculum: tuple[tuple[float, int], ...] = CURRICULUM

    def window(self, progress: float) -> int:
        """Tokens per row at `progress` (0 to 1) of the run."""
        return next((window for end, window in self.curriculum if progress < end), self.curriculum[-1][1])

    def rows(self, window: int) -> int:
        """Rows per batch."""
        return max(1, self.batch_tokens // window)

    def schedule(self, progress: float) -> float:
        """Learning rate as a share of its peak: linear warm-up, then a cosine down to 2 %."""
        if progress < self.warm_up:
            return max(progress / self.warm_up, 0.01)
        fallen = min(1.0, (progress - self.warm_up) / (1 - self.warm_up))
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen))


def llama_config(vocabulary: int, end_token: int) -> LlamaConfig:
    """3.7 million parameters with a vocabulary of 2,048: 7.4 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        # Most rotary dimensions turn less than once over the context, so that far facts are found by what they say.
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
