"""What a trained model changed against its base, and back: ``export_delta`` writes it, ``apply_delta`` restores it.

    export_delta(Path("out"), Path("base"), Path("delta"))       only what differs, bit for bit
    apply_delta(Path("delta"), Path("base"), Path("restored"))   the files of out again, byte for byte

Both go through the model one tensor at a time. A delta is a directory of ``misa_delta.json`` (what was stored how, the
checksums of base and result), ``delta-*.safetensors``, the model's small files under ``files/``, and a list of all of
them with their checksums, written last.
"""

from __future__ import annotations

from misa_engine.export.applying import apply_delta
from misa_engine.export.writing import export_delta

__all__ = ["apply_delta", "export_delta"]
