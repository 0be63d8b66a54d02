"""Every loss, several chunks, steps, and custom losses of both kinds."""

from typing import Any

import torch
from common import begin, datum, failure, given, output, tell, value
from tinker import types


def squares(data: list[types.Datum], logprobs: list[torch.Tensor]) -> Any:
    """A loss that runs here."""
    del data
    loss = sum((row**2).sum() for row in logprobs)
    return loss, {"custom/squares:sum": float(loss)}


def traced(logprobs: torch.Tensor, advantages: torch.Tensor) -> Any:
    """A loss that runs on the server."""
    ratio = torch.exp(logprobs.clamp(-5, 5))
    return -(ratio * advantages).sum(), {"custom/ratio:mean": ratio.mean()}


def main() -> None:
    asked, said = given(), {}
    service = begin()
    client = value(service.create_lora_training_client("tiny", rank=4, seed=3))
    said["info"] = client.get_info().model_dump(mode="json")
    said["tokens"] = client.get_tokenizer().encode("red disc", add_special_tokens=False)
    plain = [datum(case) for case in asked["plain"]]
    said["forward"] = output(client.forward(plain, "cross_entropy").result())
    sent = {
        name: client.forward_backward(
            [datum(one) for one in case["data"]], case["loss"], case["config"] or None
        )
        for name, case in asked["losses"].items()
    }
    step = client.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))
    after = client.forward(plain, "cross_entropy")
    said["losses"] = {name: output(future.result()) for name, future in sent.items()}
    said["step"] = step.result().metrics
    said["after"] = output(after.result())

    many = client.forward_backward([datum(case) for case in asked["many"]], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2, weight_decay=0.1))
    said["many"] = output(many.result())
    unweighted = [datum(case) for case in asked["unweighted"]]
    said["unweighted"] = client.forward_backward_custom(unweighted, squares).result().metrics
    said["custom"] = output(client.forward_backward_custom(plain, squares).result())
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    said["after_custom"] = output(client.forward(plain, "cross_entropy").result())
    if hasattr(service, "create_custom_loss"):
        handle = value(service.create_custom_loss(traced, {"logprobs": 1, "advantages": 1}))
        data = [datum(case) for case in asked["handle"]]
        said["handle"] = output(client.forward_backward_custom(data, handle).result())
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        said["after_handle"] = output(client.forward(plain, "cross_entropy").result())

    said["failures"] = {
        "model": failure(lambda: value(service.create_lora_training_client("nothing"))),
        "loss": failure(lambda: client.forward_backward(plain, "cross_entrpy").result()),
        "data": failure(
            lambda: client.forward_backward([datum(asked["bad"])], "cross_entropy").result()
        ),
        "setting": failure(
            lambda: client.forward_backward(plain, "cross_entropy", {"beta": 1.0}).result()
        ),
    }
    client.forward_backward(plain, "cross_entropy")
    step = types.AdamParams(learning_rate=1e-2)
    said["failures"]["step"] = failure(lambda: client.optim_step(step).result())
    client.optim_step(step).result()
    said["later"] = output(client.forward(plain, "cross_entropy").result())
    tell(said)


main()
