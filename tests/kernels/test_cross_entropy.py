"""Cross-entropy: the definition against torch's own,
the pieces against the definition, shards against the whole.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_completep import kernels
from megatron_completep.kernels import reference
from tests.kernels.step_kernels import DEVICE, launchers, mutant
from tests.kernels.step_kernels import IMPLEMENTATIONS as BY_KERNELS

IGNORED = -100


class Compiled:
    """The definition in float32, as `training.compile` takes it on a CPU.

    Here it is traced, and the slow suite has Inductor's part of it. Compiled anew for every case,
    because torch keeps only so many shapes of one function.
    """

    def __init__(self, backend: str):
        self.backend = backend

    def cross_entropy_forward(self, logits, *arguments):
        return self._call(kernels.cross_entropy_forward, logits.cpu(), *arguments)

    def cross_entropy_backward_(self, logits, *arguments):
        self._call(kernels.cross_entropy_backward_, logits, *arguments)

    def _call(self, operation, logits, *arguments):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = kernels.CompiledDefinitions(self.backend)
        result = operation(logits, *arguments, compiled=compiled)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        served = logits.numel() > 0 and logits.dtype != torch.float64
        assert bool(graphs) == (served and logits.device.type == "cpu")
        return result


INDUCTOR = "compiled by Inductor"
IMPLEMENTATIONS = {
    **BY_KERNELS,
    "traced": Compiled("aot_eager"),
    INDUCTOR: Compiled("inductor"),
}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == INDUCTOR else ())
    for name in IMPLEMENTATIONS
]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
# Tokens, columns, vocab_start, vocab_size: a whole padded vocabulary, a first, a middle and a last
# shard, one that is all padding.
SHAPES = [
    (3, 64, 0, 64),
    (17, 1000, 0, 990),
    (2, 4160, 0, 9000),
    (3, 100, 100, 1000),
    (2, 128, 128, 200),
    (2, 64, 128, 100),
]


@dataclasses.dataclass
class Case:
    logits: torch.Tensor
    labels: torch.Tensor
    vocab_start: int
    vocab_size: int
    logit_scale: float = 0.37
    z_loss: float = 1e-2
    label_smoothing: float = 0.1

    @classmethod
    def create(cls, tokens, columns, vocab_start, vocab_size, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = (8 * torch.randn(tokens, columns, generator=generator)).to(dtype)
        labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
        # One label in this shard, if the shard has any.
        labels[0] = min(vocab_start, vocab_size - 1)
        labels[-1] = IGNORED
        return cls(logits, labels, vocab_start, vocab_size)

    @property
    def valid(self):
        return max(0, min(self.logits.shape[1], self.vocab_size - self.vocab_start))

    def statistics(self, implementation, logits=None):
        logits = self.logits if logits is None else logits
        arguments = (
            self.labels.to(logits.device),
            self.vocab_start,
            self.vocab_size,
            self.logit_scale,
            True,
        )
        return implementation.cross_entropy_forward(logits, *arguments)

    def gradient(self, implementation, logits, lse, grad_scale):
        """Overwrites `logits`."""
        device = logits.device
        scalars = (IGNORED, self.z_loss, self.label_smoothing, self.vocab_size, self.logit_scale)
        implementation.cross_entropy_backward_(
            logits,
            self.labels.to(device),
            self.vocab_start,
            lse.to(device),
            grad_scale.to(device),
            *scalars,
        )
        return logits

    def lse(self):
        """As if the rest of the vocabulary added as much again;
        a constant for a shard that is all padding.
        """
        stats = self.statistics(reference, self.logits.double())
        return (
            stats[0] + torch.log(2 * stats[1])
            if self.valid
            else torch.ones(len(self.labels), dtype=torch.float64)
        )


def error(actual, expected):
    expected = expected.double().cpu()
    return ((actual.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_definition_matches_torch_in_float64(z_loss, label_smoothing):
    case = dataclasses.replace(
        Case.create(17, 1000, 0, 990, torch.float64), z_loss=z_loss, label_smoothing=label_smoothing
    )
    raw = case.logits.clone().requires_grad_()
    z = case.logit_scale * raw[:, : case.vocab_size]
    kept = case.labels != IGNORED
    expected = F.cross_entropy(
        z, case.labels, reduction="none", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    expected = expected + z_loss * torch.logsumexp(z, 1).square() * kept
    grad_scale = torch.rand(17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected * grad_scale).sum().backward()
    stats = case.statistics(reference)
    loss, lse = kernels.cross_entropy_loss(
        stats, case.labels, IGNORED, z_loss, label_smoothing, case.vocab_size
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        case.gradient(reference, case.logits.clone(), lse, grad_scale),
        raw.grad,
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_statistics_match_float64(name, shape, dtype):
    case = Case.create(*shape, dtype)
    actual = case.statistics(IMPLEMENTATIONS[name], case.logits.to(DEVICE)).cpu()
    expected = case.statistics(reference, case.logits.double())
    assert actual.dtype == torch.float32
    assert torch.equal(actual[0].isinf(), expected[0].isinf())
    for row in range(4):
        assert error(actual[row].nan_to_num(neginf=0), expected[row].nan_to_num(neginf=0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_matches_float64_and_stays_inside_its_logits(name, shape, dtype):
    case = Case.create(*shape, dtype)
    tokens, columns = case.logits.shape
    grad_scale = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) + 0.1
    # Rows longer than the logits: strided, with guard bands.
    guarded = torch.full((tokens + 2, columns + 16), math.nan, dtype=dtype)
    inner = guarded[1:-1, 8:-8] if dtype == torch.float32 else guarded[1:-1, :columns]
    inner.copy_(case.logits)
    inner_before = guarded.isnan()
    guarded = guarded.to(DEVICE)
    inner = guarded[1:-1, 8:-8] if dtype == torch.float32 else guarded[1:-1, :columns]
    case.gradient(
        IMPLEMENTATIONS[name],
        inner,
        case.lse().to(torch.float64 if dtype == torch.float64 else torch.float32),
        grad_scale,
    )
    expected = case.gradient(reference, case.logits.double(), case.lse(), grad_scale.double())
    assert error(inner, expected) < TOLERANCES[dtype]
    assert torch.equal(guarded.isnan().cpu(), inner_before)
    assert (inner[-1] == 0).all() and (inner[:, case.valid :] == 0).all()
    assert case.valid == 0 or (inner[0, : case.valid] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_one_grad_scale_serves_all_tokens(name):
    case = Case.create(5, 1000, 0, 990)
    gradients = [
        case.gradient(
            IMPLEMENTATIONS[name], case.logits.clone().to(DEVICE), case.lse().float(), grad_scale
        )
        for grad_scale in (torch.full((1,), 0.25), torch.full((5,), 0.25))
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_shards_of_the_vocabulary_add_up_to_the_whole(name):
    """All-reduce the maximum, then sums:
    the recipe in `cross_entropy_forward`, with a last shard that is all padding.
    """
    whole = Case.create(9, 512, 0, 370)
    implementation = IMPLEMENTATIONS[name]
    expected, expected_lse = kernels.cross_entropy_loss(
        whole.statistics(reference, whole.logits.double()),
        whole.labels,
        IGNORED,
        whole.z_loss,
        whole.label_smoothing,
        whole.vocab_size,
    )
    shards = [
        dataclasses.replace(whole, logits=whole.logits[:, s : s + 128].contiguous(), vocab_start=s)
        for s in range(0, 512, 128)
    ]
    stats = torch.stack(
        [shard.statistics(implementation, shard.logits.to(DEVICE)).cpu() for shard in shards]
    )
    maximum = stats[:, 0].amax(0)
    sums = torch.stack(
        [stats[:, 1] * torch.exp(stats[:, 0] - maximum), stats[:, 2], stats[:, 3]]
    ).sum(1)
    combined = torch.cat([maximum[None], sums])
    loss, lse = kernels.cross_entropy_loss(
        combined, whole.labels, IGNORED, whole.z_loss, whole.label_smoothing, whole.vocab_size
    )
    assert error(loss, expected) < 1e-6
    grad_scale = torch.ones(1)
    gradient = torch.cat(
        [
            shard.gradient(implementation, shard.logits.to(DEVICE), lse, grad_scale).cpu()
            for shard in shards
        ],
        1,
    )
    assert (
        error(gradient, whole.gradient(reference, whole.logits.double(), expected_lse, grad_scale))
        < 1e-6
    )


@pytest.mark.slow
def test_compiled_sums_over_a_large_vocabulary_are_as_exact_as_over_a_small_one():
    case = Case.create(4, 150_016, 0, 150_000)
    case.logits *= 3 / 8
    stats = case.statistics(IMPLEMENTATIONS[INDUCTOR])
    expected = case.statistics(reference, case.logits.double())
    for row, exact in zip(stats, expected, strict=True):
        assert error(row, exact) < 3e-7


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_and_huge_logits_are_no_special_case(name):
    empty = Case.create(1, 64, 0, 64)
    empty.logits, empty.labels = empty.logits[:0], empty.labels[:0]
    assert empty.statistics(IMPLEMENTATIONS[name], empty.logits.to(DEVICE)).shape == (4, 0)
    empty.gradient(IMPLEMENTATIONS[name], empty.logits.to(DEVICE), torch.zeros(0), torch.ones(1))
    huge = Case.create(3, 64, 0, 64)
    huge.logits *= 1e6
    stats = huge.statistics(IMPLEMENTATIONS[name], huge.logits.to(DEVICE)).cpu()
    assert error(stats, huge.statistics(reference, huge.logits.double())) < 1e-6


MUTATIONS = {
    "forgets the logit scale in the exponent": ("x * logit_scale - row_lse", "x - row_lse"),
    "forgets the chain rule of the logit scale": (
        ".to(tl.float32) * logit_scale\n    factor",
        ".to(tl.float32)\n    factor",
    ),
    "forgets the slope of the z-loss": (
        "(1.0 + 2.0 * z_loss * row_lse)",
        "(1.0 + z_loss * row_lse)",
    ),
    "smooths without taking from the target": ("1.0 - label_smoothing, 0.0", "1.0, 0.0"),
    "trains on ignored tokens": ("tl.where(label == ignore_index, 0.0, factor)", "factor"),
    "gives padding a gradient": (" | (column >= vocab_size - vocab_start)", ""),
    "takes local for global columns": ("column == label - vocab_start", "column == label"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_backward_is_caught(mutation):
    broken = launchers(mutant("ops.cross_entropy", *MUTATIONS[mutation]))
    case = Case.create(3, 100, 64, 130)
    grad_scale = torch.ones(3)
    expected = case.gradient(reference, case.logits.double(), case.lse(), grad_scale)
    actual = [
        case.gradient(i, case.logits.clone().to(DEVICE), case.lse().float(), grad_scale)
        for i in (IMPLEMENTATIONS["triton"], broken)
    ]
    assert error(actual[0], expected) < 1e-6
    assert error(actual[1], expected) > 1e-4


FORWARD_MUTATIONS = {
    "counts padding": (
        'tl.where(column < valid, x, -float("inf"))',
        'tl.where(column < columns, x, -float("inf"))',
    ),
    "forgets to rescale the sum": ("sum_exp * tl.exp(maximum - new_maximum)", "sum_exp"),
    "looks for the label in the wrong shard": (
        "tl.load(labels + row) - vocab_start",
        "tl.load(labels + row)",
    ),
}


@pytest.mark.parametrize("mutation", FORWARD_MUTATIONS)
def test_a_broken_forward_is_caught(mutation):
    broken = launchers(mutant("ops.cross_entropy", *FORWARD_MUTATIONS[mutation]))
    case = Case.create(2, 8256, 64, 64 + 8200)
    # The maximum is not in the first block, and padding holds a larger one.
    case.logits[:, 5000], case.logits[:, 8250] = (60.0, 70.0)
    expected = case.statistics(reference, case.logits.double())
    actual = [
        case.statistics(i, case.logits.to(DEVICE)) for i in (IMPLEMENTATIONS["triton"], broken)
    ]
    assert error(actual[0], expected) < 1e-6
    assert max(error(actual[1][row], expected[row]) for row in range(3)) > 1e-4


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is what checks for overflow")
@pytest.mark.parametrize("breaks", [False, True])
def test_more_than_two_to_the_31_logits_do_not_overflow(breaks, monkeypatch):
    """Rows 2^30 elements apart, of a shard that is all padding:
    the addresses are computed, nothing is read.
    """
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(
        interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True)
    )
    module = mutant(
        "ops.cross_entropy",
        "tl.program_id(0).to(tl.int64)",
        "tl.program_id(0)" if breaks else "tl.program_id(0).to(tl.int64) ",
    )
    logits = torch.zeros(64)
    labels, stats = torch.zeros(4, dtype=torch.int64), torch.zeros(3, 4)

    def launch():
        grid = (4,)
        module.cross_entropy_forward_kernel[grid](
            logits, labels, stats, 4, 64, 2**30, 64, 64, 1.0, WITH_SUM=False, BLOCK=64, STAGES=1
        )

    if breaks:
        with pytest.raises(Exception, match="overflow"):
            launch()
    else:
        launch()


# The whole loss.


def whole_loss(dtype, seed=0, tokens=(5, 7), hidden=16, columns=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, hidden, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    weight = torch.randn(columns, hidden, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 50, tokens, generator=generator)
    labels[0, 0] = IGNORED
    return x, weight, labels.to(DEVICE)


OPTIONS = {"logit_scale": 0.5, "z_loss": 1e-2, "label_smoothing": 0.1, "vocab_size": 50}


@pytest.mark.parametrize("options", [{}, OPTIONS, {"reduction": "sum"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 8, 1])
def test_the_whole_loss_and_its_gradients_match_float64(dtype, options, chunk_tokens):
    x, weight, labels = whole_loss(dtype)
    loss = kernels.unembedding_cross_entropy(
        x, weight, labels, chunk_tokens=chunk_tokens, **options
    )
    (3.0 * loss).backward()
    exact_x = x.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    expected = reference.unembedding_cross_entropy(exact_x, exact_weight, labels, **options)
    (3.0 * expected).backward()
    tolerance = 10 * TOLERANCES[dtype]  # bf16 logits are rounded before the loss sees them
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert error(x.grad, exact_x.grad) < tolerance
    assert error(weight.grad, exact_weight.grad) < tolerance


def test_gradcheck_of_the_whole_loss():
    x, weight, labels = whole_loss(torch.float64, tokens=(2, 2), hidden=3, columns=55)
    assert torch.autograd.gradcheck(
        lambda a, b: kernels.unembedding_cross_entropy(a, b, labels, chunk_tokens=3, **OPTIONS),
        (x, weight),
    )


def test_the_mean_over_no_token_is_zero():
    x, weight, labels = whole_loss(torch.float32)
    loss = kernels.unembedding_cross_entropy(x, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all() and (weight.grad == 0).all()


def test_the_loss_without_gradients_leaves_nothing_behind():
    x, weight, labels = whole_loss(torch.float32)
    with torch.no_grad():
        loss = kernels.unembedding_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(
        kernels.unembedding_cross_entropy(x, weight, labels).item(), rel=1e-7
    )


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"logit_scale": 0.0}])
def test_a_setting_the_loss_cannot_follow_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kernels.unembedding_cross_entropy(*whole_loss(torch.float32), **options)


def test_the_whole_loss_works_under_compilation():
    x, weight, labels = whole_loss(torch.float32)
    compiled = torch.compile(
        lambda a, b: kernels.unembedding_cross_entropy(a, b, labels, **OPTIONS),
        backend="aot_eager",
        fullgraph=True,
    )
    compiled(x, weight).backward()
    gradients = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    kernels.unembedding_cross_entropy(x, weight, labels, **OPTIONS).backward()
    assert error(gradients[0], x.grad) < 1e-6 and error(gradients[1], weight.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_sum", [False, True])
def test_the_operators_pass_opcheck(dtype, with_sum):
    case = Case.create(3, 64, 0, 60, dtype)
    logits, labels = case.logits.to(DEVICE), case.labels.to(DEVICE)
    torch.library.opcheck(
        torch.ops.completep.cross_entropy_forward.default, (logits, labels, 0, 60, 0.5, with_sum)
    )
    lse = case.lse().to(torch.float64 if dtype == torch.float64 else torch.float32).to(DEVICE)
    arguments = (
        logits,
        labels,
        0,
        lse,
        torch.ones(3, device=DEVICE),
        IGNORED,
        0.0,
        0.1 * with_sum,
        60,
        0.5,
    )
    torch.library.opcheck(torch.ops.completep.cross_entropy_backward_.default, arguments)
