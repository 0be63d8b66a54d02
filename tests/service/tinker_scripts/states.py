"""Checkpoints: saved, loaded in three ways, listed, published, kept for a time, deleted."""

from typing import Any

from common import begin, datum, failure, given, output, tell, value
from tinker import types


def plain(model: Any) -> Any:
    return model.model_dump(mode="json")


def main() -> None:
    asked, said = given(), {}
    service = begin(user_metadata={"who": "a test"}, project_id=asked.get("project"))
    rest = service.create_rest_client()
    client = value(service.create_lora_training_client("tiny", rank=4, user_metadata={"a": "b"}))
    data = [datum(case) for case in asked["plain"]]
    client.forward_backward(data, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2))
    path = client.save_state("one", ttl_seconds=7200).result().path
    said["path"] = path
    said["saved"] = output(client.forward(data, "cross_entropy").result())
    whole = value(service.create_training_client_from_state_with_optimizer(path))
    weights = value(service.create_training_client_from_state(path, user_metadata={"c": "d"}))
    said["from_state"] = output(weights.forward(data, "cross_entropy").result())
    for name, one in {"kept": client, "whole": whole, "weights": weights}.items():
        one.forward_backward(data, "cross_entropy")
        one.optim_step(types.AdamParams(learning_rate=1e-2))
        said[name] = output(one.forward(data, "cross_entropy").result())
    client.load_state_with_optimizer(path).result()
    said["loaded"] = output(client.forward(data, "cross_entropy").result())
    client.forward_backward(data, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2))
    said["went_on"] = output(client.forward(data, "cross_entropy").result())
    sampling = client.save_weights_for_sampler("two").result().path
    said["sampling_path"] = sampling
    said["again"] = failure(lambda: client.save_state("one").result())
    said["listing"] = listing(service, rest, client.model_id, path, sampling)
    said["failures"] = {
        "path": failure(lambda: client.load_state(path + "-not").result()),
        "name": failure(lambda: client.save_state("a/b").result()),
        "run": failure(lambda: rest.get_training_run("nobody:train:0").result()),
    }
    if hasattr(service, "close"):
        service.close("success").result()
    tell(said)


def listing(service: Any, rest: Any, run: str, path: str, sampling: str) -> dict[str, Any]:
    """What the REST client tells and changes."""
    session = service.holder.get_session_id()
    said = {
        "session": session,
        "run": run,
        "runs": plain(rest.list_training_runs(limit=100).result()),
        "one_run": plain(rest.get_training_run(run).result()),
        "by_path": plain(rest.get_training_run_by_tinker_path(path).result()),
        "of_run": plain(rest.list_checkpoints(run).result()),
        "of_user": plain(rest.list_user_checkpoints(limit=100).result()),
        "sessions": plain(rest.list_sessions(limit=100).result()),
        "one_session": plain(rest.get_session(session).result()),
        "info": plain(rest.get_weights_info_by_tinker_path(path).result()),
        "capabilities": plain(service.get_server_capabilities()),
    }
    sampler = value(service.create_sampling_client(model_path=sampling))
    name = f"{session}:sample:0"
    said["sampler"] = plain(rest.get_sampler(name).result())
    said["sampler_base"] = sampler.get_base_model()
    rest.publish_checkpoint_from_tinker_path(path).result()
    published = rest.list_checkpoints(run).result().checkpoints
    said["published"] = {one.tinker_path: one.public for one in published}
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    said["changed"] = plain(rest.list_checkpoints(run).result())
    rest.delete_checkpoint_from_tinker_path(sampling).result()
    said["left"] = [one.tinker_path for one in rest.list_checkpoints(run).result().checkpoints]
    said["deleted"] = failure(lambda: rest.get_weights_info_by_tinker_path(sampling).result())
    return said


main()
