import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
from botocore import UNSIGNED
from hypothesis import given
from hypothesis import strategies as st

from torch_s3.config import S3Config

MIB = 1024 * 1024


def _from(**options):
    return S3Config.from_storage_options(options)


def test_options_are_those_of_s3fs():
    config = _from(
        key="id",
        secret="secret",
        token="token",
        endpoint_url="http://127.0.0.1:9000",
        use_ssl=False,
        client_kwargs={"region_name": "eu-west-1", "verify": "/ca.pem"},
    )

    assert config == S3Config(
        key="id",
        secret="secret",
        token="token",
        endpoint_url="http://127.0.0.1:9000",
        use_ssl=False,
        region="eu-west-1",
        verify="/ca.pem",
    )


def test_options_are_also_the_fields():
    config = _from(region="eu-west-1", part_size=6 * MIB, max_connections=3, attempts=7, addressing_style="path")

    assert config == S3Config(
        region="eu-west-1", part_size=6 * MIB, max_connections=3, attempts=7, addressing_style="path"
    )


def test_client_kwargs_may_hold_the_credentials():
    config = _from(
        client_kwargs={
            "aws_access_key_id": "id",
            "aws_secret_access_key": "secret",
            "aws_session_token": "token",
            "endpoint_url": "http://127.0.0.1",
            "use_ssl": False,
        }
    )

    assert (config.key, config.secret, config.token) == ("id", "secret", "token")
    assert (config.endpoint_url, config.use_ssl) == ("http://127.0.0.1", False)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"requester_pays": True}, {"requester_pays": True}),
        ({"default_block_size": 16 * MIB}, {"part_size": 16 * MIB}),
        ({"config_kwargs": {"max_pool_connections": 7}}, {"max_connections": 7}),
        ({"config_kwargs": {"connect_timeout": 2, "read_timeout": 3}}, {"connect_timeout": 2, "read_timeout": 3}),
        ({"config_kwargs": {"region_name": "eu-west-1"}}, {"region": "eu-west-1"}),
        ({"config_kwargs": {"signature_version": UNSIGNED}}, {"anon": True}),
        ({"config_kwargs": {"signature_version": "s3v4"}}, {}),
        ({"config_kwargs": {"use_fips_endpoint": True}}, {"use_fips": True}),
        ({"config_kwargs": {"use_dualstack_endpoint": True}}, {"use_dualstack": True}),
        ({"config_kwargs": {"s3": {"addressing_style": "virtual"}}}, {"addressing_style": "virtual"}),
        ({"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}, {"use_accelerate": True}),
        ({"config_kwargs": {"s3": {"use_dualstack_endpoint": True}}}, {"use_dualstack": True}),
        ({"config_kwargs": {"retries": {"max_attempts": 3, "mode": "standard"}}}, {"attempts": 4}),
        ({"config_kwargs": {"retries": {"total_max_attempts": 3}}}, {"attempts": 3}),
        ({"s3_additional_kwargs": {"RequestPayer": "requester"}}, {"requester_pays": True}),
        ({"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, {"server_side_encryption": "AES256"}),
        (
            {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "id"}},
            {"server_side_encryption": "aws:kms", "kms_key_id": "id"},
        ),
        (
            {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}},
            {"customer_key": b"k" * 32},
        ),
        ({"s3_additional_kwargs": {"SSECustomerKey": b"k" * 32}}, {"customer_key": b"k" * 32}),
        ({"config_kwargs": {"read_timeout": None, "s3": None}, "s3_additional_kwargs": None}, {}),
    ],
)
def test_words_of_s3fs_are_understood(options, fields):
    assert _from(**options) == S3Config(**fields)


def test_option_goes_before_client_kwargs():
    assert _from(endpoint_url="http://one", client_kwargs={"endpoint_url": "http://other"}).endpoint_url == "http://one"


def test_none_is_unset():
    assert _from(**dict.fromkeys(field.name for field in fields(S3Config)), client_kwargs=None) == S3Config()


def test_false_and_empty_are_not_unset():
    assert _from(use_ssl=False, client_kwargs={}).use_ssl is False
    assert _from(client_kwargs={"verify": False}).verify is False


def test_base_gives_what_options_leave_out():
    base = S3Config(region="eu-west-1", attempts=9)

    assert S3Config.from_storage_options({"attempts": 2}, base) == S3Config(region="eu-west-1", attempts=2)
    assert base.attempts == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"endpoint": "x"}, "storage_options has no 'endpoint': did you mean 'endpoint_url'?"),
        ({"secrets": "x"}, "storage_options has no 'secrets': did you mean 'secret'?"),
        ({"max_connection": 3}, "storage_options has no 'max_connection': did you mean 'max_connections'?"),
        ({"client_kwargs": {"region": "x"}}, "client_kwargs has no 'region': did you mean 'region_name'?"),
        ({"zzz": 1}, "storage_options has no 'zzz': known: "),
        ({"requester_pay": 1}, "storage_options has no 'requester_pay': did you mean 'requester_pays'?"),
        (
            {"config_kwargs": {"max_connections": 3}},
            "config_kwargs has no 'max_connections': did you mean 'max_pool_connections'?",
        ),
        (
            {"config_kwargs": {"s3": {"use_accelerate": True}}},
            "config_kwargs['s3'] has no 'use_accelerate': did you mean 'use_accelerate_endpoint'?",
        ),
        (
            {"s3_additional_kwargs": {"ServerSideEncrypt": "AES256"}},
            "s3_additional_kwargs has no 'ServerSideEncrypt': did you mean 'ServerSideEncryption'?",
        ),
        ({"s3_additional_kwargs": {"ACL": "private"}}, "s3_additional_kwargs has no 'ACL': known: "),
    ],
    ids=str,
)
def test_unknown_option_is_named_with_the_nearest(options, words):
    with pytest.raises(ValueError) as caught:
        _from(**options)

    assert str(caught.value).startswith(words)


@given(st.text(max_size=20).filter(lambda name: name not in {field.name for field in fields(S3Config)}))
def test_unknown_option_never_shows_its_value(name):
    with pytest.raises(ValueError) as caught:
        S3Config.from_storage_options({name: "SECRETCANARY"} if name != "client_kwargs" else {"x": "SECRETCANARY"})

    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "id"}, "key and secret go together"),
        ({"secret": "secret"}, "key and secret go together"),
        ({"anon": True, "key": "id", "secret": "secret"}, "anon=True"),
        ({"addressing_style": "host"}, "'auto', 'path' or 'virtual'"),
        ({"use_accelerate": True, "endpoint_url": "https://host"}, "use_accelerate .*AWS's own"),
        ({"use_dualstack": True, "endpoint_url": "https://host"}, "use_dualstack .*AWS's own"),
        ({"use_fips": True, "endpoint_url": "https://host"}, "use_fips .*AWS's own"),
        ({"requester_pays": True, "anon": True}, "requester_pays needs credentials"),
        ({"server_side_encryption": "aes"}, "server_side_encryption='aes'.*AES256"),
        ({"kms_key_id": "id"}, "kms_key_id goes with"),
        ({"kms_key_id": "id", "server_side_encryption": "AES256"}, "kms_key_id goes with"),
        ({"customer_key": b"CANARY"}, "32 bytes"),
        ({"customer_key": b"k" * 32, "server_side_encryption": "aws:kms"}, "customer_key encrypts by itself"),
        ({"part_size": 5 * MIB - 1}, "5 MiB to 5 GiB"),
        ({"part_size": 5 * 1024 * MIB + 1}, "5 MiB to 5 GiB"),
        ({"max_connections": 0}, "max_connections=0: must be positive"),
        ({"connect_timeout": 0}, "connect_timeout=0: must be positive"),
        ({"read_timeout": -1}, "read_timeout=-1: must be positive"),
        ({"attempts": 0}, "attempts=0: must be positive"),
    ],
    ids=str,
)
def test_impossible_settings_are_a_value_error(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        S3Config(**options)

    assert "secret=" not in str(caught.value)
    assert "CANARY" not in str(caught.value)


def test_unknown_signature_is_a_value_error():
    with pytest.raises(ValueError, match="signature_version='s3'"):
        _from(config_kwargs={"signature_version": "s3"})


def test_secrets_are_not_shown():
    customer_key = b"CANARY".ljust(32)
    config = S3Config(key="AKIDCANARY", secret="SECRETCANARY", token="TOKENCANARY", customer_key=customer_key)

    assert "CANARY" not in f"{config} {config!r} {[config]}"


def test_config_is_a_value():
    config = S3Config(key="id", secret="secret")

    assert config == S3Config(key="id", secret="secret")
    assert config != S3Config(key="id", secret="other")
    assert hash(config) == hash(S3Config(key="id", secret="secret"))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.key = "other"
