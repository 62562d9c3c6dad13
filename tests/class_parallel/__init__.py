"""Tests of losses whose classes are sharded over ranks. A package, so that `conftest` stays the file one folder up."""
