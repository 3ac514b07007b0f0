"""Long jobs: put and score of many lines, interrupted, killed and gone on with; bad lines; plans."""

import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cli_tools import TIMEOUT_S, run, run_json, run_lines, write_checkpoint
from conftest import SUPPORTED, shared_model, shared_tokenizer

from promptdb import Engine, PromptDB
from promptdb.batch import BatchLimits, _Window
from promptdb.batch import run as run_batch
from promptdb.cache import bytes_per_token
from promptdb.checkpoint import describe
from promptdb.forecast import Sizes, forecast, usual_limits
from promptdb.keys import Root, pack_tokens
from promptdb.tokens import Prompt

SEED = 7

# A process that has everything imported, and a child of it for every command: jobs start in a fraction of a second.
FORKER = """
import json, os, sys
from promptdb import Engine, PromptDB
from promptdb.cli.main import main
with PromptDB.in_memory() as db, Engine.from_pretrained(db, sys.argv[1]) as engine:
    list(engine.run(["Hello", "Hell"]))
del db, engine
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, (name, flags) in enumerate(zip(job["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
            os.dup2(os.open(name, flags), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        sys.argv = ["promptdb", *job["args"]]
        code = 70
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Job:
    """A command in a process of its own, with its output in files."""

    def __init__(self, forker, directory, args, stdin="/dev/null", stderr=None):
        self._forker = forker
        self.out, self.err = directory / "stdout", directory / "stderr"
        for path in (self.out, self.err):
            path.write_bytes(b"")
        streams = [str(stdin), str(self.out), str(stderr or self.err)]
        forker.stdin.write(json.dumps({"args": list(map(str, args)), "streams": streams}) + "\n")
        forker.stdin.flush()
        self.pid = int(forker.stdout.readline())

    def send(self, number):
        os.kill(self.pid, number)

    def wait(self):
        return int(self._forker.stdout.readline())

    @property
    def said(self):
        return self.err.read_text()

    def documents(self):
        return [json.loads(line) for line in self.out.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("jobs") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def forker(model):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.stdin.close()
    process.wait(timeout=TIMEOUT_S)


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """A directory to work in, with the environment naming its store and the model."""
    monkeypatch.setenv("PROMPTDB_PATH", str(tmp_path / "store.promptdb"))
    monkeypatch.setenv("PROMPTDB_MODEL", model)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if (tmp_path / "store.promptdb").exists():
        with PromptDB(tmp_path / "store.promptdb") as db:
            assert db.verify() == []


@pytest.fixture
def start(forker, place, model):
    """Start a command on the store of ``place``."""
    return lambda *args, **streams: Job(
        forker, place, [args[0], "--db", place / "store.promptdb", "--model", model, *args[1:]], **streams
    )


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def families(number, *, words=60, members=6, seed=SEED):
    """Return prompts in families: a context of their own, and endings that begin with different letters.

    Where prompts part, a piece ends, so that the logits there are stored: no token is ever needed twice.
    """
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    found = []
    for family in range(number):
        context = chr(0x4E00 + 7 * family) + "".join(rng.choice(letters) + rng.choice("aeiou ") for _ in range(words))
        endings = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 12))) for _ in range(members)]
        found += [
            [context, first + rest] for first, rest in zip(rng.sample(letters.upper(), members), endings, strict=True)
        ]
    return found


def prefixes(prompts):
    """Return the distinct token prefixes of prompts, by plain Python."""
    encode = shared_tokenizer()
    found = set()
    for pieces in prompts:
        ids = tuple(encode("".join(pieces)).input_ids)
        found |= {ids[:end] for end in range(1, len(ids) + 1)}
    return found


def computed(job, code):
    """Return how many tokens a run of put says that it computed."""
    if code == 0:
        return sum(each["tokens_computed"] for each in job.documents())
    said = re.search(r"([\d,]+) tokens? computed", job.said)
    return int(said[1].replace(",", "")) if said else 0


def stored_tokens(path):
    if not path.exists():
        return 0
    with PromptDB(path, readonly=True) as db:
        return db.stat()["num_tokens"]


def started(place, *, tokens):
    """Wait until a job has stored something."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if stored_tokens(place / "store.promptdb") >= tokens:
                return
        except (OSError, ValueError):
            pass  # it is being created
        time.sleep(0.01)
    raise AssertionError("nothing was stored")


# Stopping and going on


def test_interrupted_puts_compute_every_token_once(place, start, model):
    prompts = families(24)
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in prompts])
    distinct = len(prefixes(prompts))
    rng = random.Random(SEED)
    total, codes, known = 0, [], 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, None):
        job = start("put", "--file", lines, "--json")
        if number is not None:
            started(place, tokens=known + 1)
            time.sleep(rng.uniform(0, 0.2))
            job.send(number)
        codes.append(job.wait())
        total += computed(job, codes[-1])
        known = stored_tokens(place / "store.promptdb")
        # All that a run says that it computed is stored.
        assert known == total
        assert codes[-1] == (0 if number is None or "Interrupted" not in job.said else 128 + number)
        assert "Traceback" not in job.said
        assert ("goes on from there" in job.said) == (codes[-1] != 0)
    assert 130 in codes, "no run was interrupted: it is too fast for this test"
    assert total == known == distinct
    found = {each["source"] for each in job.documents()}
    assert len(found) == len(prompts)
    assert_stored(place, prompts, rng)


def assert_stored(place, prompts, rng):
    """Compare some prompts with a plain forward pass."""
    model = shared_model("llama")
    with PromptDB(place / "store.promptdb") as db, Engine(db, model, shared_tokenizer()) as engine:
        for pieces in rng.sample(prompts, 5):
            found = engine.get("".join(pieces))
            assert found.tokens_computed == 0
            with torch.no_grad():
                logits = model(torch.tensor([found.token_ids])).logits[0]
            torch.testing.assert_close(found.logits, logits[-1], rtol=0, atol=1e-5)
            expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(found.token_ids)[1:, None])[:, 0]
            torch.testing.assert_close(found.token_logprobs, expected, rtol=0, atol=1e-5)


def test_killed_puts_lose_no_more_than_what_was_not_committed(place, start, model):
    prompts = families(24, seed=SEED + 1)
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in prompts])
    rng = random.Random(SEED)
    known, kills = 0, 0
    for _ in range(4):
        job = start("put", "--file", lines, "--json")
        started(place, tokens=known + 1)
        time.sleep(rng.uniform(0, 0.15))
        job.send(signal.SIGKILL)
        kills += job.wait() == -signal.SIGKILL
        with PromptDB(place / "store.promptdb") as db:
            assert db.verify() == []
        before, known = known, stored_tokens(place / "store.promptdb")
        assert known >= before
        printed = job.out.read_bytes().splitlines(keepends=True)
        for line in [line for line in printed if line.endswith(b"\n")][-2:]:  # what is printed is stored
            number = int(json.loads(line)["source"].rpartition(":")[2])
            assert run_json("get", "".join(prompts[number - 1]))["is_complete"]
    assert kills
    job = start("put", "--file", lines, "--json")
    assert job.wait() == 0
    assert known + computed(job, 0) == len(prefixes(prompts)) == stored_tokens(place / "store.promptdb")
    assert_stored(place, prompts, rng)


def test_a_second_interrupt_stops_at_once(place, start):
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in families(24, seed=SEED + 2)])
    job = start("put", "--file", lines)
    started(place, tokens=1)
    job.send(signal.SIGINT)
    job.send(signal.SIGTERM)
    code = job.wait()
    assert code in (130, 143)
    assert "Traceback" not in job.said
    assert start("put", "--file", lines).wait() == 0


def test_prompts_of_a_pipe_are_stored_while_it_is_open_and_waiting_for_it_can_be_interrupted(place, start):
    fifo = place / "fifo"
    os.mkfifo(fifo)
    prompts = families(60, words=150)  # more than a window of the engine
    half = "".join(json.dumps({"pieces": pieces}) + "\n" for pieces in prompts)
    # Opening a pipe waits for the other end.
    jobs = []
    thread = threading.Thread(target=lambda: jobs.append(start("put", "--file", "-", "--json", stdin=fifo)))
    thread.start()
    with fifo.open("w") as stream:
        thread.join()
        stream.write(half)
        stream.flush()
        deadline = time.monotonic() + TIMEOUT_S
        while not jobs[0].out.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.02)
        jobs[0].send(signal.SIGINT)
        assert jobs[0].wait() == 130
    done = jobs[0].documents()
    assert 0 < len(done) < len(prompts)
    assert done[0]["source"] == "standard input:1"
    assert f"{len(done)} prompts done" in jobs[0].said


def test_a_terminal_gets_a_bar_and_the_output_stays_output(place, start):
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in families(24)])
    ours, theirs = pty.openpty()
    shown = []

    def read():
        while data := os.read(ours, 65536):
            shown.append(data)
            if b"DONE" in data:
                return

    reader = threading.Thread(target=read)
    reader.start()
    job = start("put", "--file", lines, "--json", stderr=os.ttyname(theirs))
    assert job.wait() == 0
    os.write(theirs, b"DONE")
    reader.join(timeout=TIMEOUT_S)
    text = b"".join(shown).decode()
    assert re.search(r"\d+ of 144 lines", text)
    assert "tokens/s" in text
    assert len(job.documents()) == 144
    os.close(ours), os.close(theirs)


def test_a_log_gets_lines_that_only_go_up(place, monkeypatch):
    from promptdb.cli import progress

    monkeypatch.setattr(progress, "_LOG_EVERY_S", 0.0)
    monkeypatch.setattr(progress, "_SAMPLE_EVERY_S", 0.0)
    prompts = families(60, words=150)
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in prompts])
    shown = run("put", "--file", lines).stderr
    found = [
        tuple(int(each.replace(",", "")) for each in match)
        for match in re.findall(r"([\d,]+) of 360 lines, .* ([\d,]+) computed, ([\d,]+) loaded", shown)
    ]
    assert len(found) > 360
    for column in zip(*found, strict=True):
        assert list(column) == sorted(column)
    assert found[-1][:2] == (360, stored_tokens(place / "store.promptdb"))
    # The share of a window that is at work is seen as well.
    assert len({done for done, _, loaded in found if loaded == 0}) > 3
    assert "left" in shown


# Scores


def questions(number, seed=SEED):
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "

    def text(length):
        return "".join(rng.choice(letters) for _ in range(length))

    found = []
    for at in range(number):
        context = text(rng.randint(3, 60))
        kind = at % 4
        if kind == 0:
            found.append({"context": context, "continuation": " é" + text(5), "id": at})
        elif kind == 1:
            found.append({"context": context, "choices": [f" {each}{text(3)}" for each in range(3)], "id": {"n": at}})
        elif kind == 2:
            found.append({"pieces": [context, text(4), "!" + text(2)]})
        else:
            found.append({"context": [context, " 你好"], "continuation": text(3), "other": "ignored"})
    return found


def plain_score(context, continuation):
    """Return tokens, log-probabilities and greediness of a continuation, by a plain forward pass."""
    model, tokenizer = shared_model("llama"), shared_tokenizer()
    output = tokenizer(context + continuation, return_offsets_mapping=True)
    ids = output.input_ids
    reached, before = 0, 0
    for at, (_, end) in enumerate(output.offset_mapping):
        reached = max(reached, end)
        before = at + 1 if reached <= len(context) else before
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)[before - 1 : -1]
    after = torch.tensor(ids[before:])
    return after.tolist(), rows.gather(1, after[:, None])[:, 0].tolist(), bool((rows.argmax(-1) == after).all())


def assert_scores(question, result):
    if "pieces" in question:
        *context, continuation = question["pieces"]
        choices = [continuation]
    else:
        context = question["context"]
        choices = question.get("choices") or [question["continuation"]]
    context = context if isinstance(context, str) else "".join(context)
    assert result.get("id") == question.get("id")
    assert ("id" in result) == ("id" in question)
    found = result["choices"] if "choices" in question else [result]
    expected = [plain_score(context, choice) for choice in choices]
    for each, (ids, logprobs, greedy) in zip(found, expected, strict=True):
        assert each["num_tokens"] == len(ids)
        assert each["logprob_nats"] == pytest.approx(sum(logprobs), abs=1e-4)
        assert each["is_greedy"] == greedy
        if "token_ids" in each:
            assert each["token_ids"] == ids
            assert each["token_logprobs_nats"] == pytest.approx(logprobs, abs=1e-5)
    if "choices" in question:
        sums = [sum(logprobs) for _, logprobs, _ in expected]
        shares = [math.exp(each - max(sums)) for each in sums]
        assert [each["probability"] for each in found] == pytest.approx([s / sum(shares) for s in shares], abs=1e-4)
        assert [each["choice"] for each in found] == choices
        assert result["best"] == choices[sums.index(max(sums))]


def test_scores_are_those_of_plain_forward_passes(place):
    asked = questions(24)
    lines = write_lines(place / "pairs.jsonl", asked)
    summary = run_json("score", "--file", lines, "--out", "results.jsonl", "--logprobs")
    results = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [each["line"] for each in results] == list(range(1, 25))
    for question, result in zip(asked, results, strict=True):
        assert_scores(question, result)
    assert summary["num_lines"] == 24
    assert summary["tokens_computed"] == stored_tokens(place / "store.promptdb")
    # Standard output gets the same, from the store.
    again = run_lines("score", "--file", lines, "--logprobs")
    assert [each["digest"] for each in again] == [each["digest"] for each in results]
    assert "0 computed" in run("score", "--file", lines, "--logprobs").stderr
    assert run_json("score", "--file", lines, "--out", "x.jsonl", "--no-store")["tokens_computed"] == 0


def test_a_pair_on_the_command_line(place):
    ids, logprobs, greedy = plain_score("Hello there", ". General 你")
    found = run_json("score", "Hello", " there", ". General 你", "--logprobs")
    assert found["logprob_nats"] == pytest.approx(sum(logprobs), abs=1e-4)
    assert (found["token_ids"], found["is_greedy"]) == (ids, greedy)
    shown = run("score", "Hello", " there", ". General 你", "--logprobs").stdout
    assert f"{sum(logprobs):.3f}" in shown
    assert len(shown.splitlines()) == 4 + len(ids)
    assert run_json("score", "-", ".", stdin="Hello")["num_tokens"] == 1
    lines = write_lines(place / "pairs.txt", [{"pieces": ["Hello", " there", ". General 你"]}])
    (found,) = run_lines("score", "--file", lines)
    assert found["logprob_nats"] == pytest.approx(sum(logprobs), abs=1e-4)


def test_choices_may_be_compared_by_their_lengths(place):
    lines = write_lines(place / "pairs.jsonl", [{"context": "Once", "choices": [" upon a time", " é"]}])
    for how, lengths in (("tokens", None), ("bytes", [12, 3])):
        (found,) = run_lines("score", "--file", lines, "--normalize", how)
        sums = [
            each["logprob_nats"] / (lengths[at] if lengths else each["num_tokens"])
            for at, each in enumerate(found["choices"])
        ]
        share = 1 / (1 + math.exp(sums[1] - sums[0]))
        assert found["choices"][0]["probability"] == pytest.approx(share, abs=1e-6)


def test_killed_scores_are_resumed(place, start):
    asked = questions(400)
    lines = write_lines(place / "pairs.jsonl", asked)
    out = place / "results.jsonl"
    rng = random.Random(SEED)
    kills = 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, None):
        job = start("score", "--file", lines, "--out", out, "--resume")
        if number is not None:
            time.sleep(rng.uniform(0.5, 1.5))
            job.send(number)
        code = job.wait()
        kills += code != 0
        assert code in (0, -signal.SIGKILL, *([128 + number] if number else []))
        assert "Traceback" not in job.said
        if code > 0:
            assert "--resume goes on from there" in job.said
        # Half a line, as a kill in the middle of a write leaves it.
        written = out.read_bytes()
        if number is not None:
            out.write_bytes(written[: rng.randint(max(0, len(written) - 300), len(written))])
    assert kills
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["line"] for each in results] == list(range(1, 401))
    for at in rng.sample(range(400), 12):
        assert_scores(asked[at], results[at])
    assert [each.get("id") for each in results] == [each.get("id") for each in asked]


def failure(*args, code=2, stdin=None):
    said = run(*args, code=code, stdin=stdin).stderr
    assert "Error: " in said
    return said


def test_results_are_neither_lost_nor_mixed_up(place, model, tmp_path):
    asked = questions(6)
    lines = write_lines(place / "pairs.jsonl", asked)
    out = place / "results.jsonl"
    job = ("score", "--file", lines, "--out", out)
    run(*job)
    whole = out.read_bytes()
    assert "--resume" in failure(*job)
    assert "exclude" in failure(*job, "--resume", "--overwrite")
    assert "--out FILE" in failure("score", "--file", lines, "--resume")
    assert "is what is read" in failure("score", "--file", lines, "--out", lines, "--overwrite")
    assert lines.read_text().count("\n") == 6
    assert run_json(*job, "--resume")["num_lines"] == 0
    assert out.read_bytes() == whole
    # Other options, another model, other inputs.
    assert "results.jsonl:1 cannot be resumed" in failure(*job, "--resume", "--logprobs")
    other = write_checkpoint(place / "other", seed=3)
    assert "the model" in failure(*job, "--resume", "--model", other)
    changed = write_lines(place / "changed.jsonl", [*asked[:4], {**asked[4], "id": "new"}, asked[5]])
    assert "results.jsonl:5 cannot be resumed" in failure("score", "--file", changed, "--out", out, "--resume")
    fewer = write_lines(place / "fewer.jsonl", asked[:5])
    assert "the inputs end before it" in failure("score", "--file", fewer, "--out", out, "--resume")
    assert out.read_bytes() == whole
    # More inputs, and a half line.
    more = write_lines(place / "more.jsonl", [*asked, *questions(8, seed=9)])
    out.write_bytes(whole[:-10])
    summary = run_json("score", "--file", more, "--out", out, "--resume")
    assert (summary["num_resumed"], summary["num_lines"]) == (5, 9)
    assert out.read_bytes().startswith(whole[: whole.rindex(b"\n", 0, -1)])
    out.write_bytes(b"something else\n")
    assert "none of this command's results" in failure(*job, "--resume")
    assert out.read_bytes() == b"something else\n"
    run(*job, "--overwrite")
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert "No such file" in failure("score", "--file", lines, "--out", place / "none" / "results.jsonl")


def test_two_jobs_do_not_write_one_file(place, start):
    fifo = place / "fifo"
    os.mkfifo(fifo)
    jobs = []
    thread = threading.Thread(
        target=lambda: jobs.append(start("score", "--file", "-", "--out", place / "r.jsonl", stdin=fifo))
    )
    thread.start()
    with fifo.open("w") as stream:
        thread.join()
        deadline = time.monotonic() + TIMEOUT_S
        while not (place / "r.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        lines = write_lines(place / "pairs.jsonl", questions(1))
        assert "another process is writing" in failure("score", "--file", lines, "--out", "r.jsonl")
        stream.write(json.dumps({"context": "a", "continuation": "b"}) + "\n")
    assert jobs[0].wait() == 0
    assert len((place / "r.jsonl").read_text().splitlines()) == 1


# Lines that cannot be used

BAD = [
    (b"nonsense", "this is not JSON"),
    (b'{"prompt": "x"}', "has neither 'text' nor 'pieces'"),
    (b'{"text": ""}', "the prompt is empty"),
    (b'{"text": 3}', "must be a string"),
    (b'{"text": "\xff"}', "is not valid UTF-8"),
    (json.dumps({"text": "far too long " * 1000}).encode(), "positions exactly"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_a_bad_line_ends_the_job_with_all_before_it_stored(place, line, said):
    prompts = place / "prompts.jsonl"
    prompts.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    message = failure("put", "--file", prompts)
    assert re.search(rf"prompts.jsonl:4\b.*{re.escape(said)}", message)
    assert "2 prompts before it are stored" in message
    for text, code in (("one", 0), ("two", 0), ("three", 1)):
        run("get", text, code=code)


def test_bad_lines_are_skipped_on_request(place):
    prompts = place / "prompts.jsonl"
    good = b'{"text": "good %d"}\n'
    prompts.write_bytes(b"".join(good % number + line + b"\n" for number, (line, _) in enumerate(BAD)))
    result = run("put", "--file", prompts, "--skip-bad", "--json")
    assert [json.loads(line)["source"] for line in result.stdout.splitlines()] == [
        f"{prompts}:{number}" for number in range(1, 12, 2)
    ]
    skipped = [line for line in result.stderr.splitlines() if line.startswith("Skipped ")]
    for number, ((_, said), line) in enumerate(zip(BAD, skipped, strict=True)):
        assert f"prompts.jsonl:{2 * number + 2}" in line
        assert said in line
    assert "6 lines skipped" in run("put", "--file", prompts, "--skip-bad").stdout
    prompts.write_bytes(b"nonsense\n{}\n")
    assert "no prompts" in failure("put", "--file", prompts, "--skip-bad")


def test_tokens_that_the_model_does_not_have(place):
    small = write_checkpoint(place / "small", vocab_size=300)
    texts = ["a", "Hello there", "b"]
    assert [max(shared_tokenizer()(text).input_ids) >= 300 for text in texts] == [False, True, False]
    lines = write_lines(place / "prompts.jsonl", [{"text": text} for text in texts])
    message = failure("put", "--file", lines, "--model", small)
    assert re.search("prompts.jsonl:2: token ID [0-9]+ is outside the model's vocabulary of 300", message)
    result = run("put", "--file", lines, "--model", small, "--skip-bad", "--json")
    assert [json.loads(line)["source"] for line in result.stdout.splitlines()] == [f"{lines}:1", f"{lines}:3"]


BAD_QUESTIONS = [
    (b'{"context": "a"}', "it needs"),
    (b'{"context": "a", "continuation": "b", "choices": ["c"]}', "it needs"),
    (b'{"pieces": ["a", "b"], "context": "a"}', "it needs"),
    (b'{"continuation": "b"}', "it needs"),
    (b'{"pieces": ["a"]}', "needs two"),
    (b'{"context": "a", "choices": []}', "not empty"),
    (b'{"context": "a", "choices": "b"}', "must be a list of strings"),
    (b'{"context": "a", "choices": ["b", "b"]}', "all different"),
    (b'{"context": "a", "continuation": ["b", "c"]}', "one 'continuation'"),
    (b'{"context": 1, "continuation": "b"}', "not a number"),
    (b'{"context": ["a", null], "continuation": "b"}', "not null"),
    (b'{"context": "", "continuation": "b"}', "the context has no tokens"),
    (b'{"context": "a", "continuation": ""}', "the continuation has no tokens"),
    (b'{"context": "a", "continuation": "\\ud800"}', "not valid Unicode"),
    (b"[]", "not a list"),
    (json.dumps({"context": "x", "choices": [" y", " long" * 2000]}).encode(), "positions exactly"),
]


def test_bad_questions(place):
    pairs = place / "pairs.jsonl"
    good = b'{"context": "a", "continuation": "b"}\n'
    pairs.write_bytes(b"".join(line + b"\n" + good for line, _ in BAD_QUESTIONS))
    found = run_lines("score", "--file", pairs, "--skip-bad")
    assert [each["line"] for each in found] == list(range(1, 1 + 2 * len(BAD_QUESTIONS)))
    for (_, said), bad, fine in zip(BAD_QUESTIONS, found[::2], found[1::2], strict=True):
        assert said in bad["error"]
        assert f"pairs.jsonl:{bad['line']}" in bad["error"]
        assert "logprob_nats" not in bad
        assert fine["logprob_nats"] == found[1]["logprob_nats"]
    # And as a file that is resumed after each line.
    run("score", "--file", pairs, "--skip-bad", "--out", "r.jsonl")
    whole = (place / "r.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 5, 6, len(whole)):
        (place / "r.jsonl").write_bytes(b"".join(whole[:kept]))
        run("score", "--file", pairs, "--skip-bad", "--out", "r.jsonl", "--resume")
        again = (place / "r.jsonl").read_bytes().splitlines()
        assert [json.loads(each)["digest"] for each in again] == [each["digest"] for each in found]
    pairs.write_bytes(good + BAD_QUESTIONS[0][0] + b"\n" + good)
    message = failure("score", "--file", pairs, "--out", "first.jsonl")
    assert "pairs.jsonl:2" in message
    assert "1 line before it is done" in message
    assert len((place / "first.jsonl").read_text().splitlines()) == 1


def test_wrong_usage(place):
    assert "--file FILE" in failure("score")
    assert "two TEXTs" in failure("score", "alone")
    lines = write_lines(place / "pairs.jsonl", questions(1))
    assert "--file FILE" in failure("score", "a", "b", "--file", lines)
    assert "--out goes with --file" in failure("score", "a", "b", "--out", "x")
    assert "one '-'" in failure("put", "-", "--file", "-", stdin="x")
    assert "one '-'" in failure("score", "--file", "-", "--file", "-", stdin="x")
    assert "there are no prompts" in failure("score", "--file", "-", stdin="\n\n")
    assert not (place / "store.promptdb").exists()


# Plans


def test_a_plan_says_what_the_job_then_does(place):
    prompts = [*families(12), ["a piece", " and another"], ["a piece"], ["a piece"]]
    lines = write_lines(place / "prompts.jsonl", [{"pieces": pieces} for pieces in prompts])
    plan = run_json("put", "--file", lines, "--dry-run")
    assert not plan["is_known_model"]
    assert not (place / "store.promptdb").exists()
    assert plan["num_prompts"] == len(prompts)
    assert plan["distinct_tokens"] == plan["tokens_to_compute"] == len(prefixes(prompts))
    assert plan["stored_tokens"] == 0
    assert plan["compute_s"] is None
    run("put", *prompts[0])
    run("put", "A prompt of more than thirty-two tokens, so that its rate is measured, and with it those of others.")
    plan = run_json("put", "--file", lines, "--dry-run")
    assert plan["is_known_model"]
    assert plan["way"] == "packed"
    assert plan["stored_tokens"] == len(prefixes(prompts[:1]))
    assert plan["compute_s"] > 0
    done = run_lines("put", "--file", lines)
    assert sum(each["num_tokens"] for each in done) == plan["num_tokens"]
    assert sum(each["tokens_computed"] for each in done) == plan["tokens_to_compute"]
    assert sum(each["spans_written"] for each in done) == plan["num_spans"]
    assert sum(each["bytes_written"] for each in done) == plan["bytes_to_write"]
    plan = run_json("put", "--file", lines, "--dry-run")
    assert (plan["tokens_to_compute"], plan["num_passes"], plan["bytes_to_write"]) == (0, 0, 0)
    assert "nothing" in run("put", "--file", lines, "--dry-run").stdout


def test_a_plan_of_scores(place):
    asked = questions(20)
    lines = write_lines(place / "pairs.jsonl", asked)
    run("score", "Hello", " there")
    plan = run_json("score", "--file", lines, "--dry-run")
    summary = run_json("score", "--file", lines, "--out", "r.jsonl")
    assert plan["num_prompts"] == 30
    assert plan["tokens_to_compute"] == summary["tokens_computed"]
    assert run_json("score", "--file", lines, "--dry-run")["tokens_to_compute"] == 0
    assert run_json("score", "Hello", " there", "--dry-run")["stored_tokens"] > 0


def test_a_plan_of_bad_lines_and_of_what_is_not_known(place):
    lines = place / "prompts.jsonl"
    lines.write_bytes(b'{"text": "a"}\n' + BAD[-1][0] + b"\n")
    assert "prompts.jsonl:2" in failure("put", "--file", lines, "--dry-run")
    assert run_json("put", "--file", lines, "--dry-run", "--skip-bad")["num_skipped"] == 1
    run("put", "a")
    assert "prompts.jsonl:2" in failure("put", "--file", lines, "--dry-run")
    assert run_json("put", "--file", lines, "--dry-run", "--skip-bad")["stored_tokens"] == 1
    found = run_json("put", "a", "--dry-run", "--dtype", "bfloat16")
    assert "--dtype auto" in found["note"]
    assert found["stored_tokens"] == 0
    assert run_json("put", "a", "--dry-run", "--namespace", "other")["stored_tokens"] == 0
    assert "no directory" in failure("put", "a", "--dry-run", "--model", "./nowhere")


def test_a_plan_of_a_known_checkpoint_imports_no_heavy_library(place):
    run("put", "Hello")
    lines = write_lines(place / "prompts.jsonl", [{"text": "Hello"}, {"text": "Help"}])
    pairs = write_lines(place / "pairs.jsonl", questions(2))
    commands = [["put", "--file", str(lines), "--dry-run"], ["score", "--file", str(pairs), "--dry-run"]]
    code = f"""
import sys
from promptdb.cli.main import cli
for command in {commands!r}:
    assert not cli.main(command, standalone_mode=False), command
    heavy = {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE).stdout
    assert b"to compute" in shown


@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom"])
def test_a_forecast_is_what_an_engine_does(arch, tmp_path):
    model = shared_model(arch)
    sizes = Sizes.of_config(model.config.to_dict(), "float32")
    rng = random.Random(SEED)
    prompts = [[rng.randrange(200), *(rng.randrange(3) for _ in range(rng.randint(1, 20)))] for _ in range(30)]
    prompts += [prompt[: rng.randint(1, len(prompt))] for prompt in prompts[:10]]
    distinct = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    known = {tuple(prompt[:end]) for prompt in prompts[:12] for end in range(1, len(prompt) + 1)}
    for want_logits in (True, False):
        with PromptDB.in_memory(chunk_tokens=16) as db, Engine(db, model, shared_tokenizer()) as engine:
            list(engine.run(prompts[:12]))
            engine.flush()
            before = db.stat()
            asked = [engine.tokenize(prompt) for prompt in prompts]
            plan = forecast(db, engine.root, asked, sizes=sizes, want_logits=want_logits)
            assert engine.plan(prompts, want_logits=want_logits) == plan
            reports = []
            done = list(run_batch(engine, asked, want_logits=want_logits, on_progress=reports.append))
            passes = [each.tokens_computed for each in reports]
            assert sum(each.tokens_computed for each in done) == sum(passes) == plan.tokens_to_compute
            engine.flush()
            after = db.stat()
        assert (plan.distinct_tokens, plan.stored_tokens) == (len(distinct), len(known))
        assert plan.num_passes == sum(each > 0 for each in passes)
        assert plan.num_spans == after["num_nodes"] - before["num_nodes"]
        assert plan.bytes_to_write == after["blob_bytes"] - before["blob_bytes"]


@pytest.mark.parametrize("arch", SUPPORTED)
def test_sizes_told_from_the_configuration(arch, tmp_path):
    model = shared_model(arch)
    model.config.save_pretrained(tmp_path)
    sizes = Sizes.of_config(describe(tmp_path), "auto")
    with torch.no_grad():
        output = model(torch.tensor([[1, 2, 3]]), use_cache=True)
    states = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
    assert sizes.kv_bytes_per_token == sum(each.numel() * each.element_size() for each in states) // 3
    assert sizes.logits_bytes == output.logits[0, 0].numel() * output.logits.element_size()


def test_a_forecast_knows_the_limits_of_engines(db):
    with Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        engine.get("Hello there. General Kenobi")
        size = bytes_per_token(engine._extender.layout)
        for name in ("cpu", "cuda"):
            limits = BatchLimits.for_device(torch.device(name))
            window = _Window(engine, [], True, True, limits, None)
            for way in ("packed", "batched", "single"):
                assert usual_limits(name, size, way) == window.pass_limits(way)


def test_sizes_that_nobody_knows():
    assert Sizes.of_config({"model_type": "odd"}, "auto") == Sizes(None, None)
    assert Sizes.of_config({"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 9}, "int4") == Sizes()
    half = Sizes.of_config({"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 9}, "bfloat16")
    assert half == Sizes(2 * 2 * 64 * 2, 18)
    with PromptDB.in_memory() as db:
        prompts = [Prompt(pack_tokens([1, 2, 3]))]
        assert forecast(None, None, prompts).bytes_to_write is None
        assert forecast(db, Root("00" * 32, "11" * 32), prompts, sizes=half).bytes_to_write > 3 * 512
        assert forecast(db, None, []).bytes_to_write == 0


# What else the commands tell


def test_explain_tells_how_batches_run(place):
    run("put", "Hello")
    found = run_json("explain", "Hello")
    assert found["way"] == "packed"
    assert found["exact_ways"] == ["packed", "batched", "single"]
    assert "transformers" in found["probed_with"]
    assert "packed; exact are packed, batched, single" in run("explain", "Hello").stdout
    bloom = write_checkpoint(place / "bloom", "bloom")
    run("put", "--model", bloom, "Hello")
    found = run_json("explain", "--model", bloom, "Hello")
    assert (found["way"], found["exact_ways"]) == ("batched", ["batched", "single"])


def test_what_a_prompt_wrote_is_told_of_the_first_that_has_it(place):
    lines = write_lines(
        place / "prompts.jsonl",
        [{"pieces": ["one", " two"]}, {"pieces": ["one", " zwei"]}, {"text": "one two"}, {"text": "one two three"}],
    )
    found = run_lines("put", "--file", lines)
    tokens = [len(shared_tokenizer()(text).input_ids) for text in ("one two", "one zwei", "one", "one two three")]
    assert [each["spans_written"] for each in found] == [2, 1, 0, 1]
    assert [each["tokens_written"] for each in found] == [tokens[0], tokens[1] - tokens[2], 0, tokens[3] - tokens[0]]
    assert sum(each["bytes_written"] for each in found) == run_json("stat")["blob_bytes"]
    assert sum(each["tokens_written"] for each in found) == stored_tokens(place / "store.promptdb")
