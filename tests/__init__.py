"""Tests, laid out as the library is."""
