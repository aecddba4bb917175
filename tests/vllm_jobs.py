"""Runs vLLM engines one after another and writes what they answered; started by tests in a process of its own.

    python tests/vllm_jobs.py jobs.json answers.json

A job is {"name", "model", "engine": keyword arguments of LLM, "rounds": [[request, …], …]}; a request is
{"prompt", "images": [files], "videos": [.npy files], "lora": folder}. The requests of a round are one batch. The
answer to a request is {"tokens": [ids], "prompt_tokens": n, "cached": n}; a job with "may_fail": true has {"error": …}
instead of rounds when it fails, and the next ones go on. vLLM stays out of the tests' own process: it
changes PyTorch's settings for good.
"""

import gc
import json
import sys
from pathlib import Path


def main(jobs_file: str, answers_file: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    answers: dict = {}
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            answers[job["name"]] = _run(job, LLM, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
        except Exception as error:
            if not job.get("may_fail"):
                raise
            answers[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(answers_file).write_text(json.dumps(answers))


def _run(job: dict, make_engine, sampling) -> list[list[dict]]:
    engine = make_engine(
        job["model"],
        **{
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": 16,
            "limit_mm_per_prompt": {"image": 2, "video": 1},
            **job.get("engine", {}),
        },
    )
    rounds = []
    for requests in job["rounds"]:
        prompts = [_prompt(request) for request in requests]
        outputs = engine.generate(prompts, sampling, lora_request=_lora(requests), use_tqdm=False)
        rounds.append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached": output.num_cached_tokens,
                }
                for output in outputs
            ]
        )
    return rounds


def _prompt(request: dict) -> dict:
    import numpy as np
    from PIL import Image

    data = {}
    if images := [Image.open(file).convert("RGB") for file in request.get("images", [])]:
        data["image"] = images
    if videos := [np.load(file) for file in request.get("videos", [])]:
        data["video"] = videos
    return {"prompt": request["prompt"], **({"multi_modal_data": data} if data else {})}


def _lora(requests: list[dict]):
    folders = {request["lora"] for request in requests if "lora" in request}
    if not folders:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, folders.pop())


if __name__ == "__main__":
    main(*sys.argv[1:])
