"""Our forward against the stock one, for every supported shape of model, on random weights in float32."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from inference.decoupled import Segment
from inference.selfcheck import CheckedModel, take_over
from inference.working_kv import Buffers, WorkingKv
from protocol.errors import UnsupportedModel
from tests.inference.harness import SHAPES, VOCABULARY, make_model

_TOKENS = 320  # beyond every sliding window of the shapes


class Golden:
    def __init__(self, directory: Path, family: str) -> None:
        make_model(directory, family)
        load = AutoModelForCausalLM.from_pretrained
        self.stock = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        model = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        self.checked: CheckedModel = take_over(model, VOCABULARY, 1024)
        self.row = torch.randint(0, 256, (_TOKENS,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            self.logits = self.stock(input_ids=self.row.unsqueeze(0)).logits[0]


@pytest.fixture(scope="module", params=list(SHAPES))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(tmp_path_factory.mktemp(request.param), request.param)


def test_attention_is_not_flat(golden: Golden) -> None:
    """The comparison would prove little if the answer hardly depended on the history."""
    changed = golden.row.clone()
    changed[:200] = changed[:200].flip(0)
    with torch.inference_mode():
        other = golden.stock(input_ids=changed.unsqueeze(0)).logits[0]
    spread = golden.logits[-1].max() - golden.logits[-1].min()
    assert (other[-1] - golden.logits[-1]).abs().max() > 0.01 * spread


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, _TOKENS - 1), max_size=6))
def test_any_split_gives_the_stock_logits(golden: Golden, cuts: set[int]) -> None:
    shape = golden.checked.shape
    kv = WorkingKv(Buffers(shape, 0), 64)
    kv.begin(0, 0, 64)
    found = []
    bounds = [0, *sorted(cuts), _TOKENS]
    for start, end in itertools.pairwise(bounds):
        segment = Segment(kv, golden.row[start:end])
        found.append(golden.checked.model.forward([segment], all_logits=True))
        golden.checked.model.commit([segment])
    assert kv.length == _TOKENS
    torch.testing.assert_close(torch.cat(found), golden.logits, atol=2e-4, rtol=2e-4)


def test_jobs_in_one_step_do_not_see_each_other(golden: Golden) -> None:
    """Three jobs at different places of the same row, in one flat step."""
    shape, model = golden.checked.shape, golden.checked.model
    jobs = []
    for past in (0, 70, 250):
        kv = WorkingKv(Buffers(shape, 0), _TOKENS)
        kv.begin(0, 0, _TOKENS)
        if past:
            first = [Segment(kv, golden.row[:past])]
            model.forward(first)
            model.commit(first)
        jobs.append(kv)
    lengths = (40, 1, 33)
    segments = [Segment(kv, golden.row[kv.length : kv.length + n]) for kv, n in zip(jobs, lengths, strict=True)]
    logits = model.forward(segments)
    for row, segment in zip(logits, segments, strict=True):
        expected = golden.logits[segment.past + len(segment.token_ids) - 1]
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=2e-4)


def test_a_step_that_fails_can_be_taken_again(golden: Golden) -> None:
    shape, model = golden.checked.shape, golden.checked.model
    kv = WorkingKv(Buffers(shape, 0), 128)
    kv.begin(0, 0, 128)

    def fail(layer: int) -> None:
        if layer == 1:
            raise RuntimeError("no history")

    with pytest.raises(RuntimeError, match="no history"):
        model.forward([Segment(kv, golden.row[:50], wait_layer=fail)])
    assert kv.length == 0
    logits = model.forward([Segment(kv, golden.row[:50])])
    torch.testing.assert_close(logits[0], golden.logits[49], atol=2e-4, rtol=2e-4)


_SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prefix", "model_class", "reason"),
    [
        ("GPT2", "GPT2LMHeadModel", "no rotary position embedding"),
        ("OPT", "OPTForCausalLM", "no rotary position embedding"),
        ("Falcon", "FalconForCausalLM", "differs from the stock one"),
        ("GptOss", "GptOssForCausalLM", "attention sinks"),
    ],
)
def test_models_that_we_would_get_wrong_are_refused(prefix: str, model_class: str, reason: str) -> None:
    """The self-check refuses them with the reason, before anything is served."""
    config = getattr(transformers, f"{prefix}Config")(**_SMALL)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    with pytest.raises(UnsupportedModel, match=reason):
        take_over(model, 300, 256)


def test_length_dependent_rotary_scaling_is_refused() -> None:
    config = transformers.LlamaConfig(
        **_SMALL, intermediate_size=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    config._attn_implementation = "eager"
    with pytest.raises(UnsupportedModel, match="dynamic"):
        take_over(transformers.LlamaForCausalLM(config).eval(), 300, 256)
