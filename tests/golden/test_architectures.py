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
from inference.model import load_model
from inference.paged_kv import Pages
from inference.preload import LoadTask, cut
from inference.selfcheck import CheckedModel, take_over
from inference.working_kv import Buffers, KvPool, WorkingKv, as_bytes, new_context
from protocol.arena import Arena, Geometry, SlotState
from protocol.errors import ConfigError, UnsupportedModel
from protocol.messages import SlotRef
from tests.inference.harness import SHAPES, VOCABULARY, config_for, make_model

_TOKENS = 320  # beyond every sliding window of the shapes


class Golden:
    def __init__(self, directory: Path, family: str) -> None:
        make_model(directory, family)
        load = AutoModelForCausalLM.from_pretrained
        self.stock = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        model = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
        # The longest context is this row: where scaling depends on the length, the stock forward goes by the row's.
        self.checked: CheckedModel = take_over(model, VOCABULARY, _TOKENS)
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


def test_stored_keys_come_back_to_the_bit(golden: Golden) -> None:
    """What a loader rotates is what the forward had written, in every layer."""
    shape, model = golden.checked.shape, golden.checked.model
    kv = WorkingKv(Buffers(shape, 0), _TOKENS)
    kv.begin(0, 0, _TOKENS)
    segment = [Segment(kv, golden.row)]
    model.forward(segment)
    model.commit(segment)
    rotate = model.rotary.key_rotation(64, _TOKENS, shape)
    for layer in range(shape.layers):
        out = torch.empty_like(kv.keys_at(layer, 64, _TOKENS))
        rotate(layer, kv.raw.span(layer, 64, _TOKENS), out)
        assert torch.equal(out, kv.keys_at(layer, 64, _TOKENS))


_WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss", "exaone4")


@pytest.mark.parametrize("family", _WINDOWED)
def test_history_beyond_the_windows_is_not_missed(tmp_path: Path, family: str) -> None:
    """Chunks that a layer's window does not reach stay in the store, and what is in their place is never read."""
    golden = Golden(tmp_path, family)
    shape, model, history, chunk = golden.checked.shape, golden.checked.model, 288, 32
    source = WorkingKv(Buffers(shape, 0), _TOKENS)
    source.begin(0, 0, _TOKENS)
    computed = [Segment(source, golden.row[:history])]
    model.forward(computed)
    model.commit(computed)
    layer_bytes = shape.token_bytes // shape.layers
    geometry = Geometry(shape.layers, layer_bytes // 2, layer_bytes // 2, chunk)
    arena = Arena.create(tmp_path / "arena", geometry, 16 << 20)
    refs = []
    for slot, start in enumerate(range(0, history, chunk)):
        generation, name = arena.take(slot, SlotState.LOADING, bytes(16)), bytes([slot + 1]) * 16
        arena.set_identity(slot, name, bytes(16), bytes(16), chunk)
        span = (start, start + chunk)
        for layer in range(shape.layers):
            key, value = source.raw.span(layer, *span), source.values_at(layer, *span)
            arena.write_layer(slot, layer, *(as_bytes(part.unsqueeze(0))[0] for part in (key, value)))
        refs.append(SlotRef(slot, generation, name, chunk, "dram"))

    kv = WorkingKv(Buffers(shape, 0), _TOKENS)
    kv.begin(history, history, _TOKENS)
    for layer in range(shape.layers):
        kv.keys_at(layer, 0, _TOKENS).fill_(torch.nan)
        kv.values_at(layer, 0, _TOKENS).fill_(torch.nan)
    loaded = 0
    for piece in cut(LoadTask(kv, arena, refs, 0.0, lambda: None), model.rotary):
        for layer in range(shape.layers):
            if piece.span.is_seen[layer]:
                piece.load(layer)
                loaded += piece.layer_bytes
    # Windows are 160 or 192 tokens: of 288, the last 160 or 192 and what fills up the first chunk.
    in_sight = {None: history, 160: 160, 192: 192}
    assert loaded == sum(in_sight[window] for window in shape.windows) * layer_bytes
    assert loaded < history * shape.token_bytes
    logits = model.forward([Segment(kv, golden.row[history:])], all_logits=True)
    torch.testing.assert_close(logits, golden.logits[history:], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_jobs_in_one_step_do_not_see_each_other(golden: Golden, paged: bool) -> None:
    """Three jobs at different places of the same row, in one flat step."""
    shape, model = golden.checked.shape, golden.checked.model
    pool: KvPool = Pages(shape, 64, 3000 * shape.token_bytes) if paged else Buffers(shape, 0)
    jobs = []
    for past in (0, 70, 250):
        kv = new_context(pool, _TOKENS, 0)
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
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def small(model_class: str, **values: object) -> torch.nn.Module:
    kind = getattr(transformers, model_class)
    config = kind.config_class(**{**_SMALL, **values})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: torch.nn.Module = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_class", "values", "reason"),
    [
        ("GPT2LMHeadModel", {}, "no rotary position embedding"),
        ("OPTForCausalLM", {}, "no rotary position embedding"),
        ("FalconForCausalLM", {}, "leaves attention to transformers' AttentionInterface"),
        ("HunYuanDenseV1ForCausalLM", {"head_dim": 16}, "a norm after the rotation"),
        (
            "DeepseekV3ForCausalLM",
            {
                **_EXPERTS,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16,
                "v_head_dim": 32,
            },
            "latent attention",
        ),
        ("Qwen3NextForCausalLM", {**_EXPERTS, "num_hidden_layers": 4}, r"layers \[0, 1, 2\] keep no keys and values"),
        ("DiffLlamaForCausalLM", {}, "differs from the stock one"),
        ("Llama4ForCausalLM", {}, "no apply_rotary_pos_emb"),
        ("Gemma4ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, "KV of several shapes"),
        ("DogeForCausalLM", {}, "a mask or a bias of its own"),
    ],
)
def test_models_that_we_would_get_wrong_are_refused(model_class: str, values: dict[str, object], reason: str) -> None:
    """With the reason, before anything is served."""
    with pytest.raises(UnsupportedModel, match=reason):
        take_over(small(model_class, **values), 300, 256)


def test_keys_that_know_their_position_otherwise_are_refused() -> None:
    """A prompt at the beginning would not show it."""
    model = small("LlamaForCausalLM")
    layer = model.get_submodule("model.layers.1")

    def late(module: torch.nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, torch.Tensor]) -> object:
        return (args[0] + (kwargs["position_ids"] > 100).unsqueeze(-1), *args[1:]), kwargs

    layer.register_forward_pre_hook(late, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="values of layer 1 depend on positions"):
        take_over(model, 300, 256)


def test_the_self_check_reaches_beyond_a_long_window() -> None:
    """Attention that is told another window than the mask has is refused, though no short prompt would show it."""
    values = {"head_dim": 16, "sliding_window": 200}
    assert take_over(small("Gemma2ForCausalLM", **values), 300, 256).shape.windows == (200, None)
    model = small("Gemma2ForCausalLM", **values)
    model.get_submodule("model.layers.0.self_attn").sliding_window = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="differs from the stock one"):
        take_over(model, 300, 256)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_the_self_check_allows_for_experts_in_half_precision(tmp_path: Path, family: str) -> None:
    """A router that decides otherwise by a rounding is no fault of ours."""
    make_model(tmp_path, family, num_hidden_layers=3 if family == "gpt_oss" else 8, initializer_range=0.06)
    load = AutoModelForCausalLM.from_pretrained
    take_over(load(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval(), VOCABULARY, 512)


@pytest.mark.parametrize(("family", "own"), [("llama-dynamic", 128), ("phi3-longrope", 64)])
def test_a_table_for_another_length_is_another_namespace(tmp_path: Path, family: str, own: int) -> None:
    """KV of one regime is never read in the other. Up to the model's own length there is one regime."""
    make_model(tmp_path / "model", family)
    namespaces = [
        load_model(config_for(tmp_path / "model", tmp_path / "run", max_context=longest)).namespace
        for longest in (own // 2, own, 2 * own, 3 * own)
    ]
    assert namespaces[0] == namespaces[1]
    assert len(set(namespaces)) == 3


def test_scaling_by_the_configuration_alone_is_one_namespace(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama-yarn")
    load = [load_model(config_for(tmp_path / "model", tmp_path / "run", max_context=n)) for n in (128, 2048)]
    assert load[0].namespace == load[1].namespace


def test_dynamic_scaling_ends_at_its_factor(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama-dynamic")
    assert load_model(config_for(tmp_path / "model", tmp_path / "run")).max_context == 128
    with pytest.raises(ConfigError, match="over the model's own 512"):
        load_model(config_for(tmp_path / "model", tmp_path / "run", max_context=513))
