"""Checks that modules import only downwards, as docs/structures.md draws the house.

One table says on which floor and in which tower every module stands; the rest is read from the
syntax tree, so nothing is imported and imports under TYPE_CHECKING count too. Run by
scripts/check.sh; prints one line for each violation and exits 1 when there are any.

    python scripts/check_layers.py [package directory, default python/sglang]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

PACKAGE = "sglang"

# (floor, tower, rooms). A room is a module, `x.*` (package x and all below it) or a prefix `x_*`;
# the longest that matches a module is its room. Import from a lower floor, within one room, or
# on the same floor from a room further left in a chain of `<`. TEXT and DEVICE never meet;
# tower "" is open to both and, below the top floor, imports neither.
Row = tuple[int, str, str]
TABLE: tuple[Row, ...] = (
    (0, "", "srt.errors, srt.environ < srt.utils.*"),
    (1, "", "srt.sampling.sampling_params < srt.managers.io_struct"),
    (1, "", "srt.managers.io_struct, srt.configs.gguf_file, srt.configs.model_config"
     " < srt.configs.pooling_config"),
    (1, "", "srt.configs.parser_names < srt.configs.door_args"),
    (1, "", "srt.configs.flag_spec < srt.configs.door_args, srt.configs.rank_args,"
     " srt.configs.priority_args, srt.configs.lora_args, srt.configs.speculative_args,"
     " srt.configs.flag_tables, srt.configs.flag_parser"),
    (1, "", "srt.configs.kv_events_config, srt.configs.lora_args, srt.configs.speculative_args"
     " < srt.configs.flag_checks"),
    (1, "", "srt.configs.lora_config"),
    (1, "", "srt.configs.door_args, srt.configs.rank_args, srt.configs.priority_args,"
     " srt.configs.lora_args, srt.configs.speculative_args,"
     " srt.configs.flag_tables,"
     " srt.configs.flag_parser, srt.configs.flag_checks < srt.server_args"),
    (1, "", "srt.configs.gguf_file < srt.configs.gguf_dense, srt.configs.gguf_latent"
     " < srt.configs.gguf_experts < srt.configs.gguf_config < srt.configs.model_config"),
    (1, "", "srt.configs.quantization_config, srt.configs.vision_config"
     " < srt.configs.model_config"),
    (1, "", "srt.configs.rope_config < srt.configs.model_traits"
     " < srt.configs.families.* < srt.configs.model_config"),
    (2, "DEVICE", "srt.mem_cache.kv_layout < srt.mem_cache.segment_cuts < srt.mem_cache.capacity,"
     " srt.mem_cache.segment_budget, srt.mem_cache.segment_manager"),
    (2, "DEVICE", "srt.mem_cache.device_budget"),
    (2, "DEVICE", "srt.mem_cache.kv_layout < srt.mem_cache.segment_backing.*"),
    (2, "DEVICE", "srt.mem_cache.kv_layout < srt.mem_cache.segment_state"),
    (2, "DEVICE", "srt.mem_cache.segment_backing.*, srt.mem_cache.segment_state,"
     " srt.mem_cache.rank_agreement"
     " < srt.mem_cache.segment_jobs < srt.mem_cache.segment_manager"),
    (2, "DEVICE", "srt.mem_cache.segment_state < srt.mem_cache.segment_budget,"
     " srt.mem_cache.segment_plans < srt.mem_cache.segment_manager"),
    (2, "DEVICE", "srt.mem_cache.segment_backing.* < srt.mem_cache.table_space"
     " < srt.mem_cache.table_rows < srt.mem_cache.block_table"),
    (2, "DEVICE", "srt.mem_cache.kv_layout, srt.mem_cache.id_array < srt.mem_cache.page_owner"),
    (2, "DEVICE", "srt.mem_cache.kv_layout < srt.mem_cache.window_rule"),
    (2, "DEVICE", "srt.mem_cache.kv_layout < srt.mem_cache.kv_share < srt.mem_cache.memory_pool"),
    (2, "DEVICE", "srt.mem_cache.segment_backing.* < srt.mem_cache.index_planes,"
     " srt.mem_cache.slot_pieces, srt.mem_cache.state_pool < srt.mem_cache.memory_pool"),
    (2, "DEVICE", "srt.mem_cache.block_table, srt.mem_cache.allocator < srt.mem_cache.state_group"
     " < srt.mem_cache.window_recycler, srt.mem_cache.integrity, srt.mem_cache.allocation"),
    (2, "DEVICE", "srt.mem_cache.page_owner < srt.mem_cache.window_index"),
    (2, "DEVICE", "srt.mem_cache.segment_manager, srt.mem_cache.page_owner"
     " < srt.mem_cache.block_table, srt.mem_cache.allocator < srt.mem_cache.memory_pool"),
    (2, "DEVICE", "srt.mem_cache.id_array, srt.mem_cache.page_owner"
     " < srt.mem_cache.base_prefix_cache < srt.mem_cache.chunk_cache"),
    (2, "DEVICE", "srt.mem_cache.base_prefix_cache < srt.mem_cache.radix_tree"
     " < srt.mem_cache.evict_policy, srt.mem_cache.kv_events < srt.mem_cache.radix_cache"),
    (2, "DEVICE", "srt.mem_cache.radix_cache, srt.mem_cache.window_index,"
     " srt.mem_cache.window_rule < srt.mem_cache.window_cache"),
    (2, "DEVICE", "srt.mem_cache.capacity, srt.mem_cache.memory_pool, srt.mem_cache.window_cache,"
     " srt.mem_cache.chunk_cache < srt.mem_cache.lease < srt.mem_cache.page_ladder"
     " < srt.mem_cache.window_ladder, srt.mem_cache.window_recycler"
     " < srt.mem_cache.integrity, srt.mem_cache.group_parts < srt.mem_cache.allocation"
     " < srt.mem_cache.upstream.*, srt.mem_cache.compaction, srt.mem_cache.room_without"),
    (2, "DEVICE", "srt.mem_cache.allocation < srt.mem_cache.compaction < srt.mem_cache.reclaim"),
    (2, "DEVICE", "srt.mem_cache.memory_pool, srt.mem_cache.radix_cache, srt.mem_cache.window_index"
     " < srt.mem_cache.canary < srt.mem_cache.allocation"),
    (2, "DEVICE", "srt.mem_cache.memory_pool < srt.mem_cache.segment_table_pool"
     " < srt.mem_cache.allocation"),
    (2, "DEVICE", "srt.mem_cache.memory_pool < srt.mem_cache.page_copy < srt.mem_cache.allocation,"
     " srt.mem_cache.compaction"),
    (2, "DEVICE", "srt.mem_cache.lease < srt.mem_cache.decode_steps < srt.mem_cache.allocation"),
    (2, "DEVICE", "srt.mem_cache.lease < srt.mem_cache.cold_segments < srt.mem_cache.promotion"),
    (2, "DEVICE", "srt.mem_cache.page_ladder < srt.mem_cache.promotion < srt.mem_cache.allocation"),
    (2, "DEVICE", "srt.mem_cache.canary < srt.mem_cache.canary_perturb"),
    (2, "DEVICE", "srt.mem_cache.segment_manager < srt.mem_cache.memory_report"
     " < srt.mem_cache.allocation"),
    (3, "DEVICE", "srt.model_executor.forward_mode, srt.managers.pooling_state,"
     " srt.managers.req_images"
     " < srt.managers.schedule_batch"),
    (3, "DEVICE", "srt.constrained.structural_formats < srt.constrained.structural_tag"
     " < srt.constrained.grammar"
     " < srt.constrained.compiler"),
    (3, "DEVICE", "srt.constrained.grammar < srt.constrained.reasoning_matcher"
     " < srt.sampling.sampling_batch_info"),
    (3, "DEVICE", "srt.constrained.grammar < srt.managers.schedule_batch"),
    (3, "DEVICE", "srt.speculative.ngram_index, srt.speculative.draft_plan, srt.speculative.chance"
     " < srt.speculative.ngram_drafts, srt.speculative.model_drafts < srt.managers.schedule_batch"),
    (3, "DEVICE", "srt.managers.generation_result, srt.managers.schedule_batch"
     " < srt.managers.schedule_policy < srt.managers.priority_policy"),
    (3, "DEVICE", "srt.managers.schedule_batch, srt.managers.generation_result"
     " < srt.managers.step_time"),
    (3, "DEVICE", "srt.managers.step_time, srt.speculative.* < srt.managers.draft_policy"),
    (3, "DEVICE", "srt.managers.lora_policy"),
    (3, "DEVICE", "srt.managers.schedule_batch < srt.model_executor.forward_batch_info"
     " < srt.sampling.sampling_batch_info, srt.model_executor.draft_batch"),
    (4, "DEVICE", "srt.distributed.communicator, srt.distributed.shared_exchange,"
     " srt.distributed.store_board"
     " < srt.distributed.parallel_state"
     " < srt.distributed.rank_grid, srt.distributed.process_group"
     " < srt.layers.* < srt.models.* < srt.model_loader.*"),
    (5, "DEVICE", "srt.model_executor.lora_places < srt.model_executor.decode_tapes"),
    (5, "DEVICE", "srt.model_executor.decode_tapes < srt.model_executor.cuda_graph_runner,"
     " srt.model_executor.model_runner, srt.managers.token_relay"
     " < srt.managers.tp_worker"),
    (5, "DEVICE", "srt.model_executor.model_runner < srt.model_executor.draft_model"
     " < srt.model_executor.draft_head, srt.managers.tp_worker"),
    (5, "DEVICE", "srt.managers.pooling_worker"),
    (6, "DEVICE", "srt.managers.scheduler*"),
    (6, "TEXT", "srt.tokenizer.* < srt.managers.incremental_text"),
    (6, "TEXT", "srt.function_call.core_types < srt.function_call.json_scan"
     " < srt.function_call.call_readers, srt.function_call.tag_value"
     " < srt.function_call.python_call, srt.function_call.xml_call, srt.function_call.glm_call,"
     " srt.function_call.marked_call < srt.function_call.call_parser"
     " < srt.function_call.function_call_parser, srt.function_call.strict_calls"
     " < srt.parser.reasoning_parser, srt.parser.harmony_parser"
     " < srt.parser.answer_parser < srt.parser.parser_choice < srt.entrypoints.*"),
    (6, "TEXT", "srt.managers.regex_program, srt.managers.incremental_text"
     " < srt.managers.stop_regex < srt.managers.request_validation"),
    (6, "TEXT", "srt.managers.generate_request, srt.managers.incremental_text,"
     " srt.managers.stop_regex"
     " < srt.managers.detokenizer < srt.managers.detokenizer_manager"),
    (6, "TEXT", "srt.tokenizer.* < srt.managers.constraint_desk < srt.managers.tokenizer_manager"),
    (6, "TEXT", "srt.managers.lora_registry < srt.managers.request_state"),
    (6, "TEXT", "srt.multimodal.* < srt.managers.generate_request < srt.managers.image_desk"
     " < srt.managers.tokenizer_manager"),
    (6, "TEXT", "srt.tokenizer.* < srt.managers.image_desk"),
    (6, "TEXT", "srt.managers.generate_request, srt.tokenizer.*"
     " < srt.managers.request_state, srt.managers.request_validation, srt.managers.replica_choice,"
     " srt.managers.scheduler_pulse, srt.managers.control_replies,"
     " srt.managers.metrics"
     " < srt.managers.tokenizer_manager, srt.managers.detokenizer_manager"),
    (6, "TEXT", "srt.managers.generate_request < srt.managers.session_store < srt.entrypoints.*"),
    (6, "TEXT", "srt.managers.generate_request, srt.managers.tokenizer_manager"
     " < srt.entrypoints.*"),
    (7, "", "srt.entrypoints.engine < srt.entrypoints.http_server < launch_server < sglang"),
    (7, "", "kv_report < sglang"),
    (7, "", "planner.machines < planner.memory_plan < plan_memory < sglang"),
    (7, "", "planner.known_models < plan_memory"),
    (7, "", "planner < sglang"),
    (7, "", "bench.batch_run, bench.module_times < bench_one_batch < sglang"),
    (7, "", "bench.serving_load, bench.serving_figures < bench.serving_client < bench_serving"
     " < sglang"),
    (7, "", "bench.serving_load < bench.serving_flags < bench_serving, bench_offline_throughput"
     " < sglang"),
    (7, "", "srt.entrypoints.engine < bench_offline_throughput < sglang"),
    (7, "", "check_env < sglang"),
    (7, "", "cli < sglang"),
    (7, "", "bench < sglang"),
)  # fmt: skip

# Third-party packages that may be imported inside a function: optional, or slow to import.
LAZY_PACKAGES = frozenset(
    {
        "PIL",
        "cuda",
        "gguf",
        "jinja2",
        "llguidance",
        "numpy",
        "setproctitle",
        "sgl_kernel",
        "torch",
        "transformers",
        "uvloop",
        "yaml",
    }
)

# Packages that a room must not import at all: the arithmetic and the contracts stay light.
BANNED: tuple[tuple[str, frozenset[str]], ...] = (
    ("srt.mem_cache.kv_layout", frozenset({"torch", "transformers"})),
    ("srt.mem_cache.segment_cuts", frozenset({"torch", "transformers"})),
    ("srt.mem_cache.capacity", frozenset({"torch", "transformers"})),
    ("srt.mem_cache.device_budget", frozenset({"torch", "transformers"})),
    ("srt.server_args", frozenset({"torch", "transformers"})),
    ("srt.configs.*", frozenset({"torch", "transformers"})),
    ("srt.managers.io_struct", frozenset({"torch", "transformers"})),
)


@dataclass(frozen=True)
class Import:
    """One import: `target` a dotted name, `lazy` when it stands inside a function."""

    target: str
    line: int
    lazy: bool


class House:
    """The table, ready for questions. Raises ValueError when the table contradicts itself."""

    def __init__(self, table: Iterable[Row]) -> None:
        self._place: dict[str, tuple[int, str]] = {}
        left_of: dict[str, set[str]] = {}
        for floor, tower, chain in table:
            links = [_split(link, ",") for link in _split(chain, "<")]
            for room in (room for link in links for room in link):
                if self._place.setdefault(room, (floor, tower)) != (floor, tower):
                    raise ValueError(f"{room} stands in two places")
                left_of.setdefault(room, set())
            for left, right in pairwise(links):
                for room in right:
                    left_of[room].update(left)
        self._below: dict[str, set[str]] = {}
        for room in TopologicalSorter(left_of).static_order():
            below = left_of[room]
            self._below[room] = below.union(*(self._below[other] for other in below))

    def room_of(self, module: str) -> str | None:
        """The most specific room that holds the module, None when there is none."""
        fitting = [room for room in self._place if _matches(module, room)]
        return max(fitting, key=len, default=None)

    def place_of(self, room: str) -> tuple[int, str]:
        """The floor and the tower of a room."""
        return self._place[room]

    def complaint(self, source: str, target: str) -> str | None:
        """Why a module of room `source` may not import one of room `target`; None: it may."""
        if source == target:
            return None
        (floor, tower), (other_floor, other_tower) = self._place[source], self._place[target]
        if other_tower not in ("", tower) and not self._at_the_top(floor, tower):
            return f"the {tower or 'shared'} floors never import the {other_tower} tower"
        if other_floor > floor:
            return f"F{floor} imports upwards from F{other_floor}"
        if other_floor == floor and target not in self._below[source]:
            return f"no order puts {target} before {source} on F{floor}"
        return None

    def _at_the_top(self, floor: int, tower: str) -> bool:
        return tower == "" and floor == max(place[0] for place in self._place.values())


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator)]


def _matches(module: str, room: str) -> bool:
    return fnmatchcase(module, room) or (room.endswith(".*") and module == room[:-2])


def read_modules(package_dir: Path) -> dict[str, ast.Module]:
    """Every module below the directory by dotted name, without the package's own name.

    The package's own file goes by `sglang`.
    """
    modules: dict[str, ast.Module] = {}
    for path in sorted(package_dir.rglob("*.py")):
        parts = path.relative_to(package_dir).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name or PACKAGE] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return modules


def imports_of(module: str, tree: ast.Module, is_package: bool) -> Iterator[Import]:
    """All imports of a module; `from a import b` yields `a.b`, relative ones made absolute."""
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, is_package)
            yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending.extend((child, lazy) for child in ast.iter_child_nodes(node))


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *(module.split(".") if module != PACKAGE else [])]
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def own_module(target: str, modules: Mapping[str, ast.Module]) -> str | None:
    """The module of ours that a dotted name means, None for third-party names."""
    if target != PACKAGE and not target.startswith(PACKAGE + "."):
        return None
    name = target.removeprefix(PACKAGE).lstrip(".")
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or PACKAGE


def _is_trivial(tree: ast.Module) -> bool:
    """True for a package file that only holds constants and a docstring."""
    return all(isinstance(node, ast.Expr | ast.Assign) for node in tree.body)


def check(package_dir: Path, table: Sequence[Row] = TABLE) -> list[str]:
    """All violations below `package_dir`, one line each, in order of modules."""
    house = House(table)
    modules = read_modules(package_dir)
    packages = {name.rpartition(".")[0] for name in modules} | {PACKAGE}
    problems: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        room = house.room_of(module)
        if room is None:
            if not (module in packages and _is_trivial(tree)):
                problems.append(f"{module}: unknown module, give it a floor in check_layers.py")
            continue
        targets = graph.setdefault(module, set())
        for found in imports_of(module, tree, module in packages):
            own = own_module(found.target, modules)
            where = f"{module}:{found.line}: imports {found.target}: "
            problems += [where + text for text in _complaints(house, module, room, found, own)]
            if own:
                targets.add(own)
    return problems + _cycles(graph)


def _complaints(
    house: House, module: str, room: str, found: Import, own: str | None
) -> Iterator[str]:
    third_party = found.target.partition(".")[0]
    if found.lazy and (own is not None or third_party not in LAZY_PACKAGES):
        yield "inside a function only optional or heavy packages may be imported"
    if own is None:
        for pattern, packages in BANNED:
            if _matches(module, pattern) and third_party in packages:
                yield f"{pattern} stays free of {third_party}"
        return
    target_room = house.room_of(own)
    if target_room is None:
        return  # a trivial package file, or an unknown module that is reported by itself
    complaint = house.complaint(room, target_room)
    if complaint:
        yield complaint


def _cycles(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["import cycle: " + " -> ".join(error.args[1])]
    return []


def main(argv: Sequence[str]) -> int:
    """Check one package directory; 1 when something is wrong."""
    default = Path(__file__).resolve().parent.parent / "python" / PACKAGE
    problems = check(Path(argv[0]) if argv else default)
    for problem in problems:
        print(problem)
    print(f"layer check: {len(problems)} violations" if problems else "layer check: clean")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
