"""Tables as text: what is written is read again, what is torn is dropped, what is broken is named."""

import json

import pytest

from hwprune.errors import CorruptTable, DeviceMismatch, InvalidInput
from hwprune.latency import LatencyTable, Target, fingerprint, merge

SEGMENT = {
    "kind": "segment", "signature": "abc", "sizes": [3, 8], "median_us": 12.5, "p20_us": 12.0, "p80_us": 13.0,
    "count": 8, "program": "p", "forward": 0, "reference_us": 900.0, "time": 1.0,
}  # fmt: skip
WHOLE = {
    "kind": "whole", "widths": [3, 8], "median_us": 800.0, "count": 8, "program": "p", "forward": 0, "role": "fit",
    "reference_us": 900.0, "time": 1.0,
}  # fmt: skip


def test_records_survive_closing_and_opening(tmp_path):
    path = tmp_path / "deep" / "table.jsonl"
    table = LatencyTable.open(path, Target())
    table.append(SEGMENT)
    table.extend([WHOLE, {**SEGMENT, "sizes": [4, 8]}])
    again = LatencyTable.open(path, Target())
    assert again.records == [SEGMENT, WHOLE, {**SEGMENT, "sizes": [4, 8]}]
    assert again.fingerprint == fingerprint(Target()) and again.target == Target()
    assert again.of_program("p") == [WHOLE] and again.of_program("q") == []


def test_every_record_is_on_disk_before_append_returns(tmp_path):
    path = tmp_path / "table.jsonl"
    LatencyTable.open(path, Target()).append(SEGMENT)
    assert json.loads(path.read_text().splitlines()[-1]) == SEGMENT


def test_a_table_in_memory_has_no_file():
    table = LatencyTable.open(None, Target())
    table.append(SEGMENT)
    assert table.records == [SEGMENT] and table.path is None


@pytest.mark.parametrize("torn", [b"{", b'{"kind":"segment","signature":"abc","si', json.dumps(WHOLE).encode()])
def test_a_torn_last_line_is_dropped_and_the_table_continues(tmp_path, torn):
    path = tmp_path / "table.jsonl"
    LatencyTable.open(path, Target()).append(SEGMENT)
    with path.open("ab") as file:
        file.write(torn)
    before = path.read_bytes()
    assert LatencyTable.read(path).records == [SEGMENT]
    assert path.read_bytes() == before  # reading leaves the file alone
    LatencyTable.open(path, Target()).append(WHOLE)
    assert LatencyTable.open(path, Target()).records == [SEGMENT, WHOLE]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{nonsense", "line 3 is not JSON"),
        ("[1, 2]", "line 3 is not a JSON object"),
        ('{"kind": "layer"}', "line 3 has kind 'layer'"),
        ('{"kind": "segment", "signature": "x"}', "line 3 (segment) lacks sizes"),
        (json.dumps({**SEGMENT, "median_us": 0}), "line 3 (segment) has a time that is not positive"),
        (json.dumps({**WHOLE, "reference_us": "fast"}), "line 3 (whole) has a time that is not positive"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, complaint):
    path = tmp_path / "table.jsonl"
    LatencyTable.open(path, Target()).append(SEGMENT)
    with path.open("a") as file:
        file.write(line + "\n" + json.dumps(WHOLE) + "\n")
    with pytest.raises(CorruptTable) as caught:
        LatencyTable.open(path, Target())
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no line break", "no complete line"),
        ('{"hwprune_latency_table": 99}\n', "not a latency table of version 1 (found 99)"),
        ('{"kind": "segment"}\n', "not a latency table of version 1 (found None)"),
        ('{"hwprune_latency_table": 1}\n', "lacks a valid target or fingerprint"),
        ('{"hwprune_latency_table": 1, "target": {"speed": 3}, "fingerprint": {}}\n', "unknown keys speed"),
    ],
)
def test_a_broken_header_is_named(tmp_path, text, complaint):
    path = tmp_path / "table.jsonl"
    path.write_text(text)
    with pytest.raises(CorruptTable) as caught:
        LatencyTable.open(path, Target())
    assert complaint in str(caught.value)


def test_a_bad_record_is_refused_before_it_is_written(tmp_path):
    path = tmp_path / "table.jsonl"
    table = LatencyTable.open(path, Target())
    before = path.read_text()
    with pytest.raises(CorruptTable, match="lacks signature"):
        table.append({"kind": "segment", "median_us": 1.0})
    assert path.read_text() == before and table.records == []


def test_another_machine_is_refused_with_both_named_unless_forced(tmp_path):
    path = tmp_path / "table.jsonl"
    LatencyTable.open(path, Target()).append(SEGMENT)
    header, rest = path.read_text().split("\n", 1)
    other = json.loads(header)
    here = other["fingerprint"]["cpu"]
    other["fingerprint"]["cpu"] = "Abacus 3000"
    path.write_text(json.dumps(other) + "\n" + rest)
    with pytest.raises(DeviceMismatch) as caught:
        LatencyTable.open(path, Target())
    assert f"cpu: Abacus 3000 | {here}" in str(caught.value) and "--force" in str(caught.value)
    assert LatencyTable.open(path, Target(), force=True).records == [SEGMENT]


@pytest.mark.parametrize("change", [{"threads": 2}, {"memory_format": "channels_last"}, {"fold_batch_norm": False}])
def test_another_target_is_refused(tmp_path, change):
    path = tmp_path / "table.jsonl"
    LatencyTable.open(path, Target())
    with pytest.raises(DeviceMismatch, match=next(iter(change))):
        LatencyTable.open(path, Target(**change))


def test_merging_takes_every_measurement_once(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path, records in zip(paths, ([SEGMENT], [SEGMENT, WHOLE], [{**SEGMENT, "time": 2.0}]), strict=True):
        LatencyTable.open(path, Target()).extend(records)
    merged = merge(paths, tmp_path / "all.jsonl")
    assert merged.records == [SEGMENT, WHOLE, {**SEGMENT, "time": 2.0}]
    assert LatencyTable.open(tmp_path / "all.jsonl", Target()).records == merged.records
    assert merged.merge(paths) == 0


def test_tables_of_different_targets_do_not_merge(tmp_path):
    LatencyTable.open(tmp_path / "one.jsonl", Target(threads=1))
    LatencyTable.open(tmp_path / "two.jsonl", Target(threads=2))
    with pytest.raises(DeviceMismatch, match=r"threads: 1 \| 2"):
        merge([tmp_path / "one.jsonl", tmp_path / "two.jsonl"], tmp_path / "all.jsonl")


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="cannot read the latency table"):
        LatencyTable.read(tmp_path / "absent.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot write the latency table"):
        LatencyTable.open(tmp_path / "file" / "table.jsonl", Target())
    with pytest.raises(InvalidInput, match="no latency tables"):
        merge([], tmp_path / "all.jsonl")
