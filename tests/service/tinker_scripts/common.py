"""What the scripts share. They see one version of the official client, and nothing of Plait."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
import torch
from tinker import types


def begin(**options: Any) -> tinker.ServiceClient:
    """A session with the server whose address is the first argument."""
    return tinker.ServiceClient(base_url=sys.argv[1], api_key="tml-x", **options)


def given() -> Any:
    """What the test wrote for this script: the second argument is its file."""
    return json.loads(Path(sys.argv[2]).read_text())


def tell(said: Any) -> None:
    """What the test reads: the third argument is its file. It is the last thing a script does."""
    Path(sys.argv[3]).write_text(json.dumps(said))
    # The client's threads run native code, which may abort a process that ends by itself.
    os._exit(0)


def value(made: Any) -> Any:
    """A client, or a result: older versions return clients, newer ones futures of them."""
    return made.result() if hasattr(made, "result") else made


def datum(case: dict[str, Any]) -> types.Datum:
    inputs = {
        name: torch.tensor(numbers, dtype=torch.int64 if name == "target_tokens" else torch.float32)
        for name, numbers in case["inputs"].items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(case["tokens"]), loss_fn_inputs=inputs
    )


def output(result: Any) -> dict[str, Any]:
    """A ForwardBackwardOutput as JSON."""
    rows = [row["logprobs"].to_torch().tolist() for row in result.loss_fn_outputs]
    return {"logprobs": rows, "metrics": dict(result.metrics)}


def failure(work: Callable[[], Any]) -> dict[str, Any]:
    """How something failed: the kind of the error, what it says, and whose fault it is."""
    try:
        done = work()
    except Exception as error:
        category = getattr(error, "category", None)
        return {
            "kind": type(error).__name__,
            "says": str(error),
            "category": getattr(category, "value", category),
        }
    return {"kind": None, "says": repr(done), "category": None}
