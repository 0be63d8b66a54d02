"""`forward_backward`: the request's data and loss, and its answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from plait.errors import DataError
from plait.loss_inputs import INPUTS
from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.chunks import Uploaded, chunk_of, nothing_uploaded
from plait.service.wire.counting import check_parts
from plait.service.wire.tensors import (
    MOST_VALUES,
    batched,
    sparse_values,
    tensor_of,
    tensor_to,
    unbatched,
)
from plait.types import Datum, ForwardBackwardOutput, ModelInput, TensorData

CUSTOM = "custom"
"""The loss whose graph was uploaded; `loss_id` in its settings says which."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request, parsed: data, and what a loss reads that no registered loss does."""

    data: list[Datum]
    loss: str
    config: dict[str, float | str]
    backward: bool
    more: list[dict[str, TensorData]]
    """Of each datum, the inputs that only a custom loss reads."""


def parsed(body: bytes) -> pb.ForwardBackwardRequest:
    """
    Raises:
        DataError: it is no such message.
    """
    check_parts(body)
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise DataError("the body must be a protobuf ForwardBackwardRequest") from error
    return message


def call_of(message: pb.ForwardBackwardRequest, uploaded: Uploaded = nothing_uploaded) -> Call:
    """
    Raises:
        DataError: a datum cannot be used; its number is in the message.
    """
    custom = message.loss_fn == CUSTOM
    sparse = [sparse_values(one) for datum in message.data for one in datum.loss_fn_inputs.values()]
    if sum(sparse) > MOST_VALUES:
        raise DataError(f"the sparse tensors of a request have up to {MOST_VALUES} values together")
    data, more = [], []
    for number, datum in enumerate(message.data):
        try:
            made, further = _datum(datum, uploaded, custom)
        except DataError as error:
            raise DataError(f"datum {number}: {error.message}") from error
        data.append(made)
        more.append(further)
    return Call(data, message.loss_fn, _config(message), not message.forward_only, more)


def _datum(
    message: pb.Datum, uploaded: Uploaded, custom: bool
) -> tuple[Datum, dict[str, TensorData]]:
    chunks = tuple(chunk_of(chunk, uploaded) for chunk in message.model_input)
    inputs = {name: tensor_of(name, one) for name, one in message.loss_fn_inputs.items()}
    further = {name: value for name, value in inputs.items() if custom and name not in INPUTS}
    known = {name: value for name, value in inputs.items() if name not in further}
    _check_spans("loss_fn_input_spans", message.loss_fn_input_spans, _positions(inputs))
    _check_spans("model_input_spans", message.model_input_spans, _positions(inputs))
    return Datum(ModelInput(chunks), known), inputs if custom else {}


def _positions(inputs: Mapping[str, TensorData]) -> int | None:
    """Of a datum, where its targets say it: as many as its model input has."""
    targets = inputs.get("target_tokens")
    return targets.shape[0] if targets is not None and targets.shape else None


def _check_spans(name: str, spans: Iterable[pb.ProvenanceSpan], positions: int | None) -> None:
    """That spans, which say where tokens were sampled, tile the positions.

    The loss stable_reinforce alone reads them, which is not offered: nothing else is done here.
    The Tinker cookbook sends them with every loss.

    Raises:
        DataError: they do not.
    """
    kinds = [getattr(span, span.WhichOneof("span") or "prompt_tokens") for span in spans]
    if any(not one.sequence_id or one.offset < 0 or one.length < 0 for one in kinds):
        raise DataError(f"{name}: a span has a sequence_id, and an offset and a length from 0")
    total = sum(one.length for one in kinds)
    if kinds and positions is not None and total != positions:
        raise DataError(
            f"{name}: spans must cover every position once; they cover {total}, and there are "
            f"{positions}"
        )


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    return config


def request_of(
    run: str,
    seq: int,
    data: Sequence[tuple[Sequence[pb.Chunk], Mapping[str, TensorData]]],
    loss: str,
    config: Mapping[str, float],
    *,
    backward: bool,
) -> pb.ForwardBackwardRequest:
    """What a client sends: of each datum its chunks, and what the loss reads."""
    message = pb.ForwardBackwardRequest(
        model_id=run, seq_id=seq, loss_fn=loss, forward_only=not backward
    )
    for name, value in config.items():
        message.loss_fn_config_v2[name].number = value
    for chunks, inputs in data:
        made = message.data.add()
        made.model_input.extend(chunks)
        for name, tensor in inputs.items():
            made.loss_fn_inputs[name].CopyFrom(tensor_to(tensor.to_numpy()))
    return message


def answer_to(output: ForwardBackwardOutput) -> bytes:
    """The protobuf of an answer."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type)
    message.metrics.update(output.metrics)
    arrays = [row["logprobs"].to_numpy() for row in output.loss_fn_outputs]
    for trailing in dict.fromkeys(array.shape[1:] for array in arrays):
        if any(array.shape[1:] != trailing for array in arrays):
            raise AssertionError("data of one call have one shape of targets")
    if arrays:
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        record.fields["logprobs"].CopyFrom(batched(arrays))
    return message.SerializeToString()


def answer_of(body: bytes) -> ForwardBackwardOutput:
    """What `answer_to` wrote."""
    message = pb.ForwardBackwardOutput()
    message.ParseFromString(body)
    rows = [
        {"logprobs": TensorData(array)}
        for record in message.loss_fn_outputs
        for array in unbatched(record.fields["logprobs"])
    ]
    return ForwardBackwardOutput(rows, dict(message.metrics))
