"""Tests, laid out as the library is. Tests and scripts import this before Ray, which reads its token variables once."""

from mellow_platform.authentication import use_temporary_token

use_temporary_token()
