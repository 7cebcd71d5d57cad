"""Tables, row gradients, row formats, and stores that plug in beside the table."""

import pytest
import torch

from engram_lm.config import deepseek_v41
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.rows import RowFormat, RowStore
from engram_lm.memory.specification import Specification
from engram_lm.memory.table import Table


def test_a_table_may_have_more_rows_than_32_bits_count():
    rows = 3 * 2**31
    table = Table(rows, 8, device="meta")
    assert table.weight.shape == (rows, 8) and table.weight.numel() == rows * 8
    specification = Specification(layers=(0,), rows_per_head=(2**31,), heads=3, pad_id=0)
    addresses = Addresses(specification, CanonicalMap(torch.arange(1000)))
    row_numbers = addresses.rows(torch.randint(0, 1000, (4, 100)))
    offsets, primes = specification.offsets(0), specification.primes[0][0]
    assert offsets[2] > 2**32 and int(row_numbers[..., 2].min()) >= offsets[2]
    assert int(row_numbers[..., 2].max()) < offsets[2] + primes[2] == specification.table_rows(0)
    gathered = table.weight.index_select(0, row_numbers.flatten().to("meta"))
    assert gathered.shape == (1200, 8)


def test_deepseek_v41_element_counts_pass_2_to_31_on_a_meta_table():
    specification = deepseek_v41().specification
    table = Table(specification.table_rows(1), 256, dtype=torch.bfloat16, device="meta")
    assert table.weight.numel() == 384_006_168 * 256 > 2**31


def test_row_gradient_is_the_merged_sum_over_repeats_and_backward_passes():
    table = Table(10, 2)
    table.accumulate(torch.tensor([7, 3, 7]), torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    table.accumulate(torch.tensor([3, 0]), torch.tensor([[1.0, 1], [2, 2]]))
    rows, values = table.row_gradient
    assert rows.tolist() == [0, 3, 7]
    assert values.tolist() == [[2, 2], [4, 5], [6, 8]]


def memory_of(store, layer: int = 0, heads: int = 2) -> Memory:
    specification = Specification(layers=(layer,), rows_per_head=(11,), heads=heads, pad_id=0)
    return Memory(Addresses(specification, CanonicalMap(torch.arange(50))), {layer: store})


def test_backward_leaves_rows_with_the_table_and_nothing_in_grad():
    table = Table(11 + 13, 4)
    pending = memory_of(table).start(torch.tensor([[3, 4, 3, 4]]))
    pending.wait(0).sum().backward()
    rows, values = table.row_gradient
    asked, counts = pending.rows_LBTH.unique(return_counts=True)
    assert torch.equal(rows, asked)
    assert torch.equal(values, counts[:, None].float().expand(-1, 4))
    assert table.weight.grad is None


def test_frozen_rows_get_no_gradient():
    table = Table(24, 4).requires_grad_(False)
    vectors = memory_of(table).start(torch.tensor([[3, 4]])).wait(0)
    assert not vectors.requires_grad and table.row_gradient is None


class Bytes(RowStore):
    """A store that is no table: rows as bytes in host memory."""

    def __init__(self, format: RowFormat, content: torch.Tensor) -> None:
        self.format, self.content, self.hints = format, content, []

    def gather(self, rows_M: torch.Tensor) -> torch.Tensor:
        return self.content[rows_M]

    def prefetch(self, rows_M: torch.Tensor) -> None:
        self.hints.append(rows_M)

    def close(self) -> None: ...


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_store_of_the_same_bytes_gives_the_same_bits(dtype):
    table = Table(24, 4, dtype=dtype)
    store = Bytes(table.format, table.weight.detach().view(torch.uint8))
    ids = torch.randint(0, 50, (2, 9))
    ours, theirs = memory_of(table).start(ids), memory_of(store).start(ids)
    assert torch.equal(ours.wait(0), theirs.wait(0))
    assert torch.equal(store.hints[0], ours.rows_LBTH.flatten())  # asked for before anyone waits


def test_fp8_rows_with_ue8m0_scales_decode_exactly():
    format = RowFormat(dtype=torch.float8_e4m3fn, dim=64, scale_group=32)
    values = torch.randn(5, 64).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[127, 120], [20, 234], [130, 21], [127, 127], [97, 140]])
    rows = torch.cat([values.view(torch.uint8), exponents.to(torch.uint8)], dim=1)
    assert format.row_bytes == rows.shape[1] == 66
    slow = values.double() * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, dim=1)
    assert torch.equal(format.decode(rows).double(), slow)
    assert RowFormat(dtype=torch.float8_e4m3fn, dim=256, scale_group=32).row_bytes == 264


@pytest.mark.gpu
def test_lookup_and_row_gradient_on_a_gpu_equal_those_on_the_cpu():
    ids = torch.randint(0, 50, (2, 33))
    cpu = Table(24, 8)
    gpu = Table(24, 8).cuda()
    gpu.load_state_dict(cpu.state_dict())
    ours, theirs = memory_of(cpu).start(ids).wait(0), memory_of(gpu).start(ids.cuda()).wait(0)
    assert torch.equal(ours, theirs.cpu())
    (ours**2).sum().backward()
    (theirs**2).sum().backward()
    assert torch.equal(cpu.row_gradient.rows_U, gpu.row_gradient.rows_U.cpu())
    # Repeats are summed in another order on a GPU: a few ulps.
    torch.testing.assert_close(cpu.row_gradient.values_UE, gpu.row_gradient.values_UE.cpu())
