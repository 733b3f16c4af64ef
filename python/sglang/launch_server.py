"""`python -m sglang.launch_server --model-path ...`: serve a model over HTTP.

The import stands under the guard because spawned children import this module again as theirs.
"""

import sys

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import main

    sys.exit(main(sys.argv[1:]))
