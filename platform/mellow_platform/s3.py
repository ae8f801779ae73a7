"""S3 as a filesystem: endpoint and credentials, retries, and the check before a job starts.

Endpoint and credentials come from the standard AWS variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION). Requests of every operation are retried after temporary failures (throttling, a 5xx
response, a lost connection): callers see only permanent errors.
"""

from typing import Any
from urllib.parse import urlsplit

from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # it ships no types
from botocore import exceptions  # type: ignore[import-untyped]  # it ships no types
from botocore.handlers import add_expect_header  # type: ignore[import-untyped]  # it ships no types
from s3fs import S3FileSystem

OPTIONS = {
    # botocore's retries with exponential back-off, about half a minute in all. They cover every request, including
    # listings; s3fs itself retries only reads whose body breaks off. 403 and 404 responses are not retried.
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}},
    # A cached listing does not show files that other processes write.
    "use_listings_cache": False,
}
# Without retries: before a job starts, an endpoint that does not respond or refuses the keys is reported at once.
CHECK_OPTIONS = {
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": 1.5,
        "read_timeout": 5,
    },
    "use_listings_cache": False,
}
WRONG_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "AuthorizationHeaderMalformed",
}


class S3(S3FileSystem):
    """S3FileSystem whose requests have no header `Expect: 100-continue`.

    botocore adds the header to every upload, and aiohttp then waits for `100 Continue` without a timeout: a server that
    reads the body first, or fails before it responds, would block the upload forever.
    """

    def __init__(self, **options: Any):
        session = AioSession()
        session.unregister("before-call.s3", add_expect_header)
        super().__init__(session=session, **options)


def connect(uri: str, options: dict[str, Any] = OPTIONS) -> tuple[S3, str]:
    """Return the filesystem of an s3:// URI and the path in it."""
    return S3(**options), S3._strip_protocol(uri)


def check_object(uri: str, exists: bool) -> None:
    """Check that an s3:// URI can be read or written; errors that retries may resolve are ignored.

    Args:
        exists: whether the object or folder must exist, or only its bucket.

    Raises:
        OSError: the check failed; the message contains the cause and a remedy.
        ValueError: any other error of the S3 client.
    """
    fs, path = connect(uri, CHECK_OPTIONS)
    fs.retries = 1
    bucket, keys = path.partition("/")[0], "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    try:
        _check_bucket(fs, bucket)
        if exists:
            fs.info(path)
    except FileNotFoundError as error:
        missing = f"bucket {bucket!r} does not exist" if _code(error) else "no such object or folder"
        raise FileNotFoundError(f"{uri}: {missing}; check the URI and AWS_ENDPOINT_URL") from error
    except PermissionError as error:
        if (code := _code(error)) in WRONG_KEYS:
            raise PermissionError(f"{uri}: the S3 endpoint refuses the credentials ({code}); check {keys}") from error
        raise PermissionError(f"{uri}: access is denied; check {keys}, and the policy of the bucket") from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise PermissionError(f"{uri}: there are no S3 credentials; set {keys}") from error
    except exceptions.ConnectionError as error:
        endpoint = urlsplit(str(error.kwargs.get("endpoint_url", ""))).netloc
        raise ConnectionError(f"{uri}: the S3 endpoint {endpoint} does not respond; check AWS_ENDPOINT_URL") from error
    except (OSError, exceptions.HTTPClientError):
        return  # the job retries
    except exceptions.BotoCoreError as error:
        raise ValueError(f"{uri}: {error}") from error


def _check_bucket(fs: S3, bucket: str) -> None:
    """Raise s3fs's error if a bucket does not exist or the credentials are wrong.

    Credentials without permission to list the bucket are valid, because they may read or write a part of it.
    """
    try:
        fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    except PermissionError as error:
        if _code(error) in WRONG_KEYS:
            raise


def _code(error: OSError) -> str:
    """Return the S3 error code behind an error of s3fs; empty if there is none."""
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
