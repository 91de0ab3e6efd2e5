"""``misa export`` and ``misa apply``: what a trained model changed against its base, and the model from both again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from misa_engine.cli.hub import check_reachable, is_path
from misa_engine.cli.parsing import Parser, positive, positive_size
from misa_engine.errors import DONE, UserError

if TYPE_CHECKING:
    from misa_engine.export.document import Document

EXPORT_USAGE = "misa export MODEL --delta BASE --output DIR [--form exact|sparse|low_rank] [--rank R] [--density D]"
APPLY_USAGE = "misa apply DELTA --base BASE --output DIR"
#: What of a base on the Hub is needed.
NEEDED = ["*.safetensors", "*.safetensors.index.json", "config.json"]


def export(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    parser = Parser(
        "misa export",
        usage=EXPORT_USAGE,
        description="Writes only what MODEL changed against BASE. misa apply makes the model again from both.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory of the trained model: an --output_dir, a checkpoint")
    parser.add_argument("--delta", metavar="BASE", help="directory or Hub id of the model that it was trained from")
    parser.add_argument("--output", metavar="DIR", help="where to write the delta; empty or not there yet")
    parser.add_argument(
        "--form",
        default="exact",
        help="exact: the model bit for bit (default)\n"
        "sparse: the numbers of each matrix that changed most\n"
        "low_rank: the change of each matrix as a product of two\n"
        "the last two say how far they are from the model",
    )
    parser.add_argument("--rank", type=positive, help="of low_rank (default: 64)")
    parser.add_argument("--density", type=positive_size, help="of sparse: share of the numbers kept (default: 0.1)")
    parser.add_argument("--check_loss", nargs="?", const="", metavar="TEXT",
        help="of a lossy form: also say how far the restored model's held-out loss is from the model's,\n"
        "on TEXT (.txt, or .jsonl with 'text'), else on Python's own reference")  # fmt: skip
    given = parser.parse_args(words)
    if not given.delta or not given.output:
        raise UserError(f"misa export needs --delta BASE and --output DIR. {EXPORT_USAGE}")
    from misa_engine.export.document import check_form
    from misa_engine.export.place import check_free
    from misa_engine.export.writing import export_delta

    check_form(given.form, given.rank, given.density)
    text = None
    if given.check_loss is not None:
        from misa_engine.cli.export_loss import check_text

        text = check_text(given.check_loss, given.form)
    output = Path(given.output).expanduser()
    check_free(output)
    model, base = _local(given.model), _base(given.delta, "--delta")
    with _Counter() as counter:
        document = export_delta(
            model,
            base,
            output,
            form=given.form,
            rank=given.rank,
            density=given.density,
            base_name=given.delta if not Path(given.delta).expanduser().exists() else None,
            progress=counter,
        )
    print(describe(document, output))
    if given.check_loss is not None:
        from misa_engine.cli.export_loss import state_loss

        print(state_loss(document, model, base, output, text))
    print(f"restore  misa apply {output} --base {given.delta} --output RESTORED")
    return DONE


def apply(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    parser = Parser(
        "misa apply",
        usage=APPLY_USAGE,
        description="Makes a model again from its base and the delta that misa export wrote.",
    )
    parser.add_argument("delta", metavar="DELTA", help="directory that misa export wrote")
    parser.add_argument("--base", help="directory or Hub id of the model that the delta was made against")
    parser.add_argument("--output", metavar="DIR", help="where to write the model; empty or not there yet")
    given = parser.parse_args(words)
    if not given.base or not given.output:
        raise UserError(f"misa apply needs --base BASE and --output DIR. {APPLY_USAGE}")
    from misa_engine.export.applying import apply_delta
    from misa_engine.export.place import check_free

    output = Path(given.output).expanduser()
    check_free(output)
    with _Counter() as counter:
        document = apply_delta(Path(given.delta).expanduser(), _base(given.base, "--base"), output, progress=counter)
    exact = "bit for bit" if document.form == "exact" else _errors(document)
    print(f"model    {output}   ({document.total['tensors']} tensors, {exact})")
    return DONE


def describe(document: Document, output: Path) -> str:
    """Some lines: what differs, what it takes, how far a lossy form is off, and where most of that lies."""
    total = document.total
    share = total["stored_bytes"] / max(1, total["model_bytes"])
    lines = [
        f"delta    {output}   ({total['changed']} of {total['tensors']} tensors differ from {document.base_name}; "
        f"{_size(total['stored_bytes'])} instead of {_size(total['model_bytes'])}, {share:.1%})"
    ]
    if document.form == "exact":
        return "\n".join([*lines, "form     exact: misa apply gives the same files, byte for byte"])
    option = ", ".join(f"{name} {value:g}" for name, value in document.options.items())
    lines.append(f"form     {document.form}, {option}: {_errors(document)}")
    lossy = [(entry.error, name) for name, entry in document.tensors.items() if entry.error is not None]
    for error, name in sorted(lossy, reverse=True)[:5]:
        lines.append(f"         {error:6.1%} of the change is missing in {name}")
    return "\n".join([*lines, "         all tensors: misa_delta.json"])


def _errors(document: Document) -> str:
    change, weights = document.total["error"], document.total["error_of_weights"]
    return f"{change:.1%} of the change is missing, {weights:.2e} of the weights (Frobenius norms)"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _local(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"model directory {name} does not exist; looked in {Path.cwd()}.")
    return path


def _base(name: str, option: str) -> Path:
    """The directory itself, or where the Hub's client keeps that model.

    Raises:
        UserError: there is neither.
    """
    path = Path(name).expanduser()
    if path.exists() or is_path(name):
        return _local(name)
    from huggingface_hub import snapshot_download

    check_reachable(name, "config.json", option)
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option} {name} cannot be had from the Hub: {reason}") from error


class _Counter:
    """Percent done, in one line of a terminal; nothing elsewhere."""

    def __enter__(self) -> _Counter:
        self._shown = -1
        return self

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if sys.stderr.isatty() and percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3} %", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._shown >= 0:
            print("\r     \r", end="", file=sys.stderr, flush=True)
