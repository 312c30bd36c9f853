"""The shape of the project: imports go one way, files stay small, the README's tree and the dependencies are true."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_tpu"

# A module imports only from those to its left.
ORDER = """
    errors assets schema config overlay chips clouds prices devices distributed variants hf_config torus mesh
    retry remote hub sources transfer header shards weights lowrank quantise staging updates peft_folder
    streaming sizes template tokenizer datafiles records turns formats transforms rows encoding workers tokens
    packing selection corpus data pairs hlo trips flops traffic links work timeline walk buffers splash
    attention projection experts kv_cache model sites lora loading start loss optim job budget roofline
    inference cost paper advice flags step preference program compiling runs metrics columns tracing checkpoint
    faults oom meter trackers logbook drawing row_drawing decoding sampler previews page report comparison
    comparison_page train adapters asking completions endpoint chat sample_cli lite_fields lite_requests
    lite_programs lite_batch lite_answers lite_metrics lite_engine lite_app blas stage layout destination patch
    difference tunix card merging layerwise clients verify sandbox verilog_code verilog verilog_eval stats
    samples answering verilog_prompts own_prompts scorecard contamination scoring evaluate validate subject
    calibration workload plan plan_text sweep plan_page plan_cli eval_page arguments lite_cli eval_cli display
    data_text data_page data_cli rehearsal mirrored train_cli launching manifests launch_script scripts
    launch_cli hub_cache serving_memory serving serve_cli tiny_tokenizer tiny_towers tiny_archs tiny_config
    tiny_weights tiny handoff_cli arrivals points latencies wire bench_prompts exchange under_load scrape
    saturation serving_floor doubts vllm_result bench_file bench bench_text bench_page bench_cli catalogue
    json_schema new_config doctor completion find_cli cost_sources costing cost_text cost_page cost_cli demand
    choose choose_cli cli
""".split()

# What `--help`, a wrong path and the data tools load: seconds would pass before the first word with JAX in it.
WITHOUT_JAX = """
    errors assets schema config overlay chips clouds prices devices distributed variants hf_config torus retry
    remote hub sources transfer header shards weights lowrank quantise staging updates peft_folder sizes
    template tokenizer datafiles records turns formats transforms rows encoding workers tokens packing selection
    corpus data pairs hlo trips flops traffic links work timeline walk buffers job budget roofline inference
    cost paper advice flags compiling runs metrics columns comparison comparison_page asking endpoint chat
    sample_cli lite_fields lite_requests lite_cli faults trackers page report blas stage layout destination
    patch difference tunix card sandbox verilog_code verilog verilog_eval stats samples answering
    verilog_prompts own_prompts scorecard contamination scoring eval_page arguments eval_cli subject calibration
    workload plan_cli cost_cli demand choose_cli display data_text data_page data_cli mirrored train_cli
    launching manifests launch_script scripts launch_cli hub_cache serving_memory serving serve_cli
    tiny_tokenizer tiny_towers tiny_archs tiny_config tiny_weights tiny handoff_cli arrivals points latencies
    wire bench_prompts exchange under_load scrape saturation serving_floor doubts vllm_result bench_file bench
    bench_text bench_page bench_cli catalogue json_schema doctor completion find_cli cli
""".split()

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "transformers", "torch", "matplotlib"}
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}  # where the import has another name
OPTIONAL = {"torch", "peft", "pyarrow", "datasets"}  # verify asks the first two where they are; extras
OPTIONAL |= {"starlette", "uvicorn", "anyio", "prometheus_client"}  # the extra `serve`


@cache
def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}


def imports(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a module imports; `from gemma_tpu import mesh` is gemma_tpu.mesh."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "gemma_tpu":
                yield from (f"gemma_tpu.{alias.name}" for alias in node.names)
            else:
                yield node.module
        yield from imports(node, inside_functions)


def own(names: Iterator[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("gemma_tpu.")} & set(ORDER)


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(modules())


def test_no_module_takes_the_place_of_a_public_function():
    import gemma_tpu

    assert not set(gemma_tpu.__all__) & set(modules())


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in own(imports(tree, inside_functions=True))
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not wrong


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_importing_it_imports_nothing_heavy(name):
    trees, seen, queue = modules(), set(), [name]
    while queue:
        here = queue.pop()
        seen.add(here)
        found = list(imports(trees[here], inside_functions=False))
        heavy = {word.split(".")[0] for word in found} & HEAVY
        assert not heavy, f"{here}, which {name} imports, imports {heavy} at module level"
        queue += own(iter(found)) - seen


def test_files_stay_small():
    limits = [(path, 400) for path in PACKAGE.glob("*.py")] + [(path, 120) for path in ROOT.glob("recipes/*.py")]
    lengths = {path.name: (len(path.read_text().splitlines()), limit) for path, limit in limits}
    assert not {name: found for name, found in lengths.items() if found[0] > found[1]}


def test_the_readmes_tree_is_the_real_one():
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"^## The tree\n.*?```\n(.*?)```", readme, re.S | re.M)[1]
    listed, folder = set(), ""
    for line in tree.splitlines():
        path, _, about = line.strip().partition("  ")
        assert about.strip() or not path, f"{path} has no description"
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
        listed.add(path if not line.startswith(" ") else folder + path)
    missing = [name for name in listed if name and not (ROOT / name).exists()]
    assert not missing, "in the tree and not on disk"
    real = {
        str(path.relative_to(ROOT))
        for pattern in ("gemma_tpu/*.py", "recipes/*.py", "configs/*.yaml", "scripts/*.py", "benchmarks/*.py")
        for path in ROOT.glob(pattern)
    }
    assert not real - listed, "on disk and not in the tree"


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in project["dependencies"]}
    used = {name.split(".")[0] for tree in modules().values() for name in imports(tree, inside_functions=True)}
    used -= set(sys.stdlib_module_names) | {"gemma_tpu"} | OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in used} == declared
