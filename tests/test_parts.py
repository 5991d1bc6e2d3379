"""Any object that S3 can hold fits into its 10,000 parts, in memory that is bounded."""

import base64

from awscrt import checksums
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_s3 import S3FileSystem
from torch_s3.transport.checksum import checksum, joined
from torch_s3.upload import part_size

MIB = 1024 * 1024
LIMIT = 10_000 * 5 * 1024 * MIB  # 48.8 TiB

few = settings(max_examples=20, derandomize=True)  # of 10,000 parts each

first_sizes = st.integers(5 * MIB, 5 * 1024 * MIB)
expectations = st.one_of(st.integers(0, 100 * MIB), st.integers(0, LIMIT))


@few
@given(first_sizes, expectations)
def test_what_is_expected_fits_in_equal_parts(first, expected):
    sizes = [part_size(number, first=first, expected=expected) for number in range(10_000)]

    assert sum(sizes) >= expected
    count = -(-expected // sizes[0])
    assert set(sizes[:count]) <= {sizes[0]}
    assert sizes[0] <= max(first, expected // 9_000 + MIB)


@few
@given(first_sizes, expectations)
def test_parts_only_grow_and_are_those_that_s3_allows(first, expected):
    sizes = [part_size(number, first=first, expected=expected) for number in range(10_000)]

    assert sizes == sorted(sizes)
    assert first <= sizes[0] <= sizes[-1] <= 5 * 1024 * MIB


@few
@given(first_sizes, st.integers(0, 1024**4))
def test_three_times_what_was_expected_fits_too(first, expected):
    assert sum(part_size(number, first=first, expected=expected) for number in range(10_000)) >= 3 * expected


def test_unexpected_terabytes_fit():
    assert sum(part_size(number, first=8 * MIB, expected=0) for number in range(10_000)) > 7 * 1024**4


@few
@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=6))
def test_checksum_of_the_whole_follows_from_those_of_its_parts(parts):
    found = joined([checksum("crc64nvme", memoryview(part)) for part in parts], [len(part) for part in parts])

    assert found == base64.b64encode(checksums.crc64nvme(b"".join(parts)).to_bytes(8, "big")).decode()


def test_written_file_knows_the_checksum_that_s3_has_stored(s3, bucket):
    fs = S3FileSystem(**s3.storage_options, part_size=5 * MIB)
    for size in (3, 11 * MIB):
        with fs.open(f"{bucket}/key", "wb", expected=size) as file:
            file.write(bytes(size))
        head = fs.client.call("head_object", bucket, Bucket=bucket[5:], Key="key", ChecksumMode="ENABLED")

        assert file.checksum == ("crc64nvme", checksum("crc64nvme", memoryview(bytes(size))))
        assert head.get("ChecksumCRC64NVME") in (file.checksum[1], None)  # moto keeps none of single PUTs
        assert file.etag == head["ETag"].strip('"')
