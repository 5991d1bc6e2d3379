"""What a folder of checkpoints means, and which of them stay."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import KeepBest, errors
from torch_s3.checkpoint import steps
from torch_s3.checkpoint.owner import is_alive, this_process

OWNER = steps.Owner("0123abcd", 42, 1234)
NAME = steps.data_name(OWNER, "00000000")

numbers = st.integers(0, 10**10)
values = st.one_of(st.integers(-3, 3).map(float), st.floats())
runs = st.dictionaries(st.integers(0, 30), st.dictionaries(st.sampled_from(["loss", "accuracy"]), values))
rules = st.builds(KeepBest, st.sampled_from(["loss", "accuracy", "none"]), st.sampled_from(["min", "max"]), numbers)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(numbers)
def test_step_is_known_by_its_manifest(step):
    assert steps.step_of_manifest(f"{steps.folder(step)}/{steps.MANIFEST}") == step
    assert steps.step_of_manifest(f"{steps.folder(step)}/{NAME}") is None


@pytest.mark.parametrize(
    "key", ["manifest.json", "step-1/manifest.json", "step-000000001/manifest.json", "step-00000001/manifest.json.tmp"]
)
def test_strange_names_are_no_steps(key):
    assert steps.step_of_manifest(key) is None


@given(st.lists(numbers))
def test_folders_up_to_eight_digits_sort_as_their_steps(found):
    small = [step % 10**8 for step in found]

    assert [steps.folder(step) for step in sorted(small)] == sorted(steps.folder(step) for step in small)


@pytest.mark.parametrize("suffix", ["", f".{'0' * 32}.partial"])
def test_checkpoint_tells_its_owner(suffix):
    assert steps.owner_of_data(f"step-00000001/{NAME}{suffix}") == OWNER


@pytest.mark.parametrize(
    "key", [NAME, f"a/step-00000001/{NAME}", "step-00000001/manifest.json", "step-00000001/model.pt"]
)
def test_strange_names_have_no_owner(key):
    assert steps.owner_of_data(key) is None


def test_owner_that_runs_is_alive_and_one_elsewhere_unknown():
    here = this_process()

    assert is_alive(here) is True
    assert is_alive(here._replace(start=here.start + 1)) is False  # its id came again
    assert is_alive(here._replace(machine="ffffffff")) is None


@given(numbers, st.dictionaries(st.text(), st.floats()), json_values)
def test_manifest_comes_back(step, metrics, metadata):
    manifest = steps.Manifest(step, NAME, 5, None, ("crc64nvme", "AAAA"), metrics, metadata, "1.0", "now")
    found = steps.read(steps.write(manifest), "s3://b/k")

    assert found._replace(metrics={}) == manifest._replace(metrics={})
    for name, value in metrics.items():
        assert found.metrics[name] == value or (math.isnan(found.metrics[name]) and not math.isfinite(value))


@pytest.mark.parametrize("metadata", [object(), {1, 2}, math.inf, b"bytes"], ids=["object", "set", "infinity", "bytes"])
def test_metadata_that_json_cannot_hold_is_refused(metadata):
    with pytest.raises(ValueError, match="metadata"):
        steps.write(steps.Manifest(1, NAME, 5, None, None, {}, metadata, "1.0", "now"))


def _changed(**changes):
    manifest = steps.Manifest(1, NAME, 5, None, None, {}, None, "1.0", "now")
    return json.dumps(json.loads(steps.write(manifest)) | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        _changed(file="../../other.pt"),
        _changed(file="/etc/passwd"),
        _changed(file=None),
        _changed(size="5"),
        _changed(step=True),
        _changed(metrics=[]),
        _changed(metrics={"loss": "x"}),
        _changed(checksum=["crc64nvme"]),
        _changed(format="x"),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_damaged_manifest_is_an_error(content):
    with pytest.raises(errors.CheckpointError, match="s3://b/k"):
        steps.read(content, "s3://b/k")


def test_manifest_of_a_later_version_says_so():
    with pytest.raises(errors.CheckpointError, match=r"torch_s3 9\.0"):
        steps.read(_changed(format=2, version="9.0"), "s3://b/k")


@given(runs, st.integers(0, 30), st.integers(1, 5), st.none() | st.integers(1, 7), st.none() | rules)
def test_what_is_kept_is_what_the_rules_say(metrics, newest, last, every, best):
    stay = steps.kept(metrics, newest=newest, keep_last=last, keep_every=every, keep_best=best)

    def is_kept(step):
        by_rule = step == newest or sum(other > step for other in metrics) < last
        if every and step % every == 0:
            return True
        if best is None or math.isnan(metrics[step].get(best.metric, math.nan)):
            return by_rule

        def better(other):
            mine, its = metrics[step][best.metric], metrics[other].get(best.metric, math.nan)
            return (its < mine if best.mode == "min" else its > mine) or (its == mine and other > step)

        return by_rule or sum(map(better, metrics)) < best.steps

    assert stay == {newest} | {step for step in metrics if is_kept(step)}


@given(runs, st.integers(0, 30))
def test_without_a_number_all_are_kept(metrics, newest):
    stay = steps.kept(metrics, newest=newest, keep_last=None, keep_every=None, keep_best=None)

    assert stay == {newest, *metrics}
