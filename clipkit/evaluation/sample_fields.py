"""What the json of a sample says, as plain values."""

import json
from typing import Any

from clipkit.data.samples import SampleError
from clipkit.data.tars import RawSample


def json_fields(raw: RawSample) -> dict[str, Any]:
    """The json of a sample; {} without one.

    Raises:
      SampleError: it cannot be read, or is no object.
    """
    try:
        fields = json.loads(raw.json) if raw.json else {}
    except (ValueError, RecursionError) as error:
        raise SampleError("corrupt json or text", str(error)) from error
    if not isinstance(fields, dict):
        raise SampleError("corrupt json or text", f"the json is a {type(fields).__name__}, not an object")
    return fields
