"""Two ranks under ZeRO-3, whose pictures have one size and three: a step of a graft whose tower trains.

    .venv/bin/python -m pytest tests/integration/test_graft_zero3.py

Weights are wrong with several CPU processes, which is why LLaMA-Factory's runs refuse it there; what is tested is that
both ranks gather equally often. This file is also what the ranks run.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SIZES = (((1, 4, 4),), ((1, 4, 4), (1, 2, 6), (1, 6, 2)))  # of each rank's pictures, in patches
ENDED = "took two steps"
PICTURES = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14}
PICTURES |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32}
TEXTS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}


def train_on_a_rank(as_one: bool) -> None:
    import deepspeed
    import torch
    from llamafactory.model.model_utils import qwen_merge

    from qwen_merge.architecture.configuration_qwen_merge_graft import QwenMergeGraftConfig
    from qwen_merge.architecture.modeling_qwen_merge_graft import QwenMergeGraftForConditionalGeneration
    from qwen_merge.architecture.towers_qwen_merge_graft import features_of

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            settings = {"kind": "mlp", "merge_size": 2}
            config = QwenMergeGraftConfig(PICTURES, settings, TEXTS, freeze_vision=False)
            self.graft = QwenMergeGraftForConditionalGeneration(config)

        def forward(self, patches, grids):
            model = self.graft.model
            return model.projector(features_of(model.visual, patches, grids, self.graft.config), grids)

    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = Features()
    if as_one:
        qwen_merge.is_deepspeed_zero3_enabled = lambda: True
        qwen_merge.gather_as_one(model.graft)
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero3, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    grids = list(SIZES[int(os.environ["RANK"])])
    for _ in range(2):
        features = engine(torch.randn(sum(rows * columns for _, rows, columns in grids), 588), grids)
        engine.backward(features.square().mean())
        engine.step()
    torch.distributed.barrier()
    print(ENDED, flush=True)
    os._exit(0)  # past gloo's destructor, which may hang


def launch(tmp_path: Path, mode: str) -> str:
    # One after the other: each finds a port that is free.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, mode]
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    run = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=400
    )
    return run.stdout + run.stderr


def test_ranks_with_pictures_of_more_and_fewer_sizes_take_their_steps(tmp_path):
    output = launch(tmp_path, "as one")
    assert output.count(ENDED) == 2, output[-3000:]
    assert ENDED not in launch(tmp_path, "layer by layer")  # the control


if __name__ == "__main__":
    train_on_a_rank(sys.argv[1] == "as one")
