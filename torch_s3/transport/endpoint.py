"""What botocore decides: whose credentials, which endpoint, which region. Only here does the transport import it."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions as refused
import botocore.httpsession
import botocore.loaders
import botocore.session
from botocore import UNSIGNED
from botocore.utils import get_environ_proxies

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport.failures import error_for
from torch_s3.transport.fields import parameters_of
from torch_s3.transport.sigv4 import Credentials
from torch_s3.transport.target import Origin

_NO_CREDENTIALS = (
    "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile with AWS_PROFILE, "
    "pass key= and secret=, or pass anon=True for a public bucket"
)


_UNUSABLE = (
    refused.BaseEndpointResolverError,
    refused.EndpointProviderError,
    refused.InvalidRegionError,
    refused.ParamValidationError,
    refused.UnsupportedS3AccesspointConfigurationError,
    refused.UnsupportedS3ArnError,
    refused.UnsupportedS3ConfigurationError,
)
# One parse of botocore's megabyte of S3 model serves all accounts. It has no lock that a fork could leave held.
_loader = functools.lru_cache(botocore.loaders.create_loader)


class Place(NamedTuple):
    """Where a bucket's objects are: plain data, good in any process."""

    origin: Origin
    host: str
    base: str
    region: str


class _Question(str):
    """The key of an object that botocore is asked about; no request is made. ``region`` is the bucket's, if known."""

    __slots__ = ("region",)
    region: str | None


class _Answer(Exception):
    """The request, as botocore would go on to sign it."""


def _note_question(builtins: dict[str, Any], params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    question = params.get("Key")
    if isinstance(question, _Question):
        context["question"] = question
        if question.region is not None:
            builtins["AWS::Region"] = question.region


def _answer_question(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    if "question" in context:
        raise _Answer(params)


def _signature(request: dict[str, Any]) -> dict[str, Any]:
    """How a request is to be signed, in the words of botocore's endpoint rules."""
    chosen: dict[str, Any] = request["context"]["endpoint_properties"]["authSchemes"][0]
    return chosen


def _stay_here(request: Any, **_: Any) -> None:
    """Send what is for ``*.localhost`` to this machine (RFC 6761), as the transport does; not every resolver would."""
    url = urlsplit(request.url)
    if url.scheme == "http" and (url.hostname or "").endswith(".localhost"):
        request.headers["Host"] = url.netloc
        request.url = url._replace(netloc=f"localhost:{url.port or 80}").geturl()


class Account:
    """botocore's view of one configuration, in one process: it holds sockets and locks, so it is neither pickled nor
    used after fork.
    """

    def __init__(self, config: S3Config) -> None:
        self.pid = os.getpid()
        self._config = config
        self._session = botocore.session.Session(profile=config.profile)
        if config.key is not None:
            self._session.set_credentials(config.key, config.secret, config.token)
        self._made: Any = None
        self._asked: Any = None
        self._signer: Any = None
        self._boto3 = boto3.Session(botocore_session=self._session)
        self._session.register_component("data_loader", _loader(self._session.get_config_variable("data_path")))
        self._parameters = parameters_of(config)

    @property
    def client(self) -> Any:
        """A boto3 client that makes its requests itself, for buckets that need that, see :meth:`needs_boto3`."""
        if self._made is None:  # not functools.cached_property: in Python 3.11 a fork can leave its lock held
            self._made = self.make_client(attempts=min(self._config.attempts, 3))  # a fourth comes seconds later
        return self._made

    @property
    def asked(self) -> Any:
        """A boto3 client that knows everything but the credentials, for questions that need no request."""
        if self._asked is None:
            self._asked = self.make_client(attempts=1, signature=UNSIGNED)
        return self._asked

    @property
    def signer(self) -> Any:
        """A boto3 client that signs URLs by Signature Version 4, where botocore's own choice may be the one before."""
        if self._config.anon:
            return self.asked
        if self._signer is None:
            self._signer = self.make_client(attempts=1, signature="s3v4")
        return self._signer

    def parameters_for(self, operation: str) -> dict[str, Any]:
        """What the configuration adds to a call of ``client``, given by its method's name, or to its pages."""
        if not self._parameters:
            return {}
        if operation == "copy":  # boto3's own, of several calls
            return {"ExtraArgs": self.parameters_for("copy_object")}
        meta = self.asked.meta
        shape = meta.service_model.operation_model(meta.method_to_api_mapping[operation]).input_shape
        taken = shape.members if shape is not None else ()
        return {name: value for name, value in self._parameters.items() if name in taken}

    def credentials(self, uri: str) -> Credentials | None:
        """The credentials of now, refreshed where they were about to expire; ``None`` for unsigned requests.

        Raises:
            NoCredentials: botocore finds none.
        """
        if self._config.anon:
            return None
        with translated(uri):
            found = self._session.get_credentials()
            frozen = found.get_frozen_credentials() if found is not None else None
        if frozen is None:
            raise errors.NoCredentials(_NO_CREDENTIALS, uri=uri)
        return checked(Credentials(frozen.access_key, frozen.secret_key, frozen.token), uri)

    def place(self, bucket: str, *, region: str | None = None) -> Place:
        """Ask botocore for the address of a bucket's objects, without a request.

        Args:
            bucket: Name, access point alias or ARN.
            region: The bucket's, where a server has told it; ``None`` for the configuration's.

        Raises:
            InvalidUri: There can be no such bucket with this configuration.
        """
        config = self._config
        request = self._ask(bucket, region)
        url = urlsplit(request["url"])
        origin = Origin(
            scheme=url.scheme,
            host=url.hostname or "",
            port=url.port or (443 if url.scheme == "https" else 80),
            verify=self._verify(),
            max_connections=-(-config.max_connections // config.loops),
            connect_timeout=config.connect_timeout,
        )
        region = _signature(request).get("signingRegion", "*")
        return Place(origin, url.netloc.rpartition("@")[2], url.path.removesuffix("-"), region)

    def needs_boto3(self, bucket: str) -> str | None:
        """Why a bucket's data has to go through boto3 instead of the transport; ``None`` where it doesn't."""
        request = self._ask(bucket)
        scheme = urlsplit(request["url"]).scheme
        if scheme in get_environ_proxies(self.asked.meta.endpoint_url):
            return f"{scheme.upper()}_PROXY is set"
        way, name = (_signature(request)[said] for said in ("name", "signingName"))
        return None if (way, name) == ("sigv4", "s3") else f"requests are signed by {way} for {name}"

    def _ask(self, bucket: str, region: str | None = None) -> dict[str, Any]:
        """A request for an object as botocore would make it, up to its signature."""
        question = _Question("-")
        question.region = region
        try:
            self.asked.get_object(Bucket=bucket, Key=question)
        except _Answer as answer:
            request: dict[str, Any] = answer.args[0]
            return request
        raise AssertionError("botocore made a request for a question")

    def _verify(self) -> bool | str:
        verify = self._config.verify
        if verify is None:
            verify = self._session.get_config_variable("ca_bundle")
        if verify is None or verify is True:
            return str(botocore.httpsession.get_cert_path(True))
        return verify

    def check_certificates(self, uri: str) -> None:
        """See that the file of CA certificates is there, before anything fails for want of it.

        Raises:
            S3Error: It isn't.
        """
        verify = self._verify()
        if isinstance(verify, str) and not Path(verify).exists():
            message = f"there is no file of CA certificates at {verify}: check AWS_CA_BUNDLE and verify"
            raise errors.S3Error(message, uri=uri)

    def moved(self, bucket: str, where: str) -> Place | None:
        """Where a bucket is that isn't where it was looked for.

        Args:
            bucket: Its name.
            where: What the server said: a region, or the URL that it redirects to; "" if nothing.

        Returns:
            ``None`` where that can't be followed: nothing was said, or the way leads from HTTPS to HTTP, or
            would take a customer's key to another host.
        """
        if "://" not in where:
            return self.place(bucket, region=where) if where else None
        before, url = self.place(bucket), urlsplit(where)
        origin = before.origin
        if url.hostname is None or (url.scheme, origin.scheme) == ("http", "https"):
            return None
        if self._config.customer_key is not None and url.hostname != origin.host:
            return None
        origin = origin._replace(
            scheme=url.scheme, host=url.hostname, port=url.port or (443 if url.scheme == "https" else 80)
        )
        base = f"/{bucket}/" if url.path.startswith(f"/{bucket}/") else "/"
        return Place(origin, url.netloc.rpartition("@")[2], base, before.region)

    def planner(self, send: Callable[..., Any]) -> Any:
        """A boto3 client that puts requests together and reads the answers, which ``send`` gets.

        Args:
            send: Called with ``request``, botocore's ``AWSPreparedRequest``, unsigned; returns an ``AWSResponse``.
        """
        client = self.asked
        client.meta.events.register("before-send.s3", send, unique_id="torch-s3-send")
        return client

    def make_client(self, *, attempts: int, signature: Any = None, **settings: Any) -> Any:
        """A boto3 client of its own.

        Args:
            attempts: How often it tries.
            signature: botocore's name of how it signs; ``None`` for its own choice. Nothing is signed under ``anon``.
            **settings: botocore's.

        Raises:
            InvalidUri: The customer's key would be readable on its way.
        """
        config = self._config
        region = (
            config.region or self._session.get_config_variable("region") or os.environ.get("AWS_REGION") or "us-east-1"
        )
        s3 = {
            "addressing_style": None if config.addressing_style == "auto" else config.addressing_style,
            "use_accelerate_endpoint": config.use_accelerate,
        }
        client = self._boto3.client(
            "s3",
            region_name=region,
            endpoint_url=config.endpoint_url,
            use_ssl=config.use_ssl,
            verify=config.verify,
            config=botocore.config.Config(
                signature_version=UNSIGNED if config.anon else signature,
                s3={name: value for name, value in s3.items() if value is not None},
                use_dualstack_endpoint=config.use_dualstack,
                use_fips_endpoint=config.use_fips,
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=config.connect_timeout,
                read_timeout=config.read_timeout,
                user_agent_extra="torch-s3",
                **settings,
            ),
        )
        url = urlsplit(client.meta.endpoint_url)
        if config.customer_key is not None and url.scheme == "http" and not _is_loopback(url.hostname or ""):
            message = "customer_key would be readable on its way: use https"
            raise errors.InvalidUri(message, uri=client.meta.endpoint_url)
        client.meta.events.register("before-endpoint-resolution.s3", _note_question)
        client.meta.events.register("before-call.s3.GetObject", _answer_question)
        client.meta.events.register("before-send.s3", _stay_here)
        return client


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def checked(found: Credentials, uri: str) -> Credentials:
    """Credentials that can be signed with.

    Raises:
        NoCredentials: They can't be.
    """
    if not found.key or not found.secret:
        raise errors.NoCredentials(_NO_CREDENTIALS, uri=uri)
    if not f"{found.key}{found.token or ''}".isprintable():
        raise errors.NoCredentials("the credentials found have a line break in them, or the like", uri=uri)
    return found


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn botocore's exceptions into the package's own, with the object's uri and without botocore's traceback.

    Raises:
        S3Error: Whatever botocore or boto3 raised within.
    """
    try:
        yield
    except errors.S3Error:
        raise
    except refused.ClientError as error:
        said = error.response.get("Error", {})
        answer = error.response.get("ResponseMetadata", {})
        status, code = answer.get("HTTPStatusCode", 0), said.get("Code", "")
        region = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        words = ": ".join(filter(None, [code, said.get("Message", "")]))
        if code == "PreconditionFailed":
            raise errors.AlreadyExists("the object exists already, and overwriting was not allowed", uri=uri) from None
        if code in ("SlowDown", "ServiceUnavailable") or status in (429, 503):
            raise errors.Throttled(words, uri=uri) from None
        if status >= 500 or code == "ConditionalRequestConflict":
            raise errors.TransferFailed(words, uri=uri) from None
        raise error_for(status, code, words, uri=uri, region=region, operation=error.operation_name) from None
    except (refused.NoCredentialsError, refused.PartialCredentialsError):
        raise errors.NoCredentials(_NO_CREDENTIALS, uri=uri) from None
    except (refused.CredentialRetrievalError, refused.ProfileNotFound, refused.TokenRetrievalError) as error:
        raise errors.NoCredentials(str(error), uri=uri) from None
    except (refused.UnauthorizedSSOTokenError, refused.SSOTokenLoadError) as error:
        raise errors.CredentialsExpired(str(error), uri=uri) from None
    except (refused.ConnectTimeoutError, refused.ReadTimeoutError) as error:
        raise errors.DeadlineExceeded(str(error), uri=uri) from None
    except refused.SSLError as error:
        raise errors.TransferFailed(f"{error} (set AWS_CA_BUNDLE to the file of its CA)", uri=uri) from None
    except (refused.ConnectionError, refused.HTTPClientError) as error:
        raise errors.TransferFailed(str(error), uri=uri) from None
    except _UNUSABLE as error:
        raise errors.InvalidUri(str(error), uri=uri) from None
    except (refused.BotoCoreError, boto3.exceptions.Boto3Error) as error:
        raise errors.S3Error(str(error), uri=uri) from None
    except ValueError as error:
        if not isinstance(error, UnicodeError) and "endpoint" not in str(error):  # botocore's "Invalid endpoint: …"
            raise
        raise errors.InvalidUri(str(error), uri=uri) from None
