"""What VLMEvalKit's `run.py` calls: the command line options, the model entries, and its spreadsheets made lossless.

The overlay (`qwen-merge overlay apply vlmevalkit`) adds the two calls to `parse_args`; everything else is here, so that
a new version of VLMEvalKit needs two lines moved and nothing copied.

    python -m vlmeval.run --data MMStar --model Qwen-Merge-VL-4B --model-path DIR --use-vllm --reuse
    python -m vlmeval.run --data MMStar --model Qwen-Merge-VL-4B --endpoint http://localhost:8000/v1 --reuse
    python -m vlmeval.run … --temperature 0             greedy; the published numbers are sampled at 0.6, seed 0
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from qwen_merge.errors import UserError
from qwen_merge.evaluation import judge
from qwen_merge.evaluation.local_tables import score_local_tables
from qwen_merge.evaluation.records import Records, Settings, document, model_type_of

# Training's pixels, for comparison: under the published setting every picture is larger than any in training.
MATCHED = {"min_pixels": 32 * 32, "max_pixels": 512 * 512}
# name -> (default checkpoint, what differs from the published settings)
ENTRIES: dict[str, tuple[str, dict[str, Any]]] = {
    f"Qwen-Merge-VL-{size}{suffix}": (f"outputs/Qwen-Merge-VL-{size}-stage3", pixels)
    for size in ("4B", "8B")
    for suffix, pixels in (("", {}), ("-matched", MATCHED))
}
# Scored only by asking a judge; without one there is no number, and zeros would look like one.
NEED_A_JUDGE = ("MMVet", "LogicVista")


def leave(error: UserError) -> NoReturn:
    """End the run with a message for the user. VLMEvalKit logs any Exception and goes on; this passes through it."""
    print(f"qwen-merge: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the Qwen-Merge entries, on `run.py`'s parser."""
    group = parser.add_argument_group("Qwen-Merge entries: " + ", ".join(ENTRIES))
    group.add_argument("--model-path", help="checkpoint folder, with exactly one Qwen-Merge entry in --model")
    group.add_argument(
        "--endpoint",
        default=os.environ.get("QWEN_MERGE_ENDPOINT"),
        help="base URL of an OpenAI-compatible server to ask instead of loading a model (env QWEN_MERGE_ENDPOINT)",
    )
    group.add_argument("--seed", type=int, default=Settings.seed, help="for sampling (default %(default)s)")
    group.add_argument(
        "--temperature", type=float, default=Settings.temperature, help="0 is greedy (default %(default)s)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=Settings.max_new_tokens, help="a thought included (default %(default)s)"
    )


def configure(args: argparse.Namespace) -> None:
    """Register the entries and check what was asked for, before anything is loaded.

    Ends the process with exit code 2 and one message when the user can mend something.
    """
    keep_whole_answers()
    try:
        _configure(args)
    except UserError as error:
        leave(error)
    if args.judge == judge.EXACT:
        score_without_a_judge()
        score_local_tables()


def _configure(args: argparse.Namespace) -> None:
    from vlmeval.config import supported_VLM

    config = json.loads(Path(args.config).read_text(encoding="utf-8")) if args.config else {}
    asked = [name for name in (args.model or config.get("model", {})) if name in ENTRIES]
    datasets = list(args.data or config.get("data", {}))
    _refuse_contradictions(args, asked)
    if asked:
        judge.settle(args)

    work_dir = os.environ.get("MMEVAL_ROOT", args.work_dir)  # as run.py itself decides, a little later
    for name, (default_path, pixels) in ENTRIES.items():
        settings = Settings(**pixels, seed=args.seed, temperature=args.temperature, max_new_tokens=args.max_new_tokens)
        path = args.model_path if args.model_path and name in asked else default_path
        records = Records(work_dir, name, reuse=args.reuse)
        options: dict[str, Any] = {"records": records, "settings": settings, "judge": args.judge, "verbose": False}
        if args.endpoint:
            options |= {"endpoint": args.endpoint, "model_path": args.model_path, "retry": 5}
        else:
            options |= {"model_path": path, "use_vllm": args.use_vllm}
        supported_VLM[name] = functools.partial(open_model, **options)
        if name not in asked:
            continue
        if not args.endpoint:
            model_type = model_type_of(path)
            if args.reuse and not args.config:  # entries of a --config may change settings: seen at the first answer
                backend = "vllm" if args.use_vllm else "transformers"
                now = document(name, path, model_type, backend, settings, args.judge)
                for dataset in datasets:
                    records.check(dataset, now)
        if os.environ.get("RANK", "0") == "0":
            _take_up_or_set_aside(args, records, datasets)


def _take_up_or_set_aside(args: argparse.Namespace, records: Records, datasets: list[str]) -> None:
    for dataset in datasets:
        if not args.reuse:
            if aside := records.set_aside(dataset):
                print(f"qwen-merge: no --reuse: the earlier files of {records.model} x {dataset} are now in {aside}")
        elif getattr(args, "mode", "all") != "infer":
            records.judged_by(dataset, args.judge)


def _refuse_contradictions(args: argparse.Namespace, asked: list[str]) -> None:
    problems = []
    if args.model_path and len(asked) != 1:
        problems.append(f"--model-path goes with exactly one Qwen-Merge entry, --model names {len(asked)}: {asked}")
    if args.temperature < 0:
        problems.append(f"--temperature {args.temperature} is negative; 0 is greedy, 0.6 the published value")
    if args.max_new_tokens < 1:
        problems.append(f"--max-new-tokens {args.max_new_tokens} leaves no room for an answer")
    if args.endpoint and args.use_vllm:
        problems.append("--use-vllm loads a model here, --endpoint asks a served one; leave one of them out")
    if problems:
        raise UserError.from_list("cannot start:", problems)


def open_model(endpoint: str | None = None, **options: Any):
    """A `QwenMergeAPI` when there is an endpoint, else a `QwenMergeChat`; a user's mistake ends the run."""
    from qwen_merge.evaluation.models import QwenMergeChat
    from qwen_merge.evaluation.served import QwenMergeAPI

    try:
        return QwenMergeAPI(endpoint, **options) if endpoint else QwenMergeChat(**options)
    except UserError as error:
        leave(error)


# --- what VLMEvalKit loses on the way to a score ---


def keep_whole_answers() -> None:
    """Make the spreadsheets of this process give back every answer as it was; safe to call again.

    VLMEvalKit hands predictions from asking to scoring in .xlsx files. On that way xlsxwriter cuts a cell at 32,767
    characters, takes `=2` for a formula and drops long links, and pandas leaves control characters escaped and reads
    `None`, `N/A` and an empty answer as not a number. Turned into text, that is `nan`, in which VLMEvalKit's matching
    finds an option `A`: an unfinished thought would score where the options are mere letters. Excel itself refuses
    longer cells; openpyxl does not.
    """
    import pandas
    import xlsxwriter
    import xlsxwriter.worksheet
    from openpyxl.utils.escape import unescape

    if getattr(pandas.read_excel, "keeps_whole_answers", False):
        return
    initialise, open_workbook, read_excel = (
        xlsxwriter.worksheet.Worksheet.__init__,
        xlsxwriter.Workbook.__init__,
        pandas.read_excel,
    )

    @functools.wraps(initialise)
    def worksheet(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.xls_strmax = 1 << 30

    @functools.wraps(open_workbook)
    def workbook(self, filename=None, options=None):
        plain = {"strings_to_formulas": False, "strings_to_urls": False}
        open_workbook(self, filename, {**plain, **(options or {})})

    @functools.wraps(read_excel)
    def read(io, *args, **kwargs):
        frame = read_excel(io, *args, **kwargs)
        if not args and not kwargs and "prediction" in frame:
            texts = read_excel(io, usecols=["prediction"], dtype=str, keep_default_na=False)
            frame["prediction"] = [unescape(text) for text in texts["prediction"]]  # xlsxwriter's _x000D_
        return frame

    read.keeps_whole_answers = True  # type: ignore[attr-defined]
    xlsxwriter.worksheet.Worksheet.__init__ = worksheet
    xlsxwriter.Workbook.__init__ = workbook
    pandas.read_excel = read


class NoJudge:
    """Stands where VLMEvalKit expects a judge and never answers, so that only exact matches count."""

    def working(self) -> bool:
        return True

    def generate(self, *args: object, **kwargs: object) -> str:
        return "Failed to obtain answer via API."  # VLMEvalKit's own word for it


def score_without_a_judge() -> None:
    """Make `--judge exact_matching` mean it for every task; safe to call again.

    MathVista and MathVision match exactly before they ask, but want a judge that works first, and `exact_matching` is
    taken for the name of an OpenAI model. MMVet and LogicVista have no exact matching: they refuse instead of giving 0.
    """
    from vlmeval.dataset import image_vqa

    build = image_vqa.build_judge
    if getattr(build, "knows_exact_matching", False):
        return

    @functools.wraps(build)
    def build_judge(**options):
        return NoJudge() if options.get("model") == judge.EXACT else build(**options)

    def refuse(self, eval_file, **_):
        raise UserError(
            f"{self.dataset_name} has no score under exact matching; the answers are in {eval_file}. Set "
            "OPENAI_API_KEY and run again with --reuse and a judge: --judge gpt-4o-mini for LogicVista, any for MMVet."
        )

    build_judge.knows_exact_matching = True  # type: ignore[attr-defined]
    image_vqa.build_judge = build_judge
    for name in NEED_A_JUDGE:
        getattr(image_vqa, name).evaluate = refuse
