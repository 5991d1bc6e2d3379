"""What botocore decides: whose credentials, which endpoint, which region. Only here does the transport import it."""

from __future__ import annotations

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
import botocore.session
from botocore import UNSIGNED

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport.failures import error_for
from torch_s3.transport.sigv4 import Credentials
from torch_s3.transport.transfer import Origin

_NO_CREDENTIALS = (
    "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile with AWS_PROFILE, "
    "pass key= and secret=, or pass anon=True for a public bucket"
)


class Place(NamedTuple):
    """Where a bucket's objects are: plain data, good in any process."""

    origin: Origin
    host: str
    base: str
    region: str


class _Stopped(Exception):
    """A request's URL, instead of the request."""


def _stop(request: Any, **_: Any) -> None:
    raise _Stopped(request.url)


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
        self._boto3 = boto3.Session(botocore_session=self._session)

    @property
    def client(self) -> Any:
        """A boto3 client for the calls that carry no data."""
        if self._made is None:  # not functools.cached_property: in Python 3.11 a fork can leave its lock held
            self._made = self._client(UNSIGNED if self._config.anon else None)
        return self._made

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
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise errors.NoCredentials(_NO_CREDENTIALS, uri=uri)
        if not f"{frozen.access_key}{frozen.token or ''}".isprintable():
            raise errors.NoCredentials("the credentials found have a line break in them, or the like", uri=uri)
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    def place(self, bucket: str, *, region: str | None = None) -> Place:
        """Ask botocore for the address of a bucket's objects, without a request.

        Args:
            bucket: Its name.
            region: Where it is, if not where the configuration says.
        """
        config = self._config
        client = self._client(UNSIGNED, region)
        client.meta.events.register("before-send.s3.GetObject", _stop)
        try:
            client.get_object(Bucket=bucket, Key="-")
        except _Stopped as stopped:
            url = urlsplit(str(stopped))
        origin = Origin(
            scheme=url.scheme,
            host=url.hostname or "",
            port=url.port or (443 if url.scheme == "https" else 80),
            verify=self._verify(),
            max_connections=-(-config.max_connections // config.loops),
            connect_timeout=config.connect_timeout,
        )
        return Place(origin, url.netloc.rpartition("@")[2], url.path.removesuffix("-"), client.meta.region_name)

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
            ``None`` where that can't be followed: nothing was said, or the way leads from HTTPS to HTTP.
        """
        if "://" not in where:
            return self.place(bucket, region=where) if where else None
        before, url = self.place(bucket), urlsplit(where)
        origin = before.origin
        if url.hostname is None or (url.scheme, origin.scheme) == ("http", "https"):
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
        client = self._client(UNSIGNED)
        client.meta.events.register("before-send.s3", send)
        return client

    def _client(self, signature: Any, region: str | None = None) -> Any:
        config = self._config
        region = (
            region
            or config.region
            or self._session.get_config_variable("region")
            or os.environ.get("AWS_REGION")
            or "us-east-1"
        )
        settings = botocore.config.Config(
            signature_version=signature,
            s3={"addressing_style": config.addressing_style},
            retries={"total_max_attempts": 1},  # the transport tries again
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
            user_agent_extra="torch-s3",
            proxies={},  # the transport uses none either
        )
        return self._boto3.client(
            "s3",
            region_name=region or "us-east-1",
            endpoint_url=config.endpoint_url,
            use_ssl=config.use_ssl,
            verify=config.verify,
            config=settings,
        )


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
        raise error_for(status, code, words, uri=uri, region=region) from None
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
    except refused.ParamValidationError as error:
        raise errors.InvalidUri(str(error), uri=uri) from None
    except (refused.BotoCoreError, boto3.exceptions.Boto3Error) as error:
        raise errors.S3Error(str(error), uri=uri) from None
    except ValueError as error:
        if not isinstance(error, UnicodeError) and "endpoint" not in str(error):  # botocore's "Invalid endpoint: …"
            raise
        raise errors.InvalidUri(str(error), uri=uri) from None
