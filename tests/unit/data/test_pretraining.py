"""Pretraining sources over real .bin/.idx files, through Megatron-core's datasets."""

from __future__ import annotations

import io
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from nemo_align.config.data import BlendSourceConfig
from nemo_align.data.indexed import write_indexed_dataset
from nemo_align.data.pretraining import HeldOutSource, PretrainingPhase, PretrainingSource
from nemo_align.data.step_plan import StepLayout, plan_windows
from nemo_align.data.tokenizer import Tokenizer, load_tokenizer
from tests.distributed.pool import RemoteError

LENGTH = 16
FIRST_ID = 3  # of the ids that documents are made of; below are unk, bos, eos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and three sets; the ids of a set tell which it is."""
    folder = tmp_path_factory.mktemp("pretraining")
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        control_symbols=["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<extra_id_3>"], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    rng = np.random.default_rng(0)
    for number, name in enumerate(("english", "code", "questions")):
        ids = FIRST_ID + 10 * number
        documents = [rng.integers(ids, ids + 10, int(rng.integers(1, 50))).tolist() for _ in range(30)]
        write_indexed_dataset(folder / name, documents, vocab_size=40, eod=2)
    return folder


def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.model")


def _source(folder: Path, cache: Path, *, layout: StepLayout | None = None, data_rank: int = 0, **counts: int):
    phases = [
        PretrainingPhase(name, {name: BlendSourceConfig(path=str(folder / name), weight=1.0)}, num_samples)
        for name, num_samples in (counts or {"english": 40, "questions": 10}).items()
    ]
    return PretrainingSource(
        phases,
        tokenizer=_tokenizer(folder),
        seed=7,
        cache_dir=cache,
        layout=layout or StepLayout(capacity=LENGTH),
        data_rank=data_rank,
    )


def test_phases_follow_each_other(folder: Path, tmp_path: Path) -> None:
    source = _source(folder, tmp_path)
    assert source.num_examples == 50
    for sample, low in ((0, 3), (39, 3), (40, 23), (49, 23)):
        window = source.window(sample)
        assert len(window) == LENGTH + 1
        assert all(token == 2 or low <= token < low + 10 for token in window)
    with pytest.raises(AssertionError, match="samples up to 51"):
        source.step(45, 6)


def test_labels_are_the_next_tokens_and_all_are_predicted(folder: Path, tmp_path: Path) -> None:
    """Also the end-of-document token, and ids that the tokenizer pads with: GPTDataset would mask those."""
    tokenizer = _tokenizer(folder)
    source = _source(folder, tmp_path, layout=StepLayout(capacity=LENGTH, micro_batch_size=2))
    batches = [batch for step in source.evaluation(8) for batch in step.micro_batches()]
    assert all((batch.tokens[:, 1:] == batch.labels[:, :-1]).all() for batch in batches)
    assert all(batch.loss_mask.all() and batch.cu_seqlens is None for batch in batches)
    labels = np.concatenate([batch.labels.numpy().ravel() for batch in batches])
    assert (labels == tokenizer.eod).any() and (labels == tokenizer.pad_id).any()


@pytest.mark.parametrize(
    ("data_parallel", "micro_batch_size", "multiple_of"), [(1, 1, 1), (2, 1, 1), (3, 2, 2), (4, 4, 1)]
)
def test_the_order_does_not_depend_on_the_layout(
    folder: Path, tmp_path: Path, data_parallel: int, micro_batch_size: int, multiple_of: int
) -> None:
    layout = StepLayout(
        capacity=LENGTH, data_parallel=data_parallel, micro_batch_size=micro_batch_size, multiple_of=multiple_of
    )
    expected = _source(folder, tmp_path).step(12, 10)
    wanted = Counter(tuple(batch.tokens[0].tolist()) for batch in expected.micro_batches())
    seen: Counter = Counter()
    for rank in range(data_parallel):
        step = _source(folder, tmp_path, layout=layout, data_rank=rank).step(12, 10)
        for batch in step.micro_batches():
            assert batch.tokens.shape == (micro_batch_size, LENGTH)
            seen += Counter(
                tuple(row.tolist()) for row, mask in zip(batch.tokens, batch.loss_mask, strict=True) if mask.any()
            )
        assert step.plan.loss_tokens == 10 * LENGTH == step.plan.real_tokens
        assert step.plan.num_micro_batches % multiple_of == 0
    assert seen == wanted and sum(seen.values()) == 10


def test_plan_deals_micro_batches_in_turn() -> None:
    layout = StepLayout(capacity=4, data_parallel=2, micro_batch_size=2)
    plan = plan_windows(range(10, 17), [4] * 7, layout)
    assert plan.micro_batches == (((10, 11), (14, 15)), ((12, 13), (16,)))
    assert (plan.real_tokens, plan.padded_tokens, plan.squared_tokens, plan.padded_squared_tokens) == (28, 32, 112, 128)


def test_same_order_after_a_restart_and_another_seed_differs(folder: Path, tmp_path: Path) -> None:
    first = [_source(folder, tmp_path).window(i).tolist() for i in range(20)]
    again = [_source(folder, tmp_path).window(i).tolist() for i in range(20)]  # from the cache
    fresh = [_source(folder, tmp_path / "other").window(i).tolist() for i in range(20)]
    assert first == again == fresh and len({tuple(window) for window in first}) == 20


def test_a_changed_sample_count_shows_in_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    one, other = _source(folder, tmp_path, english=40), _source(folder, tmp_path, english=41)
    assert one.fingerprint.startswith("english=40-") and other.fingerprint.startswith("english=41-")
    assert one.fingerprint == _source(folder, tmp_path / "elsewhere", english=40).fingerprint


def test_a_cut_off_index_of_a_killed_run_is_built_again(folder: Path, tmp_path: Path) -> None:
    expected = _source(folder, tmp_path).window(3)
    (damaged, *_) = tmp_path.rglob("*-sample_index.npy")
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert np.array_equal(_source(folder, tmp_path).window(3), expected)


def test_a_pickle_in_the_cache_is_never_opened(folder: Path, tmp_path: Path) -> None:
    expected = _source(folder, tmp_path).window(3)
    (planted, *_) = tmp_path.rglob("*-shuffle_index.npy")
    np.save(planted, np.array([_Explosive()], dtype=object), allow_pickle=True)
    assert np.array_equal(_source(folder, tmp_path).window(3), expected)


class _Explosive:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_files_written_anew_under_the_same_name_get_new_indices(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for size in (30, 12):
        documents = [rng.integers(3, 13, size).tolist() for _ in range(20)]
        write_indexed_dataset(tmp_path / "english", documents, vocab_size=40, eod=2)
        source = _source(tmp_path_with_tokenizer(folder, tmp_path), tmp_path / "cache", english=10)
        windows = [source.window(i) for i in range(10)]
    assert all(len(window) == LENGTH + 1 for window in windows)
    text = np.concatenate([[*document, 2] for document in documents]).tolist()
    assert all(_is_in_some_order_of(window.tolist(), documents) for window in windows), text


def tmp_path_with_tokenizer(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return tmp_path


def _is_in_some_order_of(window: list[int], documents: list[list[int]]) -> bool:
    """Every whole piece between two end-of-document tokens is a document."""
    pieces = " ".join(map(str, window)).split(" 2")
    whole = {" ".join(map(str, document)) for document in documents}
    return all(piece.strip() in whole for piece in pieces[1:-1])


def _same_sizes(folder: Path, documents: list[list[int]]) -> tuple[int, int]:
    """Write the set "english"; returns the sizes of its two files."""
    write_indexed_dataset(folder / "english", documents, vocab_size=40, eod=2)
    return tuple((folder / f"english{suffix}").stat().st_size for suffix in (".bin", ".idx"))


@pytest.mark.parametrize("lengths", ["of several lengths", "of one length"])
def test_the_same_documents_in_another_order_are_other_data(lengths: str, folder: Path, tmp_path: Path) -> None:
    """The sizes of both files stay as they are; documents of one length leave the index as it is too."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 40, 20) if lengths == "of several lengths" else [20] * 20
    documents = [rng.integers(3, 13, int(size)).tolist() for size in sizes]
    tmp_path_with_tokenizer(folder, tmp_path)
    before = _same_sizes(tmp_path, documents)
    first = _source(tmp_path, tmp_path / "cache", english=10)
    assert _same_sizes(tmp_path, documents[::-1]) == before
    source = _source(tmp_path, tmp_path / "cache", english=10)
    assert source.fingerprint != first.fingerprint
    assert source.fingerprint == _source(tmp_path, tmp_path / "fresh", english=10).fingerprint
    assert len(list((tmp_path / "cache").glob("pretraining_*"))) == 2  # no index is used for other documents
    assert all(_is_in_some_order_of(source.window(i).tolist(), documents) for i in range(10))
    held_out = [_held_out(tmp_path, tmp_path / "cache", "english").fingerprint]
    _same_sizes(tmp_path, documents)
    held_out.append(_held_out(tmp_path, tmp_path / "cache", "english").fingerprint)
    assert len(set(held_out)) == 2


def _held_out(folder: Path, cache: Path, name: str, **layout: int) -> HeldOutSource:
    return HeldOutSource(
        BlendSourceConfig(path=str(folder / name)),
        tokenizer=_tokenizer(folder),
        cache_dir=cache,
        layout=StepLayout(capacity=LENGTH, **layout),
        data_rank=0,
    )


@pytest.mark.parametrize("wrong", [40, -1])
def test_an_id_outside_the_vocabulary_is_named_where_it_is_read(wrong: int, folder: Path, tmp_path: Path) -> None:
    """Of a large set samples are checked before the run, so a window may be the first to meet it. Megatron-core's
    dataset would write 0 for -1."""
    tmp_path_with_tokenizer(folder, tmp_path)
    vocab_size = _tokenizer(folder).vocab_size
    wrong = vocab_size if wrong > 0 else wrong
    documents = [[3, 4, 5] * 10 for _ in range(20)]
    write_indexed_dataset(tmp_path / "wrong", documents, vocab_size=70_000, eod=2)  # of 32-bit numbers
    write_indexed_dataset(tmp_path / "good", documents, vocab_size=70_000, eod=2)
    ids = np.memmap(tmp_path / "wrong.bin", dtype=np.int32, mode="r+")
    ids[4 * 31 + 7] = wrong  # documents are 31 tokens long with their end
    ids.flush()
    message = (
        rf"wrong\.bin: token 131 \(sequence 5\) has id {wrong}, but the vocabulary has {vocab_size} tokens; "
        r"set data\.tokenizer"
    )
    source = _source(tmp_path, tmp_path / "cache", good=5, wrong=38)  # all of the set
    assert all(len(source.window(sample)) == LENGTH + 1 for sample in range(5))
    named = []
    for sample in range(5, 43):
        try:
            assert (source.window(sample) >= 2).all()
        except ValueError as error:
            named.append(str(error))
    assert 1 <= len(named) <= 2 and all(re.search(message, said) for said in named), named
    held_out = _held_out(tmp_path, tmp_path / "cache", "wrong")
    held_out.window(0)
    with pytest.raises(ValueError, match=message):
        held_out.window(131 // LENGTH)


def test_an_id_outside_the_vocabulary_is_found_in_a_blend(pool1, folder: Path, tmp_path: Path) -> None:
    tmp_path_with_tokenizer(folder, tmp_path)
    for name in ("english", "code"):
        write_indexed_dataset(tmp_path / name, [[3, 4, 5] * 10] * 12, vocab_size=40, eod=2)  # read twice
    ids = np.memmap(tmp_path / "code.bin", dtype=np.uint16, mode="r+")
    ids[100] = 4000
    ids.flush()
    with pytest.raises(RemoteError, match=r"code\.bin: token 100 \(sequence 4\) has id 4000"):
        pool1.run(_blend_on_rank, tmp_path, tmp_path / "cache")


def test_a_full_disk_is_named_while_indices_are_written(folder: Path, tmp_path: Path) -> None:
    _source(folder, tmp_path / "cache", english=4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))  # bytes: the notes of hashes fit, not the indices
    try:
        with pytest.raises(ValueError) as caught:
            _source(folder, tmp_path / "cache", english=400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert said.startswith(f"data.cache_dir: {tmp_path / 'cache'} cannot be written (") and "make room" in said
    assert _source(folder, tmp_path / "cache", english=400).num_examples == 400


def test_held_out_set_predicts_every_token_once(folder: Path, tmp_path: Path) -> None:
    layout = StepLayout(capacity=LENGTH, data_parallel=2, micro_batch_size=2)
    sources = [
        HeldOutSource(
            BlendSourceConfig(path=str(folder / "code")),
            tokenizer=_tokenizer(folder),
            cache_dir=tmp_path,
            layout=layout,
            data_rank=rank,
        )
        for rank in range(2)
    ]
    predicted: dict[int, tuple[list[int], list[int]]] = {}
    loss_tokens = 0
    for steps in zip(*(source.evaluation(5) for source in sources), strict=True):
        loss_tokens += steps[0].plan.loss_tokens
        for step in steps:
            for batch in step.micro_batches():
                for row, window in enumerate(batch.examples.tolist()):
                    mask = batch.loss_mask[row] == 1
                    assert window not in predicted
                    predicted[window] = (batch.tokens[row][mask].tolist(), batch.labels[row][mask].tolist())
    contexts = [token for window in sorted(predicted) for token in predicted[window][0]]
    labels = [token for window in sorted(predicted) for token in predicted[window][1]]
    stream = np.fromfile(folder / "code.bin", dtype=np.uint16).tolist()
    assert labels == stream and contexts == [2, *stream[:-1]]
    assert loss_tokens == len(stream)


def _blend_on_rank(folder: Path, cache: Path) -> tuple[list[list[int]], str]:
    blend = {
        "english": BlendSourceConfig(path=str(folder / "english"), weight=3.0),
        "code": BlendSourceConfig(path=str(folder / "code"), weight=1.0),
    }
    source = PretrainingSource(
        [PretrainingPhase("main", blend, 100)],
        tokenizer=_tokenizer(folder),
        seed=7,
        cache_dir=cache,
        layout=StepLayout(capacity=LENGTH),
        data_rank=0,
    )
    return [source.window(sample).tolist() for sample in range(100)], source.fingerprint


def test_a_blend_keeps_its_weights_and_is_the_same_on_every_rank(pool2, folder: Path, tmp_path: Path) -> None:
    (windows, fingerprint), other = pool2.run(_blend_on_rank, folder, tmp_path)
    assert (windows, fingerprint) == other
    english = sum(max(window) < 13 for window in windows)
    assert abs(english - 75) <= 1


def test_unusable_blends_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.idx: no such file"):
        _source(folder, tmp_path, missing=5)
    phase = PretrainingPhase("main", {"a": BlendSourceConfig(path=str(folder / "code"), weight=0.0)}, 5)
    with pytest.raises(ValueError, match=r"data\.phases\.main\.blend\.a\.weight=0\.0"):
        PretrainingSource(
            [phase],
            tokenizer=_tokenizer(folder),
            seed=1,
            cache_dir=tmp_path,
            layout=StepLayout(capacity=4),
            data_rank=0,
        )
