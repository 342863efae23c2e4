"""Memory without a name: nothing that is read is half written."""

import time

import numpy as np
import pytest
import torch as th
from learner_runs import small_model

from sb3_mpg.common.learners.replay import SharedReplay
from sb3_mpg.common.learners.shared_memory import SharedParameters
from sb3_mpg.common.processes import Worker, process_context

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def read_parameters(connection, parameters, n_reads):
    """In another process: fetch again and again while they are written, until many versions were seen."""
    tensors = [th.zeros(1000) for _ in range(20)]
    torn, versions = 0, set()
    connection.send("ready")
    for number in range(100 * n_reads):
        if number >= n_reads and len(versions) > 10:
            break
        version = parameters.fetch(tensors)
        versions.add(version)
        torn += any((tensor != version).any() for tensor in tensors)
    connection.send((torn, len(versions)))


def read_buffer(connection, reader, parts, n_reads):
    reader.attach(*parts)
    np.random.seed(0)
    torn, newest = 0, 0.0
    connection.send("ready")
    for number in range(100 * n_reads):
        if number >= n_reads and newest > 30:
            break
        samples = reader.sample(32)
        torn += not th.equal(samples.observations, samples.rewards.expand(-1, 2))
        torn += not th.equal(samples.next_observations, samples.observations + 1)
        newest = max(newest, samples.rewards.max().item())
    connection.send((torn, newest))


def test_parameters_are_never_torn():
    parameters = SharedParameters([th.zeros(1000) for _ in range(20)])
    parameters.publish([th.zeros(1000)] * 20, 0)
    worker = Worker(process_context(), read_parameters, (parameters, 2000), "reader")
    assert worker.connection.recv() == "ready"
    version = 0
    while not worker.connection.poll():
        version += 1
        parameters.publish([th.full((1000,), float(version))] * 20, version)
    torn, n_versions = worker.connection.recv()
    worker.close(1)
    assert torn == 0
    assert n_versions > 10


def test_transitions_are_never_torn():
    buffer = small_model(buffer_size=20).replay_buffer

    def add(number):
        obs = np.full((1, 2), number, dtype=np.float32)
        buffer.add(obs, obs + 1, np.zeros((1, 1)), np.full(1, number), np.zeros(1), [{}])

    for number in range(30):
        add(number)
    shared = SharedReplay(buffer)
    arguments = (shared.reader(), shared.shared_parts(), 1000)
    worker = Worker(process_context(), read_buffer, arguments, "reader")
    assert worker.connection.recv() == "ready"
    number = 30
    while not worker.connection.poll():
        with shared.writing():
            add(number)
        number += 1
        time.sleep(1e-4)
    torn, newest = worker.connection.recv()
    worker.close(1)
    assert torn == 0
    assert newest > 30
    shared.close()
    assert buffer.rewards.max() == number - 1


def test_types_and_shapes():
    tensors = [th.tensor(3), th.rand(2, 3), th.tensor([True, False]), th.rand(3, dtype=th.float64), th.zeros(0)]
    parameters = SharedParameters(tensors)
    parameters.publish(tensors, 7)
    copies = [th.zeros_like(tensor) for tensor in tensors]
    assert parameters.fetch(copies) == 7
    assert all(th.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert all(view.data_ptr() % 64 == 0 for view in parameters.views)
