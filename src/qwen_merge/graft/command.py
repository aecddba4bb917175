"""`qwen-merge graft`: its options, and what it prints. Imports nothing heavy at its top."""

import argparse
from pathlib import Path

from qwen_merge.errors import UserError

EPILOG = """\
A file says which vision tower, projector and LLM are joined:

  vision:    {source: google/siglip2-so400m-patch16-384}   # also CLIP, DINOv2, Qwen2-VL, Qwen2.5-VL, Qwen3-VL
  #          {source: my_weights, code: my_encoder.py}     # your own PyTorch: architecture/encoder_qwen_merge_graft.py
  projector: {kind: mlp, merge_size: 2}                   # own, extended, patch_merger, linear, mlp, resampler
  llm:       {source: Qwen/Qwen3-4B}                      # Qwen3, Qwen3-MoE, Qwen2.5; the one in a Qwen3-VL
  positions: mrope                                        # mrope-2d, 1d
  output:    my-vlm-base
  architecture: qwen2_5_vl           # stock Qwen2.5-VL, for tools that load no other; costs a Qwen3 its q/k norms

Further keys: revision, layer, frozen, resolution, min_pixels, max_pixels and deepstack of vision; hidden_size, queries
and heads of projector; revision of llm; mrope_section, tokens, seed, max_shard_size. What each means and what it is
when it is left out: docs/graft.md in the kit's repository.
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "graft",
        help="join any vision tower, projector and LLM, as a file says",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="what is joined, as YAML")
    parser.add_argument("--plan", action="store_true", help="print what would be made; read headers, write nothing")
    parser.add_argument("--where", action="store_true", help="print the directory that it would be, for scripts")
    parser.add_argument(
        "--picture",
        type=picture_size,
        default=(640, 480),
        metavar="WIDTHxHEIGHT",
        help="whose tokens --plan counts (default: 640x480)",
    )
    parser.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="TEXT",
        help="then compare the graft's loss on a text (a file; default: a built-in one) with the LLM's. The built-in "
        "text is taken unasked where the architecture leaves something of the LLM out",
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="do not, even there: both models must be loaded for it"
    )
    parser.set_defaults(run=run_graft)


def picture_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a size such as 640x480") from None
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a size such as 640x480")
    return width, height


# What a graft shares with `qwen-merge merge` is told there by that command's options: how the file says it.
_IN_THE_FILE = (
    (", or put these files into the --materials-path directory", ""),
    (". --dtype writes one dtype", ""),
    ("--max-shard-size", "max_shard_size"),
    ("an --output-path", "an output"),
    ("--output-path", "output"),
    ("--mrope-section TIME,HEIGHT,WIDTH", "mrope_section: [TIME, HEIGHT, WIDTH]"),
    ("--mrope-section", "mrope_section"),
    ("--revision", "revision"),
)


def in_the_files_words(text: str) -> str:
    for option, key in _IN_THE_FILE:
        text = text.replace(option, key)
    return text


def run_graft(arguments: argparse.Namespace) -> int:
    try:
        return _run(arguments)
    except UserError as error:
        raise UserError(in_the_files_words(str(error))) from None


def _run(arguments: argparse.Namespace) -> int:
    from qwen_merge.graft import own_encoder
    from qwen_merge.graft.llms import LEFT_OUT
    from qwen_merge.graft.make import make
    from qwen_merge.graft.measure import measure, read_text
    from qwen_merge.graft.recipe import read
    from qwen_merge.graft.show import show, sizes
    from qwen_merge.merger.companions import PREPROCESSOR
    from qwen_merge.merger.sources import Source, open_source

    recipe = read(arguments.file)
    if arguments.where:
        print(recipe.output)
        return 0
    text = read_text(Path(arguments.measure) if arguments.measure else None)
    if arguments.plan:
        show(recipe, arguments.picture)
        return 0
    report = make(recipe)
    plan = report.plan
    print(f"{report.output}")
    print(f"  from the tower's checkpoint  {len(plan.of('vlm'))} tensors copied")
    print(f"  from the LLM                 {len(plan.of('llm'))} tensors copied")
    print(f"  initialised                  {len(plan.of('new'))} tensors (seed {recipe.seed})")
    print(
        f"  written                      {report.nbytes:,} bytes, {len(report.shards)} file(s), {report.seconds:.1f} s"
    )
    print(f"  pictures                     {sizes(recipe, Source(report.output, 'graft').read_json(PREPROCESSOR))}")
    for note in plan.notes:
        print(f"  note: {in_the_files_words(note)}")
    if (arguments.measure is not None or plan.dropped["llm"].get(LEFT_OUT)) and not arguments.no_measure:
        llm = open_source(recipe.llm.source, "llm", recipe.llm.revision)
        with own_encoder.known(recipe.vision.code, plan.config["vision_config"]):
            print(f"  measured: {measure(report.output, llm, text)}")
    return 0
