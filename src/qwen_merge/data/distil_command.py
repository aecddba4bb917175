"""`qwen-merge data text2image ask|judge|convert` and `qwen-merge data image-thinking ask|judge`: their options.

Imports nothing heavy at its top. The reproduction's scripts under src/data_process/stage3/ take the same options.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from qwen_merge.data.numbers import at_least

ENDPOINTS_EPILOG = """\
Teacher and judge are OpenAI-compatible servers, such as vLLM. Give --endpoint once for each: requests go round the
healthy ones, 32 in flight on each; a server that dies is left out until it is back, and its requests go elsewhere.
A key goes into the environment variable QWEN_MERGE_API_KEY.

A URL without a path gets /v1; one with a path is taken as it is (https://open.bigmodel.cn/api/paas/v4).

Every answer is written as it comes. Kill the command when you like and give it again: it asks only for what is missing.
"""


# What --extra-body cannot say: the command says it, or reads replies that would look otherwise.
OWN_FIELDS = ("messages", "model", "max_tokens", "max_completion_tokens", "stream", "n")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    later = "the others can be judged later"
    text = subparsers.add_parser("text2image", help="stage 3: questions answered by a teacher, drawn as pictures")
    steps = text.add_subparsers(dest="distil_step", metavar="COMMAND", required=True)
    parser = _step(steps, "ask", "answers from a teacher", _ask_text)
    add_endpoint_options(parser, max_tokens=8000)
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME",
        help="chinese-deepseek-r1 or alpaca (may be repeated; default: both)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a local copy: a file, folder or glob of json, jsonl, parquet or arrow files; its columns say which set "
        "it is (may be repeated; default: from the hub)",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N rows of each set: for trials")
    parser.add_argument(
        "--share", type=_share, default=1.0, metavar="P", help="of the questions, a uniform sample (default: all)"
    )
    parser.add_argument(
        "--plain-share",
        type=_share,
        default=0.5,
        metavar="P",
        help="questions that are also asked with /no_think, drawn by their hash (default: %(default)s)",
    )
    _add_decontaminate(parser)

    parser = _step(steps, "judge", "verdicts on the answers, against the set's own", _judge_text)
    add_endpoint_options(parser, max_tokens=1024)
    _add_judge_options(parser, json_schema=True)
    _add_later_options(parser, "`ask` wrote its answers; the verdicts are written beside them", f"answers, {later}")

    parser = _step(steps, "convert", "the judged answers and drawn questions as a set", _convert_text)
    _add_output(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures' looks (default: %(default)s)")
    parser.add_argument(
        "--fonts", choices=("mplfonts", "debian"), default="mplfonts", help="where the fonts are (default: %(default)s)"
    )
    _add_shard_mb(parser)
    _add_accept_missing(parser)
    _add_later_options(parser, "the answers and their verdicts are", "answers, by their ids")
    parser.add_argument("--workers", type=at_least(1), default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="who runs the workers (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a set that was begun and not finished")
    _add_overwrite(parser, "begin anew, and replace the set when the new one is complete")

    image = subparsers.add_parser("image-thinking", help="stage 3: picture questions answered again by a reasoning VLM")
    steps = image.add_subparsers(dest="distil_step", metavar="COMMAND", required=True)
    parser = _step(steps, "ask", "answers from a reasoning VLM", _ask_image)
    add_endpoint_options(parser, max_tokens=8000)
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FOLDER",
        help="the converted sets (default: llavaonevision_converted in --output)",
    )
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="only these (default: all that are there)")
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="rows drawn from each set (default: %(default)s)",
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="the same as --samples N")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int)):
        parser.add_argument(f"--{name}", type=kind, metavar="X", help="of the teacher (default: its server's own)")
    _add_decontaminate(parser)

    parser = _step(steps, "judge", "filters, verdicts, and the set", _judge_image)
    add_endpoint_options(parser, max_tokens=4096)
    _add_judge_options(parser, json_schema=False)
    _add_later_options(parser, "`ask` wrote its answers; the verdicts are written beside them", f"samples, {later}")
    _add_shard_mb(parser)


def _step(steps: argparse._SubParsersAction, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = steps.add_parser(
        name, help=text, epilog=ENDPOINTS_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_endpoint_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """What asking a server takes; the same for teachers and judges."""
    _add_output(parser)
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="URL",
        help="of a server, such as http://localhost:8000/v1 (may be repeated)",
    )
    parser.add_argument("--model", help="the served model's name (default: what the servers say)")
    parser.add_argument(
        "--in-flight",
        type=at_least(1),
        default=32,
        metavar="N",
        help="requests at a time for each server (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=max_tokens, metavar="N", help="of one answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every choice and every answer (default: %(default)s)")
    parser.add_argument(
        "--attempts", type=at_least(1), default=6, metavar="N", help="of a request that fails (default: %(default)s)"
    )
    parser.add_argument(
        "--slowest",
        type=_positive,
        default=4.0,
        metavar="X",
        help="tokens a second of one answer, below which a server counts as hanging (default: %(default)s)",
    )
    parser.add_argument(
        "--wait-for-servers",
        type=_positive,
        default=300.0,
        metavar="S",
        help="seconds without any healthy server, until the run stops (default: %(default)s)",
    )
    parser.add_argument(
        "--extra-body", type=_object, default={}, metavar="JSON", help="more of each request, e.g. '{\"min_p\": 0.05}'"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what is there, which is done in any case")
    _add_overwrite(parser, "throw away the answers (or verdicts) that are there and begin anew")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("data"), help="LLaMA-Factory's dataset_dir (default: data)")


def _add_later_options(parser: argparse.ArgumentParser, where: str, what: str) -> None:
    parser.add_argument("--input", type=Path, metavar="FOLDER", help=f"where {where} (default: the same as --output)")
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help=f"only the first N {what}: for trials",
    )


def _add_overwrite(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=text)


def _add_shard_mb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-mb", type=at_least(1), default=512, metavar="N", help="MiB a shard at most (default: %(default)s)"
    )


def _add_accept_missing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-missing", action="store_true", help="go on although requests got no answer; they are counted"
    )


def _add_decontaminate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decontaminate",
        type=Path,
        nargs="+",
        default=[],
        metavar="TSV",
        help="evaluation sets (VLMEvalKit's files) whose near-copies are not asked",
    )


def _add_judge_options(parser: argparse.ArgumentParser, json_schema: bool) -> None:
    parser.add_argument(
        "--json-schema",
        action=argparse.BooleanOptionalAction,
        default=json_schema,
        help="have the server force the verdict's form (default: %(default)s)",
    )
    _add_accept_missing(parser)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a number from 0 to 1")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a JSON object")
    if own := [name for name in OWN_FIELDS if name in value]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(own)} cannot be given here: --model and --max-tokens have options of their own, and each "
            "request asks for one whole answer"
        )
    return value


def _servers(arguments: argparse.Namespace) -> Any:
    from qwen_merge.data.teacher.endpoints import Patience
    from qwen_merge.data.teacher.steps import Servers

    return Servers(
        endpoints=arguments.endpoint,
        model=arguments.model,
        in_flight=arguments.in_flight,
        max_tokens=arguments.max_tokens,
        extra_body=arguments.extra_body,
        patience=Patience(attempts=arguments.attempts, slowest=arguments.slowest, all_dead=arguments.wait_for_servers),
    )


def _ask_text(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.teacher.steps import report
    from qwen_merge.data.text2image.ask import AskOptions, ask

    options = AskOptions(
        output=arguments.output,
        sources=arguments.source,
        inputs=arguments.input,
        limit=arguments.limit,
        share=arguments.share,
        plain_share=arguments.plain_share,
        seed=arguments.seed,
        decontaminate=arguments.decontaminate,
    )
    return report("text2image, answers", ask(options, _servers(arguments), arguments.overwrite))


def _judge_text(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.teacher.steps import report
    from qwen_merge.data.text2image.judge import judge

    summary = judge(
        arguments.input or arguments.output,
        _servers(arguments),
        arguments.seed,
        arguments.json_schema,
        arguments.accept_missing,
        arguments.overwrite,
        arguments.limit,
    )
    return report("text2image, verdicts", summary)


def _convert_text(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.text2image.convert import ConvertOptions, convert

    options = ConvertOptions(
        output=arguments.output,
        input=arguments.input,
        limit=arguments.limit,
        seed=arguments.seed,
        fonts=arguments.fonts,
        shard_mb=arguments.shard_mb,
        accept_missing=arguments.accept_missing,
    )
    manifest = convert(options, arguments.engine, arguments.workers, arguments.resume, arguments.overwrite)
    return _tell("text2image", manifest)


def _ask_image(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.image_thinking.ask import AskOptions, ask
    from qwen_merge.data.image_thinking.samples import FOLDER
    from qwen_merge.data.teacher.steps import report

    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    options = AskOptions(
        output=arguments.output,
        input=arguments.input or arguments.output / FOLDER,
        sets=arguments.sets,
        rows=arguments.limit or arguments.samples,
        seed=arguments.seed,
        sampling={name: value for name, value in sampling.items() if value is not None},
        decontaminate=arguments.decontaminate,
    )
    return report("image_thinking, answers", ask(options, _servers(arguments), arguments.overwrite))


def _judge_image(arguments: argparse.Namespace) -> int:
    from qwen_merge.data.image_thinking.judge import JudgeOptions, judge, write
    from qwen_merge.data.teacher.steps import report

    options = JudgeOptions(
        output=arguments.output,
        input=arguments.input,
        limit=arguments.limit,
        seed=arguments.seed,
        json_schema=arguments.json_schema,
        accept_missing=arguments.accept_missing,
        shard_mb=arguments.shard_mb,
    )
    summary = judge(options, _servers(arguments), arguments.overwrite)
    code = report("image_thinking, verdicts", summary)
    if code and not arguments.accept_missing:
        return code  # the set is written when every answer has its verdict
    return _tell("image_thinking", write(options, overwrite=arguments.overwrite))


def _tell(name: str, manifest: Any) -> int:
    if manifest is None:
        print(f"{name}: the set is finished already, nothing to do")
        return 0
    counts = manifest.counts
    print(f"{name}: {counts.rows_out:,} of {counts.rows_in:,} rows in {len(manifest.shards)} shard(s)")
    for reason, entry in sorted(counts.drops.items(), key=lambda item: -item[1]["rows"]):
        print(f"  {entry['rows']:>9,}  {reason}")
    for title, values in manifest.extra.items():
        if title in ("rows", "filters"):
            print(f"  {title}: {', '.join(f'{value:,} {key}' for key, value in values.items())}")
    return 0
