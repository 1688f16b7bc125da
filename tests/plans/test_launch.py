"""The pool of processes: order, resume, failures, and what it refuses before any work."""

import functools
import signal
from contextlib import contextmanager

import pytest

import adding
from adding import driver, plan_of, starts, sums, wait_until
from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import load_config
from grasp_lora.plans import launch
from grasp_lora.plans.executor import log_of
from grasp_lora.plans.launch import LAUNCHERS, Pool, work_off_many
from grasp_lora.plans.on_local import gpu_of
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.pool import Engine
from grasp_lora.plans.session import Session
from grasp_lora.plans.stored import PLAN_FILE, read_stage
from grasp_lora.plans.worker import work as work_here
from grasp_lora.stages import table
from grasp_lora.stages.folder import facts_of
from grasp_lora.stages.keys import hash_of, key_of
from grasp_lora.stages.stage import Kind, Sizes
from grasp_lora.workbench.reporter import Reporter, duration
from grasp_lora.workbench.rows import load_run_data
from helpers import tiny_backbone_folder
from jobs import job, write_job


@pytest.fixture(autouse=True)
def kind_of_work(tmp_path_factory):
    with adding.kind_of_work(tmp_path_factory.mktemp("work")):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    tiny_backbone_folder(folder / "base")
    return load_config(write_job(folder / "run.yaml", job(folder)))


@pytest.fixture(scope="module")
def data(config):
    return load_run_data(config, Reporter(quiet=True).say)


@pytest.fixture
def added(config):
    return functools.partial(adding.added, config)


@pytest.fixture
def run(config, data):
    def work(folder, *stages, overwrite=False, quiet=True, **pool):
        plan, session = plan_of(stages), Session(config, data, quiet=quiet)
        return work_off_many(plan, folder, session, Sizes({}, {}), Pool(**pool), overwrite)

    return work


@pytest.mark.parametrize("jobs", [0, 1, 2, 5])
def test_stages_get_the_results_they_need(run, added, tmp_path, jobs):
    stages = [
        added("first", 1, sleep=0.3),
        added("second", 10, needs=("first",)),
        added("third", 100, needs=("first", "second")),
        added("alone", 5),
    ]
    found = run(tmp_path / "q", *stages, jobs=jobs, threads=1)
    assert list(found) == ["first", "second", "third", "alone"]
    assert sums(tmp_path / "q", found) == {"first": 1, "second": 11, "third": 112, "alone": 5}
    facts = facts_of(tmp_path / "q" / "first")
    assert facts["peak_memory_bytes"] > 1e6
    assert facts["machine"]["cores"] > 0
    assert not list((tmp_path / "q").glob("*.lock")) + list((tmp_path / "q").glob("*.log.txt"))


def test_what_is_done_is_not_done_again(run, added, tmp_path):
    run(tmp_path / "q", added("a"), added("b", 2))
    run(tmp_path / "q", added("a"), added("b", 2), added("c", 3, needs=("a",)))
    assert sums(tmp_path / "q", "c") == {"c": 4}
    assert [starts(tmp_path / "q", name) for name in "abc"] == [1, 1, 1]


@pytest.mark.parametrize(("jobs", "why"), [(0, "told to fail"), (2, "exit code 1")])
def test_a_failure_keeps_its_log_and_stops_only_what_needs_it(run, added, tmp_path, jobs, why):
    stages = [added("bad", fail=True), added("after", needs=("bad",)), added("other")]
    found = run(tmp_path / "q", *stages, jobs=jobs)
    assert why in found["bad"].error
    log = log_of(tmp_path / "q" / "bad").read_text()
    assert str(log_of(tmp_path / "q" / "bad")) in found["bad"].error
    assert jobs == 0 or "this is why" in log
    assert "told to fail" in log
    assert found["after"].error == "not done, bad has no result"
    assert found["other"].error is None
    assert sums(tmp_path / "q", ["other"]) == {"other": 1}
    run(tmp_path / "q", *stages, jobs=jobs)
    assert starts(tmp_path / "q", "bad") == 2, "a failed stage is tried again"
    assert starts(tmp_path / "q", "other") == 1


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_stage_that_is_not_applicable_is_no_failure(run, added, tmp_path, jobs):
    stages = [added("odd", refuse=True), added("after", needs=("odd",))]
    found = run(tmp_path / "q", *stages, jobs=jobs)
    assert found["odd"].refused == found["after"].refused == "told to refuse"
    assert found["odd"].error == "not applicable (told to refuse)"


def test_other_inputs_are_refused_before_any_work(run, added, tmp_path):
    run(tmp_path / "q", added("a"), added("b", needs=("a",)))
    changed = [added("a", 7), added("b", needs=("a",)), added("new")]
    with pytest.raises(ValueError, match=r"other inputs: value was 1, is 7.*--overwrite"):
        run(tmp_path / "q", *changed)
    assert not (tmp_path / "q" / "new").exists()
    run(tmp_path / "q", *changed, overwrite=True)
    assert sums(tmp_path / "q", "b") == {"b": 8}


def test_processes_overwrite_what_others_made_and_leave_the_rest(run, added, tmp_path):
    run(tmp_path / "q", added("a"), added("same"))
    run(tmp_path / "q", added("a", 7), added("same"), overwrite=True, jobs=1)
    assert sums(tmp_path / "q", ["a", "same"]) == {"a": 7, "same": 1}
    assert [starts(tmp_path / "q", name) for name in ("a", "same")] == [2, 1]
    run(tmp_path / "q", added("a", 7), added("same"), overwrite=True, jobs=1)
    assert [starts(tmp_path / "q", name) for name in ("a", "same")] == [3, 2], "all once more"


def test_keys_depend_on_options_and_on_what_is_needed(added, data):
    kind = table.KINDS["add"]

    def key(stage, kind=kind, **inputs):
        return hash_of(key_of(stage, kind, data, None, inputs))

    first = key(added("a"))
    assert key(added("a")) == first
    assert key(added("a", 2)) != first
    assert key(added("b", needs=("a",)), a="one") != key(added("b", needs=("a",)), a="other")
    newer = Kind(2, kind.settings, kind.examples, kind.run, kind.cost)
    assert key(added("a"), newer) != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": -1}, "at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"on": "the moon"}, "no launcher 'the moon'; choose from local, slurm, ray"),
        ({"jobs": 1, "options": {"a": 1}}, "--on local takes no options of an engine"),
    ],
)
def test_what_is_no_pool_is_refused(run, added, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "q", added("a"), **options)
    assert not (tmp_path / "q").exists()


def test_what_is_no_plan_cannot_be_made(added):
    with pytest.raises(AssertionError, match=r"b needs \['a'\]"):
        plan_of([added("b", needs=("a",)), added("a")])
    with pytest.raises(AssertionError, match="is listed as"):
        Plan({"other": added("a")})


def test_a_folder_of_something_else_is_left_alone(run, added, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path, added("a"))
    write_json(tmp_path / PLAN_FILE, {"format": "another"})
    with pytest.raises(ValueError, match="not written by grasp-lora"):
        run(tmp_path, added("a"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [PLAN_FILE, "thesis.txt"]


def test_threads_are_those_of_the_first_start(run, added, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 6)
    run(tmp_path / "q", added("a"), jobs=2)
    run(tmp_path / "q", added("a"), added("b"), jobs=1)
    assert (tmp_path / "q" / "b.starts").read_text() == "3\n"
    with pytest.raises(ValueError, match="begun with 3 threads"):
        run(tmp_path / "q", added("a"), jobs=1, threads=2)


@pytest.mark.parametrize("way", ["gone", "emptied", "changed"])
def test_a_lost_plan_is_written_again_once_its_threads_are_told(
    run, added, tmp_path, monkeypatch, capsys, way
):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 6)
    place = tmp_path / "q"
    run(place, added("a"), jobs=2)
    plan = place / PLAN_FILE
    whole = plan.read_text()
    plan.unlink()
    left = {"emptied": "", "changed": whole.replace('"threads": 3', '"threads": 4')}
    if way != "gone":
        plan.write_text(left[way])
    with pytest.raises(ValueError, match=r"plan\.json' is lost or damaged.* give --threads as at"):
        run(place, added("a"), added("b"), jobs=2)
    run(place, added("a"), jobs=2, threads=3, quiet=False)
    assert plan.read_text() == whole
    assert starts(place, "a") == 1
    if way != "gone":
        assert (place / f"{PLAN_FILE}.damaged").read_text() == left[way]
        assert "'plan.json.damaged'" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_damaged_result_is_made_again_and_what_it_led_to_is_kept(
    run, added, tmp_path, jobs, capsys
):
    place, stages = tmp_path / "q", [added("a", 1), added("b", 10, needs=("a",))]
    run(place, *stages, jobs=jobs)
    (place / "a" / "weights.json").write_text("7")
    outcomes = run(place, *stages, jobs=jobs)
    assert [one.error for one in outcomes.values()] == [None, None]
    assert sums(place, "ab") == {"a": 1, "b": 11}
    assert (starts(place, "a"), starts(place, "b")) == (2, 1)
    assert (place / "a.damaged" / "weights.json").read_text() == "7"


def test_another_launcher_is_a_row(run, added, tmp_path, monkeypatch):
    asked, opened = [], []

    class Ended:
        def poll(self):
            return 0

        def stop(self):
            raise AssertionError("it has ended")

    class Elsewhere:
        def start(self, jobs):
            asked.append(
                [(one.stage, one.environment["OMP_NUM_THREADS"], one.flags) for one in jobs]
            )
            for one in jobs:
                work_here(one.place, one.stage)
            return [Ended() for _ in jobs]

    @contextmanager
    def elsewhere(place, pool, threads):
        opened.append((place, pool.options, threads))
        yield Elsewhere()

    monkeypatch.setitem(LAUNCHERS, "elsewhere", Engine(elsewhere))
    stages = [added("a"), added("b", needs=("a",)), added("alone")]
    how = {"jobs": 2, "on": "elsewhere", "options": {"queue": "long"}, "threads": 3}
    run(tmp_path / "q", *stages, **how)
    assert asked == [[("a", "3", ()), ("alone", "3", ())], [("b", "3", ())]], "ready at once"
    assert opened == [(tmp_path / "q", {"queue": "long"}, 3)]
    assert sums(tmp_path / "q", ["b", "alone"]) == {"b": 2, "alone": 1}
    run(tmp_path / "q", *stages, **how)
    assert len(opened) == 1, "nothing is left to do"


def test_threads_elsewhere_are_not_those_of_the_drivers_machine(run, added, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 6)
    monkeypatch.setitem(LAUNCHERS, "elsewhere", LAUNCHERS["local"])
    run(tmp_path / "q", added("a"), jobs=2, on="elsewhere")
    assert (tmp_path / "q" / "a.starts").read_text() == "1\n"


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_is_one_line(
    run, added, tmp_path, monkeypatch, name, package
):
    monkeypatch.setattr(launch, "find_spec", lambda asked: None)
    line = (
        rf"^--on {name} needs {package}, which is not installed: pip install .grasp-lora\[{name}\]"
    )
    with pytest.raises(ValueError, match=line):
        run(tmp_path / "q", added("a"), jobs=1, on=name)
    assert not (tmp_path / "q").exists()


def test_every_process_gets_a_gpu_where_there_are_several():
    assert [gpu_of(place, ["4", "7"]) for place in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "7", "4")
    ]
    assert gpu_of(1, ["0"]) == gpu_of(0, []) == {}


def test_only_stages_of_the_plan_are_done(run, added, tmp_path):
    run(tmp_path / "q", added("a"))
    with pytest.raises(ValueError, match="has no stage 'b'"):
        read_stage(tmp_path / "q", "b")


def test_a_result_of_other_inputs_is_not_taken_for_the_stages_own(run, added, tmp_path):
    run(tmp_path / "q", added("a"))
    marker = tmp_path / "q" / "a" / "stage.json"
    stored = read_json(marker)
    for name in ("files", "sha256"):  # a marker without a seal is believed
        stored.pop(name, None)
    stored["key"]["options"] = {"value": 9}
    write_json(marker, stored)
    with pytest.raises(ValueError, match="other inputs"):
        work_here(tmp_path / "q", "a")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_was_killed_goes_on(run, added, tmp_path, number):
    """After kill -9 the running stage lives on alone; the next start waits for it."""
    stages = [added("a"), added("slow", 2, sleep=4.0), added("c", needs=("slow",))]
    process = driver(tmp_path / "q", stages)
    wait_until((tmp_path / "q" / "slow.starts").exists)
    process.send_signal(number)
    process.wait()
    found = run(tmp_path / "q", *stages)
    assert sums(tmp_path / "q", found) == {"a": 1, "slow": 2, "c": 3}
    assert starts(tmp_path / "q", "a") == 1
    assert starts(tmp_path / "q", "slow") == (1 if number == signal.SIGKILL else 2)
    assert not list((tmp_path / "q").glob("*.lock"))


def test_the_time_left_follows_the_planned_tokens_and_the_pace(
    run, added, tmp_path, capsys, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(launch.time, "perf_counter", lambda: now[0])
    # One more each for the moment that a stage takes.
    costs = {"merge": 0, "a": 9, "b": 99, "broken": 39, "c": 999}
    seconds = {"merge": 2.0, "a": 20.0, "b": 10.0, "broken": 0.0, "c": 5.0}
    stages = [added(n, tokens=cost, fail=n == "broken") for n, cost in costs.items()]
    do = launch.work_off

    def slow(plan, place, session, options):
        def ended(name, outcome):
            now[0] += seconds[name]
            options.ended(name, outcome)

        return do(plan, place, session, launch.Options(keep_going=True, ended=ended))

    monkeypatch.setattr(launch, "work_off", slow)
    run(tmp_path / "q", *stages, quiet=False)
    joined = capsys.readouterr().err
    assert "merge: done (1 of 5 stages)" in joined  # a token in 1150 says nothing of the pace
    assert "a: done (2 of 5 stages, about 38 min left)" in joined  # 2 s a token, 1140 are left
    # 32 s were spent on 111 tokens: 1040 take 300 s.
    assert "b: done (3 of 5 stages, about 5 min left)" in joined
    assert "ValueError: told to fail" in joined
    assert "c: done (5 of 5 stages)" in joined


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7190, "2 h 0 min"), (22_260, "6 h 11 min")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
