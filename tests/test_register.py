import uuid

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest
import zarr

from torch_s3 import S3FileSystem


@pytest.fixture
def options(s3, registered):
    return s3.storage_options


@pytest.fixture
def folder(options):
    bucket = str(uuid.uuid4())
    S3FileSystem(**options).mkdir(bucket)
    return f"s3://{bucket}/folder"


FRAME = pd.DataFrame({"number": range(1000), "word": [f"ünf {i}" for i in range(1000)]})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_uris_are_ours_once_registered(scheme):
    assert fsspec.get_filesystem_class(scheme) is S3FileSystem


def test_uris_are_not_ours_before():
    assert fsspec.registry.get("s3") is not S3FileSystem


def test_fsspec_opens_uris(folder, options):
    with fsspec.open(f"{folder}/key.gz", "wt", compression="infer", **options) as file:
        file.write("content")
    with fsspec.open(f"{folder}/key.gz", "rt", compression="infer", **options) as file:
        assert file.read() == "content"


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_pandas_writes_and_reads_csv(folder, options, name):
    FRAME.to_csv(f"{folder}/{name}", index=False, storage_options=options)

    pd.testing.assert_frame_equal(pd.read_csv(f"{folder}/{name}", storage_options=options), FRAME)


def test_pandas_that_fails_writes_nothing(folder, options):
    class Unprintable:
        def __str__(self):
            raise ValueError("no words")

    with pytest.raises(ValueError, match="no words"):
        pd.DataFrame({"a": [1, Unprintable()]}).to_csv(f"{folder}/table.csv", storage_options=options)

    assert not S3FileSystem(**options).exists(f"{folder}/table.csv")


def test_pandas_writes_and_reads_parquet(folder, options):
    FRAME.to_parquet(f"{folder}/table.parquet", storage_options=options)

    pd.testing.assert_frame_equal(pd.read_parquet(f"{folder}/table.parquet", storage_options=options), FRAME)
    words = pd.read_parquet(f"{folder}/table.parquet", columns=["word"], storage_options=options)
    pd.testing.assert_frame_equal(words, FRAME[["word"]])


def test_pyarrow_writes_and_reads_datasets(folder, options):
    fs = S3FileSystem(**options)
    table = pa.table({"part": [number % 3 for number in range(100)], "number": range(100)})
    where = {"filesystem": fs, "format": "parquet"}
    pa.dataset.write_dataset(table, folder[5:], partitioning=["part"], partitioning_flavor="hive", **where)

    read = pa.dataset.dataset(folder[5:], partitioning="hive", **where).to_table(filter=pa.dataset.field("part") == 1)
    assert sorted(read["number"].to_pylist()) == [number for number in range(100) if number % 3 == 1]
    assert fs.glob(f"{folder}/part=*/*.parquet") == fs.find(folder)


def test_pyarrow_uses_the_filesystem(folder, options):
    fs = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(S3FileSystem(**options)))
    path = f"{folder[5:]}/table.parquet"
    table = pa.table({"number": range(1000)})
    pa.parquet.write_table(table, path, filesystem=fs)

    assert pa.parquet.read_table(path, filesystem=fs) == table
    found = fs.get_file_info(pa.fs.FileSelector(folder[5:]))
    assert [(info.path, info.type) for info in found] == [(path, pa.fs.FileType.File)]
    with fs.open_input_file(path) as file:
        assert file.read_at(4, 0) == b"PAR1"
    fs.copy_file(path, f"{path}-copy")
    fs.delete_file(path)
    assert [info.type for info in fs.get_file_info([path, f"{path}-copy"])] == [
        pa.fs.FileType.NotFound,
        pa.fs.FileType.File,
    ]
    fs.delete_dir(folder[5:])
    assert fs.get_file_info(folder[5:]).type == pa.fs.FileType.NotFound


def test_zarr_writes_and_reads_arrays(folder, options):
    numbers = np.arange(10_000).reshape(100, 100)
    group = zarr.create_group(f"{folder}/group.zarr", storage_options=options)
    group.create_array("numbers", data=numbers, chunks=(30, 40))
    group["numbers"][5] = 0
    numbers[5] = 0

    again = zarr.open_group(f"{folder}/group.zarr", mode="r", storage_options=options)
    np.testing.assert_array_equal(again["numbers"][:], numbers)
    np.testing.assert_array_equal(again["numbers"][3:7, 39:41], numbers[3:7, 39:41])
    assert list(again) == ["numbers"]
