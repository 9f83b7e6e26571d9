import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_completep.config.schema import DataConfig, SourceConfig
from megatron_completep.data.loader import PADDING, build_loader, validation_batches
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.errors import ConfigError, DataError
from tests.support.corpora import two_sources, write_documents

S = 8


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for name, documents in (("a", 120), ("b", 40)):
        with IndexedWriter(tmp_path / name, "uint16") as writer:
            for _ in range(documents):
                writer.add_document([random.integers(1, 100, size=random.integers(1, 20))])
    return config_of(tmp_path)


def config_of(folder, **changes):
    return two_sources(folder, **{"split": "8,1,1", **changes})


def loader_of(data, **changes):
    defaults = {
        "seq_length": S,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_steps": 10,
        "vocab_size": 100,
        "data_rank": 0,
        "data_size": 1,
    }
    return build_loader(data, **(defaults | changes))


def steps_of(loader, steps):
    with loader:
        return [loader.next_step() for _ in range(steps)]


def rows_of(batches):
    """sample id -> every field of its row, from micro-batches in any order."""
    fields = ("tokens", "labels", "loss_mask", "positions", "document_ids")
    return {
        int(b.sample_ids[i]): tuple(tuple(getattr(b, f)[i].tolist()) for f in fields)
        for b in batches
        for i in range(len(b.sample_ids))
    }


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            for field in dataclasses.fields(x):
                assert torch.equal(getattr(x, field.name), getattr(y, field.name)), field.name


def test_a_batch_has_the_promised_shapes_and_types(data):
    batches = steps_of(loader_of(data), 1)[0]
    assert len(batches) == 4
    for batch in batches:
        assert (
            batch.tokens.shape
            == batch.labels.shape
            == batch.loss_mask.shape
            == batch.positions.shape
            == batch.document_ids.shape
            == (2, S)
        )
        assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        assert (batch.positions.dtype, batch.document_ids.dtype, batch.sample_ids.dtype) == (
            torch.int64,
            torch.int32,
            torch.int64,
        )
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
    assert [i for batch in batches for i in batch.sample_ids.tolist()] == list(range(8))


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_a_step_holds_the_same_samples_at_every_data_parallel_size(data, data_size, micro):
    expected = [rows_of(step) for step in steps_of(loader_of(data), 4)]
    ranks = [
        steps_of(loader_of(data, data_rank=r, data_size=data_size, micro_batch_size=micro), 4)
        for r in range(data_size)
    ]
    for step in range(4):
        batches = [batch for rank in ranks for batch in rank[step]]
        assert rows_of(batches) == expected[step]
        assert sum(len(batch.sample_ids) for batch in batches) == 8  # none twice


@pytest.mark.parametrize("reset", [False, True])
def test_positions_and_documents_follow_the_files(data, reset):
    changed = data.model_copy(update={"reset_at_document_ends": reset})
    loader = loader_of(changed)
    for batch in loader.next_step():
        for row, index in enumerate(batch.sample_ids.tolist()):
            origin = loader.corpus.origin(index)
            dataset = loader.corpus.sources[origin.source].dataset
            span = origin.sample.spans[0]
            owners = [dataset.document_at(t) for t in range(span.begin, span.end - 1)]
            distinct = list(dict.fromkeys(owners))
            assert batch.document_ids[row].tolist() == [distinct.index(owner) for owner in owners]
            restarted = [t - owners.index(owner) for t, owner in enumerate(owners)]
            assert batch.positions[row].tolist() == (restarted if reset else list(range(S)))
            assert batch.tokens[row].tolist() == dataset.tokens[span.begin : span.end - 1].tolist()


@pytest.mark.parametrize("resumed_at", [1, 3, 7])
def test_a_resumed_loader_continues_the_same_order(data, resumed_at):
    whole = steps_of(loader_of(data), 8)
    assert_same(
        steps_of(loader_of(data, consumed_samples=8 * resumed_at), 8 - resumed_at),
        whole[resumed_at:],
    )
    loader = loader_of(data)
    loader.seek(8 * resumed_at)
    assert_same(steps_of(loader, 8 - resumed_at), whole[resumed_at:])
    assert loader.consumed_samples == 64


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data_size=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 3),
    rows=st.integers(1, 3),
    step=st.integers(0, 10**7),
    prefetch=st.integers(0, 2),
    weight=st.floats(0.01, 1),
)
def test_the_order_depends_on_nothing_but_the_position(
    data, data_size, micro, rows, step, prefetch, weight
):
    """Every layout, resume point, prefetch depth and batch size reads the samples
    first .. first + batch - 1 of one sequence.
    """
    sources = [data.train[0].model_copy(update={"weight": weight}), data.train[1]]
    config = data.model_copy(update={"train": sources, "prefetch": prefetch})
    batch = micro * rows * data_size
    common = {
        "micro_batch_size": micro,
        "global_batch_size": batch,
        "consumed_samples": step * batch,
        "data_size": data_size,
    }
    ranks = [steps_of(loader_of(config, data_rank=rank, **common), 2) for rank in range(data_size)]
    found = rows_of([micro_batch for rank in ranks for one in rank for micro_batch in one])
    corpus = loader_of(data.model_copy(update={"train": sources})).corpus
    assert sorted(found) == list(range(step * batch, (step + 2) * batch))
    assert all(found[i][0] == tuple(corpus[i].tokens[:-1].tolist()) for i in found)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetching_changes_nothing_even_with_a_changing_batch_size(data, prefetch):
    sizes = [None, None, 4, None, 8, 8, 2, None]

    def run(data):
        with loader_of(data) as loader:
            steps = [loader.next_step(size) for size in sizes]
            return steps, loader.consumed_samples

    plain, consumed = run(data)
    ahead, consumed_ahead = run(data.model_copy(update={"prefetch": prefetch}))
    assert_same(ahead, plain)
    assert consumed == consumed_ahead == 8 + 8 + 4 + 4 + 8 + 8 + 2 + 2


def test_the_worker_works_ahead_ends_and_reports_waiting(data):
    before = threading.active_count()
    loader = loader_of(data.model_copy(update={"prefetch": 2}))
    loader.next_step()
    assert threading.active_count() == before + 1
    assert loader.take_wait_seconds() > 0
    assert loader.take_wait_seconds() == 0
    loader.close()
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_token_outside_the_vocabulary_names_its_place(tmp_path, data, prefetch):
    write_documents(tmp_path / "a", [[[1] * 30], [[1] * 17 + [777] + [1] * 40]])
    message = (
        r"a\.bin: document 1, position 17: token id 777 is outside the model's vocabulary, 0 to 99"
    )
    with pytest.raises(
        DataError, match=message
    ):  # the sidecar knows the largest id: refused before training
        loader_of(config_of(tmp_path, prefetch=prefetch, split=None))
    (tmp_path / "a.json").unlink()
    with (
        loader_of(config_of(tmp_path, prefetch=prefetch, split=None)) as loader,
        pytest.raises(DataError, match=message),
    ):
        for _ in range(10):
            loader.next_step()


def test_every_source_that_is_missing_is_named(tmp_path, data):
    absent = [
        SourceConfig(prefix=str(tmp_path / name), weight=0.2) for name in ("nowhere", "nothing")
    ]
    with pytest.raises(DataError) as raised:
        loader_of(data.model_copy(update={"train": [data.train[0], *absent]}))
    assert str(raised.value).startswith("2 problems\n")
    assert "nowhere.idx" in str(raised.value)
    assert "nothing.idx" in str(raised.value)
    assert "a.idx" not in str(raised.value)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, data):
    identity = {"type": "bytes", "vocab_size": 257}
    write_documents(tmp_path / "a", [[[1] * 100]], tokenizer=identity)
    with pytest.raises(
        DataError, match=r"a\.json: tokenizer: it has 257 ids, model\.vocab_size = 100"
    ):
        loader_of(config_of(tmp_path))


def test_a_batch_that_does_not_divide_is_refused_with_its_numbers(data):
    with pytest.raises(
        ConfigError, match=r"global_batch_size = 8 is not a multiple of .* = 3 \* 2"
    ):
        loader_of(data, micro_batch_size=3, data_size=2)


@pytest.mark.parametrize(("data_size", "micro"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_validation_is_the_same_set_every_time_at_every_layout(data, data_size, micro):
    def batches(rank, size, micro):
        return validation_batches(
            data,
            samples=10,
            seq_length=S,
            micro_batch_size=micro,
            vocab_size=100,
            data_rank=rank,
            data_size=size,
        )

    expected = rows_of(batches(0, 1, 2))
    assert sorted(expected) == list(range(10))
    ranks = [batches(rank, data_size, micro) for rank in range(data_size)]
    assert len({len(list(rank)) for rank in ranks}) == 1
    for _ in range(2):
        rows = [batch for rank in ranks for batch in rank]
        found = rows_of(rows)
        assert all(mask == 0 for mask in found.pop(PADDING, ((), (), ()))[2])
        assert found == expected


def test_training_and_validation_parts_share_no_document(data):
    train, validation = loader_of(data), loader_of(data, split="validation")
    for source in range(2):
        assert train.corpus.sources[source].end == validation.corpus.sources[source].begin
        assert train.corpus.sources[source].begin == 0


def test_validation_needs_sources_or_a_split(data):
    with pytest.raises(DataError, match=r"data\.validation and data\.split are both null"):
        loader_of(data.model_copy(update={"split": None}), split="validation")
    with pytest.raises(DataError, match=r"data\.split = '1,x'"):
        loader_of(data.model_copy(update={"split": "1,x"}))


def epochs_config(folder, epochs):
    return DataConfig(
        train=[
            SourceConfig(prefix=str(folder / n), **given)
            for n, given in zip("ab", epochs, strict=True)
        ],
        prefetch=0,
    )


def test_sources_by_epochs_get_their_epochs(tmp_path, data):
    loader = loader_of(epochs_config(tmp_path, [{"epochs": 1.0}, {"epochs": 2.0}]))
    a, b = (source.samples_per_epoch for source in loader.corpus.sources)
    assert loader.corpus.blend.counts(a + 2 * b) == [a, 2 * b]


def test_epochs_beside_weights_are_exact_over_the_run(tmp_path, data):
    loader = loader_of(epochs_config(tmp_path, [{"epochs": 0.5}, {"weight": 3.0}]), train_steps=20)
    half = loader.corpus.sources[0].samples_per_epoch / 2
    assert abs(loader.corpus.blend.counts(160)[0] - half) < 1
    with pytest.raises(DataError, match=r"the whole run has 8; nothing is left"):
        loader_of(epochs_config(tmp_path, [{"epochs": 0.5}, {"weight": 3.0}]), train_steps=1)
    with pytest.raises(DataError, match="both weight and epochs"):
        loader_of(epochs_config(tmp_path, [{"epochs": 0.5, "weight": 1.0}, {}]), train_steps=1)


def test_the_order_is_frozen(tmp_path):
    """A change of these values would change the data of every run that is resumed."""
    write_documents(tmp_path / "a", [[range(100)]])
    config = DataConfig(train=[SourceConfig(prefix=str(tmp_path / "a"))], prefetch=0)
    first_tokens = [
        token
        for step in steps_of(loader_of(config), 2)
        for batch in step
        for token in batch.tokens[:, 0].tolist()
    ]
    assert first_tokens == [88, 40, 32, 80, 0, 8, 48, 16, 56, 72, 64, 24, 80, 88, 48, 24]
