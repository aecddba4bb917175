"""What only a GPU can show: bf16 parity on CUDA kernels, positions far out, Liger's kernels. Never run by CI.

    .venv/bin/python -m pytest tests/gpu

The file needs torch, transformers with the overlay (`qwen-merge overlay apply transformers --root SITE_PACKAGES`),
liger-kernel and this checkout on PYTHONPATH=src:tests, not the whole environment.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3ForCausalLM

from checkpoints import TOKEN_IDS, make_llm, make_vlm
from packing import SAMPLES, alone, apart, known, packed, trajectory
from packing import gradients as gradients_of
from qwen_merge.architecture import register
from qwen_merge.merger.merge import MergeOptions, merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
register()

PROMPT = "<|vision_start|><|image_pad|><|vision_end|>What colour is it?"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    vlm, llm = make_vlm(folder / "vlm", dtype="float32"), make_llm(folder / "llm", tied=False, dtype="float32")
    merge(MergeOptions(vlm=str(vlm), llm=str(llm), output=folder / "merged"))
    return folder


def load(sources, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(sources / "merged", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_text_only_logits_equal_those_of_qwen3(sources, dtype):
    ids = torch.randint(0, 300, (4, 200), generator=torch.Generator().manual_seed(0)).cuda()
    merged = load(sources, torch_dtype=dtype).cuda().eval()
    qwen3 = Qwen3ForCausalLM.from_pretrained(sources / "llm", torch_dtype=dtype).cuda().eval()
    expected = qwen3(ids).logits
    difference = (merged(input_ids=ids).logits - expected).abs().max().item()
    print(f"{dtype}: largest difference {difference:.2e}, largest logit {expected.abs().max().item():.1f}")
    assert difference <= (1e-4 if dtype == torch.float32 else 2**-6 * expected.abs().max().item())
    qwen3.model.layers[0].self_attn.q_norm = torch.nn.Identity()  # control
    assert (qwen3(ids).logits - expected).abs().max() > 0.1


def test_greedy_answers_to_pictures_equal_the_cpus(sources):
    processor = AutoProcessor.from_pretrained(sources / "merged", padding_side="left")
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (84, 84, 3), np.uint8)) for i in range(3)]
    inputs = processor(text=[PROMPT, PROMPT + PROMPT], images=pictures, padding=True, return_tensors="pt")
    model = load(sources).eval()
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    cpu = model.generate(**inputs, **arguments)
    gpu = model.cuda().generate(**inputs.to("cuda"), **arguments)
    assert torch.equal(cpu, gpu.cpu())


def test_text_positions_equal_qwen3s_far_out_and_under_tf32(sources):
    model, qwen3 = load(sources).cuda(), Qwen3ForCausalLM.from_pretrained(sources / "llm").cuda()
    positions_bt = torch.arange(100_000, 100_064, device="cuda")[None]
    x = torch.zeros(1, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ours = model.model.language_model.rotary_emb(x, positions_bt.expand(3, -1, -1))
        stock = qwen3.model.rotary_emb(x, positions_bt)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, stock, strict=True))
    shifted = model.model.language_model.rotary_emb(x, positions_bt.expand(3, -1, -1) + 1)  # control
    assert not torch.equal(shifted[0], stock[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_samples_trains_as_they_do_alone(sources, dtype, monkeypatch):
    """float32 goes sample by sample, bfloat16 through PyTorch's varlen kernel. In both the row is no farther from
    float32 on the CPU than the samples one by one are.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the patch embedding is a convolution
    reference = load(sources).train()
    samples = [alone(reference, seed, *sample) for seed, sample in enumerate(SAMPLES)]
    counts = [int((sample["labels"][0, 1:] != -100).sum()) for sample in samples]
    total = sum(counts)

    def moved(batch: dict, device: str) -> dict:
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}

    def one_by_one(model, device: str) -> torch.Tensor:
        pairs = zip(samples, counts, strict=True)
        return sum(model(**moved(sample, device)).loss * count / total for sample, count in pairs if count)

    expected = gradients_of(reference, one_by_one(reference, "cpu"))
    model, row = load(sources, torch_dtype=dtype).cuda().train(), moved(packed(samples), "cuda")

    def median(loss: torch.Tensor) -> float:
        found = gradients_of(model, loss)
        apart = [(found[n].float().cpu() - expected[n]).norm() / expected[n].norm().clamp(min=1e-3) for n in expected]
        return float(torch.stack(apart).median())

    without = {name: value for name, value in row.items() if not name.startswith(("cu_seq", "max_length"))}
    single, together, mixed = (
        median(one_by_one(model, "cuda")),
        median(model(**row).loss),
        median(model(**without).loss),
    )
    print(f"{dtype}: gradients off by {single:.2e} one by one, {together:.2e} packed, {mixed:.2e} without offsets")
    assert together < 1.2 * single + 1e-6
    assert mixed > 3 * single + 0.01  # the control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_step_waits_for_the_device(sources, dtype):
    """With what the collator says of a row. Liger's fused loss is left out: it counts the labels on the device."""
    model = load(sources, torch_dtype=dtype).cuda().train()
    model.loss_without_logits = True
    row = packed([alone(model, seed, *sample) for seed, sample in enumerate(SAMPLES)])
    told = known(model, row)
    row, told = ({n: x.cuda() if torch.is_tensor(x) else x for n, x in part.items()} for part in (row, told))
    model(**row, **told, use_cache=False).loss.backward()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**row, **told, use_cache=False).loss.backward()
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):  # the control
            model(**row, use_cache=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(sources):
    torch.manual_seed(0)
    model = load(sources).cuda().train()
    processor = AutoProcessor.from_pretrained(sources / "merged")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 84, 3), np.uint8))
    inputs = processor(text=[PROMPT + "It is red. " * 8], images=[picture], return_tensors="pt").to("cuda")
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return model, loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def plain_losses(sources):
    """Fifty steps with logits for all positions and nothing compiled, in float32 and in bfloat16."""
    return {dtype: trajectory(load(sources, torch_dtype=dtype).cuda()) for dtype in (torch.float32, torch.bfloat16)}


def assert_same_way(name: str, plain_losses: dict, run) -> None:
    """In float32 as good as equal, in bfloat16 not farther from float32 than the plain path is."""
    exact = plain_losses[torch.float32]
    assert exact[-5:].mean() < exact[:5].mean() - 0.2  # it learns
    apart32, apart16 = apart(run(torch.float32), exact), apart(run(torch.bfloat16), exact)
    plain16 = apart(plain_losses[torch.bfloat16], exact)
    print(f"{name}: losses off by {apart32:.1e} in float32, {apart16:.1e} in bfloat16 (plain path {plain16:.1e})")
    assert apart32 < 1e-4
    assert apart16 < 1.5 * plain16


def test_fifty_compiled_steps_without_logits_go_the_same_way(sources, plain_losses):
    def run(dtype: torch.dtype) -> torch.Tensor:
        model = load(sources, torch_dtype=dtype).cuda()
        model.loss_without_logits = True
        model.compile_blocks(dynamic=True)
        return trajectory(model)

    assert_same_way("compiled", plain_losses, run)


def test_activations_are_kept_where_a_measured_step_leaves_room(sources, monkeypatch, caplog):
    module = pytest.importorskip("llamafactory.model.model_utils.qwen_merge_memory")
    row = {"input_ids": torch.randint(0, 300, (1, 4000)).cuda()}
    row["labels"] = row["input_ids"]
    total = torch.cuda.mem_get_info()[1]

    def chosen(room: int) -> int:
        model = load(sources).cuda().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        callback = module.checkpoint_layers(model, is_packed=True)
        layers = model.model.language_model.layers
        for step in range(3):
            callback.on_step_begin()
            if step == 2:
                return sum(layer.gradient_checkpointing for layer in layers)
            model(**row, use_cache=False).loss.backward()
            # Other processes take what is too much.
            foreign = int((1 - module.KEPT_FREE) * total) - torch.cuda.max_memory_allocated() - room
            free = total - foreign - torch.cuda.memory_reserved()
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, total))
            callback.on_pre_optimizer_step()
            monkeypatch.undo()
        raise AssertionError

    assert chosen(room=10 * 2**30) == 0
    assert chosen(room=0) == 1  # of two, the first goes without, as when it was measured
    assert chosen(room=-(2**20)) == 2


def from_overlay(name: str):
    """A file of the LLaMA-Factory overlay, without LLaMA-Factory."""
    files = Path(__file__).parents[2] / "src/qwen_merge/overlays/llamafactory/files"
    spec = importlib.util.spec_from_file_location(name, files / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ligers_kernels_give_the_same_loss_and_gradients(sources, plain_losses):
    """Last: it changes transformers' classes for the rest of the process."""
    _, loss, plain = gradients(sources)
    from_overlay("qwen_merge_liger").apply_liger_kernel_to_qwen2_5_vl_merge()
    model, liger_loss, liger = gradients(sources)
    names = {type(m).__name__ for m in model.modules()}
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= names, names
    assert not {"Qwen3RMSNorm", "Qwen3MLP"} & names
    worst = max(((liger[n] - plain[n]).norm() / plain[n].norm()).item() for n in plain if plain[n].norm() > 1e-6)
    print(f"loss {loss:.6f} and with Liger {liger_loss:.6f}; largest relative difference of a gradient {worst:.2e}")
    assert abs(loss - liger_loss) < 1e-4
    assert worst < 1e-3
    assert TOKEN_IDS["<|image_pad|>"] == model.config.image_token_id
    assert_same_way("Liger", plain_losses, lambda dtype: trajectory(load(sources, torch_dtype=dtype).cuda()))
