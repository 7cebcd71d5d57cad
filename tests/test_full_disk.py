"""A disk that really runs full while a table is packed: a small tmpfs in a namespace of its own."""

import hashlib
import shutil
import subprocess
import sys

import pytest
from table_files import trainable

from engram_lm.store import packed
from engram_lm.store.pack import pack
from engram_lm.store.source import open_sources

MOUNTED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
# Once begun, somebody else takes all the room that is left.
PACKER = """
import os, sys, pathlib
from engram_lm.errors import DataError
from engram_lm.store import pack as pack_module, packed
from engram_lm.store.source import open_sources
packed.BLOCK_BYTES, pack_module.COMMIT_BLOCKS = 2**13, 4
model, out = sys.argv[1:]
greedy, (source, _) = pathlib.Path(out, "greedy"), open_sources(pathlib.Path(model))
blocks = 0
def progress(_):
    global blocks
    blocks += 1
    if blocks == 9:
        with greedy.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                assert error.strerror == "No space left on device"
path = pathlib.Path(out, "table.safetensors")
try:
    pack_module.pack(source, source.format, "packed", path, progress)
    sys.exit("the disk was not full")
except DataError as error:
    hint = "make room and start it again: it goes on"
    assert str(error) == f"{path}: No space left on device; {hint}"
assert not path.exists()
greedy.unlink()
begun = []
pack_module.pack(source, source.format, "packed", path, begun.append)
assert begun[0] >= 8 * 2**13, "nothing was kept"
sys.stdout.buffer.write(path.read_bytes())
"""


def namespace() -> bool:
    tried = [*MOUNTED, "mount -t tmpfs none /mnt"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(tried, capture_output=True).returncode
    )


@pytest.mark.skipif(not namespace(), reason="no file system may be mounted here")
def test_a_table_is_packed_on_when_there_is_room_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK_BYTES", 2**13)
    trainable(tmp_path / "model", 2000)
    (source, _) = open_sources(tmp_path / "model")
    pack(source, source.format, "packed", tmp_path / "whole.safetensors")
    (tmp_path / "full").mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$4" "$1"'
    given = [tmp_path / "full", sys.executable, PACKER, tmp_path / "model"]
    done = subprocess.run([*MOUNTED, mount, "sh", *given], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(whole).digest()
