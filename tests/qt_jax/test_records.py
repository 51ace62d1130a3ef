"""Check that records are whole lines or none, and survive kills and concurrent writers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from qt_jax.errors import InvalidInput
from qt_jax.records import FIELDS, append, new_record, read


def test_round_trip_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [
        new_record(scheme=f"s{i}", calibration={"n": i, "method": "minmax"}, note="ü\n|") for i in range(5)
    ]
    for row in rows:
        append(path, row)
    assert read(path) == rows
    assert path.read_bytes().count(b"\n") == 5
    assert set(rows[0]) == {*FIELDS, "note"}


def test_an_absent_file_holds_no_records(tmp_path):
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_say_is_refused_and_harms_nothing(tmp_path, value):
    path = tmp_path / "records.jsonl"
    append(path, {"top1": 0.5})
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=r"records\.jsonl cannot be written"):
        append(path, {"top1": value})
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [1, 9, 15])
def test_a_line_cut_short_by_a_kill_is_skipped_then_replaced(tmp_path, kept):
    path = tmp_path / "records.jsonl"
    append(path, {"seed": 0, "top1": 0.5})
    append(path, {"seed": 1, "top1": 0.5})
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:kept])
    with pytest.warns(UserWarning, match=r"records\.jsonl, line 2 was cut short"):
        assert [row["seed"] for row in read(path)] == [0]
    append(path, {"seed": 2})
    assert [row["seed"] for row in read(path)] == [0, 2]


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"seed": 0}')
    append(path, {"seed": 1})
    assert [row["seed"] for row in read(path)] == [0, 1]


@pytest.mark.parametrize("line", [b'{"seed": 0', b"[1, 2]", b"\xff\xfe"])
def test_a_malformed_line_elsewhere_is_an_error(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"seed": 0}\n' + line + b'\n{"seed": 1}\n')
    with pytest.raises(InvalidInput, match=r"records\.jsonl, line 2 is not a record"):
        read(path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    append(path, {"seed": 0})
    before = path.read_bytes()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            return self.file.write(line[:4])

    monkeypatch.setattr("builtins.open", lambda *args, _open=open, **kwargs: Full(_open(*args, **kwargs)))
    with pytest.raises(OSError, match="No space left"):
        append(path, {"seed": 1})
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_concurrent_writers_do_not_mix_or_lose_lines(tmp_path):
    """Threads open the file each for themselves, as processes would."""
    path = tmp_path / "records.jsonl"
    rows = [{"i": i, "padding": "x" * 9000} for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: append(path, row), rows))
    assert sorted(read(path), key=lambda row: row["i"]) == rows
