"""Sessions: many turns equal one run, only new tokens are run, and nothing leaks from slot to slot."""

import random

import pytest

from harness import Server, generate, pb, request, spb, wait_for


@pytest.fixture(scope="module")
def server():
    """float32 and recurrent prompts: with them bits do not depend on turns either, on any backend."""
    with Server("--max-num-seqs", 32, "--state-memory", "64MiB", "--dtype", "float32",
                "--prefill-form", "recurrent") as running:
        yield running
        running.wait_idle()
        assert running.alive()
        assert running.stop() == 0, "\n".join(running.log[-20:])


def test_many_turns_equal_one_run_over_the_whole_text(server):
    rng = random.Random(5)
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="long"))
    text = []
    for turn in range(12):
        new = [rng.randint(3, 2047) for _ in range(rng.choice([1, 2, 17, 64, 65, 130]))]
        before = server.metric("gla_prompt_tokens_total")
        answer = generate(server, new, session_id="long", max_new_tokens=rng.randint(1, 20),
                          ignore_eos=True, logprobs=0)
        # only the new tokens were run, and the answer says so
        assert answer.finish.usage.tokens_prefilled == len(new)
        assert answer.finish.usage.tokens_restored == len(text)
        assert server.metric("gla_prompt_tokens_total") - before == len(new)
        whole = generate(server, text + new, max_new_tokens=len(answer.token_ids), ignore_eos=True,
                         logprobs=0)
        assert answer.token_ids == whole.token_ids, turn
        assert ([entry.logprob for entry in answer.logprobs]
                == [entry.logprob for entry in whole.logprobs])
        text += new + answer.token_ids
        assert answer.finish.session_position == len(text)
    assert server.sessions.GetSession(spb.GetSessionRequest(session_id="long")).position == len(text)
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="long"))


def test_text_turns_get_the_begin_token_once(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="t"))
    tokens = lambda text: len(server.inference.Tokenize(  # noqa: E731
        pb.TokenizeRequest(text=text, add_special_tokens=False)).token_ids)
    first = generate(server, "In the beginning", session_id="t", max_new_tokens=2, ignore_eos=True)
    assert first.finish.usage.tokens_prefilled == tokens(b"In the beginning") + 1
    second = generate(server, " God said", session_id="t", max_new_tokens=2, ignore_eos=True)
    assert second.finish.usage.tokens_prefilled == tokens(b" God said")
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="t"))


def test_stopped_turns_keep_what_was_reported(server):
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id="s"))
    prompt = list(server.inference.Tokenize(pb.TokenizeRequest(text=b"In the beginning God")).token_ids)
    free = generate(server, prompt, max_new_tokens=40)
    stop = free.text.decode()[10:14].encode()
    answer = generate(server, prompt, session_id="s", max_new_tokens=40, stop=[stop])
    assert answer.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert answer.finish.stop_sequence == stop
    assert answer.text == free.text[:free.text.index(stop)]
    assert answer.token_ids == free.token_ids[:len(answer.token_ids)]
    assert answer.finish.session_position == len(prompt) + len(answer.token_ids)
    follow = generate(server, [300], session_id="s", max_new_tokens=10, ignore_eos=True)
    whole = generate(server, prompt + answer.token_ids + [300], max_new_tokens=10, ignore_eos=True)
    assert follow.token_ids == whole.token_ids
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id="s"))


def test_a_slot_used_again_shows_nothing_of_its_former_owner():
    """Freed slots are filled with NaN: one read of a stale value would end a stream as INTERNAL."""
    with Server("--max-num-seqs", 2, "--state-memory", "1MiB",
                "--poison-freed-slots", "yes") as server:
        want = generate(server, "ROMEO:", max_new_tokens=12).token_ids
        for round_ in range(30):
            server.sessions.CreateSession(spb.CreateSessionRequest(session_id=f"r{round_}"))
            generate(server, [1] + [7 + round_] * 40, session_id=f"r{round_}", max_new_tokens=5,
                     ignore_eos=True)
            server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=f"r{round_}"))
            assert generate(server, "ROMEO:", max_new_tokens=12).token_ids == want
        assert server.metric("gla_numeric_guard_trips_total") == 0


def test_converse(server):
    def turns():
        yield pb.ConverseRequest(open=pb.ConverseOpen(sampling=pb.SamplingParams(temperature=0)))
        for text in (b"First Citizen:\n", b"Second Citizen:\n"):
            done.clear()  # before the turn is out: its end may come before this thread goes on
            yield pb.ConverseRequest(turn=pb.ConverseTurn(text=text, max_new_tokens=10,
                                                          ignore_eos=True))
            wait_for(lambda: done, 20, "finished turn")
    done = [1]
    opened, finishes = None, []
    for message in server.inference.Converse(turns(), timeout=60):
        if message.HasField("opened"):
            opened = message.opened
        elif message.output.HasField("finish"):
            finishes.append(message.output.finish)
            done.append(1)
    assert opened.position == 0
    assert len(finishes) == 2
    assert finishes[1].usage.tokens_restored == finishes[0].session_position
    # a stream's own session ends with it
    wait_for(lambda: opened.session_id not in [
        one.session_id for one in server.sessions.ListSessions(
            spb.ListSessionsRequest()).sessions], 5, "deleted session")


def test_list_in_pages(server):
    names = [f"page-{i:03}" for i in range(25)]
    for name in names:
        server.sessions.CreateSession(spb.CreateSessionRequest(session_id=name))
    seen, token = [], ""
    while True:
        page = server.sessions.ListSessions(spb.ListSessionsRequest(page_size=10, page_token=token))
        seen += [one.session_id for one in page.sessions]
        token = page.next_page_token
        if not token:
            break
    assert [name for name in seen if name.startswith("page-")] == names
    for name in names:
        server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=name))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_score_equals_the_log_probabilities_of_generation(server, length):
    prompt = [1, 796, 261, 815][:length]
    answer = generate(server, prompt, max_new_tokens=20, ignore_eos=True, logprobs=0)
    score = server.inference.Score(pb.ScoreRequest(
        token_ids=pb.TokenIds(ids=prompt + answer.token_ids)))
    assert list(score.logprobs)[length - 1:] == [entry.logprob for entry in answer.logprobs]


def test_report_prefill(server):
    stream = server.inference.Generate(request([1] + [300] * 2000, max_new_tokens=1,
                                               report_prefill=True))
    steps = [message.prefill.tokens_done for message in stream if message.HasField("prefill")]
    assert steps and steps == sorted(steps) and steps[-1] < 2001
