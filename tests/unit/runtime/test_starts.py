"""What a run writes down of its starts and ends."""

from nemo_align.runtime import exit_codes, starts


def test_a_start_under_slurm_and_its_end(tmp_path):
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "dgx[01-24]"}
    starts.began(tmp_path, 192, variables)
    (start,) = starts.read(tmp_path)
    assert (start.job_id, start.job_restarts, start.nodes, start.ranks) == ("7", 2, "dgx[01-24]", 192)
    assert start.end_time is None and start.code is None  # it runs, or nobody lived to write its end
    starts.ended(tmp_path, exit_codes.USER_ERROR, "step 3: loss nan")
    starts.ended(tmp_path, exit_codes.FAILURE, "rank 5: connection reset")  # what followed from it
    (start,) = starts.read(tmp_path)
    assert (start.code, start.reason) == (exit_codes.USER_ERROR, "step 3: loss nan")


def test_starts_come_in_their_order_and_a_torn_line_costs_only_itself(tmp_path):
    starts.began(tmp_path, 2, {})
    with open(tmp_path / starts.STARTS_FILE, "a") as stream:
        stream.write('{"end_time": "2026-0')
    starts.began(tmp_path, 4, {})
    starts.ended(tmp_path, exit_codes.SUCCESS, "complete")
    first, second = starts.read(tmp_path)
    assert (first.ranks, first.reason) == (2, None)
    assert (second.ranks, second.reason, second.job_id, second.job_restarts) == (4, "complete", None, 0)
    assert first.nodes  # without SLURM: this host


def test_a_batch_script_is_told_where_a_start_began_and_how_it_ended(tmp_path, monkeypatch):
    note = tmp_path / "note"
    monkeypatch.setenv(starts.NOTE_VARIABLE, str(note))
    starts.resumed("runs/a", 500)
    starts.ended(tmp_path, exit_codes.USER_ERROR, "a mistake")
    starts.ended(tmp_path, exit_codes.FAILURE, "what followed from it")
    assert note.read_text() == "step runs/a 500\nend 2\nend 1\n"


def test_a_disk_that_takes_nothing_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    starts.ended(tmp_path / "file", exit_codes.FAILURE, "the disk is full")
    assert starts.read(tmp_path / "file") == []
