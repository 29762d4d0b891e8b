"""The scripts that make models: what they write is what was trained, in the forms others read."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from scripts.models import make_random_model, make_tiny_model, model_files, moe_gguf
from scripts.models.tiny_model import chat_pairs, corpus
from scripts.models.tiny_model.training import TrainingSettings

SMALL_SHAPE = replace(
    model_files.TINY_SHAPE,
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    head_dim=32,
    num_experts=12,
    moe_intermediate_size=32,
    intermediate_size=64,
    max_position_embeddings=256,
)
POOL_VALUES = 1 << 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to waiting for threads than they gain, most on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with a model of 20 training steps, and its held-out perplexity."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    settings = TrainingSettings(
        batch=4,
        peak_lr=5e-3,
        warmup_steps=5,
        duration_s=60.0,
        num_steps=20,
        report_every_s=60.0,
        num_evaluations=1,
        weight_decay=0.1,
        compile=False,
    )
    request = make_tiny_model.TrainRequest(
        out=out,
        seed=3,
        device=torch.device("cpu"),
        settings=settings,
        shape=SMALL_SHAPE,
        window=128,
        max_files=12,
        sample_tokens=2,
    )
    return out, make_tiny_model.train_model(request)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "model"
    make_random_model.make_model(SMALL_SHAPE, out, 7, 200_000, pool_values=POOL_VALUES)
    return out


def test_training_lowers_held_out_perplexity(trained: tuple[Path, float]) -> None:
    assert trained[1] < 0.6 * SMALL_SHAPE.vocab_size


def test_trained_model_is_in_hub_form(trained: tuple[Path, float]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = trained[0]
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_experts, config.num_experts_per_tok, config.tie_word_embeddings) == (12, 2, True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    assert set(index["weight_map"]) == set(model_files.tensor_shapes(SMALL_SHAPE))
    assert "model.layers.1.mlp.experts.11.down_proj.weight" in index["weight_map"]
    assert "lm_head.weight" not in index["weight_map"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == SMALL_SHAPE.vocab_size
    chat = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.bos_token is None


def test_safetensors_library_reads_the_same_bits(trained: tuple[Path, float]) -> None:
    from safetensors import safe_open

    checkpoint = model_files.Checkpoint(trained[0])
    count = 0
    for file in sorted(trained[0].glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                ours = torch.from_numpy(model_files.from_bf16(checkpoint.tensor(name)))
                assert torch.equal(reader.get_tensor(name).float(), ours)
                count += 1
    assert count == len(model_files.tensor_shapes(SMALL_SHAPE))


def test_provenance_names_what_made_the_model(trained: tuple[Path, float]) -> None:
    text = (trained[0] / "PROVENANCE.md").read_text()
    for expected in ("PSF-2.0", "`heldout.txt`", "| seed | 3 |", "model-00001-of-0000"):
        assert expected in text


@pytest.mark.parametrize("type_name", ["q8_0", "bf16", "f16", "q4_0"])
def test_gguf_holds_the_weights(trained: tuple[Path, float], tmp_path: Path, type_name: str) -> None:
    folder = trained[0]
    out = tmp_path / "model.gguf"
    size = moe_gguf.write_gguf(folder, out, type_name, "test", progress=False)
    assert out.stat().st_size == size
    assert list(tmp_path.iterdir()) == [out]
    checkpoint = model_files.Checkpoint(folder)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    # Relative to the largest value of a block: half a step, and the float16 rounding of the scale.
    limit = {"q8_0": 0.5 / 127 + 1e-3, "bf16": 0.0, "f16": 1e-3, "q4_0": 1 / 8 + 1e-3}[type_name]
    for part in ("gate", "up", "down"):
        tensor = tensors[f"blk.1.ffn_{part}_exps.weight"]
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for expert in range(SMALL_SHAPE.num_experts):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            want = model_files.from_bf16(checkpoint.tensor(name))
            assert got[expert].shape == want.shape
            error = np.abs(got[expert] - want).reshape(-1, 32).max(axis=1)
            assert np.all(error <= limit * np.abs(want).reshape(-1, 32).max(axis=1))


def test_gguf_metadata(trained: tuple[Path, float], tmp_path: Path) -> None:
    moe_gguf.write_gguf(trained[0], tmp_path / "a.gguf", "q8_0", "test", progress=False)
    moe_gguf.write_gguf(trained[0], tmp_path / "b.gguf", "q8_0", "test", progress=False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    expected = {
        "general.architecture": "qwen3moe",
        "general.file_type": 7,
        "qwen3moe.expert_count": 12,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 32,
        "qwen3moe.attention.key_length": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 511,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 512
    assert fields["tokenizer.ggml.tokens"].contents()[511] == "<|im_end|>"


def test_q8_0_equals_the_reference_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(32 * 4096).astype(np.float32)
    values[:32] = 0.0
    # Exact halves, at which rounding rules differ: a largest value of 127 makes the scale one.
    values[32:64] = np.arange(32, dtype=np.float32) - 15.5
    values[63] = 127.0
    values[64:96] = np.nextafter(np.float32(0.5), np.float32(0.0))
    values[95] = -127.0
    want = gguf.quants.quantize(values.reshape(1, -1), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(moe_gguf.quantize_q8_0(values), want.reshape(-1))


def test_bf16_rounding_matches_torch() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    want = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(model_files.to_bf16(values), want)


def test_held_out_text_reaches_no_stream() -> None:
    found = corpus.build_corpus(0, max_files=40)
    assert 100_000 < len(found.held_out.encode()) <= corpus.MAX_HELD_OUT_BYTES
    keys = corpus.leak_keys([found.held_out, found.validation])
    assert len(keys) > 300
    training = {" ".join(part.split()) for text in found.documents() for part in corpus.paragraphs(text)}
    assert not keys & training
    asked = " ".join(pair.user for pair in found.pairs)
    assert not [name for name in corpus.HELD_OUT.modules if f"{name}." in asked.replace(f"{name}. ", "")]


def test_whole_library_is_split_by_module() -> None:
    names = {path.as_posix() for path, _ in corpus.source_files(corpus.default_stdlib())}
    for holdout in (corpus.HELD_OUT, corpus.VALIDATION):
        for module in holdout.modules:
            assert f"{module}.py" in names
    assert not {name for name in names if name.startswith("site-packages")}


def test_clip_paragraphs_keeps_whole_ones() -> None:
    assert chat_pairs.clip_paragraphs("one\n\ntwo\n\nthree", 10) == "one\n\ntwo"
    assert chat_pairs.clip_paragraphs("too long a paragraph", 5) == ""


def test_random_model_is_deterministic(random_model: Path, tmp_path: Path) -> None:
    make_random_model.make_model(SMALL_SHAPE, tmp_path / "b", 7, 200_000, pool_values=POOL_VALUES)
    make_random_model.make_model(SMALL_SHAPE, tmp_path / "c", 8, 200_000, pool_values=POOL_VALUES)
    shards = sorted(path.name for path in random_model.glob("*.safetensors"))
    assert len(shards) > 2
    for name in shards:
        assert (random_model / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (random_model / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_random_weights_do_not_depend_on_other_tensors(random_model: Path, tmp_path: Path) -> None:
    one_layer = replace(SMALL_SHAPE, num_hidden_layers=1)
    make_random_model.make_model(one_layer, tmp_path / "one", 7, 1 << 30, pool_values=POOL_VALUES)
    whole, part = model_files.Checkpoint(random_model), model_files.Checkpoint(tmp_path / "one")
    for name in part.names():
        assert np.array_equal(whole.tensor(name), part.tensor(name)), name


def test_random_weights_have_the_promised_spread(random_model: Path) -> None:
    checkpoint = model_files.Checkpoint(random_model)
    experts = [
        model_files.from_bf16(checkpoint.tensor(f"model.layers.0.mlp.experts.{expert}.up_proj.weight"))
        for expert in range(SMALL_SHAPE.num_experts)
    ]
    for values in experts:
        assert values.std() == pytest.approx(SMALL_SHAPE.hidden_size**-0.5, rel=0.1)
        assert abs(values.mean()) < 0.1 * values.std()
    similarity = np.corrcoef([values.reshape(-1) for values in experts])
    assert np.abs(similarity - np.eye(len(experts))).max() < 0.12
    norm = model_files.from_bf16(checkpoint.tensor("model.layers.0.self_attn.q_norm.weight"))
    assert norm.mean() == pytest.approx(1.0, abs=0.1)


def test_random_model_runs_in_transformers_with_sane_activations(random_model: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    tokens = torch.randint(0, SMALL_SHAPE.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert 0.3 < float(logits.std()) < 3.0


def test_random_model_without_tokenizer_has_no_vocabulary(random_model: Path, tmp_path: Path) -> None:
    assert not (random_model / "tokenizer.json").exists()
    moe_gguf.write_gguf(random_model, tmp_path / "r.gguf", "q8_0", "random", progress=False)
    fields = gguf.GGUFReader(tmp_path / "r.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert fields["qwen3moe.vocab_size"].contents() == 512


def test_tokenizer_is_padded_in_a_larger_vocabulary(trained: tuple[Path, float], tmp_path: Path) -> None:
    special = make_random_model.copy_tokenizer(tmp_path, 600, model=trained[0])
    assert special == {"eos": 511, "pad": 509}
    writer = gguf.GGUFWriter(None, "qwen3moe")
    moe_gguf.add_tokenizer(writer, tmp_path, 600)
    tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    assert len(tokens) == len(set(tokens)) == 600
    with pytest.raises(ValueError, match="ids up to 511"):
        moe_gguf.add_tokenizer(gguf.GGUFWriter(None, "qwen3moe"), tmp_path, 511)


def test_yarn_and_overrides() -> None:
    base = make_random_model.SHAPES["qwen3-30b-a3b"]
    shape = make_random_model.apply_overrides(base, {"num_hidden_layers": 2, "vocab_size": None}, 4.0)
    config = model_files.hub_config(shape)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 151936)
    assert config["max_position_embeddings"] == 131072
    assert config["rope_scaling"]["factor"] == 4.0
    with pytest.raises(ValueError, match="top 300 of 128"):
        make_random_model.apply_overrides(base, {"num_experts_per_tok": 300}, None)


def test_writers_notice_missing_data(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (4, 4), "b": (2,)}
    with pytest.raises(ValueError, match="b: the pieces"):
        model_files.write_checkpoint(tmp_path, shapes, [np.zeros(16, dtype=np.uint16)], 1 << 20)
    with pytest.raises(ValueError, match="a: the pieces"):
        model_files.write_checkpoint(tmp_path, shapes, [np.zeros(17, dtype=np.uint16)], 1 << 20)
    assert not (tmp_path / model_files.INDEX_NAME).exists()
