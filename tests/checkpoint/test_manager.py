"""A step exists whole or not at all, and what is deleted is what may be."""

import gc
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from processes import in_child

import torch_s3
from torch_s3 import CheckpointManager, errors
from torch_s3.checkpoint import abandoned, manager, steps
from torch_s3.checkpoint.owner import this_process
from torch_s3.upload import S3Writer

_MIB = 1024 * 1024


@pytest.fixture
def opened(place):
    """Opens managers of one run in a `Place`."""
    return lambda **settings: CheckpointManager(f"{place.uri}/run", **place.arguments, **settings)


@pytest.fixture
def on_s3(s3, bucket):
    """Opens managers of one run on S3, which write in parts of 5 MiB."""
    options = s3.storage_options | {"part_size": 5 * _MIB}
    return lambda **settings: CheckpointManager(f"{bucket}/run", **{"storage_options": options} | settings)


def _state(step, size=1):
    weight = torch.frombuffer(bytearray([step]) * size, dtype=torch.uint8)  # torch.full's threads hang after a fork
    return {"weight": weight, "step": step}


def _large(step):
    """Three parts."""
    return _state(step, 11 * _MIB)


def _assert_is(loaded, step, size=1):
    assert loaded.step == loaded.state["step"] == step
    assert torch.equal(loaded.state["weight"], _state(step, size)["weight"])


# ---------------------------------------------------------------------- what is there


def test_new_run_has_no_steps(opened):
    run = opened()

    assert run.steps() == []
    assert run.latest() is None
    with pytest.raises(errors.NotFound):
        run.load()


def test_saved_steps_are_found_by_another_manager(opened):
    saved = opened().save(7, _state(7), {"loss": 0.5}, {"git": ["abc", 1]})
    run = opened()

    assert run.steps() == [7]
    assert run.latest() == 7
    loaded = run.load()
    _assert_is(loaded, 7)
    assert loaded[2:] == ({"loss": 0.5}, {"git": ["abc", 1]})
    manifest = run.manifest(7)
    assert (manifest.size, manifest.etag, manifest.checksum) == (saved.bytes, saved.etag, saved.checksum)
    assert manifest.version == torch_s3.__version__


def test_older_step_is_loaded_by_number_with_the_options_of_load_checkpoint(opened):
    run = opened()
    for step in (1, 2):
        run.save(step, _state(step))

    _assert_is(run.load(1), 1)
    assert run.load(1, map_location="meta").state["weight"].device.type == "meta"
    with pytest.raises(errors.NotFound, match=r"no step 3; there are, latest first: 2, 1$"):
        run.load(3)


def test_step_without_manifest_does_not_exist(opened, place):
    run = opened()
    run.save(1, _state(1))
    run.save(2, _state(2))
    place.fs.rm_file(place.fs._strip_protocol(f"{place.uri}/run/step-00000002/manifest.json"))
    place.put("run/step-00000003/other.json", b"{}")

    assert run.steps() == [1]
    _assert_is(run.load(), 1)


def test_manifest_is_readable_without_us(on_s3, client, bucket):
    on_s3().save(3, _large(3), {"loss": torch.tensor(0.5), "nan": float("nan")})
    key = "run/step-00000003/manifest.json"
    manifest = json.loads(client.get_object(Bucket=bucket[5:], Key=key)["Body"].read())
    data = f"run/step-00000003/{manifest['file']}"
    head = client.head_object(Bucket=bucket[5:], Key=data, ChecksumMode="ENABLED")

    assert manifest["step"] == 3
    assert manifest["size"] == head["ContentLength"]
    assert f'"{manifest["etag"]}"' == head["ETag"]
    assert manifest["checksum"] == ["crc64nvme", head["ChecksumCRC64NVME"]]
    assert manifest["metrics"] == {"loss": 0.5, "nan": None}


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, None], ids=repr)
def test_step_is_a_number_from_zero(opened, step):
    with pytest.raises(ValueError, match="step"):
        opened().save(step, {})


@pytest.mark.parametrize(
    "wrong", [{"metrics": {"loss": "low"}}, {"metrics": {"a": None}}, {"metadata": {1, 2}}], ids=repr
)
def test_bad_metrics_and_metadata_are_refused_before_anything_is_written(opened, place, wrong):
    with pytest.raises(ValueError, match=r"metric|metadata"):
        opened().save(1, _state(1), **wrong)

    assert place.names() == []


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": 0}, {"keep_every": 0}, {"keep_best": ("loss", "low", 1)}, {"keep_best": ("loss", "min", 0)}],
    ids=repr,
)
def test_rules_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointManager("memory://run", **wrong)


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda fs, data, manifest: fs.rm_file(data),
        lambda fs, data, manifest: fs.pipe_file(data, fs.cat_file(data)[:-10]),
        lambda fs, data, manifest: fs.pipe_file(manifest, b'{"format": 1'),
        lambda fs, data, manifest: fs.pipe_file(manifest, b""),
    ],
    ids=["data gone", "data cut", "manifest cut", "manifest empty"],
)
def test_damaged_step_is_passed_over_with_a_warning(opened, place, damage):
    run = opened()
    for step in (1, 2):
        run.save(step, _state(step))
    folder = place.fs._strip_protocol(f"{place.uri}/run/step-00000002")
    damage(place.fs, f"{folder}/{run.manifest(2).file}", f"{folder}/manifest.json")
    run = opened()

    with pytest.warns(UserWarning, match="step 2 cannot be loaded"):
        _assert_is(run.load(), 1)
    with pytest.raises((errors.CheckpointError, errors.NotFound)):
        run.load(2)


def test_where_all_is_damaged_the_newest_ones_error_is_raised(opened, place):
    run = opened()
    run.save(1, _state(1))
    place.put(f"run/step-00000001/{run.manifest(1).file}", b"")

    with pytest.warns(UserWarning, match="step 1"), pytest.raises(errors.CheckpointError, match="0 bytes"):
        run.load()


def test_unsafe_checkpoint_is_no_reason_to_load_an_older_one(opened):
    run = opened()
    run.save(1, _state(1))
    run.save(2, {"model": torch.nn.Linear(1, 1)})

    with pytest.raises(errors.UnsafeCheckpoint):
        run.load()
    assert type(run.load(weights_only=False).state["model"]) is torch.nn.Linear


@pytest.mark.parametrize(
    "wanted", [{"keys": ["wieght"]}, {"into": {"weight": torch.zeros(1, dtype=torch.uint8), "step": 0}}], ids=str
)
def test_step_that_does_not_fit_is_no_reason_to_load_an_older_one(opened, wanted):
    run = opened()
    run.save(1, {"weight": torch.zeros(1, dtype=torch.uint8), "wieght": 1})
    run.save(2, _state(2, size=3))

    with pytest.raises(errors.CheckpointMismatch):
        run.load(**wanted)


@pytest.mark.filterwarnings("ignore:step 1 cannot be loaded:UserWarning")
def test_step_saved_while_the_one_before_is_deleted_is_loaded(opened, monkeypatch):
    run, other = opened(), opened(keep_last=1)
    other.save(1, _state(1))
    steps = run.steps

    def listed():
        found = steps()
        if found == [1]:
            other.save(2, _state(2))
        return found

    monkeypatch.setattr(run, "steps", listed)
    _assert_is(run.load(), 2)


# ---------------------------------------------------------------------- two writers


def test_second_writer_of_a_step_is_told_at_once(opened):
    opened().save(1, _state(1))

    with pytest.raises(errors.AlreadyExists, match="step-00000001"):
        opened().save(1, _state(9))
    _assert_is(opened().load(1), 1)


@pytest.mark.parametrize("server", ["s3", "rclone", "file"])
def test_of_two_writers_at_once_one_wins_and_one_is_told(server, request, tmp_path, monkeypatch):
    arguments = {}
    if server == "file":
        root = f"file://{tmp_path}/run"
    else:
        fixture = request.getfixturevalue(server)
        root = f"{fixture.create_bucket(f'two-writers-{server}')}/run"
        arguments = {"storage_options": fixture.storage_options}
    slow, fast = (CheckpointManager(root, **arguments) for _ in range(2))
    save = manager.save_checkpoint

    def overtaken(state, *args, **kwargs):
        saved = save(state, *args, **kwargs)
        monkeypatch.setattr(manager, "save_checkpoint", save)
        fast.save(1, _state(1))
        return saved

    monkeypatch.setattr(manager, "save_checkpoint", overtaken)
    with pytest.raises(errors.AlreadyExists):
        slow.save(1, _state(2))

    _assert_is(fast.load(1), 1)
    assert len(fast._list()) == 2  # the loser's checkpoint is gone


def test_many_writers_of_the_same_steps_agree(on_s3):
    outcomes = []

    def write(number):
        run = on_s3(keep_last=None)
        for step in range(4):
            try:
                run.save(step, {"writer": number})
                outcomes.append((step, number))
            except errors.AlreadyExists:
                pass

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = on_s3()

    assert sorted(step for step, _ in outcomes) == [0, 1, 2, 3]
    assert all(run.load(step).state == {"writer": number} for step, number in outcomes)
    assert len(run._list()) == 8


# ---------------------------------------------------------------------- retention


def test_what_need_not_be_kept_goes(opened, place):
    run = opened(keep_last=2, keep_every=4, keep_best=("loss", "min", 1))
    for step in range(1, 8):
        run.save(step, _state(step), {"loss": abs(step - 3)})

    assert run.steps() == [3, 4, 6, 7]
    assert run.best() == 3
    assert len(place.names()) == 8
    assert opened(keep_best=("loss", "max", 1)).best() == 7


def test_metric_of_another_name_is_warned_of(opened):
    run = opened(keep_best=("loss", "min", 1))
    run.save(1, _state(1))
    with pytest.warns(UserWarning, match="step 2 has no metric 'loss', which keep_best goes by, but 'los'"):
        run.save(2, _state(2), {"los": 0.1})


@pytest.mark.parametrize("rule", ["loss", ("loss", "minimum", 2), ("loss", "min", 0), ("a", "min", 1, 2), ()])
def test_rule_that_is_none_is_refused(opened, rule):
    with pytest.raises(ValueError, match="give a metric, 'min' or 'max', and how many"):
        opened(keep_best=rule)


def test_step_may_be_any_integer(opened):
    run = opened()
    run.save(np.int64(4), _state(4))
    assert run.steps() == [4]


def test_nothing_but_steps_is_deleted(opened, place):
    others = ["run/notes.txt", "run/step-00000001/notes.txt", "run/step-00000001/model.pt", "run/step-1/manifest.json"]
    for name in others:
        place.put(name, b"mine")
    run = opened(keep_last=1)
    for step in (1, 2, 3):
        run.save(step, _state(step))

    assert run.steps() == [3]
    assert [place.read(name) for name in others] == [b"mine"] * 4


def test_step_just_saved_stays_though_higher_ones_are_there(opened):
    run = opened(keep_last=1)
    run.save(9, _state(9))
    run.save(4, _state(4))

    assert run.steps() == [4, 9]


def test_manifest_goes_first(opened, place, monkeypatch):
    run = opened(keep_last=1)
    run.save(1, _state(1))
    gone = []
    rm_file = run._fs.rm_file
    monkeypatch.setattr(run._fs, "rm_file", lambda path: (gone.append(path), rm_file(path)))
    run.save(2, _state(2))

    assert [Path(path).suffix for path in gone] == [".json", ".pt"]


def test_failing_delete_is_logged_and_tried_again(opened, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError("not yours")

    run = opened(keep_last=1)
    run.save(1, _state(1))
    with monkeypatch.context() as patch:
        patch.setattr(run._fs, "rm_file", refuse)
        run.save(2, _state(2))
    assert run.steps() == [1, 2]
    assert "not yours" in caplog.text

    run.save(3, _state(3))
    assert run.steps() == [3]


def test_damaged_manifest_counts_as_none_and_is_left_alone(opened, place):
    run = opened(keep_last=2)
    for step in (1, 2):
        run.save(step, _state(step))
    place.put("run/step-00000009/manifest.json", b"?")
    opened(keep_last=2).save(3, _state(3))

    assert run.steps() == [2, 3, 9]


# ---------------------------------------------------------------------- behind the training


def test_asynchronous_save_is_of_the_state_as_it_was(opened):
    with opened() as run:
        state = _state(1)
        assert run.save_async(1, state, {"loss": 1})
        state["weight"].zero_()
        state["step"] = 5
        assert run.wait().bytes > 0
        assert run.wait() is None
        _assert_is(run.load(), 1)


@pytest.fixture
def held(monkeypatch):
    """Holds asynchronous saves until it is set."""
    event = threading.Event()
    save = manager.save_checkpoint

    def wait_and_save(*args, **kwargs):
        event.wait(30)
        return save(*args, **kwargs)

    monkeypatch.setattr(manager, "save_checkpoint", wait_and_save)
    yield event
    event.set()


def test_busy_manager_skips_or_waits_as_told(opened, held):
    with opened() as run:
        assert run.save_async(1, _state(1))
        assert not run.save_async(2, _state(2), when_busy="skip")
        threading.Timer(0.05, held.set).start()
        assert run.save_async(3, _state(3))
    assert run.steps() == [1, 3]


def test_closing_waits_and_ends(opened, held):
    run = opened()
    run.save_async(1, _state(1))
    held.set()
    run.close()
    run.close()

    assert run.steps() == [1]
    with pytest.raises(ValueError, match="closed"):
        run.save(2, _state(2))


_NEXT_CALLS = {
    "save": lambda run: run.save(2, _state(2)),
    "save_async": lambda run: run.save_async(2, _state(2)),
    "wait": lambda run: run.wait(),
    "close": lambda run: run.close(),
    "exit": lambda run: run.__exit__(None, None, None),
}


@pytest.mark.parametrize("call", _NEXT_CALLS)
def test_error_of_an_asynchronous_save_surfaces_at_the_next_call_once(tmp_path, monkeypatch, caplog, call):
    run = CheckpointManager(f"file://{tmp_path}/run")
    with monkeypatch.context() as patch:
        patch.setattr(manager, "save_checkpoint", lambda *_, **__: 1 / 0)
        run.save_async(1, _state(1))
        run._thread.join()
        with pytest.raises(ZeroDivisionError):
            _NEXT_CALLS[call](run)

    assert "step 1 was not saved" in caplog.text
    if call not in ("close", "exit"):
        run.save(2, _state(2))
        assert run.steps() == [2]


def test_error_of_the_block_is_not_hidden_by_that_of_a_save(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manager, "save_checkpoint", lambda *_, **__: 1 / 0)
    with pytest.raises(KeyError), CheckpointManager(f"file://{tmp_path}/run") as run:
        run.save_async(1, _state(1))
        raise KeyError

    assert "ZeroDivisionError" in caplog.text


def test_asynchronous_save_of_an_existing_step_is_told(opened, caplog):
    run = opened()
    run.save(1, _state(1))
    run.save_async(1, _state(2))
    with pytest.raises(errors.AlreadyExists):
        run.wait()
    _assert_is(run.load(), 1)


def test_fork_has_no_part_in_its_parents_save(on_s3, held):
    run = on_s3()
    run.save_async(1, _state(1))

    assert in_child(lambda: (held.set(), run.save(2, _state(2)))) == 0
    held.set()
    run.close()
    assert run.steps() == [1, 2]


def test_interpreter_waits_for_an_asynchronous_save(tmp_path, s3, bucket):
    program = f"""
import torch, torch_s3
run = torch_s3.CheckpointManager("{bucket}/run", storage_options={s3.storage_options} | {{"part_size": {5 * _MIB}}})
run.save_async(1, {{"weight": torch.full(({20 * _MIB},), 1, dtype=torch.uint8), "step": 1}})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(torch_s3.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)

    _assert_is(CheckpointManager(f"{bucket}/run", storage_options=s3.storage_options).load(), 1, 20 * _MIB)


def test_interrupted_wait_loses_nothing(on_s3, held):
    run = on_s3()
    run.save_async(1, _large(1))
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    held.set()

    assert run.wait().bytes > 11 * _MIB
    _assert_is(run.load(), 1, 11 * _MIB)


def test_manager_that_is_collected_leaves_its_save_alone(on_s3, held):
    run = on_s3()
    run.save_async(1, _large(1))
    del run
    gc.collect()
    held.set()
    for thread in threading.enumerate():
        if thread.name == "torch_s3-save":
            thread.join()

    _assert_is(on_s3().load(), 1, 11 * _MIB)


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("call", "at"), [*((S3Writer.write, at) for at in range(1, 8, 2)), (S3Writer.commit, 1), (S3Writer.commit, 2)]
)
def test_interrupt_leaves_the_step_before_and_nothing_else(on_s3, open_uploads, monkeypatch, call, at):
    run = on_s3(keep_last=1)
    run.save(1, _large(1))
    calls = itertools.count(1)

    def interrupted(file, *args):
        if next(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return call(file, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(S3Writer, call.__name__, interrupted)
        run.save(2, _large(2))

    assert open_uploads() == []
    _assert_is(run.load(), run.latest(), 11 * _MIB)


@pytest.mark.parametrize("kind", ["create", "part", "complete", "put", "head", "get", "list", "delete"])
@pytest.mark.parametrize("fault", [faults.reset, faults.lose, faults.answer(500), faults.answer(503, "SlowDown")])
def test_save_through_faults_is_whole(s3, bucket, open_uploads, kind, fault):
    behave = faults.aim(kind, faults.in_turn(fault, faults.serve))
    with faults.Faults(itertools.repeat(behave), upstream=s3.endpoint_url) as proxy:
        run = CheckpointManager(
            f"{bucket}/run", keep_last=1, storage_options=proxy.storage_options | {"part_size": 5 * _MIB}
        )
        for step in (1, 2):
            run.save(step, _large(step))
    run = CheckpointManager(f"{bucket}/run", storage_options=s3.storage_options)

    assert run.steps() == [2]
    _assert_is(run.load(), 2, 11 * _MIB)
    assert open_uploads() == [] or (kind, fault) == ("create", faults.lose)  # of which no client can know


@pytest.mark.parametrize("kind", ["create", "part", "complete", "put", "head"])
def test_save_that_fails_leaves_the_step_before(s3, bucket, open_uploads, kind):
    options = s3.storage_options | {"part_size": 5 * _MIB}
    CheckpointManager(f"{bucket}/run", storage_options=options).save(1, _large(1))
    behave = faults.aim(kind, faults.answer(403, "AccessDenied") if kind != "head" else faults.answer(400))
    with faults.Faults(itertools.repeat(behave), upstream=s3.endpoint_url) as proxy:
        run = CheckpointManager(
            f"{bucket}/run", storage_options=options | {"endpoint_url": proxy.storage_options["endpoint_url"]}
        )
        with pytest.raises(errors.S3Error):
            run.save(2, _large(2))
    run = CheckpointManager(f"{bucket}/run", storage_options=options)

    assert open_uploads() == []
    _assert_is(run.load(), 1, 11 * _MIB)
    run.save(2, _large(2))  # what the failed save has left is not in the way
    _assert_is(run.load(), 2, 11 * _MIB)


# ---------------------------------------------------------------------- killed


def _save_until_killed(run, pipe):
    run = run(keep_last=2)
    first = (run.latest() or 0) + 1
    os.write(pipe, b".")
    for step in itertools.count(first):
        run.save(step, (_large if step % 2 else _state)(step % 200) | {"step": step})
        os.write(pipe, b".")


def test_writer_killed_at_fifty_random_points_leaves_a_latest_that_is_what_was_saved(on_s3, open_uploads):
    seeded = random.Random(5)
    reached, pace = [0], 0.0
    for _ in range(50):
        mine, its = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_until_killed(on_s3, its)
            finally:
                os._exit(1)
        os.close(its)
        told = seeded.randrange(3)  # steps that it has to reach, however long that takes here
        for _ in range(1 + told):
            began = time.monotonic()
            assert select.select([mine], [], [], 30)[0]
            assert os.read(mine, 1)
            pace = time.monotonic() - began
        select.select([], [], [], seeded.uniform(0, 1.5 * pace))  # anywhere in the next one
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(mine)
        run = on_s3()
        latest = run.latest()
        if latest is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                loaded = run.load()
            assert loaded.state["step"] == loaded.step == latest
            wanted = torch.full((11 * _MIB if latest % 2 else 1,), latest % 200, dtype=torch.uint8)
            assert torch.equal(loaded.state["weight"], wanted)
        reached.append(latest or 0)
        assert reached[-1] >= reached[-2] + told

    assert reached[-1] > 10
    on_s3().save(10**6, _state(0))
    assert open_uploads() == []


def _kill_in(run, call, monkeypatch):
    """Have a child be killed when it calls ``S3Writer.call`` while it saves step 2."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(S3Writer, call, die)
        assert in_child(lambda: run.save(2, _large(2))) == -signal.SIGKILL


def test_upload_of_a_killed_process_is_aborted(on_s3, open_uploads, monkeypatch):
    run = on_s3()
    run.save(1, _large(1))
    _kill_in(run, "_complete", monkeypatch)
    assert len(open_uploads()) == 1

    _assert_is(run.load(), 1, 11 * _MIB)
    run.save(2, _large(2))
    assert open_uploads() == []


def _upload(client, bucket, owner, root="run"):
    key = f"{root}/step-00000005/{steps.data_name(owner, '00000000')}"
    client.create_multipart_upload(Bucket=bucket[5:], Key=key)
    return key


def test_uploads_of_the_living_of_the_young_elsewhere_and_of_others_stay(
    on_s3, client, bucket, open_uploads, monkeypatch
):
    me = this_process()
    wanted = [
        _upload(client, bucket, me),
        _upload(client, bucket, me._replace(start=1), root="run-2"),
    ]
    client.create_multipart_upload(Bucket=bucket[5:], Key="run/step-00000005/model.pt")
    elsewhere = _upload(client, bucket, me._replace(machine="ffffffff"))
    _upload(client, bucket, me._replace(start=1))
    on_s3(abandoned_after=1e12).save(1, {})
    assert sorted(upload["Key"] for upload in open_uploads()) == sorted(
        [*wanted, elsewhere, "run/step-00000005/model.pt"]
    )

    on_s3().save(2, {})  # moto's uploads all began in 2010
    assert sorted(upload["Key"] for upload in open_uploads()) == sorted([*wanted, "run/step-00000005/model.pt"])


def test_checkpoints_that_no_manifest_lists_go_when_their_writers_are_dead(opened, place, monkeypatch):
    me = this_process()
    names = {
        kind: f"run/step-00000005/{steps.data_name(owner, '00000000')}"
        for kind, owner in {
            "living": me,
            "dead": me._replace(start=1),
            "elsewhere": me._replace(machine="ffffffff"),
        }.items()
    }
    for name in names.values():
        place.put(name, b"content")
    run = opened()
    run.save(1, _state(1))
    assert len(place.names()) == 5  # a dead process's last request may still be under way

    monkeypatch.setattr(abandoned, "_SETTLED", -100.0)
    run.save(2, _state(2))
    left = [f"run/step-00000005/{name}" for name in place.names()]
    assert [kind for kind, name in names.items() if name in left] == ["living", "elsewhere"]

    opened(abandoned_after=-100.0).save(3, _state(3))
    left = [f"run/step-00000005/{name}" for name in place.names()]
    assert [kind for kind, name in names.items() if name in left] == ["living"]
    assert run.steps() == [1, 2, 3]


def test_uploads_that_may_not_be_listed_are_no_reason_to_fail(s3, bucket, caplog):
    behave = faults.aim("uploads", faults.answer(403, "AccessDenied"))
    with faults.Faults(itertools.repeat(behave), upstream=s3.endpoint_url) as proxy:
        run = CheckpointManager(f"{bucket}/run", keep_last=1, storage_options=proxy.storage_options)
        for step in (1, 2):
            run.save(step, _state(step))
        assert run.steps() == [2]

    assert "could not delete old checkpoints" in caplog.text
