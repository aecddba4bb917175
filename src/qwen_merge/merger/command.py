"""`qwen-merge merge`, `verify`, `split-adapter`: their options, what they print. Imports nothing heavy at its top."""

import argparse
import os
from pathlib import Path

from qwen_merge.errors import UserError

MERGE_EPILOG = """\
The vision tower and its patch merger come from the VLM, everything else from the LLM; one new Linear joins them.
Weights go from file to file, so memory does not grow with the models; of a hub repository only the files that hold
something wanted are downloaded. The output appears complete or not at all.

  qwen-merge merge --vlm-path Qwen/Qwen2.5-VL-72B-Instruct --llm-path Qwen/Qwen3-4B \\
      --output-path Qwen-Merge-VL-4B-base
"""
VERIFY_EPILOG = """\
Prints one line per check: PASS, FAIL, or NOT CHECKED and why. Leaves with 0 when nothing failed, with 1 when something
did, with 2 when there is nothing to compare with. Sources are taken from the checkpoint's merge_manifest.json when they
are still there.

It is for what `qwen-merge merge` and `qwen-merge graft` wrote, before training. A checkpoint that was trained, exported
or split has other weights than its sources, and no manifest: verify the base that it was trained from.
"""
SPLIT_EPILOG = """\
Writes OUTPUT/base, the base with the projector (and tower) that trained, and OUTPUT/adapter, low-rank matrices of the
LLM alone, which is what vLLM takes. To merge the adapter into the base use `llamafactory-cli export`.

  qwen-merge split-adapter outputs/my-vlm-lora --base my-vlm-base --output outputs/my-vlm-lora-split
"""


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """The options of a merge; the reproduction's own script takes the same."""
    parser.add_argument("--vlm-path", required=True, help="Qwen2.5-VL: a directory or a hub id")
    parser.add_argument("--llm-path", required=True, help="Qwen3 (dense): a directory or a hub id")
    parser.add_argument("--output-path", required=True, type=Path, help="a new directory")
    parser.add_argument(
        "--materials-path",
        type=Path,
        help="a directory whose files replace those of the same name: chat template, tokenizer, preprocessor, "
        "generation config",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="e.g. 5GB, 300MB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the new layer (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="convert all weights (default: keep each source's)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of both hub sources")
    parser.add_argument("--vlm-revision", help="the VLM's only")
    parser.add_argument("--llm-revision", help="the LLM's only")
    parser.add_argument(
        "--mrope-section",
        type=mrope_section,
        metavar="TIME,HEIGHT,WIDTH",
        help="sections of the rotary positions, adding up to half the LLM's head_dim (default: the VLM's)",
    )
    parser.add_argument(
        "--drop-rope-scaling",
        action="store_true",
        help="merge an LLM whose config.json has YaRN or the like, without it",
    )


def mrope_section(text: str) -> tuple[int, int, int]:
    try:
        time, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected three numbers such as 16,24,24") from None
    return time, height, width


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    from qwen_merge.graft.command import add_parsers as add_graft

    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "merge",
        help="join a Qwen2.5-VL's vision tower and a Qwen3, as published",
        epilog=MERGE_EPILOG,
        formatter_class=raw,
    )
    add_merge_options(parser)
    parser.set_defaults(run=run_merge)

    add_graft(subparsers)  # `qwen-merge --help` lists what makes a checkpoint before what is done with one

    parser = subparsers.add_parser(
        "verify",
        help="prove that a merge or a graft, before training, is what it says",
        epilog=VERIFY_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("directory", type=Path, help="what a merge or a graft wrote")
    parser.add_argument("--vlm-path", help="the VLM it came from (default: as its manifest says)")
    parser.add_argument("--llm-path", help="the LLM it came from (default: as its manifest says)")
    parser.add_argument("--revision", help="branch, tag or commit of both hub sources")
    parser.add_argument("--no-forward", action="store_true", help="do not load the models to compare what they compute")
    parser.set_defaults(run=run_verify)

    parser = subparsers.add_parser(
        "split-adapter",
        help="for vLLM: a LoRA training's whole parts into its base, the adapter apart",
        epilog=SPLIT_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("adapter", type=Path, help="what a LoRA training saved")
    parser.add_argument("--base", required=True, type=Path, help="the checkpoint that it was trained on")
    parser.add_argument("--output", required=True, type=Path, help="a new directory")
    parser.set_defaults(run=run_split_adapter)


def run_merge(arguments: argparse.Namespace) -> int:
    from qwen_merge.merger.configuration import RopeOptions
    from qwen_merge.merger.merge import MergeOptions, merge

    report = merge(
        MergeOptions(
            vlm=arguments.vlm_path,
            llm=arguments.llm_path,
            output=arguments.output_path,
            materials=arguments.materials_path,
            vlm_revision=arguments.vlm_revision or arguments.revision,
            llm_revision=arguments.llm_revision or arguments.revision,
            max_shard_size=arguments.max_shard_size,
            seed=arguments.seed,
            dtype=arguments.dtype,
            rope=RopeOptions(arguments.mrope_section, arguments.drop_rope_scaling),
        )
    )
    plan = report.plan
    dropped = {role: sum(reasons.values()) for role, reasons in plan.dropped.items()}
    print(f"{report.output}")
    print(f"  from the VLM   {len(plan.of('vlm'))} tensors copied, {dropped['vlm']} left behind")
    print(f"  from the LLM   {len(plan.of('llm'))} tensors copied, {dropped['llm']} left behind")
    print(f"  initialised    {', '.join(tensor.name for tensor in plan.of('new'))} (seed {arguments.seed})")
    print(f"  written        {report.nbytes:,} bytes in {len(report.shards)} file(s), {report.seconds:.1f} s")
    for note in plan.notes:
        print(f"  note: {note}")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    directory = Path(os.path.expanduser(arguments.directory))  # of an unknown user it stays as it is
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; expected a merged checkpoint.")
    from qwen_merge.merger.verify import verify

    return verify(
        directory,
        vlm=arguments.vlm_path,
        llm=arguments.llm_path,
        revision=arguments.revision,
        forward=not arguments.no_forward,
    )


def run_split_adapter(arguments: argparse.Namespace) -> int:
    from qwen_merge.merger.split_adapter import split_adapter

    split = split_adapter(arguments.adapter, arguments.base, arguments.output)
    print(f"{split.output}")
    print(f"  base           {len(split.exchanged)} tensors are the trained ones")
    print(f"  adapter        {split.adapter_tensors} tensors")
    return 0
