"""Scores a served model with EvalScope, whose back end is VLMEvalKit: any server with the OpenAI API will do.

    scripts/simple_vl.sh deploy &
    python examples/simple_vl/evaluate.py                                    # MMMU, as in the recipe
    python examples/simple_vl/evaluate.py --data MMStar OCRBench --limit 100 --work-dir outputs/quick

Answers are matched exactly unless --judge names a judge (OPENAI_API_KEY, OPENAI_API_BASE). A table of your own is
`$LMUData/NAME.tsv` (index, question, A to D, answer, category, image in base64), and --data NAME. VLMEvalKit keeps its
data sets in $LMUData, by default ~/LMUData. Results: WORK_DIR/vlmeval*/MODEL/.
"""

import argparse
import os


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1/chat/completions", help="default: %(default)s")
    parser.add_argument("--model", default="Simple-VL", help="its name at the server (default: %(default)s)")
    parser.add_argument("--key", default="EMPTY", help="API key (default: %(default)s)")
    parser.add_argument(
        "--data", nargs="+", default=["MMMU_DEV_VAL"], help="VLMEvalKit's names (default: MMMU_DEV_VAL)"
    )
    parser.add_argument("--work-dir", default="outputs/simple_vl/evaluation", help="default: %(default)s")
    parser.add_argument("--nproc", type=int, default=64, help="requests at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only so many questions of each set")
    parser.add_argument("--temperature", type=float, default=0.6, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--judge", default="exact_matching", help="default: %(default)s")
    parser.add_argument("--mode", choices=["all", "infer"], default="all", help="infer: answers without a score")
    parser.add_argument("--reuse", action="store_true", help="go on with the answers of an earlier run")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    os.environ.setdefault("LMUData", os.path.expanduser("~/LMUData"))  # read when VLMEvalKit is imported
    from evalscope import TaskConfig, run_task

    model = {
        "name": "CustomAPIModel",
        "type": given.model,
        "api_base": given.url,
        "key": given.key,
        "temperature": given.temperature,
        "max_tokens": given.max_tokens,
        "img_size": -1,  # pictures as they are; the server's processor makes them fit
        "video_llm": False,
    }
    settings = {
        "data": given.data,
        "model": [model],
        "mode": given.mode,
        "nproc": given.nproc,
        "judge": given.judge,
        "limit": given.limit,
        "reuse": given.reuse,
    }
    run_task(TaskConfig(work_dir=given.work_dir, eval_backend="VLMEvalKit", eval_config=settings))


if __name__ == "__main__":
    main()
