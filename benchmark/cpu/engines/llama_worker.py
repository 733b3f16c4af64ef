"""llama.cpp in a process of its own: reads one JSON request a line, answers with one JSON line.

Run by a Python that has `llama-cpp-python`; it imports nothing of this project. Calls go to the
library's C interface, without HTTP and sampling beyond argmax, so its figures flatter it a little.

    python llama_worker.py FILE.gguf THREADS
"""

import json
import sys
import time

import llama_cpp
import numpy as np

SEQUENCES = 16
TOKENS = 8192


class Worker:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = TOKENS
        settings.n_batch = 4096
        settings.n_seq_max = SEQUENCES
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True  # one sequence may take all tokens
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(4096, 0, 1)

    def step(self, rows: list) -> list:
        """Greedy tokens of the rows (token, position, sequence, wanted) that are wanted."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = wanted
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = llama_cpp.llama_get_logits_ith(self.context, i)
                found.append(int(np.ctypeslib.as_array(logits, (self.words,)).argmax()))
        return found

    def run(self, prompts: list, new_tokens: int) -> dict:
        """All prompts together; seconds until the first tokens, and from there to the last."""
        llama_cpp.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        tokens = []
        for sequence, ids in enumerate(prompts):
            last = len(ids) - 1
            rows = [(token, at, sequence, at == last) for at, token in enumerate(ids)]
            tokens += self.step(rows)
        first = time.perf_counter()
        for n in range(new_tokens - 1):
            tokens = self.step(
                [(tokens[s], len(ids) + n, s, True) for s, ids in enumerate(prompts)]
            )
        return {"first_s": first - began, "rest_s": time.perf_counter() - first}


def main() -> None:
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
