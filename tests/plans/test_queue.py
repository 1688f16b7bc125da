"""The queue: order, resume, failures, and what it refuses before any work."""

import json
import signal
import subprocess
import sys
import time

import pytest
from grasp_lora.plans.job import JOB_FILE, RESULT_FILE, do_job, work_named
from grasp_lora.plans.queue import Job, gpu_of, keys_of, run_queue

from grasp_lora.base.files import read_json, write_json
from grasp_lora.plans import queue
from grasp_lora.workbench.reporter import duration

STAND_IN = '''
import os, sys, time
from pathlib import Path

def add(inputs, needed, folder):
    """Append a line per start, so that a test can count them."""
    with open(folder / "starts.txt", "a") as file:
        file.write(os.environ.get("OMP_NUM_THREADS", "?") + "\\n")
    time.sleep(inputs.get("sleep", 0))
    if inputs.get("fail"):
        print("this is why", file=sys.stderr)
        raise ValueError("told to fail")
    return {"sum": inputs["value"] + sum(one["sum"] for one in needed.values())}
'''


@pytest.fixture(autouse=True)
def work(monkeypatch, tmp_path_factory):
    """A module of work beside the plans; jobs find it through the package's own path."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "stand_in.py").write_text(STAND_IN)
    # Every process that starts reads this file first, the jobs' processes among them.
    (folder / "sitecustomize.py").write_text(
        f"import grasp_lora.plans\ngrasp_lora.plans.__path__.append({str(folder)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr("grasp_lora.plans.__path__", [*_plans_path(), str(folder)])


def _plans_path():
    import grasp_lora.plans

    return list(grasp_lora.plans.__path__)


def added(name, value=1, needs=(), **inputs):
    return Job(name, "stand_in:add", {"value": value, **inputs}, needs)


def starts(folder, name):
    return len((folder / name / "starts.txt").read_text().splitlines())


def run(folder, *jobs, **options):
    return run_queue(folder, jobs, quiet=True, threads=options.pop("threads", 1), **options)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_jobs_get_the_results_they_need(tmp_path, workers):
    jobs = [
        added("first", 1, sleep=0.3),
        added("second", 10, needs=("first",)),
        added("third", 100, needs=("first", "second")),
        added("alone", 5),
    ]
    found = run(tmp_path / "q", *jobs, workers=workers)
    assert list(found) == ["first", "second", "third", "alone"]
    assert {name: one.result["sum"] for name, one in found.items()} == {
        "first": 1,
        "second": 11,
        "third": 112,
        "alone": 5,
    }
    assert found["first"].seconds >= 0.3
    assert found["first"].peak_memory_bytes > 1e6


def test_what_is_done_is_not_done_again(tmp_path):
    run(tmp_path / "q", added("a"), added("b", 2))
    found = run(tmp_path / "q", added("a"), added("b", 2), added("c", 3, needs=("a",)))
    assert found["c"].result == {"sum": 4}
    assert [starts(tmp_path / "q", name) for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize(("workers", "why"), [(0, "told to fail"), (2, "exit code 1")])
def test_a_failure_keeps_its_log_and_stops_only_what_needs_it(tmp_path, workers, why):
    jobs = [added("bad", fail=True), added("after", needs=("bad",)), added("other")]
    found = run(tmp_path / "q", *jobs, workers=workers)
    assert found["bad"].result is None
    assert why in found["bad"].error
    log = (tmp_path / "q" / "bad" / "log.txt").read_text()
    assert workers == 0 or "this is why" in log
    assert "told to fail" in log
    assert found["after"].error == "not run, bad has no result"
    assert found["other"].result == {"sum": 1}
    run(tmp_path / "q", *jobs, workers=workers)
    assert starts(tmp_path / "q", "bad") == 2, "a failed run is tried again"
    assert starts(tmp_path / "q", "other") == 1


def test_other_inputs_are_refused_before_any_work(tmp_path):
    run(tmp_path / "q", added("a"), added("b", needs=("a",)))
    changed = [added("a", 7), added("b", needs=("a",)), added("new")]
    with pytest.raises(ValueError, match=r"other settings or data \(a, b\).*--overwrite"):
        run(tmp_path / "q", *changed)
    assert not (tmp_path / "q" / "new").exists()
    found = run(tmp_path / "q", *changed, overwrite=True)
    assert found["b"].result == {"sum": 8}


def test_keys_depend_on_inputs_and_on_what_is_needed():
    first = keys_of([added("a"), added("b", needs=("a",))])
    assert keys_of([added("a"), added("b", needs=("a",))]) == first
    other = keys_of([added("a", 2), added("b", needs=("a",))])
    assert other["a"] != first["a"]
    assert other["b"] != first["b"]
    assert keys_of([Job("a", "stand_in:other", {"value": 1})])["a"] != first["a"]


@pytest.mark.parametrize(
    ("jobs", "options", "message"),
    [
        ([added("a"), added("a")], {}, "unique"),
        ([added("../a")], {}, "cannot name a run"),
        ([added("")], {}, "cannot name a run"),
        ([added("b", needs=("a",)), added("a")], {}, "b needs a"),
        ([added("a")], {"workers": -1}, "at least 0, got -1"),
        ([added("a")], {"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_what_is_no_queue_is_refused(tmp_path, jobs, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "q", *jobs, **options)
    assert not (tmp_path / "q").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path, added("a"))
    write_json(tmp_path / "queue.json", {"format": "another"})
    with pytest.raises(ValueError, match="not written by grasp-lora"):
        run(tmp_path, added("a"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["queue.json", "thesis.txt"]


def test_threads_are_those_of_the_first_start(tmp_path, monkeypatch):
    monkeypatch.setattr(queue.os, "cpu_count", lambda: 6)
    run(tmp_path / "q", added("a"), workers=2, threads=None)
    run(tmp_path / "q", added("a"), added("b"), workers=1, threads=None)
    assert (tmp_path / "q" / "b" / "starts.txt").read_text() == "3\n"
    with pytest.raises(ValueError, match="begun with 3 threads"):
        run(tmp_path / "q", added("a"), threads=2)


def test_every_worker_gets_a_gpu_where_there_are_several():
    assert [gpu_of(place, ["4", "7"]) for place in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "7", "4")
    ]
    assert gpu_of(1, ["0"]) == gpu_of(0, []) == {}


@pytest.mark.parametrize("name", ["os:system", "sub.module:f", "grasp_lora", "job:nothing"])
def test_only_functions_of_the_plans_are_work(name):
    with pytest.raises((ValueError, ModuleNotFoundError), match=r"grasp_lora\.plans"):
        work_named(name)


def test_a_result_of_other_inputs_is_not_taken_for_the_jobs_own(tmp_path):
    job = {"key": "k", "work": "stand_in:add", "needs": {}, "inputs": {"value": 1}}
    write_json(tmp_path / JOB_FILE, job)
    write_json(tmp_path / RESULT_FILE, {"key": "other", "result": {}})
    with pytest.raises(ValueError, match="other inputs"):
        do_job(tmp_path)


def queue_process(folder, *jobs):
    listed = [[job.name, job.work, dict(job.inputs), list(job.needs)] for job in jobs]
    code = (
        "import json, signal, sys; from pathlib import Path\n"
        # A shell's background job is started with interrupts ignored, and hands that on.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from grasp_lora.plans.queue import Job, run_queue\n"
        "jobs = [Job(n, w, i, tuple(d)) for n, w, i, d in json.loads(sys.argv[2])]\n"
        "run_queue(Path(sys.argv[1]), jobs, threads=1)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder), json.dumps(listed)])


def wait_until(reached):
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_queue_that_was_killed_goes_on(tmp_path, number):
    """After kill -9 the running job lives on alone; the next start waits for it."""
    jobs = [added("a"), added("slow", 2, sleep=2.0), added("c", needs=("slow",))]
    process = queue_process(tmp_path / "q", *jobs)
    wait_until((tmp_path / "q" / "slow" / "starts.txt").exists)
    process.send_signal(number)
    process.wait()
    found = run(tmp_path / "q", *jobs)
    assert {name: one.result["sum"] for name, one in found.items()} == {"a": 1, "slow": 2, "c": 3}
    assert starts(tmp_path / "q", "a") == 1
    assert starts(tmp_path / "q", "slow") == (1 if number == signal.SIGKILL else 2)
    assert read_json(tmp_path / "q" / "slow" / RESULT_FILE)["result"] == {"sum": 2}


def test_the_time_left_follows_the_projection_and_how_it_is_kept(tmp_path, capsys, monkeypatch):
    jobs = [added("a"), added("b"), added("broken", fail=True), added("c")]
    seconds = {"a": 20.0, "b": 10.0, "broken": 0.0, "c": 5.0}
    real = queue._outcome

    def slow(folder, key):
        found = real(folder, key)
        return found and queue.Outcome(found.result, seconds[folder.name], None)

    monkeypatch.setattr(queue, "_outcome", slow)
    expected = {"a": 10.0, "b": 100.0, "broken": 40.0, "c": 1000.0}
    run_queue(tmp_path / "q", jobs, 0, 1, expected=expected)
    lines = [line for line in capsys.readouterr().err.splitlines() if " runs" in line]
    joined = "\n".join(lines)
    assert "a: done in 0:20 (1 of 4 runs, about 38 min left)" in joined  # 1140 s, twice as long
    # 30 s were spent where 110 were projected: 1040 s become 284.
    assert "b: done in 0:10 (2 of 4 runs, about 5 min left)" in joined
    assert "c: done in 0:05 (4 of 4 runs)" in joined


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7190, "2 h 0 min"), (22_260, "6 h 11 min")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
