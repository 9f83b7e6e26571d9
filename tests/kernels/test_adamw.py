"""AdamW over a flat shard: the definition against torch,
then every implementation against the definition.
"""

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_completep import kernels
from megatron_completep.kernels import Control, new_control, read_control, reference
from megatron_completep.kernels.control import SKIP, STEP
from megatron_completep.kernels.ops.adamw import block_table
from tests.kernels.step_kernels import DEVICE, IMPLEMENTATIONS, mutant

BETA1, BETA2 = 0.9, 0.95
SEGMENTS = torch.tensor([[0, 100, 0], [128, 1, 1], [192, 1000, 2], [1216, 64, 3], [1280, 1277, 1]])
SIZE = 2624  # the last segment's padding, and 64 elements that belong to nobody

# One row a group: learning-rate factor, weight decay, eps. In each table the groups differ in one
# column only.
GROUPS = {
    "eps": torch.tensor(
        [[1.0, 0.1, 1e-12], [1.0, 0.1, 1e-3], [1.0, 0.1, 1e-1], [1.0, 0.1, 1.0]],
        dtype=torch.float64,
    ),
    "learning rate": torch.tensor(
        [[1.0, 0.1, 1e-8], [0.5, 0.1, 1e-8], [0.25, 0.1, 1e-8], [2.0, 0.1, 1e-8]],
        dtype=torch.float64,
    ),
    "weight decay": torch.tensor(
        [[1.0, 0.0, 1e-8], [1.0, 0.1, 1e-8], [1.0, 1.0, 1e-8], [1.0, 4.0, 1e-8]],
        dtype=torch.float64,
    ),
}


@dataclasses.dataclass
class Shard:
    """A flat shard and its optimizer state, in `dtype` on `device`;
    a clone of it starts from the same numbers.
    """

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    out: torch.Tensor | None
    control: torch.Tensor

    @classmethod
    def create(cls, dtype=torch.float32, size=SIZE, bf16_out=False, learning_rate=1e-2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        control = new_control("cpu", Control(learning_rate))
        state = torch.zeros(2, size, dtype=dtype)
        master = torch.randn(size, generator=generator).to(dtype)
        return cls(
            master,
            state[0],
            state[1],
            torch.full((size,), math.nan, dtype=torch.bfloat16) if bf16_out else None,
            control,
        )

    def to(self, device, dtype=None):
        move = {"device": device} if dtype is None else {"device": device, "dtype": dtype}
        out = None if self.out is None else self.out.clone().to(device)
        state = (t.clone().to(**move) for t in (self.master, self.exp_avg, self.exp_avg_sq))
        return Shard(*state, out, self.control.clone().to(device))

    def step(self, implementation, grad, groups, segments=SEGMENTS, max_norm=1.0):
        device = self.master.device
        implementation.begin_step_(
            self.control, implementation.sum_of_squares(grad, None), max_norm, BETA1, BETA2
        )
        state = (self.out, self.master, self.exp_avg, self.exp_avg_sq, grad)
        implementation.adamw_(
            *state, segments.to(device), groups.to(device), self.control, BETA1, BETA2
        )


def gradients(steps, dtype=torch.float32, size=SIZE, seed=1):
    """Gradients of slowly changing direction and of very different sizes, zero in the padding."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 1, size)[torch.randperm(size, generator=generator)]
    drift = torch.randn(size, generator=generator)
    covered = owned(size)
    for _ in range(steps):
        yield ((drift + torch.randn(size, generator=generator)) * scale * covered).to(dtype)


def owned(size=SIZE):
    covered = torch.zeros(size, dtype=torch.bool)
    for start, length, _ in SEGMENTS.tolist():
        covered[start : start + length] = True
    return covered


def relative_error(actual, expected, start):
    """Of the distance travelled, so that a large parameter hides nothing."""
    actual, expected, start = actual.double().cpu(), expected.double().cpu(), start.double().cpu()
    return ((actual - expected).norm() / (expected - start).norm()).item()


def distance_from_definition(implementation, groups, steps=5, used_groups=None, max_norm=1.0):
    """Error of `steps` float32 steps against the float64 definition,
    over the distance travelled; worst segment.
    """
    start = Shard.create()
    actual, expected = start.to(DEVICE), start.to("cpu", torch.float64)
    for grad in gradients(steps):
        actual.step(
            implementation,
            grad.to(DEVICE),
            groups if used_groups is None else used_groups,
            max_norm=max_norm,
        )
        expected.step(reference, grad.double(), groups, max_norm=max_norm)
    pieces = [slice(s, s + n) for s, n, _ in SEGMENTS.tolist() if n > 1]
    return max(
        relative_error(actual.master[p], expected.master[p], start.master[p]) for p in pieces
    )


def test_the_definition_matches_torch_in_float64():
    groups, shard = GROUPS["eps"] * torch.tensor([1.0, 2.0, 1.0]), Shard.create(torch.float64)
    parameters = [shard.master[s : s + n].clone().requires_grad_() for s, n, _ in SEGMENTS.tolist()]
    rules = [groups[g].tolist() for _, _, g in SEGMENTS.tolist()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "lr": 1e-2 * lr, "weight_decay": wd, "eps": eps}
            for p, (lr, wd, eps) in zip(parameters, rules, strict=True)
        ],
        betas=(BETA1, BETA2),
        foreach=False,
    )
    for grad in gradients(20, torch.float64):
        for parameter, (start, length, _) in zip(parameters, SEGMENTS.tolist(), strict=True):
            parameter.grad = grad[start : start + length].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shard.step(reference, grad, groups)
        assert read_control(shard.control).grad_norm == pytest.approx(norm.item(), rel=1e-12)
    for parameter, (start, length, _) in zip(parameters, SEGMENTS.tolist(), strict=True):
        torch.testing.assert_close(
            shard.master[start : start + length], parameter.detach(), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("column", GROUPS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_fifty_steps_match_float64(name, column):
    assert distance_from_definition(IMPLEMENTATIONS[name], GROUPS[column], steps=50) < 1e-5


@pytest.mark.parametrize("column", GROUPS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_wrong_group_table_is_caught(name, column):
    swapped = GROUPS[column].flip(0)
    assert (
        distance_from_definition(IMPLEMENTATIONS[name], GROUPS[column], used_groups=swapped) > 1e-4
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float64_steps_are_exact(name):
    start = Shard.create(torch.float64)
    actual, expected = start.to(DEVICE), start.to("cpu")
    for grad in gradients(5, torch.float64):
        actual.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"])
        expected.step(reference, grad, GROUPS["eps"])
    assert relative_error(actual.master, expected.master, start.master) < 1e-13


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_is_never_touched(name):
    shard, owner = Shard.create(bf16_out=True), owned()
    for tensor in (shard.master, shard.exp_avg, shard.exp_avg_sq):
        tensor[~owner] = math.nan
    before, shard = shard.to("cpu"), shard.to(DEVICE)
    for grad in gradients(2):
        shard.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"])
    for after, old in zip(
        (shard.master, shard.exp_avg, shard.exp_avg_sq),
        (before.master, before.exp_avg, before.exp_avg_sq),
        strict=True,
    ):
        assert torch.equal(after.cpu()[~owner].view(torch.int32), old[~owner].view(torch.int32))
        assert after.cpu()[owner].isfinite().all()
        assert (after.cpu()[owner] != old[owner]).any()
    assert shard.out.cpu()[~owner].isnan().all()
    assert torch.equal(shard.out.cpu()[owner], shard.master.cpu()[owner].bfloat16())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_gradient_that_is_not_finite_skips_the_step(name, bad):
    start = Shard.create(bf16_out=True)
    shard, twin = start.to(DEVICE), start.to(DEVICE)
    first, broken, last = gradients(3)
    broken[5] = bad
    for grad in (first, broken, last):
        shard.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"])
        if grad is broken:
            assert shard.control[SKIP] == 1 and shard.control[STEP] == 1
            assert torch.equal(shard.master, twin.master)
            assert torch.equal(shard.exp_avg_sq, twin.exp_avg_sq)
        else:
            twin.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"])
    assert torch.equal(shard.master, twin.master) and torch.equal(shard.exp_avg, twin.exp_avg)
    assert shard.control[STEP] == 2 and shard.control[SKIP] == 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_same_bits_however_the_shard_is_cut(name):
    """Two runs, a table cut into blocks, and two shards cut at a multiple of 64 give one result."""
    results = []
    cut = torch.tensor(
        [
            [0, 100, 0],
            [128, 1, 1],
            [192, 448, 2],
            [640, 552, 2],
            [1216, 64, 3],
            [1280, 1024, 1],
            [2304, 253, 1],
        ]
    )
    for segments in (SEGMENTS, SEGMENTS, block_table(SEGMENTS, 128), cut):
        shard = Shard.create(bf16_out=True).to(DEVICE)
        for grad in gradients(3):
            shard.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"], segments)
        results.append(shard)
    for other in results[1:]:
        assert torch.equal(other.master, results[0].master)
        assert torch.equal(other.exp_avg_sq, results[0].exp_avg_sq)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_bf16_gradient_and_a_tiny_one_are_used_as_they_are(name):
    start = Shard.create()
    shard, expected = start.to(DEVICE), start.to("cpu", torch.float64)
    groups = GROUPS["eps"] * torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) + torch.tensor(
        [0.0, 0.0, 1e-30], dtype=torch.float64
    )
    for grad in gradients(3, torch.bfloat16):
        # Squares are subnormal in float32: a square root that flushes them would divide by eps =
        # 1e-30.
        grad = grad * 1e-20
        grad = torch.where(grad.abs() < 1e-21, torch.zeros_like(grad), grad)
        shard.step(IMPLEMENTATIONS[name], grad.to(DEVICE), groups, max_norm=0.0)
        expected.step(reference, grad.double(), groups, max_norm=0.0)
    assert (expected.master - start.master).abs().max() > 1e-3
    assert relative_error(shard.master, expected.master, start.master) < 1e-2


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_tiny_decay_keeps_its_size_on_average(name):
    """Rounding 1 - lr*wd to float32 first, as torch's fused AdamW does,
    makes a decay of 1.5e-7 one of 1.8e-7.
    """
    start = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 1
    decay = {}
    for key in ("ours", "torch"):
        master, state = start.clone().to(DEVICE), torch.zeros(3, 4096, device=DEVICE)
        control = new_control(
            DEVICE, Control(1.5e-6, step=1, clip=1, correction1=0.1, correction2=0.05)
        )
        tables = (
            torch.tensor([[0, 4096, 0]], device=DEVICE),
            torch.tensor([[1.0, 0.1, 1e-8]], dtype=torch.float64, device=DEVICE),
        )
        if key == "ours":
            IMPLEMENTATIONS[name].adamw_(None, master, *state, *tables, control, BETA1, BETA2)
        else:
            options = {
                "lr": 1.5e-6,
                "beta1": BETA1,
                "beta2": BETA2,
                "weight_decay": 0.1,
                "eps": 1e-8,
                "amsgrad": False,
                "maximize": False,
            }
            lists = (
                [master],
                [state[2]],
                [state[0]],
                [state[1]],
                [],
                [torch.ones((), device=DEVICE)],
            )
            torch._fused_adamw_(*lists, **options)
        decay[key] = ((start - master.cpu()).double().sum() / start.double().sum()).item()
    assert decay["ours"] == pytest.approx(1.5e-7, rel=0.05)
    if DEVICE == "cpu":
        assert decay["torch"] > 1.7e-7


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_empty_tables_and_empty_segments_do_nothing(name):
    shard = Shard.create().to(DEVICE)
    before = shard.master.clone()
    (grad,) = gradients(1)
    for table in (SEGMENTS[:0], torch.tensor([[0, 0, 0], [64, 0, 1]])):
        shard.step(IMPLEMENTATIONS[name], grad.to(DEVICE), GROUPS["eps"], table)
    assert torch.equal(shard.master, before)


MUTATIONS = {
    "drops the first bias correction": ("lr / tl.load(control + AT_CORRECTION1)", "lr"),
    "drops the second bias correction": ("new_v / correction2", "new_v"),
    "puts eps under the root": ("(root + eps)", "tl.sqrt(root * root + eps)"),
    "forgets the clip coefficient": (".to(dtype) * clip", ".to(dtype)"),
    "decays without the learning rate": ("(lr * tl.load(group + 1))", "tl.load(group + 1)"),
    "reads one group for all": ("tl.load(row + 2) * 3", "0"),
    "rounds 1 - beta2 up": ("(1 - BETA2)", "(1.001 - BETA2)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_kernel_is_caught(mutation):
    """Each change to the kernel's source would fail `test_fifty_steps_match_float64`."""
    broken = dataclasses.replace(
        IMPLEMENTATIONS["triton"], adamw_=mutant("ops.adamw", *MUTATIONS[mutation]).launch_adamw_
    )
    groups = GROUPS["eps"] * torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    groups[:, 0] = torch.tensor([1.0, 0.5, 0.7, 2.0])
    assert distance_from_definition(IMPLEMENTATIONS["triton"], groups, steps=3) < 1e-5
    assert distance_from_definition(broken, groups, steps=3) > 1e-4


def test_a_kernel_that_writes_padding_or_ignores_the_skip_flag_is_caught(monkeypatch):
    for replacement, check in (
        (
            ("tl.where(inside, new_p, p)", "tl.where(inside, new_p, 0.0)"),
            lambda: test_padding_is_never_touched("triton"),
        ),
        (("skip == 0.0", "skip == skip"), skip_check),
    ):
        broken = dataclasses.replace(
            IMPLEMENTATIONS["triton"], adamw_=mutant("ops.adamw", *replacement).launch_adamw_
        )
        monkeypatch.setitem(IMPLEMENTATIONS, "triton", broken)
        with pytest.raises(AssertionError):
            check()


def skip_check():
    test_a_gradient_that_is_not_finite_skips_the_step("triton", math.inf)


# The segment table.


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 700)), max_size=6),
    st.sampled_from([64, 128, 1024]),
)
def test_a_block_table_covers_every_element_once(gaps_and_lengths, block):
    rows, start = [], 0
    for group, (gap, length) in enumerate(gaps_and_lengths):
        start += 64 * gap
        rows.append([start, length, group])
        start += (length + 63) // 64 * 64
    segments = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    expected, actual = torch.full((start,), -1), torch.full((start,), -1)
    for begin, length, group in rows:
        expected[begin : begin + length] = group
    for begin, length, group in block_table(segments, block).tolist():
        assert 0 < length <= block and begin % 64 == 0
        assert (actual[begin : begin + length] == -1).all()
        actual[begin : begin + length] = group
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[32, 10, 0]], "segment 0"),
        ([[0, 100, 0], [64, 10, 1]], "segment 1"),
        ([[0, -1, 0]], "segment 0"),
        ([[64, 10, 0], [0, 10, 0]], "segment 1"),
    ],
)
def test_a_wrong_segment_table_is_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        kernels.device_segments(torch.tensor(segments), "cpu")


def test_the_cpu_keeps_its_segments_whole():
    assert torch.equal(kernels.device_segments(SEGMENTS, "cpu"), SEGMENTS)


# As torch sees it.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_out", [False, True])
def test_the_operator_passes_opcheck(dtype, with_out):
    shard = Shard.create(dtype, bf16_out=with_out).to(DEVICE)
    (grad,) = gradients(1, dtype)
    now = Control(1e-2, step=1, clip=0.5, correction1=1 - BETA1, correction2=1 - BETA2)
    shard.control = new_control(DEVICE, now)
    if shard.out is not None:
        shard.out.zero_()
    tables = (kernels.device_segments(SEGMENTS, DEVICE), GROUPS["eps"].to(DEVICE), shard.control)
    arguments = (
        shard.out,
        shard.master,
        shard.exp_avg,
        shard.exp_avg_sq,
        grad.to(DEVICE),
        *tables,
        BETA1,
        BETA2,
    )
    torch.library.opcheck(torch.ops.completep.adamw_.default, arguments)


# The host sees no values.


class Recorder:
    """Stands in for a kernel: remembers its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def step_without_data(adamw, grad_norm, monkeypatch):
    """The launchers of one step on `meta` tensors,
    whose values nobody can read; the kernels' launches.
    """
    recorded = {}
    for module, kernels_of in (
        (grad_norm, ("sum_of_squares_kernel", "begin_step_kernel")),
        (adamw, ("adamw_kernel",)),
    ):
        for name in kernels_of:
            recorded[name] = Recorder()
            monkeypatch.setattr(module, name, recorded[name])
    state = Shard.create(bf16_out=True).to("meta")
    segments = SEGMENTS.to("meta")
    groups = GROUPS["eps"].to("meta")
    grad = torch.empty(SIZE, device="meta")
    sum_sq = grad_norm.launch_sum_of_squares(grad, segments)
    grad_norm.launch_begin_step_(state.control, sum_sq, 1.0, BETA1, BETA2)
    adamw.launch_adamw_(
        state.out,
        state.master,
        state.exp_avg,
        state.exp_avg_sq,
        grad,
        segments,
        groups,
        state.control,
        BETA1,
        BETA2,
    )
    return {name: recorder.launches for name, recorder in recorded.items()}


def test_a_step_is_three_launches_that_read_no_value_on_the_host(monkeypatch):
    """What a CUDA graph needs: no synchronization, the same launches whatever the numbers are.

    Shown without a GPU.
    """
    adamw, grad_norm = (
        importlib.import_module(f"megatron_completep.kernels.ops.{name}")
        for name in ("adamw", "grad_norm")
    )
    launches = step_without_data(adamw, grad_norm, monkeypatch)
    assert [len(found) for found in launches.values()] == [1, 1, 1]
    assert launches["adamw_kernel"][0][0] == (len(SEGMENTS),)
    nosy = mutant(
        "ops.adamw",
        "if segments.shape[0] == 0:",
        "if segments.shape[0] == 0 or control.sum().item():",
    )
    with pytest.raises(RuntimeError, match="meta"):
        step_without_data(nosy, grad_norm, monkeypatch)


# On a GPU.


@pytest.mark.gpu
def test_a_step_never_waits_for_the_host_and_is_one_launch():
    shard = Shard.create(bf16_out=True).to("cuda")
    segments = kernels.device_segments(SEGMENTS, "cuda")
    groups, (grad,) = GROUPS["eps"].cuda(), (g.cuda() for g in gradients(1))

    def step():
        kernels.begin_step_(
            shard.control, kernels.sum_of_squares(grad, segments), 1.0, BETA1, BETA2
        )
        state = (shard.out, shard.master, shard.exp_avg, shard.exp_avg_sq, grad)
        kernels.adamw_(*state, segments, groups, shard.control, BETA1, BETA2)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    launches = {event.key: event.count for event in trace.key_averages()}
    assert launches["adamw_kernel"] == 1


@pytest.mark.gpu
def test_a_captured_graph_steps_as_the_launches_do():
    start, segments = Shard.create(bf16_out=True), kernels.device_segments(SEGMENTS, "cuda")
    captured, launched, grad = start.to("cuda"), start.to("cuda"), torch.empty(SIZE, device="cuda")
    stream = torch.cuda.Stream()
    implementation = IMPLEMENTATIONS["triton"]
    groups = GROUPS["eps"].cuda()
    warm = start.to("cuda")
    grad.copy_(next(gradients(1)))
    with torch.cuda.stream(stream):
        warm.step(implementation, grad, groups, segments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(implementation, grad, groups, segments)
    for new in gradients(4):
        grad.copy_(new)
        graph.replay()
        launched.step(implementation, grad, groups, segments)
    assert launched.control[STEP] == 4
    assert torch.equal(captured.master, launched.master) and torch.equal(captured.out, launched.out)
