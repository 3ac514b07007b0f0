"""The contract of far stores, against real servers: Redis, its Cluster, a directory, and one in front of another."""

import pytest
from far_servers import needs_redis, redis_cluster, redis_server

from promptdb.far import FarStore
from promptdb.far_open import open_far
from promptdb.shared_options import SharedOptions
from promptdb.testing_shared import FarContract


def opened(url: str, **options) -> FarStore:
    return open_far(SharedOptions(url, timeout_s=10, **options))


class TestDirectory(FarContract):
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path):
        self.path = tmp_path

    def open_far(self, name: str) -> FarStore:
        return opened(f"file://{self.path}/{name}")


@needs_redis()
class TestRedis(FarContract):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with redis_server(
            tmp_path_factory.mktemp("redis"), maxmemory="256mb", maxmemory_policy="allkeys-lru"
        ) as server:
            cls.url = server.url
            yield server

    def open_far(self, name: str) -> FarStore:
        return opened(f"{self.url}?prefix={name}")


@needs_redis()
class TestCluster(FarContract):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def cluster(cls, tmp_path_factory):
        with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
            cls.hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
            yield nodes

    def open_far(self, name: str) -> FarStore:
        return opened(f"redis+cluster://{self.hosts}?prefix={name}")


@needs_redis()
class TestLayers(FarContract):
    """A server that forgets, in front of a directory that keeps."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with redis_server(tmp_path_factory.mktemp("layers"), maxmemory="256mb") as server:
            cls.server, cls.path = server, tmp_path_factory.mktemp("behind")
            yield server

    def open_far(self, name: str) -> FarStore:
        return opened(f"{self.server.url}?prefix={name} file://{self.path}/{name}")

    def test_what_is_behind_comes_to_the_front(self, far, name):
        """A server that lost everything is filled again by reading."""
        far.put([("v/one", b"value")])
        self.server.cli("flushall")
        front = opened(f"{self.server.url}?prefix={name}")
        assert front.exists(["v/one"]) == [False]
        assert far.get(["v/one"]) == [[b"value"]]
        assert front.exists(["v/one"]) == [True]
        front.close()
