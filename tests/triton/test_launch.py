"""The functions that choose a launch configuration, on a grid of shapes, layouts and devices. No kernel runs.

Properties: the fields that determine the bits of a row follow from the row alone; every row belongs to exactly one
program; the rows of a program have the same alignment; a device is filled; memory that is read twice stays in L2.
"""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
from conftest import DEVICE

from fused_la._call.problem import Problem

pytest.importorskip("triton")
launch_config = importlib.import_module("fused_la._triton.launch_config")
operands = importlib.import_module("fused_la._triton.operands")
Device, Layout = launch_config.Device, launch_config.Layout

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = [Device(1, 1 << 20), Device(132, 50 << 20)]
SMALL_L2 = Device(132, 1 << 20)
AMD = Device(304, 4 << 20, warp_size=64)
N_ROWS = [1, 2, 3, 5, 16, 64, 255, 264, 1000, 4096, 100_003, 10**7]
N_CLASSES = [
    *(1, 2, 3, 7, 8, 9, 63, 64, 127, 128, 248, 255, 256, 257, 512, 513),  # from a vector to the shortest wide rows
    *(1000, 1023, 1024, 1025, 2048, 2049, 4097, 8142, 8192),  # one tile and more
    *(4096, 4110, 8195, 16384, 16385, 32768, 32769),  # resident and more, by dtype and target
    *(50257, 65537, 99991, 131072, 524289, 999_999, 10**6),  # one chunk and more
]  # fmt: skip


def layouts(n_classes):
    """Contiguous, misaligned, padded (evenly, oddly), one row repeated; the last three have no 16-byte vectors."""
    padded = -(-n_classes // 8) * 8
    return [
        *(Layout(True, shift, step) for shift in (0, 1) for step in (n_classes, padded, padded + 1, padded + 4, 0)),
        Layout(False, 0, 1), Layout(True, None, n_classes), Layout(True, 0, None),
    ]  # fmt: skip


def grid():
    for n_classes in N_CLASSES:
        for dtype, layout in itertools.product(DTYPES, layouts(n_classes)):
            yield n_classes, dtype, layout


def launches(n_rows, n_classes, dtype, layout, device):
    """The launches of these rows for every cost of a target."""
    for cost in (1, 2, 4):
        yield launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost)


def row_arithmetic(launch):
    """The fields that determine the bits of a row."""
    block_rows = launch.block_rows if launch.vec == 1 else None
    return (
        launch.vec, launch.resident, launch.full_c, launch.block_c, launch.chunk_tiles, launch.num_warps, block_rows,
    )  # fmt: skip


def test_the_bits_of_a_row_depend_on_neither_the_number_of_rows_nor_the_device():
    for (n_classes, dtype, layout), cost in itertools.product(grid(), (1, 2, 4)):
        found = {
            row_arithmetic(launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost))
            for n_rows, device in itertools.product(N_ROWS, DEVICES)
        }
        assert len(found) == 1, (n_classes, dtype, layout)


def test_constants_of_a_compiled_kernel_do_not_depend_on_the_number_of_rows():
    for (n_classes, dtype, layout), device, cost in itertools.product(grid(), DEVICES, (1, 2, 4)):
        compiled = set()
        for n_rows in N_ROWS:
            launch = launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost)
            may_make = launch_config.may_make_gradient(launch, n_classes, dtype, device, "mean")
            compiled.add((may_make, launch.resident, launch.tile_constants(), launch.num_warps))
        assert len(compiled) == 1, (n_classes, dtype, layout, device)


def bodies(n_classes, vec):
    """The body lengths of rows with `n_classes` classes, for every alignment of the first element."""
    return {(n_classes - head) // vec * vec for head in range(vec)}


def test_tiles_of_a_resident_row_are_in_its_body_and_cover_it():
    for n_classes, dtype, layout in grid():
        for launch in launches(1000, n_classes, dtype, layout, DEVICES[1]):
            if not launch.resident:
                assert launch.full_c == 0
            elif launch.vec == 1:
                assert launch.full_c == 0 <= n_classes <= launch.block_c
            else:
                for body in bodies(n_classes, launch.vec):
                    assert max(launch.full_c, launch.block_c) <= body <= launch.full_c + launch.block_c
                waste = (launch.full_c + launch.block_c) / n_classes
                assert waste <= 1.5, (n_classes, launch)


@pytest.mark.parametrize("cost", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_labels_is_resident_up_to_64_kilobytes_with_128_bytes_a_thread(dtype, cost):
    """32,768 classes in half precision, 16,384 in float32; other targets half or a quarter, with 64 bytes a thread."""
    most = (1 << 16) // dtype.itemsize // cost
    for n_classes in (256, 1000, most // 2, most - 1, most, most + 1, 2 * most):
        layout = Layout(True, 1, n_classes)
        for device, n_rows in itertools.product((*DEVICES, AMD), (1, 4096)):
            launch = launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost)
            assert launch.resident == (n_classes <= most)
            if launch.resident:
                n_threads, n_bytes = (
                    launch.num_warps * device.warp_size,
                    (launch.full_c + launch.block_c) * dtype.itemsize,
                )
                assert n_threads <= (256 if cost == 4 else 512)
                bytes_per_thread = 128 // min(cost, 2)
                assert n_bytes <= n_threads * bytes_per_thread * (1 if n_threads > device.warp_size else 2)
                assert (launch.block_rows, launch.splits, launch.n_chunks(n_classes)) == (1, 1, 1)


def test_wide_rows_are_summed_in_the_same_order_at_every_alignment():
    """A row has the same bits in an aligned and in a misaligned matrix."""
    for n_classes, dtype, cost in itertools.product([n for n in N_CLASSES if n >= 256], DTYPES, (1, 2, 4)):
        found = {
            row_arithmetic(launch_config.choose_launch_config(1000, n_classes, dtype, layout, DEVICES[1], cost))
            for layout in layouts(n_classes)[:-3]
        }
        assert len(found) == 1, (n_classes, dtype)


@pytest.mark.parametrize("n_classes", [1000, 8142, 50257, 99991])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_any_length_and_step_are_read_in_16_bytes(n_classes, dtype):
    for shift, step, n_rows, device in itertools.product(range(8), range(n_classes, n_classes + 9), (1, 4096), DEVICES):
        for launch in launches(n_rows, n_classes, dtype, Layout(True, shift, step), device):
            assert launch.vec * dtype.itemsize == 16, (shift, step)


def rows_of_groups(launch, n_rows, groups):
    """(len(groups), BLOCK_ROWS) row indices of each group, as the kernels compute them; -1 for no row."""
    first = groups // launch.period * (launch.block_rows * launch.period) + groups % launch.period
    rows = first[:, None] + launch.period * np.arange(launch.block_rows)
    return np.where(rows < n_rows, rows, -1)


def test_every_row_is_in_one_group_and_every_group_has_a_row():
    for n_rows in (1, 2, 3, 7, 8, 9, 33, 264, 1001):
        for launch in {launch for case in grid() for launch in launches(n_rows, *case, DEVICES[1])}:
            rows = rows_of_groups(launch, n_rows, np.arange(launch.n_groups(n_rows)))
            assert (rows[:, 0] >= 0).all(), (n_rows, launch)  # every group has a first row
            assert np.array_equal(np.sort(rows[rows >= 0]), np.arange(n_rows)), (n_rows, launch)


def test_ten_million_rows_are_in_groups():
    for n_classes in (3, 1000, 8142):
        for launch in launches(10**7, n_classes, torch.bfloat16, Layout(True, 1, n_classes), DEVICES[1]):
            rows = rows_of_groups(launch, 10**7, np.arange(launch.n_groups(10**7), dtype=np.int64))
            assert (rows[:, 0] >= 0).all()
            assert (rows >= 0).sum() == 10**7
            assert rows.max() == 10**7 - 1


def test_rows_of_a_program_share_their_head_and_bodies_are_aligned():
    for n_classes, dtype, layout in grid():
        for launch in launches(1000, n_classes, dtype, layout, DEVICES[1]):
            vec = launch.vec
            if vec == 1:
                continue
            assert layout.row_stride * launch.period % vec == 0 or launch.block_rows == 1, (layout, launch)
            for row in range(2 * vec):
                start = layout.misalignment + row * layout.row_stride
                head = min(-start % vec, n_classes) if launch.edges else 0
                body = (n_classes - head) // vec * vec
                assert (start + head) % vec == 0 or body == 0, (n_classes, layout, launch)
                assert n_classes - head - body < (vec if launch.edges else 1), (n_classes, layout, launch)


def test_tiles_chunks_and_splits_cover_a_streamed_row():
    for n_classes, dtype, layout in grid():
        for n_rows, device in itertools.product((1, 64, 4096), (*DEVICES, AMD)):
            for launch in launches(n_rows, n_classes, dtype, layout, device):
                n_chunks = launch.n_chunks(n_classes)
                if launch.resident:
                    assert launch.splits == n_chunks == 1
                    continue
                assert (n_chunks - 1) * launch.chunk_tiles * launch.block_c < n_classes
                assert n_classes <= n_chunks * launch.chunk_tiles * launch.block_c
                assert 1 <= launch.splits <= n_chunks <= launch_config.MAX_CHUNKS
                assert launch.splits * -(-n_chunks // launch.splits) >= n_chunks
                if launch.vec > 1:
                    assert launch.block_c == launch.vec * device.warp_size * launch.num_warps  # one vector a thread


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_few_rows_of_many_classes_fill_the_device(dtype, device):
    wanted = 2 * device.n_multiprocessors
    for n_classes, n_rows in itertools.product((8142, 50257, 131072, 10**6), (1, 2, 8, 64, 256, 1000)):
        for layout in layouts(n_classes)[:-3]:
            for launch in launches(n_rows, n_classes, dtype, layout, device):
                programs = launch.n_groups(n_rows) * launch.splits
                chunks = launch.n_groups(n_rows) * launch.n_chunks(n_classes)
                assert programs >= min(wanted, chunks), (n_rows, launch)


def test_64_rows_of_a_million_classes_fill_an_h100():
    for launch in launches(64, 10**6, torch.bfloat16, Layout(True, 0, 10**6), DEVICES[1]):
        assert launch.n_groups(64) * launch.splits >= 2 * 132


def test_streamed_rows_share_an_offset_unless_that_costs_their_place_in_l2():
    for n_classes, block_rows in ((50258, 2), (99_990, 1), (262_142, 2)):  # in the last case all block sizes exceed L2
        for n_rows in (1, 64, 4096):
            launch = launch_config.choose_launch_config(
                n_rows, n_classes, torch.bfloat16, Layout(True, 0, n_classes), DEVICES[1], 1
            )
            period = 4 if block_rows == 2 else 1  # every fourth row has the same alignment
            assert (launch.block_rows, launch.period) == (block_rows, period)


def test_the_forward_pass_may_make_the_gradient_of_every_resident_row_and_of_streamed_rows_in_l2():
    made = set()
    for (n_classes, dtype, layout), cost in itertools.product(grid(), (1, 2, 4)):
        for n_rows, device in itertools.product(N_ROWS, (*DEVICES, SMALL_L2)):
            launch = launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost)
            makes = launch_config.may_make_gradient(launch, n_classes, dtype, device, "mean")
            assert makes == launch_config.may_make_gradient(launch, n_classes, dtype, device, "sum")
            if launch.resident:
                assert makes == (dtype != torch.float16), "whatever the number of rows and L2"
            elif makes:
                resident = device.n_multiprocessors * max(
                    1, launch_config.STREAM_THREADS_PER_SM // (device.warp_size * launch.num_warps)
                )
                assert resident * launch.block_rows * n_classes * dtype.itemsize < 0.75 * device.l2_bytes
                made.add((n_classes, dtype, device.n_multiprocessors))
    for n_classes in (50257, 99991):
        assert (n_classes, torch.bfloat16, 132) in made
    assert (10**6, torch.bfloat16, 132) not in made


@pytest.mark.parametrize(
    ("n_rows", "dtype", "reduction"), [(4096, torch.float16, "mean"), (4096, torch.bfloat16, "none")]
)
def test_the_forward_pass_makes_no_gradient_in_float16_or_without_a_reduction(n_rows, dtype, reduction):
    for n_classes in N_CLASSES:
        for layout, device, cost in itertools.product(layouts(n_classes), DEVICES, (1, 2, 4)):
            launch = launch_config.choose_launch_config(n_rows, n_classes, dtype, layout, device, cost)
            assert not launch_config.may_make_gradient(launch, n_classes, dtype, device, reduction)


def test_a_problem_holds_the_vectors_of_kernels_in_their_order():
    vectors = importlib.import_module("fused_la._triton.tiles").Vectors
    assert Problem._fields[1 : 1 + len(vectors._fields)] == vectors._fields


# Tensors --------------------------------------------------------------------------------------------------------------


def signature_of(logits):
    return operands.signature_of(Problem(logits, None, torch.zeros(*logits.shape[:2], 1, dtype=torch.int64)))


def gradient_of(logits):
    return operands.gradient_layout(signature_of(logits)).allocate(logits)


def flat(n_elements, dtype=torch.float32):
    return torch.empty(n_elements, dtype=dtype, device=DEVICE)


LAYOUTS = {
    "contiguous": (lambda: flat(30).view(3, 1, 10), Layout(True, 0, 10)),
    "padded": (lambda: flat(36).view(3, 1, 12)[..., :10], Layout(True, 0, 12)),
    "shifted": (lambda: flat(31)[1:].view(3, 1, 10), Layout(True, 1, 10)),
    "shifted by a vector": (lambda: flat(34)[4:].view(3, 1, 10), Layout(True, 0, 10)),
    "one row repeated": (lambda: flat(10).view(1, 1, 10).expand(3, 1, 10), Layout(True, 0, 0)),
    "every second row": (lambda: flat(60).view(6, 1, 10)[::2], Layout(True, 0, 20)),
    "transposed": (lambda: flat(30).view(10, 3).t()[:, None], Layout(False, 0, 1)),
    "sequences": (lambda: flat(60).view(2, 3, 10), Layout(True, 0, 10)),
    "one sequence, padded": (lambda: flat(36).view(1, 3, 12)[..., :10], Layout(True, 0, 12)),
    "cut sequences": (lambda: flat(80).view(2, 4, 10)[:, :3], Layout(True, 0, None)),
    "one class": (lambda: flat(6).view(6, 1)[::2].unsqueeze(1), Layout(True, 0, 2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_tensors(name):
    make, expected = LAYOUTS[name]
    assert signature_of(make()).layout() == expected


def test_memory_that_begins_between_boundaries_has_no_shift():
    """A tensor over foreign memory may begin off a 16-byte boundary, with no storage before its first element."""
    foreign = torch.frombuffer(bytearray(64 + 16), dtype=torch.float32)
    start = -foreign.data_ptr() % 16 // 4 + 1
    outside = torch.frombuffer(memoryview(foreign.numpy())[start:], dtype=torch.float32)[:12].view(3, 1, 4)
    assert outside.storage_offset() == 0
    assert outside.data_ptr() % 16 == 4
    assert signature_of(outside).layout().misalignment is None


def row_pointers(tensor):
    n_outer, n_inner, _ = tensor.shape
    return [tensor[i, j].data_ptr() for i in range(n_outer) for j in range(n_inner)]


ROWS_IN_MEMORY = {
    "contiguous": lambda n, dtype: flat(6 * n, dtype).view(6, 1, n),
    "sequences": lambda n, dtype: flat(6 * n, dtype).view(2, 3, n),
    "padded": lambda n, dtype: flat(6 * (n + 5), dtype).view(6, 1, n + 5)[..., :n],
    "sliced": lambda n, dtype: flat(6 * (n + 3), dtype).view(6, 1, n + 3)[..., 1 : n + 1],
    "every second row": lambda n, dtype: flat(12 * n, dtype).view(12, 1, n)[::2],
    "shifted": lambda n, dtype: flat(6 * n + 3, dtype)[3:].view(6, 1, n),
    "one row repeated": lambda n, dtype: flat(n + 1, dtype)[1:].view(1, 1, n).expand(6, 1, n),
}


@pytest.mark.parametrize("n_classes", [1, 9, 64, 101])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROWS_IN_MEMORY)
def test_rows_of_the_gradient_have_the_alignment_of_the_logits(name, dtype, n_classes):
    vec = 16 // dtype.itemsize
    logits = ROWS_IN_MEMORY[name](n_classes, dtype)
    gradient = gradient_of(logits)
    assert gradient.shape == logits.shape
    assert gradient.dtype == dtype
    distances = [g - x for g, x in zip(row_pointers(gradient), row_pointers(logits), strict=True)]
    assert all(distance % 16 == 0 for distance in distances)
    if logits.is_contiguous():
        assert gradient.is_contiguous()
    n_elements = gradient.untyped_storage().nbytes() // dtype.itemsize
    assert n_elements <= (vec - 1) + 6 * (n_classes + vec - 1)
    steps = np.diff(row_pointers(gradient)) // dtype.itemsize
    assert ((steps >= n_classes) & (steps < n_classes + vec)).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_gradient_of_permuted_dense_logits_is_dense_in_the_same_order(order):
    logits = flat(2 * 3 * 5).view([(2, 3, 5)[dim] for dim in order]).permute(np.argsort(order).tolist())
    gradient = gradient_of(logits)
    assert gradient.stride() == logits.stride()
    assert gradient.untyped_storage().nbytes() == 30 * 4


@pytest.mark.parametrize("strides", [(0, 5, 1), (5, 0, 1), (1, 1, 1), (0, 0, 1), (3, 1, 1)], ids=str)
def test_adjacent_classes_are_adjacent_in_the_gradient_of_overlapping_rows(strides):
    logits = flat(100).as_strided((2, 3, 5), strides)
    gradient = gradient_of(logits)
    assert gradient.stride(2) == 1
    places = {pointer + 4 * c for pointer in row_pointers(gradient) for c in range(5)}
    assert len(places) == 30


def test_the_gradient_of_strided_classes_has_no_gaps():
    logits = flat(2 * 4 * 20).view(2, 4, 20)[:, :, ::2]
    gradient = gradient_of(logits)
    assert gradient.is_contiguous()
