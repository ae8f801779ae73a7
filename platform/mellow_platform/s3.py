"""s3fs with uploads that never wait for `100 Continue`."""

from typing import Any

from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # it ships no types
from botocore.handlers import add_expect_header  # type: ignore[import-untyped]  # it ships no types
from s3fs import S3FileSystem


class S3(S3FileSystem):
    """S3FileSystem whose requests have no header `Expect: 100-continue`.

    botocore adds the header to every upload, and aiohttp then waits for the server's permission without a timeout: a
    server that reads the body first, or that fails before it asks for one, would block the upload forever.
    """

    def __init__(self, **options: Any):
        session = AioSession()
        session.unregister("before-call.s3", add_expect_header)
        super().__init__(session=session, **options)
