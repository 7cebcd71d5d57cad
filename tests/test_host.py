"""A table in memory that processes share: one copy, which outlives any of them."""

import os
import pickle
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from stores import FORMATS, claim_same_bits, content, zipf

from engram_lm.errors import DataError
from engram_lm.store.host import Host
from engram_lm.store.resident import COPIED_AT_ONCE, Resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is Linux's memfd")
FORMAT = FORMATS["fp8"]
# Each says a line, then goes on until it is killed.
MAKER = """
import sys, pickle, time, torch
from engram_lm.store.host import Host
from engram_lm.store.resident import Resident
format, bytes_VR = pickle.load(sys.stdin.buffer)
host = Host.of(Resident(bytes_VR, format))
print(host.address, flush=True)
time.sleep(600)
"""
READER = """
import sys, pickle, torch
host, bytes_VR = pickle.load(sys.stdin.buffer)
rows_M = torch.randint(0, host.rows, (500,))
while True:
    assert torch.equal(host.gather(rows_M), bytes_VR[rows_M])
    print("read", flush=True)
"""


@contextmanager
def process(code: str, *given):
    """A Python process that is given these by pickle, and is killed in the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        pickle.dump(given, child.stdin)
        child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.communicate()


def test_memory_outlives_a_reader_and_the_process_that_made_it():
    bytes_VR = content(FORMAT, 2000)
    with process(MAKER, FORMAT, bytes_VR) as maker:
        address = maker.stdout.readline().decode().strip()
        host = Host.attach(address, FORMAT)
        with process(READER, host, bytes_VR) as reader:
            assert reader.stdout.readline() == b"read\n"
            claim_same_bits(host, bytes_VR)
            reader.send_signal(signal.SIGKILL)
            assert reader.wait() == -signal.SIGKILL
        claim_same_bits(host, bytes_VR)
    assert maker.returncode == -signal.SIGKILL
    with host:
        claim_same_bits(host, bytes_VR)
        with pickle.loads(pickle.dumps(host)) as again:
            claim_same_bits(again, bytes_VR)


@pytest.mark.parametrize("kind", [Host, Resident])
def test_copying_tells_every_byte_it_has_copied(kind):
    pieces = []
    store = Resident(content(FORMAT, 2 * COPIED_AT_ONCE // 264 + 9), FORMAT)
    with kind.of(store, progress=pieces.append) as copied:
        claim_same_bits(copied, store.bytes_VR)
    assert len(pieces) == 3 and sum(pieces) == store.bytes_VR.nbytes


def test_processes_map_one_memory_and_not_copies():
    host = Host.of(Resident(content(FORMAT, 50), FORMAT))
    with host, Host.attach(host.address, FORMAT) as other:
        assert os.stat(host.address).st_ino == os.stat(other.address).st_ino
        host._bytes_VR[7] = 9  # what no reader does, seen by all
        assert (other.gather(torch.tensor([7])) == 9).all()


def test_memory_cannot_be_cut_under_a_reader():
    with Host.of(Resident(content(FORMAT, 50), FORMAT)) as host:
        for size in (0, 50 * 264 - 1, 50 * 264 + 1):
            with pytest.raises(PermissionError):
                os.truncate(host.address, size)


def test_closing_gives_the_memory_back_and_no_descriptor_stays():
    before = len(os.listdir("/proc/self/fd"))
    host = Host.of(Resident(content(FORMAT, 5000), FORMAT))
    other = Host.attach(host.address, FORMAT)
    address = host.address
    other.close()
    host.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "engram-table" not in Path("/proc/self/maps").read_text()
    with pytest.raises(DataError, match="no table in shared memory"):
        Host.attach(address, FORMAT)


def test_what_is_no_shared_table_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(264))
    with pytest.raises(DataError, match="file: not a table in shared memory"):
        Host.attach(str(tmp_path / "file"), FORMAT)
    with pytest.raises(DataError, match=r"none: no table in shared memory \(No such file"):
        Host.attach(str(tmp_path / "none"), FORMAT)
    message = "not a table in shared memory with 320 bytes a row"
    host = Host.of(Resident(content(FORMAT, 50), FORMAT))
    with host, pytest.raises(DataError, match=message):
        Host.attach(host.address, FORMATS["bf16"])


def test_a_store_that_cannot_be_copied_leaves_nothing_behind():
    class Broken(Resident):
        def gather(self, rows_M):
            raise DataError("no row can be read")

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="no row can be read"):
        Host.of(Broken(content(FORMAT, 5), FORMAT))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.gpu
def test_shared_memory_is_pinned_and_gives_the_same_bits_to_a_gpu():
    bytes_VR = content(FORMAT, 2000)
    with Host.of(Resident(bytes_VR, FORMAT)) as host:
        assert host._bytes_VR.is_pinned()
        rows_M = zipf(2000, 500)
        assert torch.equal(host.gather(rows_M).cuda().cpu(), bytes_VR[rows_M])
