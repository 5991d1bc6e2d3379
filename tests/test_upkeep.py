"""Many copies, deletions and moves at once, and what they ask of the server."""

import signal
import threading
import uuid
from collections import Counter
from contextlib import nullcontext
from itertools import repeat

import pytest
from faults import Faults, aim, answer, hold, in_turn, serve, stall

from torch_s3 import S3FileSystem, errors


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options)


@pytest.fixture
def bucket(fs):
    name = str(uuid.uuid4())
    fs.mkdir(name)
    return name


@pytest.fixture
def many(fs, bucket):
    """The paths of 40 objects and, beside them, a prefix."""
    names = [f"{bucket}/many/{number:02}" for number in range(40)]
    fs.pipe({name: name.encode() for name in [*names, f"{bucket}/many/dir/key"]})
    return names


def through(proxy, s3, **settings):
    return S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}, **settings)


def asked(proxy):
    return Counter(method for method, _ in proxy.requests)


# ---------------------------------------------------------------------- patience


def _late(exchange):
    exchange.read_body()
    if not exchange.wait_for_client_to_leave(0.6):
        exchange.sock.settimeout(None)
        serve(exchange)


def _write_by_parts(fs, many):
    with fs.open(f"{many[0]}-large", "wb") as file:
        file.write(bytes(9 << 20))


@pytest.mark.parametrize(
    ("kind", "do"),
    [
        ("put", lambda fs, many: fs.cp_file(many[0], f"{many[0]}-copy")),
        ("post", lambda fs, many: fs.rm(many)),
        ("complete", _write_by_parts),
    ],
    ids=["copy", "deletion", "completion"],
)
def test_answer_that_s3_has_to_work_for_may_be_late(s3, many, kind, do):
    with Faults(repeat(aim(kind, _late)), upstream=s3.endpoint_url) as proxy:
        late = through(proxy, s3, first_byte_timeout=0.2, read_timeout=0.2, attempts=2)
        do(late, many)

        assert not any(late.stats()["retries"].values())


# ---------------------------------------------------------------------- deleting


def test_list_is_deleted_in_one_request(s3, fs, bucket, many):
    with Faults(upstream=s3.endpoint_url) as proxy:
        through(proxy, s3).rm(many)

        assert asked(proxy) == {"POST": 1}
    assert fs.find(bucket) == [f"{bucket}/many/dir/key"]


def test_deletion_of_a_list_can_be_done_again(fs, bucket, many):
    fs.rm(many[:20])
    fs.rm(many)

    assert fs.find(bucket) == [f"{bucket}/many/dir/key"]


def test_more_than_a_thousand_are_deleted_in_batches(s3, fs, bucket):
    names = [f"{bucket}/{number:04}" for number in range(2001)]
    fs.pipe(dict.fromkeys(names, b""))
    with Faults(upstream=s3.endpoint_url) as proxy:
        through(proxy, s3).rm(names)

        assert asked(proxy) == {"POST": 3}
    assert fs.find(bucket) == []


def test_names_of_a_list_that_look_like_patterns_are_meant_where_they_exist(fs, bucket):
    fs.pipe({f"{bucket}/a[1]": b"", f"{bucket}/a1": b""})
    fs.rm([f"{bucket}/a[1]"])

    assert fs.find(bucket) == [f"{bucket}/a1"]


def test_pattern_means_objects_unless_recursive(fs, bucket, many):
    fs.rm(f"{bucket}/many/*")
    assert fs.find(bucket) == [f"{bucket}/many/dir/key"]

    fs.rm(f"{bucket}/ma*", recursive=True)
    assert fs.find(bucket) == []


def test_pattern_that_matches_prefixes_alone_is_an_error_that_says_what_to_pass(fs, bucket, many):
    with pytest.raises(errors.S3Error, match=f"^s3://{bucket}/many: this is a prefix: pass recursive=True"):
        fs.rm(f"{bucket}/ma*")

    assert len(fs.find(bucket)) == 41


def test_recursive_pattern_deletes_objects_and_prefixes_of_one_name(fs, bucket):
    fs.pipe({f"{bucket}/{name}": b"" for name in ("twin", "twin/key", "two", "other")})
    fs.rm(f"{bucket}/tw*", recursive=True)

    assert fs.find(bucket) == [f"{bucket}/other"]


def test_bucket_is_not_deleted_unless_recursive(fs, bucket):
    with pytest.raises(errors.S3Error, match=f"^s3://{bucket}: .*recursive=True"):
        fs.rm(bucket)

    assert fs.exists(bucket, refresh=True)


def test_refused_deletion_names_the_object():
    refused = b"<DeleteResult><Error><Key>b</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"

    def refuse(exchange):
        exchange.read_body()
        exchange.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(refused)}\r\n\r\n".encode(), refused)

    with (
        Faults([refuse]) as server,
        pytest.raises(errors.AccessDenied, match=r"^s3://bucket/b: not deleted: AccessDenied: no"),
    ):
        S3FileSystem(**server.storage_options).rm(["bucket/a", "bucket/b"])


# ---------------------------------------------------------------------- copying and moving


def test_many_are_copied_side_by_side(s3, fs, bucket, many):
    barrier = threading.Barrier(16, timeout=60)

    def meet(exchange):
        barrier.wait()  # broken, unless sixteen come at a time
        serve(exchange)

    with Faults(repeat(aim("put", in_turn(*[meet] * 16, serve))), upstream=s3.endpoint_url) as proxy:
        through(proxy, s3).cp(f"{bucket}/many/*", f"{bucket}/copies/")

    assert fs.find(f"{bucket}/copies") == [name.replace("many", "copies") for name in many]
    assert fs.cat(f"{bucket}/copies/07") == f"{bucket}/many/07".encode()


def test_tree_is_moved_with_few_requests(s3, fs, bucket, many):
    with Faults(upstream=s3.endpoint_url) as proxy:
        through(proxy, s3).mv(f"{bucket}/many", f"{bucket}/moved", recursive=True)

        assert asked(proxy)["POST"] == 1
        assert asked(proxy)["HEAD"] <= 43
        assert asked(proxy)["GET"] <= 4
    assert len(fs.find(f"{bucket}/moved")) == 41
    assert not fs.exists(f"{bucket}/many", refresh=True)


def test_pattern_is_got_without_asking_about_each(s3, bucket, many, tmp_path):
    with Faults(upstream=s3.endpoint_url) as proxy:
        through(proxy, s3, use_listings_cache=False).get(f"{bucket}/many/**", str(tmp_path))

        assert asked(proxy)["HEAD"] <= 1
        assert asked(proxy)["GET"] <= 43
    assert len(list(tmp_path.rglob("*"))) == 42


def test_failed_copy_of_many_ends_the_others_and_is_named(s3, bucket, many):
    gone = threading.Event()

    def refuse(exchange):
        answer(403, "AccessDenied")(exchange)
        gone.set()

    slow = hold(gone, then=stall)
    with Faults(repeat(aim("put", in_turn(slow, slow, refuse, stall))), upstream=s3.endpoint_url) as proxy:
        fs = through(proxy, s3)
        with pytest.raises(errors.AccessDenied, match=f"^s3://{bucket}/copies/"):
            fs.cp(f"{bucket}/many/*", f"{bucket}/copies/")


@pytest.mark.parametrize("use", ["cp", "mv"])
def test_two_objects_that_would_take_one_place_stay_where_they_are(fs, bucket, use):
    fs.pipe({f"{bucket}/a/x": b"a", f"{bucket}/b/x": b"b"})
    with pytest.raises(errors.S3Error, match=f"^s3://{bucket}/b/x: .*s3://{bucket}/a/x would both be .*/both/x"):
        getattr(fs, use)([f"{bucket}/a/x", f"{bucket}/b/x"], f"{bucket}/both/")

    assert fs.find(bucket) == [f"{bucket}/a/x", f"{bucket}/b/x"]


def test_move_that_fails_deletes_nothing(s3, fs, bucket, many):
    script = repeat(aim("put", in_turn(serve, serve, answer(403, "AccessDenied"))))
    with Faults(script, upstream=s3.endpoint_url) as proxy, pytest.raises(errors.AccessDenied):
        through(proxy, s3).mv(f"{bucket}/many/*", f"{bucket}/moved/")

    assert len(fs.find(f"{bucket}/many")) == 41


def test_interrupted_copy_of_many_ends_at_once(s3, bucket, many):
    with Faults(repeat(aim("put", stall)), upstream=s3.endpoint_url) as proxy:
        fs = through(proxy, s3, first_byte_timeout=600.0)

        def interrupt_main():
            proxy.wait_for_requests(30)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        interrupt = threading.Thread(target=interrupt_main)
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            fs.cp(f"{bucket}/many/*", f"{bucket}/copies/")
        interrupt.join()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torch_s3-calls")]


@pytest.mark.parametrize("on_error", [None, "ignore", "raise"])
def test_copy_of_what_goes_meanwhile_is_passed_over_or_raised(s3, fs, bucket, many, on_error):
    script = repeat(aim("put", in_turn(answer(404, "NoSuchKey"), serve)))
    expected = pytest.raises(errors.NotFound) if on_error == "raise" else nullcontext()
    with Faults(script, upstream=s3.endpoint_url) as proxy, expected:
        through(proxy, s3).cp(f"{bucket}/many", f"{bucket}/copies", recursive=True, on_error=on_error)

    assert on_error == "raise" or len(fs.find(f"{bucket}/copies")) == 40


def test_copy_keeps_storage_class_metadata_and_tags(fs, bucket):
    where = {"Bucket": bucket, "Key": "key"}
    settings = {"ContentType": "text/csv", "Metadata": {"a": "b"}, "Tagging": "x=y", "StorageClass": "STANDARD_IA"}
    fs.client.call("put_object", bucket, **where, **settings, Body=b"content")
    fs.cp(f"{bucket}/key", f"{bucket}/copy")

    head = fs.client.call("head_object", bucket, Bucket=bucket, Key="copy")
    assert (head["ContentType"], head["StorageClass"]) == ("text/csv", "STANDARD_IA")
    assert fs.metadata(f"{bucket}/copy") == {"a": "b"}
    tags = fs.client.call("get_object_tagging", bucket, Bucket=bucket, Key="copy")["TagSet"]
    assert tags == [{"Key": "x", "Value": "y"}]


# ---------------------------------------------------------------------- lists


@pytest.mark.parametrize("how", ["copy", "mv", "get", "put"])
def test_lists_of_unequal_length_are_a_value_error_and_nothing_is_done(fs, bucket, many, how, tmp_path):
    before = fs.find(bucket)
    (tmp_path / "a").write_bytes(b"a")
    places = {"get": [f"{tmp_path}/got"], "put": [f"{bucket}/put"]}
    sources = [f"{tmp_path}/a"] * 2 if how == "put" else many[:2]
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        getattr(fs, how)(sources, places.get(how, [f"{bucket}/new"]))

    assert fs.find(bucket) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_files_are_never_put_to_one_place(fs, bucket, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(errors.S3Error, match=f"^{tmp_path}/b: .*{tmp_path}/a would both be s3://{bucket}/same"):
        fs.put([f"{tmp_path}/a", f"{tmp_path}/b"], [f"{bucket}/same"] * 2)

    assert not fs.exists(f"{bucket}/same")
