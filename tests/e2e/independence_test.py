"""The same request gives the same tokens and log probabilities, bit for bit, whoever else is in the batch."""

import random
import threading
import time

import pytest

from harness import Server, generate, spb

WORDS = ("In the beginning God created the heaven and the earth KING HENRY Speak ROMEO But soft what "
         "light through yonder window breaks And the LORD said unto Moses").split()


def make_request(rng, index):
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    fields = dict(max_new_tokens=rng.randint(1, 48), logprobs=rng.choice([0, 3]),
                  ignore_eos=rng.random() < .5)
    if index % 2:
        fields["sampling"] = dict(temperature=rng.choice([.5, 1., 1.5]), seed=rng.getrandbits(63),
                                  top_k=rng.choice([0, 5, 50]), top_p=rng.choice([1., .9, .5]),
                                  min_p=rng.choice([0., .05]),
                                  repetition_penalty=rng.choice([1., 1.2]),
                                  presence_penalty=rng.choice([0., .5]),
                                  frequency_penalty=rng.choice([0., .3]))
    return prompt, fields


def bits(answer):
    return (answer.token_ids, answer.text, answer.finish.reason,
            [(entry.token_id, entry.logprob, list(entry.top_token_ids), list(entry.top_logprobs))
             for entry in answer.logprobs])


def run_turns(server, turns, session):
    """The bits of each turn; on a session when there are more than one."""
    if len(turns) == 1:
        return [bits(generate(server, turns[0][0], **turns[0][1]))]
    server.sessions.CreateSession(spb.CreateSessionRequest(session_id=session))
    results = [bits(generate(server, prompt, session_id=session, **fields))
               for prompt, fields in turns]
    server.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=session))
    return results


@pytest.mark.parametrize("form,state", [("recurrent", "float32"), ("chunkwise", "float32"),
                                        ("chunkwise", "int16")])
def test_64_clients_that_join_and_leave_at_random_equal_their_solo_runs(form, state):
    rng = random.Random(20261123)
    jobs = [[make_request(rng, client + job) for _ in range(rng.choice([1, 1, 3]))]
            for client in range(64) for job in range(2)]
    with Server("--prefill-form", form, "--state-dtype", state, "--max-num-seqs", 24,
                "--max-num-batched-tokens", 256, "--max-prefill-chunk", 64) as server:
        alone = [run_turns(server, turns, f"alone-{i}") for i, turns in enumerate(jobs)]
        steps_alone = server.metric("gla_step_batch_size_count")
        sequences_alone = server.metric("gla_step_batch_size_sum")
        together = [None] * len(jobs)
        starts = [rng.random() * .05 for _ in range(64)]  # a GPU is done with each in milliseconds

        def client(index):
            time.sleep(starts[index])
            for job in (2 * index, 2 * index + 1):
                together[job] = run_turns(server, jobs[job], f"together-{job}")
        threads = [threading.Thread(target=client, args=(i,)) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        different = [i for i in range(len(jobs)) if together[i] != alone[i]]
        assert not different, different
        steps = server.metric("gla_step_batch_size_count") - steps_alone
        mean_batch = (server.metric("gla_step_batch_size_sum") - sequences_alone) / steps
        assert mean_batch > 1.5, mean_batch  # they did share steps
        server.wait_idle()
        assert server.stop() == 0
