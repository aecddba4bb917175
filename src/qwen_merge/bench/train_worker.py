"""One measured run of `qwen-merge bench train`, in a process of its own.

    python -m qwen_merge.bench.train_worker JOB.json

LLaMA-Factory's own `run_exp` trains, with one callback more. Two things are not as in `llamafactory-cli train`: weights
are drawn where the model lives instead of read from the disk, and nothing is saved. Marks are CUDA events, so that
measuring waits for nothing; on a CPU they are times. `upstream` in the job names what is done as transformers does it:
the "tower", the "loss"; "checkpointing" of all layers. Each rank writes its figures into a file of its own; of several
ranks the last `profiled` steps are traced (`train_profile`), which are not among the measured ones.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

from qwen_merge.bench.train_flops import Counts, Sizes, attention_flops, formula, matrix_flops
from qwen_merge.bench.train_profile import shares

PARTS = ("waiting", "vision", "LLM", "loss", "backward", "optimizer")
COUNTED = ("labels", "attention_mask", "cu_seq_lens_q", "image_grid_thw")


class Clock:
    """Marks in the order of the device's work, and the seconds between two."""

    def __init__(self, device: str):
        self.device = device

    def mark(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: Any, other: Any) -> float:
        return other - one if self.device == "cpu" else one.elapsed_time(other) / 1000


def make_meter(job: dict):
    """A callback that counts and marks the steps after the first `warm_up`."""
    import torch
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self) -> None:
            self.clock = Clock(job["device"])
            self.marks: list[list[tuple[str, Any]]] = []  # of each step; a name says what ended
            self.batches: list[list[dict]] = []  # counted at the end, so that nothing waits for the device
            self.profiler: Any = None

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model = getattr(model, "module", model)  # DeepSpeed's engine and DDP hold it there
            if args.deepspeed:
                self.mark_deepspeed_steps()
            if "loss" in job["upstream"]:
                model.loss_without_logits = False
            self.sizes = Sizes.of(model)
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.model.visual.register_forward_hook(lambda *_: self.note("vision"))
            model.model.language_model.register_forward_hook(lambda *_: self.note("LLM"))
            model.register_forward_hook(lambda *_: self.note("loss"))
            self.tower, self.config, self.layers = model.model.visual, model.config, model.model.language_model.layers

        def mark_deepspeed_steps(self) -> None:
            """DeepSpeed's engine takes the optimizer's step where Trainer sees the backward."""
            from deepspeed.runtime.engine import DeepSpeedEngine

            step = DeepSpeedEngine.step

            def marked(engine, *arguments, **options):
                self.note("backward")
                result = step(engine, *arguments, **options)
                self.note("optimizer")
                return result

            DeepSpeedEngine.step = marked

        def note(self, name: str) -> None:
            self.marks[-1].append((name, self.clock.mark()))

        def before(self, model, arguments, inputs) -> None:
            if model.training:
                self.note("waiting")
                self.batches[-1].append({name: inputs.get(name) for name in COUNTED})

        def on_step_begin(self, args, state, control, **kwargs):
            begin = self.marks[-1][-1] if self.marks else ("begin", self.clock.mark())
            self.marks.append([begin])
            self.batches.append([])
            if state.global_step == job["warm_up"] and job["device"] != "cpu":
                torch.cuda.reset_peak_memory_stats()
            if job["profiled"] and state.global_step == args.max_steps - job["profiled"]:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()

        def on_substep_end(self, args, state, control, **kwargs):
            self.note("backward")

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.note("backward")

        def on_step_end(self, args, state, control, **kwargs):
            self.note("optimizer")

        def on_train_end(self, args, state, control, **kwargs):
            if self.profiler is not None:
                torch.cuda.synchronize()
                self.profiler.stop()

        def profile(self) -> dict | None:
            if self.profiler is None:
                return None
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json")
                self.profiler.export_chrome_trace(str(trace))
                return shares(trace)

        def figures(self) -> dict:
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            steps, seconds, parts, total = [], [], dict.fromkeys(PARTS, 0.0), Counts()
            measured = slice(job["warm_up"], len(self.marks) - job["profiled"])
            for marks, batches in zip(self.marks[measured], self.batches[measured], strict=True):
                counts = Counts()
                for batch in batches:
                    counts += count(batch, self.tower)
                seconds.append(self.clock.between(marks[0][1], marks[-1][1]))
                for (_, begin), (name, end) in pairwise(marks):
                    parts[name] += self.clock.between(begin, end)
                steps.append(counts.tokens)
                total += counts
            peak = torch.cuda.max_memory_reserved() if job["device"] != "cpu" else 0
            return {
                "device": torch.cuda.get_device_name() if job["device"] != "cpu" else "cpu",
                "torch": torch.__version__,
                "step_seconds": seconds,
                "step_tokens": steps,
                "parts": parts,
                "counts": vars(total),
                "matrix_flops": matrix_flops(self.sizes, total),
                "formula": formula(self.sizes, total),
                "attention_flops": attention_flops(self.sizes, total),
                "peak_bytes": peak,
                "profile": self.profile(),
                "attention": self.config._attn_implementation,
                "checkpointed_layers": sum(layer.gradient_checkpointing for layer in self.layers),
                "layers": len(self.layers),
            }

    return Meter()


def count(inputs: dict, tower) -> Counts:
    """What a batch holds."""
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    offsets = inputs.get("cu_seq_lens_q")
    lengths = offsets.diff() if offsets is not None else mask.sum(1) if mask is not None else None
    lengths = [labels.shape[1]] * len(labels) if lengths is None else lengths.tolist()
    grids = inputs["image_grid_thw"].tolist() if inputs.get("image_grid_thw") is not None else []
    side = tower.window_size // tower.patch_size  # patches
    windows = 0
    for frames, height, width in grids:
        rows = [min(side, height - top) for top in range(0, height, side)]
        columns = [min(side, width - left) for left in range(0, width, side)]
        windows += frames * sum(row * row for row in rows) * sum(column * column for column in columns)
    return Counts(
        samples=len(lengths),
        tokens=sum(lengths),
        places=labels.numel(),
        labelled=int((labels[:, 1:] != -100).sum()),
        patches=sum(frames * height * width for frames, height, width in grids),
        squares=sum(length * length for length in lengths),
        window_squares=windows,
        frame_squares=sum(frames * (height * width) ** 2 for frames, height, width in grids),
    )


def upstream_tower(tower) -> None:
    """The vision tower as transformers has it: masks over all patches of a batch. The parameters are the same."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as upstream

    for block in tower.blocks:
        block.__class__ = upstream.Qwen2_5_VLVisionBlock

    def forward(tower, hidden_states, grid_thw):
        grid_thw = grid_thw.to(hidden_states.device)  # ours takes grids of the host
        return upstream.Qwen2_5_VisionTransformerPretrainedModel.forward(tower, hidden_states, grid_thw)

    tower.forward = MethodType(forward, tower)


def drawn_on(job: dict, load: Callable) -> Callable:
    """LLaMA-Factory's `load_model`, whose `train_from_scratch` builds and draws on the CPU: here on the device."""
    device = job["device"]

    def load_model(*arguments, **options):
        import torch
        from transformers.modeling_utils import no_init_weights

        with torch.device(device), no_init_weights():
            model = load(*arguments, **options)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                ones = "norm" in name or "ln_q" in name
                values = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this rank's part of it, flat
                if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
                    values.normal_(0, 0.02, generator=generator)
                else:
                    values.fill_(float(ones))
        model.tie_weights()
        if "tower" in job["upstream"]:
            upstream_tower(model.model.visual)
        return model

    return load_model


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer

    workflow.load_model = drawn_on(job, workflow.load_model)
    if "checkpointing" in job["upstream"]:
        config = json.loads(Path(job["arguments"]["model_name_or_path"], "config.json").read_text())
        os.environ["QWEN_MERGE_CHECKPOINT_LAYERS"] = str(config["num_hidden_layers"])
    for name in ("save_model", "save_state", "_save_checkpoint"):
        setattr(Trainer, name, lambda *_, **__: None)
    meter = make_meter(job)
    run_exp(job["arguments"], callbacks=[meter])
    Path(f"{job['output']}-{os.getenv('RANK', '0')}.json").write_text(json.dumps(meter.figures()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
