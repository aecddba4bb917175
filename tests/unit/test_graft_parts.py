"""What a training of a graft rests on: calls of a tower, the experts' loss, LoRA's targets, a patch's cost, Liger."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import grafts
from qwen_merge import cli
from qwen_merge.architecture import register
from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig
from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration
from qwen_merge.architecture.towers_qwen_merge_graft import features_of

register()


@pytest.fixture
def interpolated(sources, tmp_path):
    file = grafts.write_recipe(
        tmp_path / "graft.yaml", sources / "siglip", "mlp", sources / "qwen3", tmp_path / "out",
        vision={"resolution": "interpolated", "min_pixels": 28 * 28, "max_pixels": 112 * 112},
    )  # fmt: skip
    assert cli.main(["graft", str(file)]) == 0
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "out").train()


def calls_of(model, module: torch.nn.Module, grids: list[tuple[int, int, int]]) -> int:
    """How often a module is called, and ZeRO-3 would gather it, for pictures of these sizes."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda *_: seen.append(1))
    patches = torch.randn(sum(rows * columns for _, rows, columns in grids), 3 * 14 * 14)
    features_of(model.model.visual, patches, grids, model.config)
    hook.remove()
    return len(seen)


def test_a_tower_is_called_once_for_pictures_of_all_sizes(interpolated):
    """Ranks whose pictures have more sizes than those of others would wait for them in ZeRO-3's gathering."""
    tower, sizes = interpolated.model.visual, [(1, 2, 4), (1, 4, 4), (1, 6, 2), (1, 4, 4)]
    assert calls_of(interpolated, tower, sizes[:1]) == calls_of(interpolated, tower, sizes) == 1
    inside = tower.vision_model.encoder.layers[0]  # the control: why all of it is gathered as one
    assert calls_of(interpolated, inside, sizes[:1]) == 1
    assert calls_of(interpolated, inside, sizes) == 3


def test_all_that_can_train_is_let_train(graft):
    """A quantized LLM's weights are whole numbers, of which torch takes no gradients."""
    from llamafactory.model.model_utils import qwen_merge

    model = AutoModelForImageTextToText.from_pretrained(graft("siglip", "mlp", "qwen3", "mrope"))
    assert not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    qwen_merge.let_all_train(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.language_model.layers.0.mlp.up_proj.weight"]


def test_zero3_gathers_a_picture_tower_and_experts_as_one(graft, interpolated, monkeypatch):
    from deepspeed.utils import z3_leaf_module
    from llamafactory.model.model_utils import qwen_merge

    experts = AutoModelForImageTextToText.from_pretrained(graft("siglip", "mlp", "qwen3_moe", "1d"))
    native = AutoModelForImageTextToText.from_pretrained(graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"))
    leaves = lambda model: {  # noqa: E731
        name for name, module in model.named_modules() if z3_leaf_module(module)
    }
    for model in (interpolated, experts, native):
        qwen_merge.gather_as_one(model)
        assert leaves(model) == set()  # the control: without ZeRO-3
    monkeypatch.setattr(qwen_merge, "is_deepspeed_zero3_enabled", lambda: True)
    for model in (interpolated, experts, native):
        qwen_merge.gather_as_one(model)
    assert leaves(interpolated) == {"model.visual"}
    # DeepSpeed refuses a trained leaf whose input asks for no gradient.
    given = []
    interpolated.model.visual.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            features_of(interpolated.model.visual, torch.randn(8, 588), [(1, 2, 4)], interpolated.config)
    assert [patches.requires_grad for patches in given] == [True, False]
    layers = {f"model.language_model.layers.{i}.mlp" for i in range(2)}
    assert leaves(experts) == {"model.visual"} | layers
    assert leaves(native) == set()  # its pictures of all sizes go through in one call of every module


@pytest.mark.parametrize("short", [False, True], ids=["logits", "without logits"])
def test_the_loss_of_experts_has_the_routers_part(graft, sources, short):
    own = AutoModelForCausalLM.from_pretrained(sources / "qwen3_moe").train()
    model = AutoModelForImageTextToText.from_pretrained(graft("siglip", "mlp", "qwen3_moe", "1d")).train()
    model.loss_without_logits = short
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    plain = model(**batch).loss
    assert plain.item() == pytest.approx(own(**batch).loss.item(), abs=1e-5)
    for config in (own.config, model.model.language_model.config):
        config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    own.router_aux_loss_coef = 0.5
    expected, loss = own(**batch).loss, model(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(loss.item() - plain.item()) > 0.1  # the control
    loss.backward()
    expected.backward()
    gates = [m.layers[0].mlp.gate.weight.grad for m in (own.model, model.model.language_model)]
    assert torch.allclose(*gates, atol=1e-6)


def test_the_experts_loss_follows_llama_factorys_argument(graft):
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.qwen_merge import check_launch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(graft("siglip", "mlp", "qwen3_moe", "1d"))
    for coefficient in (None, 0.02):
        check_launch(config, SimpleNamespace(moe_aux_loss_coef=coefficient), FinetuningArguments())
        assert config.text_config.output_router_logits is (coefficient is not None)
    assert config.text_config.router_aux_loss_coef == 0.02


def test_adapters_go_by_whole_names(graft):
    """A resampler's `kv_proj` ends with `v_proj`, which LLaMA-Factory's own search finds in it."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.qwen_merge_parts import lora_targets, whole_modules
    from llamafactory.model.model_utils.visual import patch_target_modules

    model = AutoModelForImageTextToText.from_pretrained(graft("siglip", "resampler", "qwen3", "1d"))
    arguments = FinetuningArguments(lora_target="v_proj", freeze_vision_tower=False, freeze_multi_modal_projector=False)
    found = lora_targets(model, arguments, ["v_proj"])
    assert found == [f"model.language_model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert whole_modules(model, arguments) == ["model.visual", "model.projector"]
    own = patch_target_modules(model, arguments, ["v_proj"])  # the control
    assert "model.projector.kv_proj" in own
    assert any("visual" in name for name in own)


@pytest.mark.parametrize("tower", grafts.TOWERS)
@pytest.mark.parametrize("projector", grafts.PROJECTORS)
def test_a_patch_costs_what_the_weights_it_goes_through_do(sources, tower, projector):
    """Against the modules' own matrices; what is no Linear (norms, positions, the cut into patches) is left out."""
    from llamafactory.data.qwen_merge_plan import patch_cost
    from transformers import AutoConfig

    if projector in ("own", "extended") and not tower.startswith("qwen"):
        pytest.skip("a tower without a patch merger")
    vision = AutoConfig.from_pretrained(sources / tower)
    vision = getattr(vision, "vision_config", vision).to_dict()
    vision["model_type"] = f"{tower}_vision_model" if tower in ("clip", "siglip", "siglip2") else tower
    settings = {"kind": projector, **grafts.PROJECTORS[projector]}
    if projector in ("own", "extended", "patch_merger"):
        settings["merge_size"] = 2
    text = AutoConfig.from_pretrained(sources / "qwen2").to_dict()
    if projector in ("own", "extended"):
        settings["out_hidden_size"] = 48 if projector == "extended" else text["hidden_size"]
    config = QwenMergeGraftConfig(vision_config=vision, projector_config=settings, text_config=text, positions="1d")
    model = QwenMergeGraftForConditionalGeneration(config).model

    def matrices(module) -> int:
        named = module.named_modules()
        linear = [m for name, m in named if isinstance(m, torch.nn.Linear) and "patch_embedding" not in name]
        return sum(m.weight.numel() for m in linear)

    unit, llm = config.merge_size**2, matrices(model.language_model)
    before = matrices(model.projector) / unit
    if projector == "resampler":  # keys and values of a patch; queries and the way out are a picture's
        before = model.projector.kv_proj.weight.numel() + 2 * config.hidden_size**2
    expected = (matrices(model.visual) + before) / (3 * llm)
    assert patch_cost(config, False, False, True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_ligers_kernels_reach_a_graft(graft):
    """Built, not run: they need a GPU. In a process of its own, since Liger exchanges classes for good."""
    script = f"""
from transformers import AutoModelForCausalLM, AutoConfig
from llamafactory.hparams import ModelArguments
from llamafactory.model.model_utils.liger_kernel import apply_liger_kernel
from llamafactory.model.model_utils.qwen_merge_liger import use_fused_loss
folder = {str(graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope"))!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
arguments = ModelArguments(model_name_or_path=folder, enable_liger_kernel=True)
for logits in (True, False):
    apply_liger_kernel(config, arguments, is_trainable=True, require_logits=logits)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    use_fused_loss(model)
    layer = model.model.language_model.layers[0]
    parts = (layer.mlp, layer.input_layernorm, model.model.visual.blocks[0].norm1, model.model.projector.ln_q)
    print(*(type(part).__name__ for part in parts), getattr(model.lm_head.fused_loss, "__qualname__", None))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = "LigerSwiGLUMLP LigerRMSNorm LigerRMSNorm LigerRMSNorm"
    lines = [line for line in run.stdout.splitlines() if line.startswith("Liger")]
    assert lines == [f"{kernels} None", f"{kernels} LigerFusedLinearCrossEntropyLoss.forward"]


def test_a_graft_knows_a_grid_without_the_picture(graft, interpolated):
    from PIL import Image

    folders = [graft("siglip", "mlp", "qwen3", "mrope"), graft("qwen2_5_vl", "patch_merger", "qwen3", "mrope")]
    processors = [AutoProcessor.from_pretrained(folder) for folder in (*folders, interpolated.config._name_or_path)]
    for processor in processors:
        for size in ((90, 60), (60, 300), (31, 95)):
            (grid,) = processor(images=[Image.new("RGB", size)])["image_grid_thw"]
            assert processor.image_processor.grid(size[1], size[0]) == tuple(int(number) for number in grid)
        assert "_grid" not in processor.image_processor.to_dict()
