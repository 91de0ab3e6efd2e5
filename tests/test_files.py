"""Files that appear whole: what is there after a write, an error, a write that was never finished."""

from pathlib import Path

import pytest

from misa_engine.files import PART, replacing, write_whole


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_whole(path, "first ü")
    with replacing(path) as part:
        part.write_bytes(b"second")
        assert path.read_text(encoding="utf-8") == "first ü" and part.suffix == PART
    assert path.read_bytes() == b"second"
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_bytes(b"thi")
        raise OSError("disk full")
    assert path.read_bytes() == b"second" and [one.name for one in path.parent.iterdir()] == ["results.json"]


def test_an_archive_holds_no_half_written_file(tmp_path: Path) -> None:
    import tarfile

    from misa_engine.bench.runner import pack, write

    folder = tmp_path / "out"
    write({"peak": [1, 2]}, folder / "results.json")
    (folder / f"results.json.123{PART}").write_text("{")
    pack(folder, folder / "out.tar.gz")
    with tarfile.open(folder / "out.tar.gz") as tar:
        assert tar.getnames() == ["out/results.json"]
    assert '"peak": [1, 2]' in (folder / "results.json").read_text()
