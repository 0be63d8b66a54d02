"""A checkpoint to be looked at, and downloaded, by the client's own command line."""

from common import begin, datum, given, tell, value
from tinker import types


def main() -> None:
    client = value(begin().create_lora_training_client("tiny", rank=4, train_unembed=False))
    client.forward_backward([datum(case) for case in given()["plain"]], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2))
    state = client.save_state("kept").result().path
    sampling = client.save_weights_for_sampler("weights").result().path
    tell({"run": client.model_id, "state": state, "sampling": sampling})


main()
