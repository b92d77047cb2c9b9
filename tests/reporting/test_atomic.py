import pytest

from clinfuse.reporting.atomic import write_atomically


def test_text_and_bytes_are_written_and_folders_made(tmp_path):
    assert write_atomically(tmp_path / "new" / "a.txt", "β = 1.2").read_text("utf-8") == "β = 1.2"
    assert write_atomically(tmp_path / "b.png", b"\x89PNG").read_bytes() == b"\x89PNG"


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_rubbish(tmp_path):
    path = write_atomically(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
