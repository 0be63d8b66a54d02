"""The public methods of the client, and how the server refuses those that it does not offer."""

import inspect
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import tinker
from common import begin, datum, failure, given, tell, value
from tinker import types
from tinker.lib.public_interfaces.admin_client import AdminClient
from tinker.lib.public_interfaces.rest_client import RestClient

CLIENTS = (
    tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, RestClient, AdminClient,
)  # fmt: skip


def public() -> dict[str, list[str]]:
    """Names, without those that do the same with `_async` behind them."""
    said = {}
    for client in CLIENTS:
        names = [name for name, _ in inspect.getmembers(client) if not name.startswith("_")]
        said[client.__name__] = [
            name for name in names if name.removesuffix("_async") == name
            or name.removesuffix("_async") not in names
        ]  # fmt: skip
    return said


def main() -> None:
    asked = given()
    service = begin()
    rest = service.create_rest_client()
    admin = AdminClient(service.holder)
    training = value(service.create_lora_training_client("tiny", rank=4))
    data = [datum(case) for case in asked["plain"]]
    training.forward_backward(data, "cross_entropy").result()
    path = training.save_state("one").result().path
    sampling = value(training.save_weights_and_get_sampling_client())
    recording = value(service.create_sampling_client(base_model="tiny", record_stability_info=True))
    session = service.holder.get_session_id()

    def sample(client: Any = sampling, **options: Any) -> Any:
        params = types.SamplingParams(max_tokens=1)
        return client.sample(types.ModelInput.from_ints([5, 6]), 1, params, **options).result()

    target = types.TensorData(data=[7], dtype="int64", shape=[1, 1])
    window = ("2026-07-13T00:00:00Z", "2026-07-14T00:00:00Z")
    refused: dict[str, Callable[[], Any]] = {
        "ServiceClient.copy_weights": lambda: begin(project_id="a").copy_weights(path).result(),
        'TrainingClient.save_weights_and_get_sampling_client(kind="inflight")': lambda: value(
            training.save_weights_and_get_sampling_client(kind="inflight")
        ),
        "SamplingClient.sample(topk_sample_logprobs)": lambda: sample(topk_sample_logprobs=2),
        "SamplingClient.sample(target_prompt_logprobs)": lambda: sample(
            target_prompt_logprobs=target
        ),
        "SamplingClient.sample(prompt_alt_tokens_k)": lambda: sample(prompt_alt_tokens_k=2),
        "SamplingClient.sample(record_stability_info)": lambda: sample(recording),
        "RestClient.assign_session_project": lambda: rest.assign_session_project(
            session, "a"
        ).result(),
        "RestClient.copy_weights": lambda: rest.copy_weights(path, "a project").result(),
        "RestClient.export_session_trace": lambda: rest.export_session_trace(session).result(),
        "RestClient.get_billing_usage": lambda: rest.get_billing_usage(*window).result(),
        "RestClient.get_current_checkpoint_storage_usage": lambda: (
            rest.get_current_checkpoint_storage_usage().result()
        ),
        "RestClient.list_training_runs(project_id)": lambda: rest.list_training_runs(
            project_id="a"
        ).result(),
        "RestClient.search_sessions": lambda: rest.search_sessions(
            types.SessionSearchRequest()
        ).result(),
        "RestClient.whoami": lambda: rest.whoami().result(),
        "AdminClient.get_audit_log(event_type)": lambda: admin.get_audit_log("projects").result(),
        "AdminClient.get_billing_usage": lambda: admin.get_billing_usage(*window).result(),
        "AdminClient.get_current_checkpoint_storage_usage": lambda: (
            admin.get_current_checkpoint_storage_usage().result()
        ),
    }
    more = {
        "project_id": lambda: value(begin(project_id="a").create_lora_training_client("tiny")),
        "stable_reinforce": lambda: training.forward_backward(data, "stable_reinforce").result(),
        "weights_access_token": lambda: training.load_state(path, "a token").result(),
        "base_model": lambda: value(
            service.create_training_client_from_state(path, base_model="other")
        ),
        "age_encryption": lambda: training.save_weights_external(
            "out", age_encryption_recipients=["age1"]
        ).result(),
    }
    said = {
        "refused": {name: failure(call) for name, call in refused.items()},
        "more": {name: failure(call) for name, call in more.items()},
    }
    begun = time.monotonic()
    later = training.forward(data, "cross_entropy").result()  # no number is missing for the server
    seconds = time.monotonic() - begun
    handle = sampling.get_sampler_handle()
    opened = tinker.SamplingClient.from_sampler_handle(handle, api_key="tml-x")
    entries = admin.get_audit_log(day=date.today()).result().entries
    tell({
        "public": public(),
        **said,
        "handle": [sample(client).sequences[0].stop_reason for client in (sampling, opened)],
        "audit": len(entries),
        "later": [later.metrics["loss:sum"], seconds],
    })  # fmt: skip


main()
