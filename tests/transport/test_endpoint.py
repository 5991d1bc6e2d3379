import string

import boto3.exceptions
import botocore.exceptions as refused
import pytest
from botocore.exceptions import ClientError

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.client import Client
from torch_s3.transport.endpoint import Account, translated
from torch_s3.transport.fields import headers_for
from torch_s3.transport.sigv4 import Credentials


def _place(bucket="bucket", **settings):
    return Account(S3Config(key="id", secret="secret", **settings)).place(bucket)


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Write a profile called ``team`` into the shared configuration file."""

    def write(**settings):
        lines = [f"{name} = {value}" for name, value in settings.items()]
        (tmp_path / "config").write_text("\n".join(["[profile team]", *lines, ""]))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    return write


# ---------------------------------------------------------------------- where


def test_bucket_is_at_aws_by_default():
    place = _place()

    assert (place.origin.scheme, place.origin.host, place.origin.port) == ("https", "bucket.s3.amazonaws.com", 443)
    assert (place.host, place.base, place.region) == ("bucket.s3.amazonaws.com", "/", "us-east-1")


def test_bucket_is_in_the_path_at_an_address():
    place = _place(endpoint_url="http://127.0.0.1:9000")

    assert (place.origin.scheme, place.origin.host, place.origin.port) == ("http", "127.0.0.1", 9000)
    assert (place.host, place.base) == ("127.0.0.1:9000", "/bucket/")


def test_bucket_is_in_the_host_with_virtual_addressing():
    place = _place(endpoint_url="http://storage.localhost:9000", addressing_style="virtual")

    assert place.origin.host == "bucket.storage.localhost"
    assert (place.host, place.base) == ("bucket.storage.localhost:9000", "/")


def test_bucket_is_in_the_path_with_path_addressing():
    place = _place(addressing_style="path")

    assert (place.host, place.base) == ("s3.amazonaws.com", "/bucket/")


def test_bucket_with_dots_is_in_the_path_over_https():  # no certificate covers its host
    assert _place("data.example.com", region="eu-west-1").base == "/data.example.com/"


def test_base_path_of_the_endpoint_is_kept():
    assert _place(endpoint_url="http://127.0.0.1:9000/s3/v1").base == "/s3/v1/bucket/"


def test_ipv6_address_is_an_endpoint():
    place = _place(endpoint_url="http://[::1]:9000")

    assert (place.origin.host, place.origin.port, place.host) == ("::1", 9000, "[::1]:9000")


def test_use_ssl_chooses_the_scheme():
    assert _place(use_ssl=False).origin.scheme == "http"
    assert _place(use_ssl=False).origin.port == 80


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"region": "eu-west-1"},
        {"region": "eu-south-1"},  # a region that AWS's global endpoint doesn't serve
        {"region": "cn-north-1"},
        {"region": "eu-west-1", "addressing_style": "path"},
        {"region": "eu-west-1", "addressing_style": "virtual"},
        {"region": "eu-west-1", "use_dualstack": True},
        {"region": "eu-west-1", "use_dualstack": True, "addressing_style": "path"},
        {"region": "us-west-2", "use_fips": True},
        {"region": "us-gov-west-1", "use_fips": True, "use_dualstack": True},
        {"endpoint_url": "http://127.0.0.1:9000"},
        {"endpoint_url": "https://storage.example.com/base"},
        {"endpoint_url": "https://storage.example.com/base", "addressing_style": "virtual"},
        {"use_ssl": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "bucket",
    [
        "bucket",
        "dotted.bucket",
        "name-abcdefghijklmnopqrstuvwxyz-s3alias",
        "arn:aws:s3:us-west-2:123456789012:accesspoint/name",
        "arn:aws:s3:us-west-2:123456789012:accesspoint:name",
    ],
)
def test_place_is_where_boto3_sends_requests(bucket, settings):
    account = Account(S3Config(key="id", secret="secret", **settings))

    def ours():
        place = account.place(bucket)
        return f"{place.origin.scheme}://{place.host}{place.base}key", place.region

    assert _outcome(ours) == _outcome(lambda: _sent_by_boto3(account, bucket))


def _outcome(ask):
    try:
        return ask()
    except refused.BotoCoreError as error:  # not every bucket goes with every setting
        return str(error)


@pytest.mark.parametrize("bucket", ["bucket", "arn:aws:s3:us-west-2:123456789012:accesspoint/name"])
def test_place_with_acceleration_is_where_boto3_sends_requests(bucket):
    account = Account(S3Config(key="id", secret="secret", region="eu-west-1", use_accelerate=True))
    if bucket == "bucket":
        assert account.place(bucket).host == "bucket.s3-accelerate.amazonaws.com"
        assert _sent_by_boto3(account, bucket)[0] == "https://bucket.s3-accelerate.amazonaws.com/key"
    else:
        with pytest.raises(errors.InvalidUri, match="Accelerate"), translated("s3://bucket"):
            account.place(bucket)


def _sent_by_boto3(account, bucket):
    """The URL and the signature's region of boto3's own request for an object called ``key``."""

    class SentError(Exception):
        pass

    def refuse(request, **_):
        region = request.headers["Authorization"].decode().split("/")[2]
        raise SentError(request.url, region)

    account.client.meta.events.register("before-send.s3", refuse)
    with pytest.raises(SentError) as sent:
        account.client.get_object(Bucket=bucket, Key="key")
    return sent.value.args


@pytest.mark.parametrize("settings", [{}, {"use_dualstack": True}, {"addressing_style": "path"}], ids=str)
@pytest.mark.parametrize("region", ["eu-west-1", "eu-south-1"])
def test_place_in_a_given_region_is_that_of_an_account_there(region, settings):
    account = Account(S3Config(key="id", secret="secret", region="us-west-2", **settings))

    assert account.place("bucket", region=region) == _place(region=region, **settings)
    assert account.place("bucket") == _place(region="us-west-2", **settings)


@pytest.mark.parametrize(
    ("settings", "bucket"),
    [
        ({"use_accelerate": True}, "dotted.bucket"),
        ({"use_accelerate": True, "use_fips": True}, "bucket"),
        ({"region": "no region"}, "bucket"),
        ({"use_fips": True}, "arn:aws:s3::123456789012:accesspoint/name.mrap"),
    ],
    ids=str,
)
def test_impossible_combination_is_invalid_before_any_request(settings, bucket):
    client = Client(S3Config(key="id", secret="secret", **settings))
    with pytest.raises(errors.InvalidUri, match=f"^s3://{bucket}/key: ."):
        client.target(bucket, f"s3://{bucket}/key")


@pytest.mark.parametrize(("name", "host"), [("DUALSTACK", "s3.dualstack.us-east-1"), ("FIPS", "s3-fips.us-east-1")])
def test_kind_of_endpoint_comes_from_the_environment(monkeypatch, name, host):
    monkeypatch.setenv(f"AWS_USE_{name}_ENDPOINT", "true")

    assert _place().host == f"bucket.{host}.amazonaws.com"


def test_addressing_style_comes_from_the_profile(profile):
    profile(s3="\n  addressing_style = path\n")

    assert _place(profile="team").base == "/bucket/"


def test_customers_key_is_not_sent_in_the_open():
    client = Client(S3Config(key="id", secret="secret", endpoint_url="http://10.0.0.1:9000", customer_key=b"k" * 32))
    with pytest.raises(errors.InvalidUri, match="readable on its way"):
        client.target("bucket", "s3://bucket/key")
    with pytest.raises(errors.InvalidUri, match="readable on its way"):
        client.call("head_object", "s3://bucket/key", Bucket="bucket", Key="key")


@pytest.mark.parametrize(
    "endpoint_url", ["https://10.0.0.1", "http://127.0.0.1", "http://[::1]", "http://s3.localhost"]
)
def test_customers_key_may_go_over_tls_or_to_this_machine(endpoint_url):
    assert _place(endpoint_url=endpoint_url, customer_key=b"k" * 32).base == "/bucket/"


def test_boto3_reaches_hosts_below_localhost(s3, bucket):
    endpoint_url = s3.endpoint_url.replace("127.0.0.1", "localhost")
    settings = {"endpoint_url": endpoint_url, "addressing_style": "virtual"}
    fs = S3FileSystem(**s3.storage_options | settings)

    fs.pipe(f"{bucket}/key", b"content")  # to where the transport finds it

    assert fs.ls(bucket, detail=False) == [f"{bucket.removeprefix('s3://')}/key"]


def test_accounts_share_what_botocore_has_read():
    one, other = Account(S3Config(region="eu-west-1")), Account(S3Config(region="eu-west-2"))

    assert one._session.get_component("data_loader") is other._session.get_component("data_loader")


def test_own_data_path_of_botocore_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))

    assert str(tmp_path) in Account(S3Config())._session.get_component("data_loader").search_paths


# ---------------------------------------------------------------------- by whom


@pytest.mark.parametrize(
    ("bucket", "reason"),
    [
        ("bucket", None),
        ("bucket--usw2-az1--x-s3", "sigv4-s3express"),
        ("name--usw2-az1--xa-s3", "sigv4-s3express"),
        ("arn:aws:s3::123456789012:accesspoint/name.mrap", "sigv4a"),
        ("arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01234567890123456/accesspoint/name", "s3-outposts"),
        ("arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/name", "s3-object-lambda"),
    ],
)
def test_what_the_transport_cannot_sign_goes_through_boto3(bucket, reason):
    said = Account(S3Config(key="id", secret="secret", region="us-west-2")).needs_boto3(bucket)

    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    ("environment", "endpoint_url", "expected"),
    [
        ({}, "http://storage.example.com", None),
        ({"HTTP_PROXY": "http://proxy:1"}, "http://storage.example.com", "HTTP_PROXY is set"),
        ({"http_proxy": "http://proxy:1"}, "http://storage.example.com", "HTTP_PROXY is set"),
        ({"HTTPS_PROXY": "http://proxy:1"}, "https://storage.example.com", "HTTPS_PROXY is set"),
        ({"HTTPS_PROXY": "http://proxy:1"}, "http://storage.example.com", None),
        ({"HTTP_PROXY": "http://proxy:1", "NO_PROXY": ".example.com"}, "http://storage.example.com", None),
        ({"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "10.1.2.3"}, "http://10.1.2.3:9000", None),
    ],
    ids=str,
)
def test_proxies_are_left_to_boto3(monkeypatch, environment, endpoint_url, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    account = Account(S3Config(key="id", secret="secret", endpoint_url=endpoint_url))

    proxies = account.client._endpoint.http_session._proxy_config
    assert bool(proxies.proxy_url_for(endpoint_url)) == (expected is not None)  # what boto3 does
    assert account.needs_boto3("bucket") == expected


# ---------------------------------------------------------------------- what is added to requests

CUSTOMER_KEY = bytes(range(32))
ADDED = {
    "nothing": {},
    "requester pays": {"requester_pays": True},
    "SSE-S3": {"server_side_encryption": "AES256"},
    "SSE-KMS": {"server_side_encryption": "aws:kms:dsse", "kms_key_id": "arn:aws:kms:eu-west-1:123456789012:key/id"},
    "SSE-C": {"customer_key": CUSTOMER_KEY, "requester_pays": True},
}


@pytest.mark.parametrize("settings", ADDED.values(), ids=ADDED)
def test_fields_are_those_that_boto3_sends(settings):
    config = S3Config(key="id", secret="secret", **settings)
    account = Account(config)
    sent = []

    def keep(params, **_):
        sent.append(params["headers"])
        return type("Answer", (), {"status_code": 200}), {}

    account.client.meta.events.register("before-call.s3", keep)
    where = {"Bucket": "bucket", "Key": "key"}
    account.client.get_object(**where, **account.parameters_for("get_object"))
    account.client.put_object(**where, **account.parameters_for("put_object"))
    account.client.upload_part(**where, PartNumber=1, UploadId="id", **account.parameters_for("upload_part"))

    ours = headers_for(config)
    for fields, theirs in zip((ours.get, ours.put, ours.part), sent, strict=True):
        lower = {name.lower(): value for name, value in theirs.items()}
        assert dict(fields) == {name: value for name, value in lower.items() if name.startswith(_ADDED_BY_SETTINGS)}


_ADDED_BY_SETTINGS = ("x-amz-server-side-encryption", "x-amz-request-payer")


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        ("head_object", {"RequestPayer", "SSECustomerKey", "SSECustomerAlgorithm"}),
        ("list_objects_v2", {"RequestPayer"}),
        ("head_bucket", set()),
        ("delete_objects", {"RequestPayer"}),
        ("create_multipart_upload", {"RequestPayer", "SSECustomerKey", "SSECustomerAlgorithm"}),
        ("complete_multipart_upload", {"RequestPayer", "SSECustomerKey", "SSECustomerAlgorithm"}),
        ("abort_multipart_upload", {"RequestPayer"}),
        (
            "copy_object",
            {
                "RequestPayer",
                "SSECustomerKey",
                "SSECustomerAlgorithm",
                "CopySourceSSECustomerKey",
                "CopySourceSSECustomerAlgorithm",
            },
        ),
    ],
)
def test_calls_get_what_they_take(operation, names):
    account = Account(S3Config(key="id", secret="secret", requester_pays=True, customer_key=CUSTOMER_KEY))

    assert account.parameters_for(operation).keys() == names


@pytest.mark.parametrize("operation", ["copy_object", "create_multipart_upload", "put_object"])
def test_calls_that_write_ask_for_encryption(operation):
    account = Account(S3Config(key="id", secret="secret", server_side_encryption="aws:kms", kms_key_id="id"))

    assert account.parameters_for(operation) == {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "id"}
    assert account.parameters_for("complete_multipart_upload") == {}


def test_managed_copy_gets_what_a_copy_takes(s3, bucket):
    config = S3Config.from_storage_options(s3.storage_options | {"server_side_encryption": "AES256"})
    account, name = Account(config), bucket.removeprefix("s3://")
    account.client.put_object(Bucket=name, Key="from", Body=b"content")

    account.client.copy({"Bucket": name, "Key": "from"}, name, "to", **account.parameters_for("copy"))

    assert account.client.head_object(Bucket=name, Key="to")["ServerSideEncryption"] == "AES256"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_comes_from_the_environment(monkeypatch, name):
    monkeypatch.setenv(name, "eu-west-1")

    assert _place().region == "eu-west-1"


def test_region_comes_from_the_profile(profile):
    profile(region="eu-west-1")

    assert _place(profile="team").region == "eu-west-1"


def test_given_region_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")

    assert _place(region="eu-west-3").region == "eu-west-3"


def test_endpoint_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")

    assert _place().host == "127.0.0.1:9000"


def test_endpoint_for_s3_goes_before_the_one_for_all(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9001")

    assert _place().host == "127.0.0.1:9001"


def test_given_endpoint_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9001")

    assert _place(endpoint_url="http://127.0.0.1:9002").host == "127.0.0.1:9002"


def test_endpoint_comes_from_the_profile(profile):
    profile(endpoint_url="http://127.0.0.1:9003")

    assert _place(profile="team").host == "127.0.0.1:9003"


@pytest.mark.parametrize("endpoint_url", ["127.0.0.1:9000", "http://", "http://no host", "http://a..b"])
def test_unusable_endpoint_is_invalid(endpoint_url):
    client = Client(S3Config(key="id", secret="secret", endpoint_url=endpoint_url))
    with pytest.raises(errors.InvalidUri, match=r"^s3://bucket/key: .*endpoint"):
        client.target("bucket", "s3://bucket/key")


def test_unusable_bucket_is_invalid():
    client = Client(S3Config(key="id", secret="secret"))
    with pytest.raises(errors.InvalidUri, match="Invalid bucket name"):
        client.target("no bucket", "s3://no bucket/key")


def test_certificates_are_botocores_by_default():
    assert _place().origin.verify.endswith("cacert.pem")


def test_certificates_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/ca.pem")

    assert _place().origin.verify == "/ca.pem"


def test_certificates_come_from_the_profile(profile):
    profile(ca_bundle="/ca.pem")

    assert _place(profile="team").origin.verify == "/ca.pem"


@pytest.mark.parametrize("verify", ["/mine.pem", False])
def test_given_certificates_go_before_the_environment(monkeypatch, verify):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/ca.pem")

    assert _place(verify=verify).origin.verify == verify


# ---------------------------------------------------------------------- who


def _credentials(**settings):
    return Account(S3Config(**settings)).credentials("s3://bucket")


def test_given_credentials_go_before_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret")

    assert _credentials(key="id", secret="secret", token="token") == Credentials("id", "secret", "token")


def test_credentials_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")

    assert _credentials() == Credentials("id", "secret", "token")


def test_credentials_come_from_the_given_profile(profile):
    profile(aws_access_key_id="id", aws_secret_access_key="secret")

    assert _credentials(profile="team") == Credentials("id", "secret", None)


def test_credentials_come_from_the_profile_of_the_environment(profile, monkeypatch):
    profile(aws_access_key_id="id", aws_secret_access_key="secret")
    monkeypatch.setenv("AWS_PROFILE", "team")

    assert _credentials() == Credentials("id", "secret", None)


def test_credentials_come_from_a_process(profile):
    said = '{"Version": 1, "AccessKeyId": "id", "SecretAccessKey": "secret", "SessionToken": "token"}'
    profile(credential_process=f"echo '{said}'")

    assert _credentials(profile="team") == Credentials("id", "secret", "token")


def test_anonymous_access_asks_for_no_credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    assert _credentials(anon=True) is None


def test_no_credentials_are_an_error_that_says_where_to_put_them():
    with pytest.raises(errors.NoCredentials, match=r"s3://bucket: .*AWS_ACCESS_KEY_ID.*AWS_PROFILE.*anon=True"):
        _credentials()


def test_half_of_the_credentials_are_none(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")

    with pytest.raises(errors.NoCredentials):
        _credentials()


def test_unknown_profile_is_an_error_that_names_it():
    with pytest.raises(errors.NoCredentials, match=r"^s3://bucket: .*nobody"):
        Client(S3Config(profile="nobody")).target("bucket", "s3://bucket")


def test_failed_credential_process_is_an_error(profile):
    profile(credential_process="false")

    with pytest.raises(errors.NoCredentials):
        _credentials(profile="team")


# ---------------------------------------------------------------------- what botocore raises


def _classes_below(kind):
    below = set(kind.__subclasses__())
    return below.union(*map(_classes_below, below))


def _example(kind):
    """An exception of any of botocore's or boto3's classes."""
    if issubclass(kind, ClientError):
        return kind({"Error": {"Code": "Code", "Message": "Message"}}, "GetObject")
    if issubclass(kind, refused.WaiterError):
        return kind("name", "reason", {})
    if issubclass(kind, boto3.exceptions.ResourceNotExistsError):
        return kind("service", "available", has_low_level_client=False)
    if issubclass(kind, boto3.exceptions.UnknownAPIVersionError):
        return kind("service", "bad", "available")
    if issubclass(kind, boto3.exceptions.DynamoDBOperationNotSupportedError):
        return kind("operation", "value")
    if issubclass(kind, boto3.exceptions.Boto3Error):
        return kind("message")
    fields = string.Formatter().parse(kind.fmt)
    return kind(**{name: "value" for _, name, _, _ in fields if name})


RAISED = {
    kind
    for root in (refused.BotoCoreError, ClientError, boto3.exceptions.Boto3Error)
    for kind in {root} | _classes_below(root)
    if kind.__module__ in ("botocore.exceptions", "boto3.exceptions")
}


@pytest.mark.parametrize("kind", sorted(RAISED, key=str), ids=lambda kind: kind.__name__)
def test_each_exception_is_translated(kind):
    raised = _example(kind)

    with pytest.raises(errors.S3Error, match=r"^s3://bucket/key: .") as caught, translated("s3://bucket/key"):
        raise raised

    assert caught.value.uri == "s3://bucket/key"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (refused.NoCredentialsError(), errors.NoCredentials),
        (refused.PartialCredentialsError(provider="env", cred_var="secret"), errors.NoCredentials),
        (refused.ProfileNotFound(profile="team"), errors.NoCredentials),
        (refused.CredentialRetrievalError(provider="process", error_msg="failed"), errors.NoCredentials),
        (refused.UnauthorizedSSOTokenError(), errors.CredentialsExpired),
        (refused.SSOTokenLoadError(error_msg="expired"), errors.CredentialsExpired),
        (refused.ConnectTimeoutError(endpoint_url="http://host"), errors.DeadlineExceeded),
        (refused.ReadTimeoutError(endpoint_url="http://host"), errors.DeadlineExceeded),
        (refused.EndpointConnectionError(endpoint_url="http://host"), errors.TransferFailed),
        (refused.ConnectionClosedError(endpoint_url="http://host"), errors.TransferFailed),
        (refused.ProxyConnectionError(proxy_url="http://proxy"), errors.TransferFailed),
        (refused.SSLError(endpoint_url="https://host", error="unknown CA"), errors.TransferFailed),
        (refused.ResponseStreamingError(error="broken"), errors.TransferFailed),
        (refused.ParamValidationError(report="too long"), errors.InvalidUri),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_exception_is_translated_to_its_meaning(raised, kind):
    with pytest.raises(kind) as caught, translated("s3://bucket/key"):
        raise raised

    assert type(caught.value) is kind


def _said(status, code, **fields):
    answer = {"HTTPStatusCode": status, "HTTPHeaders": fields}
    return ClientError({"Error": {"Code": code, "Message": "because"}, "ResponseMetadata": answer}, "HeadObject")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "404", errors.NotFound),
        (404, "NoSuchKey", errors.NotFound),
        (404, "NoSuchBucket", errors.NotFound),
        (404, "NoSuchUpload", errors.NotFound),
        (403, "403", errors.AccessDenied),
        (403, "AccessDenied", errors.AccessDenied),
        (403, "InvalidAccessKeyId", errors.AccessDenied),
        (403, "SignatureDoesNotMatch", errors.AccessDenied),
        (401, "Unauthorized", errors.AccessDenied),
        (400, "ExpiredToken", errors.CredentialsExpired),
        (403, "ExpiredToken", errors.CredentialsExpired),
        (412, "PreconditionFailed", errors.AlreadyExists),
        (409, "ConditionalRequestConflict", errors.TransferFailed),
        (503, "SlowDown", errors.Throttled),
        (429, "TooManyRequests", errors.Throttled),
        (500, "InternalError", errors.TransferFailed),
        (400, "InvalidRequest", errors.S3Error),
    ],
)
def test_answer_is_translated_to_its_meaning(status, code, kind):
    with pytest.raises(kind, match=r"^s3://bucket.*: .") as caught, translated("s3://bucket/key"):
        raise _said(status, code)

    assert type(caught.value) is kind


def test_missing_bucket_is_named_without_the_key():
    with pytest.raises(errors.NotFound, match=r"^s3://bucket: no such bucket$"), translated("s3://bucket/key"):
        raise _said(404, "NoSuchBucket")


@pytest.mark.parametrize(("status", "code"), [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed")])
def test_bucket_elsewhere_is_an_error_that_names_the_region_to_set(status, code):
    with pytest.raises(errors.S3Error, match="AWS_REGION=eu-west-1"), translated("s3://bucket/key"):
        raise _said(status, code, **{"x-amz-bucket-region": "eu-west-1"})


def test_untrusted_certificate_is_an_error_that_says_what_to_set():
    with pytest.raises(errors.TransferFailed, match="AWS_CA_BUNDLE"), translated("s3://bucket/key"):
        raise refused.SSLError(endpoint_url="https://host", error="certificate verify failed: self-signed certificate")


def test_own_errors_pass_unchanged():
    error = errors.NotFound("gone", uri="s3://bucket/key")

    with pytest.raises(errors.NotFound) as caught, translated("s3://other"):
        raise error

    assert caught.value is error


def test_bugs_are_not_translated():
    with pytest.raises(ZeroDivisionError), translated("s3://bucket/key"):
        raise ZeroDivisionError
