"""What failures mean, as the package's errors. Pure, no I/O."""

from __future__ import annotations

import re
import ssl

from torch_s3 import errors
from torch_s3.paths import split_path
from torch_s3.transport.retry import Cause, Renewal

_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_DENIED = ("", "403", "AccessDenied", "Forbidden")  # for want of a permission, perhaps
_RESOURCE = re.compile(r' on resource: "?arn:[\w-]+:s3:::[^"]*"(?= )')
_ACTIONS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CopyObject": "s3:PutObject, and of its source s3:GetObject",
    "CreateBucket": "s3:CreateBucket",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteBucket": "s3:DeleteBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "GetObjectTagging": "s3:GetObjectTagging",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject, and s3:ListBucket to be told that there is none",
    "ListBuckets": "s3:ListAllMyBuckets",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectVersions": "s3:ListBucketVersions",
    "ListObjectsV2": "s3:ListBucket",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:PutObject, and of its source s3:GetObject",
}
"""From "Actions, resources, and condition keys for Amazon S3" in the AWS Service Authorization Reference."""
_ELSEWHERE = (
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
)
_REDIRECTS = (301, 302, 307, 308)
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
_RENEWALS = {
    **dict.fromkeys(_ELSEWHERE, Renewal.PLACE),
    **dict.fromkeys((*_EXPIRED, "InvalidAccessKeyId", "InvalidToken"), Renewal.CREDENTIALS),
    "RequestTimeTooSkewed": Renewal.CLOCK,
}


def renewal_for(status: int, code: str) -> Renewal | None:
    """What to find out anew after an answer's HTTP status and S3 error code; ``None`` where that can't help."""
    return _RENEWALS.get(code) or (Renewal.PLACE if status in _REDIRECTS else None)


def denied(code: str, words: str, *, operation: str) -> str:
    """What to say of a refusal: the permission that was missing, as S3 said it, or else the one that the call needs.

    Args:
        code: S3's error code, "" if the answer had none.
        words: What the server said.
        operation: S3's name of the call.
    """
    if " is not authorized to perform: " in words:  # it names the identity too; which object, the uri says
        hint = ""
        if operation in ("GetObject", "HeadObject") and " perform: s3:ListBucket " in words:
            hint = "; S3 asks for that where there is no such object"
        do = "have that denial lifted" if " with an explicit deny in " in words else "have it allowed"
        return f"{_RESOURCE.sub('', words)}: {do}{hint}"
    needs = _ACTIONS.get(operation) if code in _DENIED else None
    hint = f" ({operation} needs {needs})" if needs else ""
    return f"{words}: check the credentials and their permissions{hint}"


def error_for(
    status: int,
    code: str,
    words: str,
    *,
    uri: str,
    range: tuple[int, int] | None = None,
    region: str | None = None,
    operation: str = "",
) -> errors.S3Error:
    """The typed error for an answer that trying again can't mend.

    Args:
        status: HTTP status.
        code: S3's error code, "" if the answer had none.
        words: What the server said, for the message.
        uri: The object asked for.
        range: The bytes asked for.
        region: The region that the server named as the bucket's.
        operation: S3's name of the call, "" if it has none.
    """
    if status in _REDIRECTS or code in _ELSEWHERE:
        where = (
            f"in region {region}: set AWS_REGION={region}"
            if region
            else "served elsewhere: set endpoint_url or AWS_REGION"
        )
        return errors.S3Error(f"the bucket is {where} ({words})", uri=uri, range=range)
    if code == "NoSuchBucket":
        return errors.NotFound("no such bucket", uri=f"s3://{split_path(uri.removeprefix('s3://'))[0]}")
    if status == 404 and uri.count("/") < 3:
        return errors.NotFound("no such bucket", uri=uri)
    if status == 404:
        return errors.NotFound(f"no such key ({words})", uri=uri)
    if code == "RequestTimeTooSkewed":
        return errors.AccessDenied(f"{words}: set this machine's clock", uri=uri)
    if code in _EXPIRED:
        return errors.CredentialsExpired(f"{words}: renew the credentials", uri=uri)
    if code == "InvalidObjectState":
        return errors.S3Error(f"it is archived: restore it, and try again when that is done ({words})", uri=uri)
    if status in (401, 403) or code in _REFUSED:
        return errors.AccessDenied(denied(code, words, operation=operation), uri=uri)
    if status == 416:
        return errors.IntegrityError(f"the range starts past the object's end ({words})", uri=uri, range=range)
    return errors.S3Error(f"the server answered {status} {words}", uri=uri, range=range)


def final(error: Exception, *, uri: str, range: tuple[int, int] | None) -> errors.S3Error:
    """The error to raise for a failure that another attempt can't mend."""
    if isinstance(error, ssl.SSLCertVerificationError):
        message = (
            f"the server's certificate is not trusted ({error.verify_message}): set AWS_CA_BUNDLE to its CA's file"
        )
        return errors.TransferFailed(message, uri=uri)
    if isinstance(error, errors.S3Error):
        return error
    return errors.S3Error(f"{type(error).__name__}: {error}", uri=uri, range=range)


def given_up(
    cause: Cause,
    reason: str,
    attempt: int,
    attempts: int,
    seconds: float,
    *,
    uri: str,
    range: tuple[int, int] | None,
) -> errors.S3Error:
    """The error to raise when a request isn't tried again.

    Args:
        cause: Why the last attempt failed.
        reason: With what, in words.
        attempt: Its number, from 1.
        attempts: The most there may be.
        seconds: Since the first one began.
        uri: The object asked for.
        range: The bytes asked for.
    """
    kinds = {
        Cause.INTEGRITY: errors.IntegrityError,
        Cause.THROTTLE: errors.Throttled,
        Cause.TIMEOUT: errors.DeadlineExceeded,
    }
    message = f"{reason} (attempt {attempt} of {attempts}, {seconds:.1f} s)"
    return kinds.get(cause, errors.TransferFailed)(message, uri=uri, range=range, attempts=attempt)
