"""`qwen-merge chat`: look at what a checkpoint answers before writing any code against it.

    qwen-merge chat outputs/Qwen-Merge-VL-4B-stage3 --image cat.jpg -q "What is in the picture?"      in this process
    qwen-merge chat --endpoint http://localhost:8000/v1 --image cat.jpg -q "What is in the picture?"  through a server

Without a question it reads them line by line from standard input, as one conversation.
"""

import argparse
import sys
from pathlib import Path


def add_parsers(subparsers) -> None:
    parser = subparsers.add_parser("chat", help="ask a checkpoint or a server about a picture or a video")
    parser.add_argument("model_dir", nargs="?", type=Path, metavar="MODEL_DIR", help="a checkpoint, without --endpoint")
    parser.add_argument("-q", "--question", help="what to ask (default: questions from standard input)")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="an OpenAI-compatible server, such as http://localhost:8000/v1; a URL without a path gets /v1",
    )
    parser.add_argument("--model", help="the model's name at the endpoint (default: the first one it serves)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--video", type=Path, action="append", default=[], help="a video")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--no-think", action="store_true", help="ask for an answer without a thought")
    parser.add_argument("--hide-thoughts", action="store_true", help="print the answer alone")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="end the thought after N tokens (server only)")
    parser.add_argument("--max-tokens", "--max-new-tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the thought (dimmed on a terminal) and the answer as they come."""
    from qwen_merge.chat import conversation
    from qwen_merge.errors import UserError

    model_dir = arguments.model_dir
    if (model_dir is None) == (arguments.endpoint is None):
        raise UserError(
            f"{'both MODEL_DIR and' if model_dir else 'neither MODEL_DIR nor'} --endpoint given; expected one.\n"
            "Name a checkpoint (qwen-merge chat MODEL_DIR --image FILE -q QUESTION) or a server's address "
            "(--endpoint http://localhost:8000/v1)."
        )
    missing = [str(path) for path in (*arguments.image, *arguments.video) if not path.is_file()]
    if missing:
        raise UserError(f"no such file: {', '.join(missing)}.")
    if arguments.thinking_budget is not None and model_dir is not None:
        raise UserError("--thinking-budget is an option of the server.\nStart ./scripts/serve.sh and use --endpoint.")
    settings = conversation.Settings(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        thinking=not arguments.no_think,
        thinking_budget=arguments.thinking_budget,
    )
    answerer = (
        conversation.InProcess(model_dir, settings)
        if model_dir is not None
        else conversation.Endpoint(arguments.endpoint, arguments.model, settings)
    )
    messages = conversation.opening(arguments.system)
    media = (arguments.image, arguments.video)
    for question in [arguments.question] if arguments.question else _questions():
        messages.append(conversation.question(question, *media))
        media = ((), ())  # shown once, seen in the whole conversation
        answer = _print(answerer.answer(messages), hide_thoughts=arguments.hide_thoughts)
        if answer and answerer.cut_off:
            print(f"qwen-merge chat: cut off after {arguments.max_tokens} tokens (--max-tokens).", file=sys.stderr)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return 0


def _questions():
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _print(pieces, *, hide_thoughts: bool) -> str:
    """Print (kind, text) pieces and return the text of the answer."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    answer, kind_before = "", None
    for kind, text in pieces:
        if kind == "answer":
            answer += text
        if kind == "thought" and hide_thoughts:
            continue
        if kind != kind_before:
            sys.stdout.write((dim if kind == "thought" else plain) + ("" if kind_before is None else "\n"))
        sys.stdout.write(text if kind == kind_before else text.lstrip("\n"))
        kind_before = kind
        sys.stdout.flush()
    print(plain)
    if not answer.strip():
        print(
            "qwen-merge chat: the thought was not closed, so there is no answer; raise --max-tokens.", file=sys.stderr
        )
    return answer.strip()
