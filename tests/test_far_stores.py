"""The contract of far stores, against real servers: Redis, its Cluster, a directory, and one in front of another."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from archive_tools import lookup
from far_servers import (
    AZURE_ACCOUNT,
    AZURE_KEY,
    azure_server,
    needs_azurite,
    needs_ceph,
    needs_redis,
    proxy_to,
    redis_cluster,
    redis_server,
    s3_server,
)
from google_stand_in import credentials_for, google_stand_in
from shared_tools import PROMPT, Machine

from promptdb.errors import SharedError
from promptdb.far import FarStore, joined
from promptdb.far_open import open_far
from promptdb.shared_options import SharedOptions
from promptdb.testing_shared import FarContract


def opened(url: str, **options) -> FarStore:
    return open_far(SharedOptions(url, timeout_s=10, **options))


class Shared(FarContract):
    """The contract, and two machines with stores of their own on top of it."""

    def url(self, name: str) -> str:
        raise NotImplementedError

    def open_far(self, name: str) -> FarStore:
        return opened(self.url(name))

    def test_two_machines(self, name, tmp_path):
        # Servers that are started for a test may take more than a second on a busy machine.
        url = f"{self.url(name)}{'&' if '?' in self.url(name) else '?'}timeout_s=10"
        options = SharedOptions.of_url(url)
        one, two = Machine(tmp_path / "one", url), Machine(tmp_path / "two", url)
        try:
            one.put(PROMPT, logits=[50])
            assert two.pull([*PROMPT, 7]) == 50
            two.put([*PROMPT, 7], logits=[51])
            assert one.pull([*PROMPT, 7]) == 51
            assert lookup(one.db, [*PROMPT, 7]).is_complete
            assert one.tier.options.url == options.url
        finally:
            one.db.close()
            two.db.close()


class TestDirectory(Shared):
    @pytest.fixture(autouse=True)
    def directory(self, tmp_path):
        self.path = tmp_path

    def url(self, name: str) -> str:
        return f"file://{self.path}/{name}"


@needs_redis()
class TestRedis(Shared):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with redis_server(
            tmp_path_factory.mktemp("redis"), maxmemory="256mb", maxmemory_policy="allkeys-lru"
        ) as server:
            cls.server, cls.address = server, server.url
            yield server

    def url(self, name: str) -> str:
        return f"{self.address}?prefix={name}"

    def test_an_error_among_replies(self, far, name):
        """The replies after it are not taken for answers to what is asked next."""
        names = [f"v/{number}" for number in range(8)]
        far.put([(each, each.encode()) for each in names])
        self.server.cli("del", f"{name}:v/3")
        self.server.cli("rpush", f"{name}:v/3", "a list")
        with pytest.raises(SharedError, match="WRONGTYPE"):
            far.exists(names)
        del names[3]
        assert far.get(names, [len(each) for each in names]) == [[each.encode()] for each in names]

    def test_interrupted_between_question_and_reply(self, name, monkeypatch):
        """Who asks next is not answered with what the interrupted one was to get."""
        with proxy_to(self.server.port) as proxy:
            far = opened(f"redis://127.0.0.1:{proxy.port}?prefix={name}")
            far.put([("v/one", b"one"), ("v/two", b"two")])
            proxy.delay_s = 0.2
            with monkeypatch.context() as interrupted:
                interrupted.setattr("redis.connection.Connection.read_response", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    far.get(["v/one"], [3])
            assert far.get(["v/two"], [3]) == [[b"two"]]
            far.close()


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


@needs_redis()
class TestCluster(Shared):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def cluster(cls, tmp_path_factory):
        with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
            cls.hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
            cls.nodes = nodes
            yield nodes

    def url(self, name: str) -> str:
        return f"redis+cluster://{self.hosts}?prefix={name}"

    def test_slots_move_meanwhile(self, far):
        """Keys are found where they went, while slots go from one node to another, and after that."""
        values = {f"v/{number:03}": f"value {number}".encode() for number in range(300)}
        far.put(list(values.items()))
        assert far.exists(list(values)) == [True] * len(values)
        first, second = (node.cli("cluster", "myid").strip() for node in self.nodes[:2])
        from_first = ("--cluster-from", first, "--cluster-to", second, "--cluster-slots", "1000", "--cluster-yes")
        with ThreadPoolExecutor(1) as pool:
            moving = pool.submit(self.nodes[0].cli, "--cluster", "reshard", self.hosts.split(",")[0], *from_first)
            num_reads = 0
            while not moving.done() or num_reads < 3:
                assert far.get(list(values)) == [[value] for value in values.values()]
                num_reads += 1
            moving.result()
        far.put([("v/late", b"late")])
        assert far.get(["v/late", *values])[0] == [b"late"]


@needs_redis()
class TestLayers(Shared):
    """A server that forgets, in front of a directory that keeps."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with redis_server(tmp_path_factory.mktemp("layers"), maxmemory="256mb") as server:
            cls.server, cls.path = server, tmp_path_factory.mktemp("behind")
            yield server

    def url(self, name: str) -> str:
        return f"{self.server.url}?prefix={name} file://{self.path}/{name}"

    def test_what_is_behind_comes_to_the_front(self, far, name):
        """A server that lost everything is filled again by reading."""
        far.put([("v/one", b"value")])
        self.server.cli("flushall")
        front = opened(f"{self.server.url}?prefix={name}")
        assert front.exists(["v/one"]) == [False]
        assert far.get(["v/one"]) == [[b"value"]]
        assert front.exists(["v/one"]) == [True]
        front.close()


@needs_redis()
def test_a_front_that_hangs(tmp_path, caplog):
    """It costs its timeout once, is told once, and what is behind answers; it is used again when it works."""
    with redis_server(tmp_path / "front") as server, proxy_to(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port} file://{tmp_path}/behind"
        far = open_far(SharedOptions(url, timeout_s=0.3, connect_timeout_s=0.3))
        assert far.put([("v/one", b"one")]) == [True]
        proxy.is_silent = True
        with caplog.at_level("WARNING", "promptdb"):
            began = time.monotonic()
            assert far.get(["v/one", "v/two"]) == [[b"one"], None]
            assert far.put([("v/two", b"two")]) == [True]
            assert far.lease(["c/one"], "one", 5) == [0]
            assert time.monotonic() - began < 2
            began = time.monotonic()
            for number in range(20):
                assert far.exists(["v/two", f"v/{number}"]) == [True, False]
                far.delete([f"v/{number}"])
            assert time.monotonic() - began < 2.5  # twenty times its timeouts otherwise
        assert [record.event for record in caplog.records] == ["shared_failed"] * 2  # reading, and writing
        assert all("a layer" in record.message for record in caplog.records)
        proxy.is_silent = False
        for breaker in (*far._reading, *far._writing):
            breaker._next_try = 0.0
        assert far.get(["v/two"]) == [[b"two"]]
        front = opened(server.url)
        assert [None if each is None else joined(each) for each in front.get(["v/one", "v/two"])] == [b"one", b"two"]
        front.close()
        far.close()


@needs_ceph()
class TestS3(Shared):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with s3_server(tmp_path_factory.mktemp("s3")) as address:
            cls.address = address
            yield address

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")

    def url(self, name: str, bucket: str = "promptdb") -> str:
        return f"s3://{bucket}/{name}?endpoint={self.address}&region=us-east-1"

    def test_what_is_wrong_is_told(self, name, monkeypatch):
        with pytest.raises(SharedError, match="no such bucket"):
            opened(self.url(name, "nobodys")).get(["v/one"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(SharedError, match="access denied"):
            self.open_far(name).put([("v/one", b"x")])
        with pytest.raises(SharedError):
            opened(f"s3://promptdb/{name}?endpoint=http://127.0.0.1:9&region=us-east-1").get(["v/one"])

    def test_a_hung_server(self, name):
        with proxy_to(int(self.address.rpartition(":")[2])) as proxy:
            url = f"s3://promptdb/{name}?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1"
            far = open_far(SharedOptions(url, timeout_s=0.5, connect_timeout_s=0.5))
            far.put([("v/one", b"x")])
            proxy.is_silent = True
            began = time.monotonic()
            with pytest.raises(SharedError):
                far.get(["v/one"])
            assert time.monotonic() - began < 3


@needs_azurite()
class TestAzure(Shared):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls, tmp_path_factory):
        with azure_server(tmp_path_factory.mktemp("azure")) as address:
            cls.address = address
            yield address

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY)

    def url(self, name: str, container: str = "promptdb") -> str:
        return f"az://{container}/{name}?endpoint={self.address}"

    def test_what_is_wrong_is_told(self, name, monkeypatch):
        with pytest.raises(SharedError, match="no such bucket"):
            opened(self.url(name, "nobodys")).get(["v/one"])
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "A" + AZURE_KEY[1:])
        with pytest.raises(SharedError, match="access denied"):
            self.open_far(name).put([("v/one", b"x")])


class TestGoogle(Shared):
    """Against a stand-in, not Google's server: see there."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def server(cls):
        with google_stand_in() as server:
            cls.server = server
            yield server

    @pytest.fixture(autouse=True)
    def credentials(self, monkeypatch):
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", credentials_for(self.server))

    def url(self, name: str, bucket: str = "promptdb") -> str:
        return f"gs://{bucket}/{name}?allow_http=true"

    def test_creating_is_conditional(self, far):
        """Where nothing is: generation 0. Without that, the second of two writers would replace what is there."""
        far.put([("v/one", b"x"), ("v/two", b"y")])
        assert self.server.conditions == {"0"}

    def test_what_is_wrong_is_told(self, name):
        with pytest.raises(SharedError, match="no such bucket"):
            opened(self.url(name, "nobodys")).get(["v/one"])
