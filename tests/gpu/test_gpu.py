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
from packing import SAMPLES, alone, packed
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


def gradients(sources):
    torch.manual_seed(0)
    model = load(sources).cuda().train()
    processor = AutoProcessor.from_pretrained(sources / "merged")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 84, 3), np.uint8))
    inputs = processor(text=[PROMPT + "It is red. " * 8], images=[picture], return_tensors="pt").to("cuda")
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return model, loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_ligers_kernels_give_the_same_loss_and_gradients(sources):
    """Last: it changes transformers' classes for the rest of the process."""
    _, loss, plain = gradients(sources)
    files = Path(__file__).parents[2] / "src/qwen_merge/overlays/llamafactory/files"
    spec = importlib.util.spec_from_file_location("qwen_merge_liger", files / "qwen_merge_liger.py")
    module = sys.modules["qwen_merge_liger"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.apply_liger_kernel_to_qwen2_5_vl_merge()
    model, liger_loss, liger = gradients(sources)
    names = {type(m).__name__ for m in model.modules()}
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= names, names
    assert not {"Qwen3RMSNorm", "Qwen3MLP"} & names
    worst = max(((liger[n] - plain[n]).norm() / plain[n].norm()).item() for n in plain if plain[n].norm() > 1e-6)
    print(f"loss {loss:.6f} and with Liger {liger_loss:.6f}; largest relative difference of a gradient {worst:.2e}")
    assert abs(loss - liger_loss) < 1e-4
    assert worst < 1e-3
    assert TOKEN_IDS["<|image_pad|>"] == model.config.image_token_id
