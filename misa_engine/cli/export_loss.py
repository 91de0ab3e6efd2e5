"""``misa export --check_loss``: what a lossy delta changes in held-out loss, measured and written into the delta."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from misa_engine.errors import UserError

if TYPE_CHECKING:
    from misa_engine.export.document import Document


def check_text(given: str, form: str) -> Path | None:
    """The text of ``--check_loss``; None where none was named.

    Raises:
        UserError: the form is exact, or the file is not there or of another kind.
    """
    if form == "exact":
        raise UserError("--check_loss is about --form sparse and low_rank: the exact form changes no loss.")
    if not given:
        return None
    text = Path(given).expanduser()
    if text.suffix not in (".txt", ".jsonl") or not text.is_file():
        raise UserError(f"--check_loss {given}: a .txt file, or .jsonl with a column 'text', is needed; looked in "
                        f"{Path.cwd()}.")  # fmt: skip
    return text


def state_loss(document: Document, model: Path, base: Path, delta: Path, text: Path | None) -> str:
    """Restore the model from its delta in a temporary directory, compare the losses, write them into the delta.

    Args:
        document: of the delta; ``total`` gets ``loss``, ``loss_restored``, ``loss_error`` and ``loss_text``.
        model: directory of the trained model.
        base: directory of the model that it was trained from.
        delta: directory of the delta, which has room for the restored model beside it.
        text: a file of held-out text; None takes the text of misa eval's ``forgetting``.

    Returns:
        A line for the user.

    Raises:
        UserError: the model has no tokenizer, or the text cannot be read.
    """
    from misa_engine.cli.evaluate import subjects_of
    from misa_engine.evaluation import Settings, evaluate
    from misa_engine.evaluation.forgetting import LOSS
    from misa_engine.evaluation.tasks import FORGETTING
    from misa_engine.export.applying import apply_delta
    from misa_engine.trainer.manifest import write_manifest

    with tempfile.TemporaryDirectory(dir=delta.parent, prefix=f".{delta.name}-") as folder:
        place = Path(folder)
        apply_delta(delta, base, place / "restored")
        data = None
        if text is not None:
            data = place / "data"
            data.mkdir()
            shutil.copyfile(text, data / f"{FORGETTING}{text.suffix}")
        start, restored = subjects_of([str(model), str(place / "restored")])
        found = evaluate([restored], [FORGETTING], place / "eval", base=start, settings=Settings(data=data),
                         say=lambda line: None)  # fmt: skip
        losses = {one.model: one.metrics[LOSS].value for one in found.results}
        paired = found.against_reference(restored.label, FORGETTING, LOSS)
    name = text.name if text is not None else str(found.results[0].settings["text"])
    error = None if paired is None else paired.stderr
    document.total |= {
        "loss": losses[start.label], "loss_restored": losses[restored.label], "loss_error": error, "loss_text": name,
    }  # fmt: skip
    document.write(delta)
    write_manifest(delta, 0)  # again: it holds the document's checksum
    difference = losses[restored.label] - losses[start.label]
    spread = "" if error is None else f" \u00b1 {error:.4f}"
    return (
        f"loss     {losses[start.label]:.4f} of the model, {losses[restored.label]:.4f} restored: {difference:+.4f}"
        f"{spread} nats a token on {name}"
    )
