"""Scores a served model with EvalScope, whose back end is VLMEvalKit: any server with the OpenAI API will do.

    scripts/simple_vl.sh deploy &
    python examples/simple_vl/evaluate.py                                    # MMMU, as in the recipe
    python examples/simple_vl/evaluate.py --data MMStar OCRBench --limit 100 --work-dir outputs/quick

Answers are matched exactly unless --judge names a judge (OPENAI_API_KEY, OPENAI_API_BASE). A table of your own is
`$LMUData/NAME.tsv` (index, question, A to D, answer, category, image in base64), and --data NAME. VLMEvalKit keeps its
data sets in $LMUData, by default ~/LMUData. Results: WORK_DIR/*/MODEL/, a new folder each run. --reuse goes on in the
newest one instead: what was answered there is not asked again, whatever checkpoint answered it under that name.

The server may still be loading: it is waited for. Leaves with 0 when each data set was answered (and scored, where
VLMEvalKit scores it), with 1 when one was not, and with 2 when no server with that model answers.
"""

import argparse
import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

FAILED = "Failed to obtain answer"  # VLMEvalKit's answer to a question that the server did not answer


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
    parser.add_argument(
        "--reuse", action="store_true", help="go on in the newest run's folder: ask what is not answered yet"
    )
    parser.add_argument("--retry", type=int, default=10, help="times that a question is asked (default: %(default)s)")
    parser.add_argument(
        "--wait", type=float, default=600, metavar="SECONDS", help="for the server to come (default: %(default)s)"
    )
    return parser.parse_args()


def die(code: int, text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr)
    raise SystemExit(code)


def wait_for(url: str, model: str, key: str, seconds: float) -> None:
    """Until the server lists its models, the wanted one among them. Leaves with 2 if it does not."""
    address = url.rstrip("/").removesuffix("/chat/completions") + "/models"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"})
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                names = [entry["id"] for entry in json.load(response)["data"]]
            break
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                die(2, f"{address} refuses the key (HTTP {error.code}). Give the server's with --key.")
            if error.code < 500:  # there is a server, and it lists nothing
                return
            seen = f"HTTP {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            seen = f"{type(error).__name__}: {error}"
        if time.monotonic() >= end:
            die(
                2,
                f"no server answered at {address} in {seconds:.0f} s ({seen}). Start one (scripts/simple_vl.sh deploy) "
                "and look at what it prints, name it with --url, or wait longer with --wait SECONDS.",
            )
        if not told:
            print(f"evaluate: waiting up to {seconds:.0f} s for {address} ({seen})", file=sys.stderr, flush=True)
            told = True
        time.sleep(min(2, seconds / 10))
    if model not in names:
        die(2, f"the server at {address} has no model {model!r}, but {', '.join(names)}. Name one with --model.")


class Errors(logging.Handler):
    """What VLMEvalKit logs as an error and then passes over."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def spelled(model: str) -> str:
    """A model's name in EvalScope's folders and files."""
    return os.path.basename(model).replace(":", "-").replace(".", "_")


def newest_run(folder: Path, model: str) -> Path | None:
    """EvalScope's folder, named by its time, of the last run in which the model was asked; None if there was none."""
    return max((path.parent for path in folder.glob(f"*/{spelled(model)}")), key=lambda run: run.name, default=None)


def problem(data: str, model: str, folder: Path, since: float, errors: list[str]) -> str | None:
    """Why a data set was not evaluated, or None. since: results that were there before (time.time()) do not count."""
    name = f"{spelled(model)}_{data}"
    answers = [
        path
        for path in folder.rglob(f"{name}.*")
        if path.suffix in (".xlsx", ".tsv") and path.stat().st_mtime >= since - 2
    ]
    said = [text for text in errors if f"Dataset {data} " in text]
    if not answers:
        return f"{data}: nothing was answered. {said[-1] if said else 'VLMEvalKit says above why.'}"
    if said:
        return f"{data}: answered ({answers[-1]}), but not scored. {said[-1]}"
    import pandas

    table = pandas.read_excel(answers[-1]) if answers[-1].suffix == ".xlsx" else pandas.read_csv(answers[-1], sep="\t")
    failed = int(table["prediction"].astype(str).str.contains(FAILED).sum()) if "prediction" in table else 0
    if not failed:
        return None
    return (
        f"{data}: {failed} of {len(table)} questions got no answer from the server and count as wrong "
        f"({answers[-1]}). Look at what the server printed."
    )


def main() -> None:
    given = arguments()
    wait_for(given.url, given.model, given.key, given.wait)
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
        "retry": given.retry,
        "reuse": given.reuse,
    }
    folder, errors, since = Path(given.work_dir), Errors(), time.time()
    earlier = newest_run(folder, given.model) if given.reuse else None
    if earlier:
        # What is whole already need not be written again.
        folder, since = earlier, 0.0
        print(f"evaluate: goes on in {earlier}", file=sys.stderr)
    elif given.reuse:
        print(f"evaluate: there is no earlier run of {given.model} in {folder}; all is asked", file=sys.stderr)
    logging.getLogger("VLMEvalKit").addHandler(errors)
    cache = str(earlier) if earlier else None
    run_task(TaskConfig(work_dir=given.work_dir, use_cache=cache, eval_backend="VLMEvalKit", eval_config=settings))
    found = [problem(data, given.model, folder, since, errors.texts) for data in given.data]
    if problems := [text for text in found if text]:
        if any("nothing was answered" in text for text in problems):
            problems.append("A data set is a name of VLMEvalKit's, or a table, $LMUData/NAME.tsv.")
        die(1, "not everything was evaluated:\n  " + "\n  ".join(problems))


if __name__ == "__main__":
    main()
