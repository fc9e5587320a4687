"""Values per example on disk: exact, resumable, keyed by what they depend on."""

import resource

import numpy as np
import pytest

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


@pytest.mark.parametrize("room", [50, 1000])  # bytes: not for about.json; not for the part
def test_a_full_disk_is_named_and_what_was_published_stays(room, tmp_path):
    cache = open_cache(tmp_path)
    cache.load()
    if room == 1000:
        fill(cache, KEYS[:3])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    many = [number.to_bytes(16, "little") for number in range(1000, 2000)]
    try:
        with pytest.raises(ValueError) as caught:
            fill(cache, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert str(tmp_path) in said and "cannot be written" in said and "File too large" in said
    assert "make room" in said or "start the same command again" in said
    assert not [path for path in cache.directory.iterdir() if path.suffix not in (".npz", ".json")]
    assert open_cache(tmp_path).load() == (3 if room == 1000 else 0)
    cache.flush()  # with room again
    assert open_cache(tmp_path).load() == (1003 if room == 1000 else 1000)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}', "\0\0", "\xff"])
def test_a_damaged_description_is_none(content, tmp_path, caplog):
    cache = open_cache(tmp_path)
    cache.load()
    fill(cache, KEYS[:3])
    about = cache.directory / "about.json"
    expected = about.read_bytes()
    about.write_bytes(content.encode("latin-1"))
    again = open_cache(tmp_path)
    assert again.load() == 3  # the values do not depend on it
    assert f"{about} cannot be read (" in caplog.text and "is not known" in caplog.text
    fill(again, KEYS[3:])
    assert about.read_bytes() == expected
    caplog.clear()
    assert open_cache(tmp_path).load() == 5 and not caplog.text
