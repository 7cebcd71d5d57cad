import pytest

from engram_lm import whole


def test_a_file_is_what_it_was_until_it_is_whole(tmp_path):
    path = tmp_path / "record.json"
    whole.write(path, "早 1\n")
    assert path.read_bytes() == "早 1\n".encode()
    with whole.aside(path) as partial:
        partial.write_text("2")
        assert path.read_bytes() == "早 1\n".encode()
    assert path.read_text() == "2"
    with pytest.raises(OSError), whole.aside(path) as partial:
        partial.write_text("half of")
        raise OSError("no room")
    assert path.read_text() == "2"
    assert path.parent == partial.parent
