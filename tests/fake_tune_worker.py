"""A stand-in for the child process of the search: answers as a script says, and touches no GPU.

    python -m fake_tune_worker FOLDER

FOLDER holds `script.json`, and gets `asked.jsonl`: a line for each start and each request. The
script is

    facts      what the child says of the machine, or {"error": message}
    answers    {"candidate, name value, ...": answer}, for all rows or for "rows: candidate, ..."
    default    the answer for every other candidate

An answer is a number of microseconds; a list of them, for one request after the other; "crash",
"hang", "exit" or "silent" (dies before it begins); or an object, the fields of a report's end, with
`after`, seconds that it takes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def name_of(candidate: dict[str, Any]) -> str:
    """The candidate as the search writes it."""
    fields = dict(candidate)
    kind = fields.pop("kind")
    fields = fields.pop("plan", fields)
    return ", ".join([kind, *(f"{name} {value}" for name, value in fields.items())])


def main() -> None:
    folder = Path(sys.argv[1])
    script = json.loads((folder / "script.json").read_text())

    def note(**fields: Any) -> None:
        with (folder / "asked.jsonl").open("a") as file:
            print(json.dumps(fields), file=file)

    def report(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    job = json.loads(sys.stdin.readline())
    preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    note(job=job, preallocate=preallocate)
    if "error" in script["facts"]:
        report(**script["facts"])
        return
    if script["facts"].get("dies"):
        print("no such driver", file=sys.stderr)
        sys.exit(3)
    print("a library greets")  # which is no report
    report(ready=script["facts"])
    for line in sys.stdin:
        request = json.loads(line)
        name = name_of(request["candidate"])
        note(rows=request["rows"], name=name, effort=request["effort"], best=request["best"])
        answers = script["answers"]
        answer = answers.get(f"{request['rows']}: {name}", answers.get(name, script["default"]))
        if isinstance(answer, list):
            asked = (folder / "asked.jsonl").read_text().splitlines()
            same = [a for a in map(json.loads, asked) if a.get("name") == name]
            count = len([a for a in same if a["rows"] == request["rows"]])
            answer = answer[min(count, len(answer)) - 1]
        if answer == "silent":
            sys.exit(4)
        report(begin=request["candidate"])
        if answer == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if answer == "exit":
            print("CUDA_ERROR_ILLEGAL_INSTRUCTION", file=sys.stderr)
            sys.exit(1)
        if answer == "hang":
            time.sleep(600)
        fields = dict(answer) if isinstance(answer, dict) else {"microseconds": answer}
        time.sleep(fields.pop("after", 0))
        report(end=request["candidate"], **fields)
        if "failed" in fields:
            sys.exit(1)


if __name__ == "__main__":
    main()
