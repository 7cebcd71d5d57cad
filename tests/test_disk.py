"""Rows in files: what is read, when, how often, and what is refused."""

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stores import FORMATS, content, shards, split_disk, write, zipf

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.store import row_file
from engram_lm.store.ahead import PATIENCE, Ahead
from engram_lm.store.disk import HINTED_AT_ONCE, SLICE, Disk
from engram_lm.store.region import Region
from engram_lm.store.released import Released
from engram_lm.store.row_file import PAGE, WINDOW, Extents, RowFile

KIT = Path(__file__).parents[1] / "conformance"
FP8 = FORMATS["fp8"]


@pytest.fixture
def rows(tmp_path):
    bytes_VR = content(FP8, 40_000)
    region = write(tmp_path / "rows", bytes_VR, offset=100)
    return region, bytes_VR


@pytest.fixture
def on_disk(rows):
    """The same, no page of it in memory."""
    descriptor = os.open(rows[0].path, os.O_RDWR)
    os.fsync(descriptor)  # a page that is not written yet stays in the cache
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return rows


@pytest.mark.parametrize("size", [1, WINDOW * 5, SLICE, SLICE * 2 + 1])
@pytest.mark.parametrize("sparse", [True, False])
def test_long_requests_are_read_window_by_window(rows, size, sparse):
    region, bytes_VR = rows
    rows_M = torch.randperm(len(bytes_VR))[:size] if sparse else torch.arange(size) + 7
    with Disk(FP8, [[region]]) as store:
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])


def test_extents_cover_all_rows_and_join_neighbouring_pages():
    offset_K = np.unique(np.random.default_rng(0).integers(0, 400 * PAGE, 300))
    extents = Extents.of(offset_K, 264)
    covered = [
        page
        for offset, size in zip(extents.offsets, extents.sizes, strict=True)
        for page in range(offset // PAGE, (offset + size) // PAGE)
    ]
    wanted = {o // PAGE for o in offset_K.tolist()} | {(o + 263) // PAGE for o in offset_K.tolist()}
    assert covered == sorted(wanted)
    joined = sum(a + 1 != b for a, b in pairwise(covered)) + 1
    assert len(extents.offsets) == joined < len(covered)


class Kernel:
    """Counts what is asked of the kernel the plain way, and may answer badly."""

    def __init__(self, answer=None):
        self.reads, self.asked, self.handed_back = [], [], []
        self.preadv, self.fadvise, self.answer = os.preadv, os.posix_fadvise, answer

    def read(self, descriptor, views, offset):
        self.reads.append((offset, len(views[0])))
        if self.answer is None:
            return self.preadv(descriptor, views, offset)
        return self.answer(len(self.reads), self.preadv, descriptor, views, offset)

    def advise(self, descriptor, offset, size, advice):
        if advice == os.POSIX_FADV_WILLNEED:
            self.asked.append((offset, size))
        elif advice == os.POSIX_FADV_DONTNEED:
            self.handed_back.append((offset, size))
        self.fadvise(descriptor, offset, size, advice)

    def __enter__(self):
        self.patches = [
            mock.patch.object(row_file, "_compiled", lambda: None),
            mock.patch.object(os, "preadv", self.read),
            mock.patch.object(os, "posix_fadvise", self.advise),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


@pytest.mark.parametrize("size", [1, WINDOW * 5, SLICE * 2 + 1])
@pytest.mark.parametrize("width", [8, 264, 5000])
def test_both_ways_of_reading_give_the_same_bytes_and_count_the_same_pages(tmp_path, size, width):
    bytes_VW = torch.randint(0, 256, (40_000 if width < 5000 else 4000, width)).byte()
    region = write(tmp_path / "rows", bytes_VW, offset=100)
    rows_K = torch.randperm(len(bytes_VW))[:size].sort().values
    read = []
    for way in (row_file._compiled, lambda: None):
        into_KW = np.zeros((len(rows_K), width), np.uint8)
        file = RowFile(region.path, region.end)
        with mock.patch.object(row_file, "_compiled", way):
            pages = file.read_rows(100 + rows_K.numpy() * width, into_KW)
        file.close()
        assert np.array_equal(into_KW, bytes_VW[rows_K].numpy())
        read.append(pages)
    assert read[0] == read[1]


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <sys/types.h>
static int reads;
static void note(const char *name, long from, long size) {
    FILE *log = fopen("log", "a");
    fprintf(log, "%s %ld %ld\n", name, from, size);
    fclose(log);
}
ssize_t pread(int file, void *into, size_t size, off_t from) {
    ssize_t (*real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    note("pread", from, size);
    reads++;
    if (reads == EIO_AT) { errno = EIO; return -1; }
    return real(file, into, reads == SHORT_AT ? size / 2 : size, from);
}
int posix_fadvise(int file, off_t from, off_t size, int advice) {
    int (*real)(int, off_t, off_t, int) = dlsym(RTLD_NEXT, "posix_fadvise");
    note(advice == 3 ? "willneed" : "dontneed", from, size);
    return real(file, from, size, advice);
}
"""
READS = """
import sys, numpy as np
from pathlib import Path
from engram_lm.store.row_file import RowFile
path, *rows = sys.argv[1:]
rows_K = np.array(rows, np.int64)
into_KW = np.zeros((len(rows), 264), np.uint8)
file = RowFile(Path(path), 0)
Path("log").unlink(missing_ok=True)
print(file.read_rows(100 + rows_K * 264, into_KW))
Path("bytes").write_bytes(into_KW.tobytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="puts a library before the system's")
@pytest.mark.parametrize("fault", ["", "EIO_AT", "SHORT_AT"])
def test_what_a_compiled_read_does_not_get_is_read_plainly(rows, tmp_path, fault):
    """Faults come from a library between the compiled code and the system's own."""
    region, bytes_VR = rows
    rows_K = [3, 5, 900, 901, 902, 20_000, 39_999]
    (tmp_path / "shim.c").write_text(SHIM)
    faults = [f"-D{name}={2 if name == fault else -1}" for name in ("EIO_AT", "SHORT_AT")]
    compiler = ["cc", "-shared", "-fPIC", *faults, "-o", "shim.so", "shim.c"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", READS, str(region.path), *map(str, rows_K)],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "bytes").read_bytes() == bytes_VR[rows_K].numpy().tobytes()
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    calls = {name: [each[1:] for each in log if each[0] == name] for name, *_ in log}
    reads = [[str(100 + row * 264), str(count * 264)] for row, count in ((3, 1), (5, 1), (900, 3))]
    if fault:  # the second read goes wrong: the rest is read by other calls
        assert calls["pread"] == reads[:2]
        return
    assert calls["pread"][:3] == reads and len(calls["pread"]) == 5
    assert calls["willneed"] == calls["dontneed"]
    assert int(done.stdout) == sum(int(size) for _, size in calls["willneed"])
    pages = {(100 + row * 264 + byte) // PAGE for row in rows_K for byte in (0, 263)}
    assert int(done.stdout) == len(pages) * PAGE


def test_rows_asked_for_often_are_read_once_and_neighbours_together(rows):
    region, bytes_VR = rows
    rows_M = torch.tensor([900, 5, 901, 5, 7, 902, 900, 30_000])
    with Kernel() as kernel, Disk(FP8, [[region]]) as store:
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
    sizes = {(offset - 100) / 264: size / 264 for offset, size in kernel.reads}
    assert sizes == {5: 1, 7: 1, 900: 3, 30_000: 1}
    assert kernel.asked == kernel.handed_back  # nothing stays in the page cache
    assert len(kernel.asked) == 3  # rows 5 and 7 share a page


def test_a_hint_starts_reading_and_the_gather_asks_the_kernel_for_nothing_else(rows):
    region, bytes_VR = rows
    rows_M = torch.randperm(len(bytes_VR))[:HINTED_AT_ONCE]
    with Disk(FP8, [[region]]) as store:
        with Kernel() as kernel:
            store.prefetch(rows_M)
            hinted = set(kernel.asked)
            assert hinted and not kernel.reads
            store.prefetch(rows_M)
            assert set(kernel.asked) == hinted and len(kernel.asked) == len(hinted)
            assert len(store._ahead) == HINTED_AT_ONCE
            assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        assert set(kernel.asked) == hinted
        assert len(store._ahead) == 0


def test_rows_and_pages_are_counted_as_read_whoever_asks(tmp_path):
    bytes_VR = content(FP8, 3000)
    with split_disk(bytes_VR, FP8, tmp_path) as store, ThreadPoolExecutor(4) as readers:
        requests = [zipf(3000, 400) for _ in range(40)]
        list(readers.map(store.gather, requests))
        assert store.rows_read == sum(len(request.unique()) for request in requests)
        pages = 0
        for request in requests:
            for width in (256, 8):  # of values and of scales, each cut after 1,000 rows
                places = [(row >= 1000, row - 1000 * (row >= 1000)) for row in request.tolist()]
                ends = [
                    (late, 13 + row * width + byte)
                    for late, row in places
                    for byte in (0, width - 1)
                ]
                pages += len({(late, byte // PAGE) for late, byte in ends})
        assert store.bytes_read == pages * PAGE


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_pages_on_their_way_are_not_read_twice(on_disk):
    region, bytes_VR = on_disk

    def read_bytes():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    rows_M = torch.arange(0, 40_000, 40_000 // HINTED_AT_ONCE)[:HINTED_AT_ONCE]
    pages = Extents.of(100 + rows_M.numpy() * 264, 264)
    with Disk(FP8, [[region]]) as store:
        store.gather(torch.tensor([39_999]))
        before = read_bytes()
        store.prefetch(rows_M)
        counted = store.bytes_read
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        taken = read_bytes() - before
        assert store.bytes_read - counted == sum(pages.sizes)
    assert taken < 2 * sum(pages.sizes)


def test_hints_beyond_their_budget_are_dropped_and_old_ones_give_way():
    ahead = Ahead(room=4)
    ahead.add(np.array([50, 3, 50, 9]))
    assert ahead.begin(2).tolist() == [3, 50]
    ahead.add(np.array([3, 1, 2]))
    assert len(ahead) == 4 and ahead.begin(9).tolist() == [1, 9]
    ahead.gathered(np.array([3, 9]))
    ahead.add(np.array([60, 61, 62]))
    assert ahead.begin(9).tolist() == [60, 61] and len(ahead) == 4
    for _ in range(PATIENCE):
        ahead.gathered(np.array([7]))
    ahead.add(np.array([8]))
    assert ahead.begin(9).tolist() == [8] and len(ahead) == 1


def test_a_long_hint_is_started_by_a_thread_within_the_budget(rows):
    region, bytes_VR = rows
    rows_M = torch.randperm(len(bytes_VR))[:3000]
    with Kernel() as kernel, Disk(FP8, [[region]], ahead_bytes=2000 * PAGE) as store:
        store.prefetch(rows_M)
        assert len(store._ahead) == 2000
        store._thread.submit(int).result()
        hinted = {offset for offset, _ in kernel.asked}
        pages = (100 + rows_M[:2000].numpy() * 264) // PAGE * PAGE
        assert hinted and all(any(o <= p for o in hinted) for p in pages[:5])
        assert not len(store._ahead.begin(1))
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])


def test_short_reads_are_read_on(rows):
    region, bytes_VR = rows
    rows_M = torch.arange(0, 40_000, 200)
    short = lambda _n, preadv, fd, views, at: preadv(fd, [views[0][:100]], at)  # noqa: E731
    with Disk(FP8, [[region]]) as store, Kernel(short) as kernel:
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
    assert len(kernel.reads) == 3 * 200


def test_a_passing_fault_is_read_again_and_a_lasting_one_is_one_line(rows):
    region, bytes_VR = rows
    rows_M = torch.tensor([3, 500, 9])

    def passing(count, preadv, *rest):
        if count == 2:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*rest)

    def lasting(count, preadv, *rest):
        if count >= 2:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*rest)

    with Disk(FP8, [[region]]) as store:
        with Kernel(passing):
            assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        with Kernel(lasting), pytest.raises(DataError) as refusal:
            store.gather(rows_M)
        assert str(refusal.value) == (
            f"{region.path}: reading 264 bytes at byte {100 + 9 * 264}: Input/output error"
        )
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])


def test_a_file_that_is_cut_or_written_to_while_open_is_refused(rows):
    region, bytes_VR = rows
    with Disk(FP8, [[region]]) as store:
        os.utime(region.path, ns=(1, 1))
        with pytest.raises(DataError, match="rows: it was changed after it had been opened"):
            store.gather(torch.tensor([1]))
        os.truncate(region.path, region.end - 10)
        with pytest.raises(DataError, match="ends before byte .* truncated after it had been"):
            store.gather(torch.tensor([len(bytes_VR) - 1]))


def cut_and_filled(path: Path) -> None:
    content = path.read_bytes()
    os.truncate(path, 100)
    with path.open("r+b") as file:
        file.write(content[::-1])


def mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[200] ^= 1


@pytest.mark.parametrize("write_to", [cut_and_filled, mapped])
def test_a_file_whose_time_is_put_back_after_writing_is_refused(rows, write_to):
    path, state = rows[0].path, rows[0].path.stat()
    with Disk(FP8, [[rows[0]]]) as store:
        write_to(path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert path.stat().st_mtime_ns == state.st_mtime_ns
        with pytest.raises(DataError, match="rows: it was changed after it had been opened"):
            store.gather(torch.tensor([1]))


def test_a_file_that_is_renamed_or_linked_while_open_keeps_its_bits(rows, tmp_path):
    region, bytes_VR = rows
    rows_M = zipf(40_000, 100)
    with Disk(FP8, [[region]]) as store:
        (tmp_path / "link").hardlink_to(region.path)
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        (tmp_path / "link").unlink()
        region.path.rename(tmp_path / "aside")
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        (tmp_path / "aside").write_bytes(b"1" * region.end)
        with pytest.raises(DataError, match="changed after it had been opened|truncated"):
            store.gather(rows_M)


def test_a_file_that_is_replaced_while_open_keeps_its_bits(rows, tmp_path):
    region, bytes_VR = rows
    with Disk(FP8, [[region]]) as store:
        write(tmp_path / "other", content(FP8, 40_000), offset=100)
        os.replace(tmp_path / "other", region.path)
        rows_M = zipf(40_000, 100)
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        region.path.unlink()
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])


def test_files_that_cannot_hold_their_rows_are_refused_and_none_stays_open(rows, tmp_path):
    region, bytes_VR = rows
    before = len(os.listdir("/proc/self/fd"))
    os.truncate(region.path, region.end - 1)
    good = write(tmp_path / "a", bytes_VR)
    with pytest.raises(DataError, match=f"rows end at byte {region.end}: truncated"):
        Disk(FP8, [[good, region]])
    with pytest.raises(DataError, match="none: No such file"):
        Disk(FP8, [[good, Region(path=tmp_path / "none", offset=0, rows=1, row_bytes=264)]])
    with pytest.raises(DataError, match="not a file"):
        Disk(FP8, [[Region(path=tmp_path, offset=0, rows=0, row_bytes=264)]])
    assert len(os.listdir("/proc/self/fd")) == before


def test_parts_that_do_not_make_rows_of_the_format_are_refused(tmp_path):
    bytes_VR = content(FP8, 30)
    values = shards(tmp_path / "values", bytes_VR[:, :256])
    scales = shards(tmp_path / "scales", bytes_VR[:, 256:])
    with pytest.raises(MismatchError, match="264 in all"):
        Disk(FP8, [values])
    with pytest.raises(MismatchError, match="264 in all"):
        Disk(FP8, [])
    with pytest.raises(ConfigError, match="ahead_bytes=-1: 0 or more"):
        Disk(FP8, [values, scales], ahead_bytes=-1)
    with pytest.raises(MismatchError, match=r"parts of \[30, 20\] rows"):
        Disk(FP8, [values, scales[2:]])
    split_disk(bytes_VR, FP8, tmp_path).close()


@pytest.mark.parametrize("family", ["deepseek_v41", "qwen4_exp"])
def test_released_tables_are_the_same_on_disk_in_memory_and_in_their_tensors(family):
    released = Released(KIT / family)
    tensors = {}
    for path in (KIT / family).glob("model*.safetensors"):
        tensors |= load_file(path)
    for layer in released.layers:
        if family == "deepseek_v41":
            parts = [tensors[f"layers.{layer}.engram.embed.{n}"] for n in ("weight", "scale")]
            wanted_VR = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
        else:
            name = f"model.layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{{}}.weight"
            wanted_VR = torch.cat([tensors[name.format(i)] for i in range(4)]).view(torch.uint8)
        with released.table(layer, where="disk") as disk, released.table(layer) as memory:
            assert disk.format == memory.format and disk.rows == memory.rows == len(wanted_VR)
            for rows_M in (torch.arange(disk.rows), zipf(disk.rows, 500)):
                assert torch.equal(disk.gather(rows_M), wanted_VR[rows_M])
                assert torch.equal(memory.gather(rows_M), wanted_VR[rows_M])


def copied(family: str, directory: Path) -> Path:
    return Path(shutil.copytree(KIT / family, directory / family))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_released_files_that_are_not_whole_are_refused(where, tmp_path):
    directory = copied("deepseek_v41", tmp_path)
    shard = directory / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for damaged, message in ((whole[:-1], "truncated"), (whole + b"\0", "overlong")):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            Released(directory).table(14, where=where)
    index = directory / "model.safetensors.index.json"
    shard.write_bytes(whole)
    names = json.loads(index.read_text())
    names["weight_map"]["layers.14.engram.embed.scale"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(names))
    with pytest.raises(DataError, match="no tensor layers.14.engram.embed.scale"):
        Released(directory).table(14, where=where)


def test_a_released_file_that_is_replaced_while_being_opened_is_refused(tmp_path):
    directory = copied("qwen4_exp", tmp_path)
    path = directory / "model.safetensors"

    def late(*given):
        save_file({"a": torch.zeros(5), **load_file(path)}, path)
        return Disk(*given)

    with (
        mock.patch("engram_lm.store.released.Disk", late),
        pytest.raises(DataError, match="replaced while it was being opened"),
    ):
        Released(directory).table(1, where="disk")


def test_released_tables_of_other_dtypes_or_shapes_are_refused(tmp_path):
    directory = copied("qwen4_exp", tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    good = tensors[name.format(1)]
    for bad, message in ((good.float(), "the shard before"), (good.flatten(), "a matrix")):
        save_file({**tensors, name.format(1): bad.clone()}, path)
        with pytest.raises(MismatchError, match=message):
            Released(directory).table(1, where="disk")
    save_file({**tensors, **{name.format(i): good.short() for i in range(4)}}, path)
    with pytest.raises(ConfigError, match="a table of I16 values: F32, BF16"):
        Released(directory).table(1, where="disk")
    with pytest.raises(ConfigError, match="where='ram': 'memory' or 'disk'"):
        Released(KIT / "qwen4_exp").table(1, where="ram")
