"""Tests, laid out as the library is. Tests and scripts import this before Ray, which reads its token variables once."""

from mellow_platform.launch import prepare_process

prepare_process()
