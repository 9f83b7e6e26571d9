"""The data order of a run that is made longer or shorter:
what a digest promises, and what data.order_samples keeps.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.corpus import Corpus, has_validation, open_corpus, prebuild
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders")
    generator = np.random.default_rng(3)
    for name, documents in (("a", 25), ("b", 9)):
        with IndexedWriter(folder / name, "uint16") as writer:
            for _ in range(documents):
                writer.add_document([generator.integers(0, 1000, size=generator.integers(3, 20))])
    return folder


KINDS: dict[str, tuple[str, list[dict[str, float]]]] = {
    "permutation": ("permutation", [{}]),
    "weights": ("permutation", [{"weight": 0.3}, {"weight": 0.512345}]),
    "epochs": ("permutation", [{"epochs": 1.5}, {"epochs": 2.0}]),
    "epochs beside weights": ("permutation", [{"epochs": 0.3}, {"weight": 1.0}]),
    "megatron": ("megatron", [{}]),
    "megatron, a blend": ("megatron", [{"weight": 0.3}, {"weight": 0.7}]),
}
DEPENDS_ON_THE_LENGTH = ("epochs beside weights", "megatron", "megatron, a blend")


def data_of(folder: Path, kind: str, **changes: Any) -> DataConfig:
    order, sources = KINDS[kind]
    train = [
        {"prefix": str(folder / name), **given} for name, given in zip("ab", sources, strict=False)
    ]
    return DataConfig.model_validate({"train": train, "order": order, "prefetch": 0, **changes})


def corpus_of(folder: Path, kind: str, total: int, **changes: Any) -> Corpus:
    return open_corpus(
        data_of(folder, kind, **changes), seq_length=5, total_samples=total, vocab_size=1000
    )


def read(corpus: Corpus, samples: int) -> list[tuple[int, tuple[Any, ...]]]:
    """Source and spans of the first samples: what was read, without the digest's own notions."""
    origins = (corpus.origin(i) for i in range(samples))
    return [(origin.source, origin.sample.spans) for origin in origins]


@settings(max_examples=70)
@given(
    kind=st.sampled_from([*KINDS]),
    lengths=st.tuples(st.integers(40, 200), st.integers(40, 200)),
    share=st.floats(0, 1),
)
def test_digests_are_equal_exactly_where_the_same_samples_were_read(
    folder: Path, kind: str, lengths: tuple[int, int], share: float
) -> None:
    first, second = (corpus_of(folder, kind, length) for length in lengths)
    consumed = round(share * min(lengths))
    same = sorted(read(first, consumed), key=repr) == sorted(read(second, consumed), key=repr)
    if consumed > 3:  # fewer may agree by chance
        assert (first.order_digest(consumed) == second.order_digest(consumed)) == same
    if kind not in DEPENDS_ON_THE_LENGTH:
        assert same and first.order_digest(consumed) == second.order_digest(consumed)


def test_lengthening_within_the_epochs_of_megatrons_order_keeps_it(folder: Path) -> None:
    """The smallest case of a prefix, and its counterpart: one epoch more is another order."""
    epoch = corpus_of(folder, "megatron", 1).num_samples
    short, longer, beyond = (
        corpus_of(folder, "megatron", length) for length in (epoch // 2, epoch, epoch + 5)
    )
    assert short.order_digest(10) == longer.order_digest(10) != beyond.order_digest(10)
    assert read(short, 10) == read(longer, 10) != read(beyond, 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("planned", [48, 96])
def test_a_longer_run_that_keeps_the_planned_length_reads_the_same_samples_first(
    folder: Path, kind: str, planned: int
) -> None:
    short = corpus_of(folder, kind, planned)
    longer = corpus_of(folder, kind, 3 * planned - 7, order_samples=planned)
    assert read(longer, planned) == read(short, planned)
    assert longer.planned_samples == planned
    assert all(
        short.order_digest(consumed) == longer.order_digest(consumed)
        for consumed in (1, planned // 2, planned)
    )
    rest = [longer[i].tokens.tolist() for i in range(planned, 3 * planned - 7)]
    assert len(rest) == 2 * planned - 7
    if kind in DEPENDS_ON_THE_LENGTH:
        other = corpus_of(folder, kind, 3 * planned - 7)
        # The control: what it keeps is not there by itself.
        assert other.order_digest(planned) != longer.order_digest(planned)


@pytest.mark.parametrize("kind", ["megatron", "megatron, a blend"])
def test_beyond_the_planned_length_megatrons_order_goes_on_with_the_next_seed(
    folder: Path, kind: str
) -> None:
    longer = corpus_of(folder, kind, 150, order_samples=60, seed=11)
    for number in (0, 1, 2):
        expected = corpus_of(folder, kind, 60, seed=11 + number)
        count = min(60, 150 - 60 * number)
        assert [longer[60 * number + i].tokens.tolist() for i in range(count)] == [
            expected[i].tokens.tolist() for i in range(count)
        ]
    epochs = [longer.origin(i).epoch for i in (0, 59, 60, 149)]
    assert epochs == sorted(epochs)
    with pytest.raises(
        DataError, match=r"order megatron has \d+ samples for this run, sample \d+ was asked for"
    ):
        corpus_of(folder, "megatron", 150, order_samples=60)[100_000]


def test_each_pass_can_be_prebuilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(folder, "megatron, a blend", order_samples=60, seed=5)
    expected = [
        open_corpus(data, seq_length=5, total_samples=150, vocab_size=1000)[i].tokens.tolist()
        for i in (0, 60, 149)
    ]
    assert len(prebuild(data, seq_length=5, total_samples=150)) == 2 * 3 + 1
    # Building again would fail.
    monkeypatch.setattr("megatron_completep.data.megatron_order.build_tables", None)
    corpus = open_corpus(data, seq_length=5, total_samples=150, vocab_size=1000)
    assert [corpus[i].tokens.tolist() for i in (0, 60, 149)] == expected


def test_the_digest_costs_the_same_at_any_length(folder: Path) -> None:
    """A trillion samples: nothing is walked through."""
    for kind in ("permutation", "weights", "epochs"):
        corpus = corpus_of(folder, kind, 10**12)
        assert corpus.order_digest(10**12) != corpus.order_digest(10**12 - 1)


# A split without validation


def test_a_split_without_validation_is_a_run_without_validation(folder: Path) -> None:
    for split, expected in (("100,0,0", False), ("99,1,0", True), ("1,0,1", False), (None, False)):
        assert has_validation(data_of(folder, "permutation", split=split)) == expected
    without = data_of(folder, "permutation", split="100,0,0")
    assert read(open_corpus(without, seq_length=5, total_samples=40, vocab_size=1000), 40) == read(
        corpus_of(folder, "permutation", 40), 40
    )
    with pytest.raises(DataError, match=r"data\.split = '100,0,0' leaves nothing to validate on"):
        open_corpus(without, seq_length=5, total_samples=40, vocab_size=1000, split="validation")
    with pytest.raises(DataError, match=r"no document of \d+, one sample .* whole documents"):
        sliver = data_of(folder, "permutation", split="1000,1,0")
        open_corpus(sliver, seq_length=5, total_samples=40, vocab_size=1000, split="validation")
