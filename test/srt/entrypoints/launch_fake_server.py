"""The real launcher with a fake scheduler: `python -m srt.entrypoints.launch_fake_server FLAGS`."""

from __future__ import annotations

import functools
import sys

if __name__ == "__main__":
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.processes import ServerProcesses
    from srt.entrypoints.fake_scheduler import ENTRY

    http_server.ServerProcesses = functools.partial(  # type: ignore[misc]
        ServerProcesses, scheduler=ENTRY
    )
    sys.exit(http_server.main(sys.argv[1:]))
