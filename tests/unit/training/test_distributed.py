"""Ranks that do not find each other; those that do are in tests/integration and tests/faults."""

import socket

import pytest

from ldm.registry import ConfigError
from ldm.training import distributed


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(
                ConfigError, match=rf"rank 0 of 2 could not .* {port}: .*; choose a free MASTER_PORT"
            ) as told,
            distributed.session("cpu"),
        ):
            pass
    assert "\n" not in str(told.value) and not distributed.dist.is_initialized()
