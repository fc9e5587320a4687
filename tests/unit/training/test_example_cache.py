"""Values per example on disk: exact, resumable, keyed by what they depend on."""

import numpy as np

from nemo_align.training.example_cache import ExampleCache

IDENTITY = {"checkpoint": "abc", "dtype": "fp32"}
LAYOUT = {"tensor": 1, "pipeline": 1}
KEYS = [bytes([number]) * 16 for number in range(5)]


def open_cache(root, identity=IDENTITY, layout=LAYOUT) -> ExampleCache:
    return ExampleCache(root, kind="reference", identity=identity, layout=layout, names=("chosen", "rejected"))


def fill(cache: ExampleCache, keys: list[bytes], offset: float = 0.0) -> None:
    values = np.arange(len(keys), dtype=np.float32) / 3 + offset
    cache.add(keys, {"chosen": values, "rejected": -values}, write=True)
    cache.flush()


def test_values_come_back_to_the_last_bit_in_any_order(tmp_path):
    first = open_cache(tmp_path)
    assert first.load() == 0
    fill(first, KEYS[:3])
    fill(first, KEYS[3:], offset=7.1)

    again = open_cache(tmp_path)
    assert again.load() == 5
    order = [KEYS[4], KEYS[0], KEYS[2]]
    columns = again.columns(order)
    expected = np.array([np.float32(1 / 3) + np.float32(7.1), 0, np.float32(2) / 3], dtype=np.float32)
    assert np.array_equal(columns["chosen"], expected)
    assert np.array_equal(columns["rejected"], -expected)


def test_a_damaged_part_is_computed_again_and_never_overwritten(tmp_path, caplog):
    cache = open_cache(tmp_path)
    cache.load()
    fill(cache, KEYS[:3])
    fill(cache, KEYS[3:])
    (damaged,) = cache.directory.glob("part_000000_*.npz")
    damaged.write_bytes(damaged.read_bytes()[:-40])

    again = open_cache(tmp_path)
    assert again.load() == 2
    assert "computed again" in caplog.text
    assert KEYS[0] not in again and KEYS[3] in again
    fill(again, KEYS[:3])
    assert open_cache(tmp_path).load() == 5


def test_other_weights_or_formats_share_nothing_and_another_layout_warns(tmp_path, caplog):
    cache = open_cache(tmp_path)
    cache.load()
    fill(cache, KEYS)
    assert open_cache(tmp_path, identity={**IDENTITY, "checkpoint": "def"}).load() == 0
    assert open_cache(tmp_path, identity={**IDENTITY, "dtype": "bf16"}).load() == 0
    assert "layout" not in caplog.text
    assert open_cache(tmp_path, layout={"tensor": 2, "pipeline": 1}).load() == 5
    assert "agree to rounding" in caplog.text
